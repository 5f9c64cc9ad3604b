"""The pipeline of a recipe that makes weights from nothing: train, measure, save (conf/experiment/pretrain_*.yaml)."""

import torch
from omegaconf import DictConfig

from experiments.engine.artefacts import staged, write_json
from experiments.engine.clock import Stages
from experiments.engine.evaluation import held_out
from experiments.engine.inputs import data_of
from experiments.engine.ranks import barrier, is_rank_zero, meet
from experiments.engine.run import Run
from experiments.engine.training import train
from experiments.reporting.dashboard import Dashboard
from experiments.tools.precompute import backbone_of, check_latents
from lightning_modules.metrics.cost import peak_memory
from lightning_modules.training.trainer import accelerator_of, make_trainer


def pretrain(cfg: DictConfig) -> None:
    """Train `cfg.pretrain`, test it on the held-out images, write weights/ (half precision) and metrics.json."""
    run = Run(cfg, teacher="none")
    if run.finished and not cfg.force:
        print(f"finished: {run.folder} (force=true runs it again)")
        return
    with run.opened(), Dashboard(cfg, run) as dashboard:
        stages = Stages(cfg, torch.device(accelerator_of(cfg.trainer.accelerator)), run / "seconds.json")
        meet(make_trainer(cfg.trainer, "", cfg.trainer.precision))
        data = data_of(cfg)
        if cfg.latents is not None:
            check_latents(cfg, data, backbone_of(cfg))
        holdout = held_out(cfg, data)
        with stages("train"):
            module = train(cfg, cfg.pretrain, run, data, "train", dashboard)
        with stages("test"):
            make_trainer(cfg.trainer, "test", cfg.evaluation.precision).test(module, holdout, verbose=False)
        if is_rank_zero():
            with staged(run / "weights") as folder:
                module.save(folder)
            metrics = {"run_id": run.id, **module.metrics}
            measured = {"seconds": stages.seconds, "peak_memory_bytes": peak_memory(stages.device)}
            write_json(run / "metrics.json", metrics)
            write_json(run / "measured.json", measured)
            dashboard.finish(metrics, measured)
            write_json(run / "finished.json", metrics)
            print(f"{run.folder}: {metrics}")
        barrier()
