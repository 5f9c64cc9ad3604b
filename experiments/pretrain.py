"""The pipeline of a recipe that makes weights from nothing: train, measure, save (conf/experiment/pretrain_*.yaml)."""

import torch
from omegaconf import DictConfig

from conf.schema import build
from experiments.dashboard import Dashboard
from experiments.run import Run, barrier, is_rank_zero, staged, write_json
from experiments.stages import Stages
from lightning_modules.metrics.cost import peak_memory
from lightning_modules.training import WarmedUpEMA, accelerator_of, fit, make_trainer


def pretrain(cfg: DictConfig) -> None:
    """Train `cfg.pretrain`, test it on the held-out images, write weights/ (half precision) and metrics.json."""
    run = Run(cfg, teacher="none")
    if run.finished and not cfg.force:
        print(f"finished: {run.folder} (force=true runs it again)")
        return
    with run.opened(), Dashboard(cfg, run) as dashboard:
        stages = Stages(cfg, torch.device(accelerator_of(cfg.trainer.accelerator)), run / "seconds.json")
        data = build(cfg.data)
        evaluation = cfg.evaluation
        holdout = data.subset("holdout", evaluation.loss_samples, evaluation.seed, evaluation.batch_size)
        module = build(
            cfg.pretrain,
            optimizer=build(cfg.optimizer),
            lr_scheduler=build(cfg.lr_scheduler),
            seed=cfg.seed,
            dump=run / "failure",
        )()
        callbacks = [WarmedUpEMA(cfg.ema_decay)] if cfg.ema_decay is not None else []
        with stages("train"):
            fit(module, data, cfg.trainer, run.folder, "train", dashboard.loggers, callbacks)
        with stages("test"):
            make_trainer(cfg.trainer, "test", evaluation.precision).test(module, holdout, verbose=False)
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
