"""The pipeline of a recipe that makes weights from nothing: train, measure, save (conf/experiment/pretrain_*.yaml)."""

from omegaconf import DictConfig

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
            cfg.pretrain,
            optimizer=build(cfg.optimizer),
            lr_scheduler=build(cfg.lr_scheduler),
            seed=cfg.seed,
            dump=run / "failure",
        )()
        callbacks = [WarmedUpEMA(cfg.ema_decay)] if cfg.ema_decay is not None else []
        fit(module, data, cfg.trainer, run.folder, "train", callbacks=callbacks)
        holdout = data.subset("holdout", cfg.evaluation.loss_samples, cfg.evaluation.seed, 250)
        make_trainer(cfg.trainer, "test", cfg.trainer.precision).test(module, holdout, verbose=False)
        if is_rank_zero():
            with staged(run / "weights") as folder:
                module.save(folder)
            metrics = {"run_id": run.id, **module.metrics}
            write_json(run / "metrics.json", metrics)
            write_json(run / "finished.json", metrics)
            print(f"{run.folder}: {metrics}")
