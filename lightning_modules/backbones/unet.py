"""Diffusion U-Nets of diffusers (UNet2DModel, UNet2DConditionModel) as backbones."""

import contextlib
import copy
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn

from criteria.base import Batch, Unit
from criteria.selection import known
from datamodules.seeding import torch_rng
from datamodules.sources import MissingData
from lightning_modules.backbones.pruned_unet import (
    Bypass,
    PrunedUNet2DConditionModel,
    PrunedUNet2DModel,
    bypass,
    put,
    removable,
)
from lightning_modules.backbones.replay import Replay
from lightning_modules.metrics.cost import Macs, count_macs

CLASSES = {
    cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel, PrunedUNet2DModel, PrunedUNet2DConditionModel)
}
CONDITIONS = ("encoder_hidden_states", "class_labels", "added_cond_kwargs")
"""Entries of a batch that are handed to the network as they are."""


class UNetBackbone(nn.Module):
    """A U-Net that predicts noise (or velocity, or the sample), with the noise schedule it was trained under."""

    unet: Any  # of one of CLASSES; their mix-ins are not typed

    def __init__(self, unet: nn.Module, noise_scheduler: Any) -> None:
        super().__init__()
        self.unet, self.noise_scheduler = unet, noise_scheduler
        self.counted: Macs | None = None

    # Units and their removal

    def units(self) -> list[Unit]:
        """The ResNet blocks and attentions (whole transformers) that can be bypassed, with what each frees."""
        macs = self.macs()
        kinds = {ResnetBlock2D: "resnet", Attention: "attention"}
        return [
            Unit(
                name=name,
                kind=kinds.get(type(module), "transformer"),
                params=sum(p.numel() for p in self.freed_weights(name)),
                macs=macs.of(name)
                - (macs.of(f"{name}.conv_shortcut") if getattr(module, "conv_shortcut", None) else 0),
            )
            for name, module in removable(self.unet).items()
            if not isinstance(module, Bypass)
        ]

    def freed_weights(self, name: str) -> list[Tensor]:
        module = removable(self.unet)[name]
        return [
            p
            for key, p in module.named_parameters()
            if not (isinstance(module, ResnetBlock2D) and key.startswith("conv_shortcut."))
        ]

    @contextlib.contextmanager
    def without(self, names: Iterable[str]) -> Iterator[None]:
        removed = bypass(self.unet, names)
        try:
            yield
        finally:
            put(self.unet, removed)

    def pruned(self, names: Sequence[str]) -> Self:
        """A student of its own: the same weights without these units."""
        known(names, self.units(), "plan.units")
        removed = [*self.unet.config.get("removed_units", ()), *names]
        cls = CLASSES["Pruned" + type(self.unet).__name__.removeprefix("Pruned")]
        student = cls.from_config({**self.unet.config, "removed_units": removed})
        with self.without(names):
            student.load_state_dict(copy.deepcopy(self.unet.state_dict()))
        return type(self)(student.to(next(self.unet.parameters()).device).eval(), self.noise_scheduler)

    # Batches

    def calibration_inputs(self, batch: Batch, seed: int, purpose: str = "calibration") -> Batch:
        """Noised images with noise and timestep a function of (seed, purpose, sample number), in whatever batch.

        Timesteps are stratified: sample k of n falls into the k-th of n equal parts of the schedule.
        """
        noise, timesteps = [], []
        steps = self.noise_scheduler.config.num_train_timesteps
        for number, count, image in zip(batch["number"].tolist(), batch["of"].tolist(), batch["image"], strict=True):
            rng = torch_rng(seed, purpose, number)
            noise.append(torch.randn(image.shape, generator=rng))
            timesteps.append(int((number + float(torch.rand((), generator=rng))) / count * steps))
        return self.noised(batch, torch.stack(noise), torch.tensor(timesteps))

    def training_inputs(self, batch: Batch) -> Batch:
        """Noised images with noise and uniform timesteps from the global CPU generator, the same on every device."""
        image = batch["image"]
        timesteps = torch.randint(0, self.noise_scheduler.config.num_train_timesteps, (len(image),))
        return self.noised(batch, torch.randn(image.shape), timesteps)

    def noised(self, batch: Batch, noise: Tensor, timesteps: Tensor) -> Batch:
        image = batch["image"]
        noise, timesteps = noise.to(image), timesteps.to(image.device)
        kind = self.noise_scheduler.config.prediction_type
        if kind == "epsilon":
            target = noise
        elif kind == "v_prediction":
            target = self.noise_scheduler.get_velocity(image, noise, timesteps)
        else:
            target = image
        inputs = {
            "sample": self.noise_scheduler.add_noise(image, noise, timesteps),
            "timestep": timesteps,
            "target": target,
        }
        return inputs | {key: batch[key] for key in CONDITIONS if key in batch}

    # The network

    def predict(self, inputs: Batch) -> Tensor:
        """The network's output for noised samples: (N,C,H,W)."""
        conditions = {key: inputs[key] for key in CONDITIONS if key in inputs}
        return self.unet(inputs["sample"], inputs["timestep"], return_dict=False, **conditions)[0]

    def predict_without_each(self, inputs: Batch, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """Outputs with one unit bypassed at a time, reusing what the dense pass computed before that unit.

        Equal to `without([name])` around `predict`, bit for bit on a CPU.
        """
        units = removable(self.unet)
        replay = Replay(self.unet, list(units.values()))
        with replay.recording():
            dense = self.predict(inputs)
        yield None, dense
        for name in names:
            # The bypass stands where the unit stood, so the units and parts before it answer from the record.
            with replay.reusing(replay.first_call(units[name])), self.without([name]):
                output = self.predict(inputs)
            yield name, output

    def loss(self, inputs: Batch) -> Tensor:
        """The task loss: mean squared error to the target (noise, velocity or sample)."""
        return F.mse_loss(self.predict(inputs).float(), inputs["target"].float())

    def generate(self, seeds: Tensor, sampler: Callable[..., Any], steps: int) -> Tensor:
        """Images from seeds, uint8 (N,H,W,C); each depends on its own seed only, not on the batch.

        `sampler(noise schedule's config)` makes a diffusers scheduler.
        """
        shape = self.data_shape()
        device = next(self.unet.parameters()).device
        sample = torch.stack([torch.randn(shape, generator=torch_rng("sample", int(seed))) for seed in seeds]).to(
            device
        )
        scheduler = sampler(self.noise_scheduler.config)
        scheduler.set_timesteps(steps, device=device)
        options: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:  # stochastic samplers: a generator an image
            options["generator"] = [torch_rng("sampler", int(seed)) for seed in seeds]
        sample = sample * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            inputs = {"sample": scheduler.scale_model_input(sample, t), "timestep": t}
            sample = scheduler.step(self.predict(inputs).float(), t, sample, return_dict=False, **options)[0]
        if not torch.isfinite(sample).all():
            raise FloatingPointError(f"samples are not finite after {steps} steps of {type(scheduler).__name__}")
        return ((sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    # Taps for distillation

    def stages(self) -> dict[str, nn.Module]:
        """The stages whose outputs can be compared between teacher and student, in the order of the forward pass."""
        found = {f"down_blocks.{i}": block for i, block in enumerate(self.unet.down_blocks)}
        if self.unet.mid_block is not None:
            found["mid_block"] = self.unet.mid_block
        return found | {f"up_blocks.{i}": block for i, block in enumerate(self.unet.up_blocks)}

    # Shapes, costs, files

    def data_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the samples the network takes."""
        config = self.unet.config
        size = config.sample_size
        return (config.in_channels, *((size, size) if isinstance(size, int) else tuple(size)))

    def example_inputs(self, batch: int, device: torch.device | str) -> Batch:
        """Inputs of the right shape, zeros: for counting and timing."""
        config = self.unet.config
        inputs = {
            "sample": torch.zeros(batch, *self.data_shape(), device=device),
            "timestep": torch.zeros(batch, dtype=torch.long, device=device),
        }
        if isinstance(self.unet, UNet2DConditionModel):
            inputs["encoder_hidden_states"] = torch.zeros(batch, 77, config.cross_attention_dim, device=device)
        return inputs

    def macs(self) -> Macs:
        """Multiply-accumulates of one forward at batch 1, counted once on the meta device."""
        if self.counted is not None:
            return self.counted
        with torch.device("meta"):
            twin = UNetBackbone(type(self.unet).from_config(dict(self.unet.config)), self.noise_scheduler)
        inputs = twin.example_inputs(1, "meta")
        self.counted = count_macs(twin.unet, lambda: twin.predict(inputs))
        return self.counted

    def params(self) -> int:
        return sum(p.numel() for p in self.unet.parameters())

    def save(self, folder: Path) -> None:
        """config.json and safetensors weights, as diffusers writes them."""
        self.unet.save_pretrained(folder, safe_serialization=True)


def find_weights(path: str) -> Path:
    """The local folder with a U-Net's config.json and safetensors: `path` itself, its unet/ folder, or a hub id.

    Raises MissingData at once where the weights are neither here nor to be had.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if local.is_absolute() or path.count("/") != 1:
            raise MissingData(
                f"teacher.path={path!r} does not exist: it names a folder with config.json and *.safetensors, "
                "or a hub id"
            )
        patterns = ["*.json", "*.safetensors", "unet/*.json", "unet/*.safetensors"]
        try:
            local = Path(snapshot_download(path, allow_patterns=patterns, local_files_only=not on_the_hub(path)))
        except Exception as error:
            raise MissingData(
                f"teacher.path={path!r} is not a folder here, and could not be downloaded ({type(error).__name__}); "
                f"where there is a network, run `hf download {path}` and copy the folder, then set teacher.path to it"
            ) from error
    for folder in (local, local / "unet"):
        if (folder / "config.json").exists():
            if not any(folder.glob("*.safetensors")):
                raise MissingData(
                    f"{folder} has a config.json but no *.safetensors weights (pickled weights are not read)"
                )
            return folder
    raise MissingData(
        f"{local} has no config.json (nor has its folder unet/): teacher.path names a folder saved by diffusers"
    )


def on_the_hub(path: str) -> bool:
    """Can the hub be asked for this model? Says so in seconds, where a download would try for half a minute."""
    try:
        HfApi().model_info(path, timeout=5)
    except Exception:
        return False
    return True


def weight_files(path: str) -> list[Path]:
    """The files that make a teacher what it is: for its fingerprint, without reading a weight."""
    folder = find_weights(path)
    return [folder / "config.json", *folder.glob("*.safetensors")]


def load_unet(path: str, noise_scheduler: Any) -> UNetBackbone:
    """A U-Net in float32 and eval mode, from safetensors only.

    Raises ValueError for an architecture that is none of CLASSES, for a damaged file, and for weights that are not
    finite, naming the tensor.
    """
    folder = find_weights(path)
    try:
        name = json.loads((folder / "config.json").read_text()).get("_class_name")
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is not readable JSON ({error})") from error
    if name not in CLASSES:
        raise ValueError(f"{folder}/config.json says _class_name={name!r}; choose one of: {', '.join(CLASSES)}")
    try:
        unet, info = CLASSES[name].from_pretrained(
            folder, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError) as error:  # damaged, cut off, of another shape
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from error
    wrong = [
        f"{kind}: {', '.join(sorted(map(str, info[kind]))[:3])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit its config.json ({'; '.join(wrong)})")
    for key, tensor in unet.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the weights in {folder} are not finite: {key}")
    unet.register_to_config(_name_or_path="")  # where it lay here is nobody's business in an export
    return UNetBackbone(unet.eval(), noise_scheduler)
