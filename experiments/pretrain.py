"""The pipeline of a recipe that makes weights from nothing: train, measure, save (conf/experiment/pretrain_*.yaml)."""

from typing import Any

from omegaconf import DictConfig
from safetensors.torch import save_file

from conf.schema import build
from experiments.run import Run, is_rank_zero, staged, write_json
from lightning_modules.training import WarmedUpEMA, fit, make_trainer


def pretrain(cfg: DictConfig) -> None:
    """Train `cfg.pretrain`, test it on the held-out images, write weights/ (half precision) and metrics.json."""
    run = Run(cfg, teacher="none")
    if run.finished and not cfg.force:
        print(f"finished: {run.folder} (force=true runs it again)")
        return
    with run.opened():
        data = build(cfg.data)
        module = build(
            cfg.pretrain, optimizer=build(cfg.optimizer), lr_scheduler=build(cfg.lr_scheduler), seed=cfg.seed, dump=run / "failure"
        )()
        callbacks = [WarmedUpEMA(cfg.ema_decay)] if cfg.ema_decay is not None else []
        fit(module, data, cfg.trainer, run.folder, "train", callbacks=callbacks)
        holdout = data.subset("holdout", len(data.source("holdout")), cfg.calibration.seed, 500)
        make_trainer(cfg.trainer, "test", cfg.trainer.precision).test(module, holdout, verbose=False)
        if is_rank_zero():
            metrics: dict[str, Any] = {"run_id": run.id, **module.metrics}
            with staged(run / "weights") as folder:
                half = {name: t.half() if t.is_floating_point() else t for name, t in module.weights().items()}
                save_file(half, folder / "model.safetensors", metadata={"run_id": run.id})
            write_json(run / "metrics.json", metrics)
            write_json(run / "finished.json", metrics)
            print(f"{run.folder}: {metrics}")
