"""The schema of a configuration: the fields that all choices of a group share, as dataclasses.

Hydra refuses an unknown field and a value of another type. All other checks are in checks.py.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from conf import devices
from conf.environment import read_environment

ROOT = Path(__file__).resolve().parent.parent
"""The folder of this repository."""

PACKAGES = ("conf", "criteria", "datamodules", "experiments", "lightning_modules")
"""This project's own packages."""

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
"""Precisions of computations. Weights stay float32, as `16-true` or `bf16-true` would round those of the teacher."""

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")
"""How several devices train together. The second ddp is for modules of one's own with parameters that a loss may not
use."""


CHECKPOINT_ACTIVATIONS = ("none", "blocks")
"""Which activations of the trained network are computed again in the backward pass instead of being saved: none, or
those inside each unit of depth (ResNet block, attention, transformer block, decoder layer)."""

NOTES = ("name", "license")
"""Keys beside a `_target_` that are not passed to it."""


RESERVED = ("output_loss", "task_loss", "params", "macs", "macs_attention", "flops", "latency_ms", "weights")
"""Names of figures in metrics.json and measured.json, which `evaluation.metrics` must not use."""


class ConfigError(ValueError):
    """A configuration that cannot be run: the message names the field, its value and the valid choices."""


@dataclass
class Trainer:
    accelerator: str = "auto"
    """auto | cpu | gpu"""
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    """how several devices train together, one of STRATEGIES: auto is ddp where there are several; fsdp distributes
    weights, their moving average, gradients and optimiser states over them"""
    precision: str = "auto"
    """auto is bf16-mixed on a GPU that has it, else 32-true; or one of PRECISIONS"""
    deterministic: bool = True
    """the same bits on one device, also after an interruption; false lets cuDNN search for its fastest algorithms"""
    compile: bool = False
    """compile the networks part by part for training (torch.compile); changes results by rounding"""
    checkpoint_activations: str = "none"
    """none | blocks: less memory for activations, for one more forward pass; see CHECKPOINT_ACTIVATIONS"""
    steps: int = MISSING
    """optimiser steps"""
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    checkpoint_every: int = 50
    """optimiser steps between checkpoints; the last two are kept"""
    log_every_n_steps: int = 1
    resume: str = "auto"
    """auto starts anew where there is no checkpoint; required fails there"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of Lightning's Trainer for training, not for scoring or evaluation: {detect_anomaly: true}"""


@dataclass
class Calibration:
    data: Any = None
    """another data set whose training samples are used, such as /data@calibration.data=bookcorpus; null: data.train"""
    samples: int = 128
    batch_size: int = 16
    seed: int = 0
    """seed of the choice of samples, of their noise and timesteps"""
    augment: bool = False
    """augment the samples (mirror, shift) as in training"""
    precision: str = "32-true"
    memory_gib: float | None = None
    """memory for the activations of prefix reuse (output_loss, task_loss), kept by splitting batches; null: no bound"""
    compile: bool = False
    """compile the parts of the network for scoring; changes scores by rounding"""


@dataclass
class Evaluation:
    name: str = MISSING
    metrics: dict[str, Any] = field(default_factory=dict)
    """measures by name, each a `_target_`; figures show the first one. Without any, no samples are generated"""
    samples: int = 256
    fits: dict[str, Any] = field(default_factory=dict)
    """{measure: [names of the data sets that its features were learnt from]}; for other data it warns"""
    resize: int | None = None
    """edge in pixels to which samples and reference images are resized before they are stored and measured"""
    prompts: Any = None
    """a `_target_` that returns a list of prompts, one per sample; null: the captions of the held-out samples"""
    tokens: int = 48
    """number of tokens with which a language model continues a prompt"""
    reference_images: int = 10000
    """maximum number of training images for measures that need more than the mean and covariance of features"""
    batch_size: int = 32
    seed: int = 0
    """of the samples, and of the noise of the joint output loss"""
    precision: str = "32-true"
    images: int | None = None
    """number of held-out images for the accuracy of a classifier, a fixed random choice; null: all"""
    loss_samples: int = 128
    """number of held-out samples for losses, and for the accuracy of a classifier after `pretrain`"""
    every_n_steps: int | None = None
    """optimiser steps between two evaluations while training, by the first measure; null: none. A finished run is not
    evaluated again: force=true repeats it"""
    training_samples: int = 64
    """maximum number of samples, or of held-out images of a classifier, in an evaluation while training"""
    latency_batch: int = 16
    latency_repeats: int = 10


@dataclass
class Sampler:
    name: str = MISSING
    scheduler: Any = MISSING
    """makes a diffusers scheduler from the noise schedule's configuration"""
    steps: int = MISSING
    guidance: float = 1.0
    """scale of classifier-free guidance; 1 is none"""
    also_steps: list[int] = field(default_factory=list)
    """further numbers of steps: samples of each are generated and measured as those of `steps` are, in columns of
    their own of the report"""


@dataclass
class Export:
    dense_twin: bool = False
    """also write a network of the original architecture, with zeros in place of bypassed units"""
    onnx: bool = False
    """also write the network as onnx/model.onnx, and compare it in onnxruntime"""
    push_to_hub: str | None = None
    """an id on the Hugging Face hub to push the export to; null pushes nothing"""


