"""How much memory a training would need on a GPU: python -m experiments.memory experiment=laptop_diff_sd15_50

The arguments are those of train.py. A table is printed: batch sizes, what is recomputed in the backward pass, and an
estimate for each. Nothing is downloaded where the teacher's shape is among assets/architectures/; of another teacher,
the weights are read. Stored latents are assumed (`latents=`), so that neither VAE nor text encoders take memory.

Which units a plan removes depends on scores, which need weights. The table is for the plan within the budget that keeps
the operations, and so the activations: few plans need more memory.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import hydra
import pandas as pd
import torch
from diffusers import DDPMScheduler
from omegaconf import DictConfig
from tqdm import tqdm

from conf import checks, schema, search_path
from conf.schema import CHECKPOINT_ACTIVATIONS, ROOT, ConfigError, build
from criteria.selection.base import Pool
from datamodules.readers.base import MissingData
from experiments.engine.inputs import build_data, build_other_teacher, build_teacher
from experiments.engine.memory import describe_training
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion import families
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.modules.base import TrainedModule
from lightning_modules.training.memory import MemoryEstimate, TrainingSettings, estimate_memory

SAME_SHAPE = {"sd14": "sd15", "ldm_bedroom": "ldm_celebahq_256", "ddpm_bedroom": "ddpm_church"} | {
    "ddpm_celebahq": "ddpm_church"
}
"""{teacher: another one whose denoiser has the same shape}"""
BATCHES = 3
"""how many batch sizes the table has: the configured one, and halves of it"""


def make_teacher(cfg: DictConfig) -> NetworkBackbone:
    """Return the teacher: on the meta device where its shape is known without its weights."""
    name = cfg.teacher.name
    path = ROOT / "assets" / "architectures" / f"{SAME_SHAPE.get(name, name)}.json"
    if not path.exists():
        return build_teacher(cfg)
    config = json.loads(path.read_text())
    with torch.device("meta"):
        network: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    if type(network).__name__ in families.CLASSES:
        return families.backbone_class(network)(network, DDPMScheduler(), sample_size=cfg.teacher.get("sample_size"))
    options = {key: cfg.teacher[key] for key in ("transformers", "pointwise", "sample_size") if key in cfg.teacher}
    return UNetBackbone(network, DDPMScheduler(), **options)


def make_student(cfg: DictConfig, teacher: NetworkBackbone) -> NetworkBackbone:
    """Return a student within the configuration's budget that keeps as many operations as it can."""
    selection, level = build(cfg.selection), build(cfg.criterion).level
    units = teacher.units(level)
    pool = Pool(units, teacher.totals(), teacher.shared(level))
    scores = {unit.name: unit.macs / pool.totals["macs"] for unit in units}
    return teacher.pruned(selection.changes(pool, scores))


def make_module(cfg: DictConfig) -> TrainedModule:
    """Return the module that the configuration trains; its networks are on the meta device where that is possible."""
    node, networks = cfg.pretrain, {}
    if not isinstance(node, DictConfig):
        if "_target_" not in cfg.distillation:
            raise ConfigError("distillation=none: nothing is trained; choose another distillation")
        teacher = make_teacher(cfg)
        other = teacher if cfg.distillation.get("teacher") is None else build_other_teacher(cfg)
        node, networks = cfg.distillation, {"student": make_student(cfg, teacher), "teacher": other}
    optimizer, schedule = build(cfg.optimizer), build(cfg.lr_scheduler)
    module = build(node, optimizer=optimizer, lr_scheduler=schedule, seed=cfg.seed, dump=Path("failure"), **networks)()
    if not isinstance(module, TrainedModule):
        raise ConfigError(f"the memory of a {type(module).__name__} cannot be estimated, as it is no TrainedModule")
    return module


def list_settings(cfg: DictConfig, module: TrainedModule) -> Iterator[TrainingSettings]:
    """Yield the settings of the rows: fewer samples at once, and each way of recomputing activations."""
    settings = replace(describe_training(cfg, module, "cuda"), encodes=False)
    if cfg.trainer.precision == "auto":
        settings = replace(settings, precision="bf16-mixed")
    batches = [settings.batch_size >> n for n in range(BATCHES) if settings.batch_size >> n]
    for batch in batches:
        for level in CHECKPOINT_ACTIVATIONS:
            yield replace(settings, batch_size=batch, checkpoint_activations=level)


def find_sample_shape(cfg: DictConfig, module: TrainedModule) -> tuple[int, ...]:
    """Return the shape of a sample where the networks do not have it; data are read only where no field has it."""
    networks = module.networks()
    if any(backbone.writes_text for backbone in networks):
        return (cfg.data.length,)
    return () if networks else build_data(cfg).sample_shape()


def describe_row(settings: TrainingSettings, estimate: MemoryEstimate) -> dict[str, Any]:
    """Return a row of the table: settings, and memory in GiB."""
    gib = {name: f"{size / 2**30:.2f}" for name, size in (*vars(estimate).items(), ("total", estimate.total))}
    return {
        "batch on a GPU": settings.batch_size,
        "precision": settings.precision,
        "checkpoint_activations": settings.checkpoint_activations,
        **gib,
    }


def print_table(cfg: DictConfig) -> pd.DataFrame:
    """Print the memory that the training of a configuration needs; returns the table."""
    module = make_module(cfg)
    shape = find_sample_shape(cfg, module)
    counts = " and ".join(f"{backbone.params():,}" for backbone in module.networks())
    rows = [
        describe_row(settings, estimate_memory(module, settings, shape))
        for settings in tqdm(list(list_settings(cfg, module)), "estimating")
    ]
    table = pd.DataFrame(rows)
    print(f"Networks of {counts} parameters; memory in GiB, estimated: not measured on a GPU\n")
    print(table.to_markdown(index=False, disable_numparse=True))
    return table


@hydra.main(version_base="1.3", config_path="../../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    try:
        search_path.check_shadowed_files()
        checks.check_config(cfg)
        print_table(cfg)
    except (MissingData, ValueError) as error:
        sys.exit(str(error))


def run() -> None:
    """Compose the configuration from the command line, and print the table."""
    schema.register()
    search_path.register_own_files_first()
    main()