@dataclass
class Precompute:
    dtype: str = "float16"
    """of stored latents: float16 | float32; with float32, training has the same bits as from pictures"""
    batch_size: int = 16
    samples_per_shard: int = 1024
    teacher_draws: int = 0
    """draws of (noise, timestep) per training sample for which the teacher's outputs are stored, for
    distillation.teacher_outputs=stored; 0 stores none. Mirrored pictures have as many of their own"""


@dataclass
class Pipeline:
    name: str = MISSING
    stages: dict[str, Any] = field(default_factory=dict)
    """the stages by name in the order in which they run, each a `_target_`; null leaves one out"""


@dataclass
class Task:
    name: str = MISSING


@dataclass
class Logger:
    wandb: bool = False
    """one run of Weights & Biases per job"""
    project: str = "secateur"
    entity: str | None = None
    mode: str = "auto"
    """auto is online when there is a key, else offline; or online | offline"""
    artifacts: bool = True
    """log artifacts of W&B from the teacher to the export: JSON files, and references to networks, which stay local"""
    loggers: dict[str, Any] = field(default_factory=dict)
    """further loggers of Lightning by name, each a `_target_`; `save_dir` is logs/ of the run's folder unless given"""


@dataclass
class Paths:
    runs: str = "${root:}/runs"
    cache: str = "${.runs}/.cache"
    """scores, teacher evaluations and fingerprints, shared by all runs"""


@dataclass
class Config:
    name: str = "prune"
    """the folder of the run under paths.runs: a study"""
    label: str = MISSING
    """the readable part of the run directory"""
    seed: int = 0
    """training: data order, noise, initialisation"""
    force: bool = False
    """run a finished job again"""
    pipeline: Pipeline = field(default_factory=Pipeline)
    task: Task = field(default_factory=Task)
    teacher: Any = None
    criterion: Any = None
    calibration: Calibration = field(default_factory=Calibration)
    selection: Any = None
    data: Any = MISSING
    latents: str | None = None
    """folder of latents by `python -m experiments.precompute`; training then needs no VAE and no text encoder"""
    repair: Any = None
    distillation: Any = None
    pretrain: Any = None
    noise_scheduler: Any = None
    timesteps: Any = None
    """which timesteps a training of a diffusion network draws, and how much each counts"""
    sampler: Sampler = field(default_factory=Sampler)
    optimizer: Any = MISSING
    lr_scheduler: Any = MISSING
    ema_decay: float | None = 0.999
    """null switches the moving average of the weights off"""
    evaluation: Evaluation = field(default_factory=Evaluation)
    export: Export = field(default_factory=Export)
    precompute: Precompute = field(default_factory=Precompute)
    trainer: Trainer = field(default_factory=Trainer)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """callbacks of Lightning for every training, by name, each a `_target_`. They are not part of the run's identity,
    so they must watch the training and not change its result"""
    logger: Logger = field(default_factory=Logger)
    paths: Paths = field(default_factory=Paths)


def register() -> None:
    """Make the schema known to Hydra, and resolvers to OmegaConf.

    They are `${root:}` (this repository's folder), `${either:a,b}` (the first that is not null), `${at_most:a,b}` (the
    smaller number), `${first_key:mapping,default}` and `${first_value:mapping,default}` (of the first entry, or the
    default where there is no mapping), `${job_slots:n}` (how many jobs of n devices fit on this
    machine at once), and an `${oc.env:NAME}` that notes what it reads.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)
    OmegaConf.register_new_resolver("either", take_first_value, replace=True)
    OmegaConf.register_new_resolver("at_most", min, replace=True)
    OmegaConf.register_new_resolver("job_slots", devices.count_job_slots, replace=True)
    OmegaConf.register_new_resolver("first_key", partial(take_first_entry, 0), replace=True)
    OmegaConf.register_new_resolver("first_value", partial(take_first_entry, 1), replace=True)
    OmegaConf.register_new_resolver("oc.env", read_environment, replace=True)


def take_first_value(*values: Any) -> Any:
    """Return the first value that is not null; a whole number is returned as an integer, for names of folders."""
    value = next((value for value in values if value is not None), None)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def take_first_entry(part: int, mapping: Any, default: Any) -> Any:
    """Return the key (part 0) or the value (part 1) of the first entry of a mapping, else a default."""
    return next(iter(mapping.items()))[part] if isinstance(mapping, DictConfig) and mapping else default


def build(node: DictConfig, **extra: Any) -> Any:
    """Return the object that a node with a `_target_` describes; nodes inside it are instantiated first.

    `extra` are further arguments of the `_target_`. Lists and dictionaries are passed as plain Python values.
    """
    return hydra.utils.instantiate(drop_notes(OmegaConf.to_container(node, resolve=True)), _convert_="all", **extra)


def drop_notes(content: Any) -> Any:
    """Return content without the NOTES beside a `_target_`, which are for tables and model cards."""
    if isinstance(content, dict):
        return {
            key: drop_notes(value) for key, value in content.items() if key not in NOTES or "_target_" not in content
        }
    return [drop_notes(value) for value in content] if isinstance(content, list) else content
