"""Checkpoints on full disks, training on several ranks, and SIGTERM in the middle of a training."""

import errno
import functools
import itertools
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from support.distillation import REMOVED, distillation
from support.networks import bypasses, tiny_backbone, tiny_batch
from support.ranks import two_ranks
from support.results import differences, files, read_repeatable_history, trained_state
from torch import Tensor, nn

from conf import schema
from lightning_modules.disk import DiskFull
from lightning_modules.modules.consistency import Consistency
from lightning_modules.modules.distillation import Distillation
from lightning_modules.modules.lora import Lora
from lightning_modules.modules.non_finite import NonFiniteLoss
from lightning_modules.training.checkpoints import (
    AtomicCheckpoints,
    find_newest_checkpoint,
    partial_path,
    remove_partial_checkpoints,
)
from lightning_modules.training.ema import WarmedUpEMA
from lightning_modules.training.ranks import DrawsForGlobalBatch
from lightning_modules.training.sigterm import SIGTERM_EXIT_CODE, EndOnSigterm
from lightning_modules.training.trainer import fit

# Checkpoints

CONTENT = {"global_step": 3, "state_dict": {"weight": torch.arange(6.0)}}


def test_a_checkpoint_is_written_without_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    path = tmp_path / "step=0000003.ckpt"
    AtomicCheckpoints().save_checkpoint(CONTENT, path)
    assert files(tmp_path) == {path.name}
    assert find_newest_checkpoint(tmp_path) == (path, 3)
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["weight"], torch.arange(6.0))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_a_full_disk_is_reported_with_path_and_size(tmp_path, monkeypatch, error):
    before, path = tmp_path / "step=0000003.ckpt", tmp_path / "step=0000006.ckpt"
    AtomicCheckpoints().save_checkpoint(CONTENT, before)

    def fill_the_disk(content: Any, file: Any) -> None:
        file.write(b"some of it")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise error  # torch's writer has an error of its own, behind the system's

    monkeypatch.setattr(torch, "save", fill_the_disk)
    large = {"weight": torch.zeros(3 * 2**18)}
    with pytest.raises(DiskFull) as caught:
        AtomicCheckpoints().save_checkpoint(large | {"same": large["weight"].view(-1)}, path)
    assert f"no space is left on the disk for {path} ({3 * 2**20:,} bytes are needed, " in str(caught.value)
    assert files(tmp_path) == {before.name}


def test_a_write_error_other_than_a_full_disk_is_raised_unchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("of another kind")))
    with pytest.raises(RuntimeError, match="of another kind"):
        AtomicCheckpoints().save_checkpoint(CONTENT, tmp_path / "step=0000003.ckpt")
    assert not files(tmp_path)


def test_incomplete_checkpoints_of_killed_processes_are_removed(tmp_path):
    AtomicCheckpoints().save_checkpoint(CONTENT, tmp_path / "step=0000003.ckpt")
    partial_path(tmp_path / "step=0000006.ckpt").write_bytes(b"some of it")
    remove_partial_checkpoints(tmp_path)
    assert files(tmp_path) == {"step=0000003.ckpt"}


# Draws

DRAWS: dict[str, Any] = {
    "rand": lambda samples: torch.rand(len(samples)),
    "rand_of_sizes": lambda samples: torch.rand(len(samples), 3),
    "randn": lambda samples: torch.randn(samples.shape),
    "randn_by_keyword": lambda samples: torch.randn(size=samples.shape, dtype=torch.float64),
    "randint": lambda samples: torch.randint(0, 1000, (len(samples),)),
    "randint_without_low": lambda samples: torch.randint(1000, (len(samples), 2)),
    "randn_like": torch.randn_like,
    "several_rows_per_sample": lambda samples: torch.rand(3 * len(samples), 2),
    "normal_in_place": lambda samples: torch.empty_like(samples).normal_(),
    "uniform_in_place": lambda samples: torch.empty(len(samples), 2).uniform_(2, 3),
    "bernoulli": lambda samples: torch.bernoulli(samples / 37),
    "dropout": lambda samples: F.dropout(samples, 0.5),
    "dropout_in_another_memory_order": lambda samples: F.dropout(samples.mT, 0.5),
    "dropout_of_channels": lambda samples: nn.Dropout2d(0.5)(samples[..., None]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_two_ranks_together_equal_those_of_one_process(name):
    samples = torch.arange(1.0, 37.0).view(6, 3, 2)
    torch.manual_seed(1)
    alone = DRAWS[name](samples)
    by_rank = []
    for rank in range(2):
        torch.manual_seed(1)
        with DrawsForGlobalBatch(3, rank, 2):
            by_rank.append(DRAWS[name](samples[rank::2]))
    rows = len(alone) // 6
    assert torch.equal(torch.stack([draws.unflatten(0, (3, rows)) for draws in by_rank], 1).flatten(0, 2), alone)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(()),
        lambda: torch.rand(4),
        lambda: torch.randn(3, generator=torch.Generator().manual_seed(2)),
        lambda: F.dropout(torch.ones(3), 0.5, training=False),
    ],
    ids=["scalar", "not_of_samples", "generator", "no_dropout"],
)
def test_draws_without_samples_are_the_same_on_all_ranks(draw):
    torch.manual_seed(1)
    alone = draw()
    torch.manual_seed(1)
    with DrawsForGlobalBatch(3, 1, 2):
        assert torch.equal(draw(), alone)


# Ranks and SIGTERM


class Terminate(Callback):
    """Sends SIGTERM to one rank's process while it trains a batch."""

    def __init__(self, batch: int, rank: int = 0) -> None:
        self.batch, self.rank = batch, rank

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def train(cfg: DictConfig, folder: Path, *callbacks: Callback) -> dict[str, Tensor]:
    """The student's averaged weights after a fit with SGD, which adds no rounding where gradients are near 0."""
    teacher = tiny_backbone("UNet2DModel")
    student = teacher.pruned(bypasses(REMOVED))
    for part in student.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.25
    timesteps = schema.build(cfg.distillation.timesteps)
    module = distillation(student, teacher, normalization=cfg.distillation.normalization, timesteps=timesteps)
    module.make_optimizer = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.5)
    fit(module, schema.build(cfg.data), cfg.trainer, folder, "distil", callbacks=[WarmedUpEMA(0.9), *callbacks])
    assert module.student is student and module.teacher is teacher
    return student.state_dict()


class Distributed(Callback):
    """Checks after a step that each rank holds about half of every network, average and momentum."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        (average,) = (callback for callback in trainer.callbacks if isinstance(callback, WarmedUpEMA))
        momenta = [state["momentum_buffer"] for state in trainer.optimizers[0].state.values()]
        for tensors in (module.parameters(), average._average_model.parameters(), module.teacher.parameters(), momenta):
            sizes = [(tensor.to_local().numel(), tensor.numel()) for tensor in tensors]
            own, whole = map(sum, zip(*sizes, strict=True))
            assert whole / 3 < own < whole * 2 / 3


def train_terminate_and_resume(rank: int, cfg: DictConfig, folder: Path) -> None:
    """Train on two ranks to the end, then until rank 1 receives a SIGTERM, and from there on with both strategies."""
    watchers = [Distributed()] if cfg.trainer.strategy == "fsdp" and cfg.trainer.accumulate_grad_batches == 1 else []
    weights = train(cfg, folder, *watchers)
    torch.save(weights, folder / f"{rank}.pt")
    with pytest.raises(SystemExit) as caught:
        train(cfg, folder / "terminated", Terminate(cfg.trainer.accumulate_grad_batches, rank=1))
    assert caught.value.code == (0 if rank else SIGTERM_EXIT_CODE)
    if rank == 0:
        assert files(folder / "terminated" / "checkpoints") == {"distil/step=0000002.ckpt"}
    shutil.copytree(folder / "terminated", folder / f"other{rank}")
    torch.distributed.barrier()
    assert differences(train(cfg, folder / "terminated"), weights) == []
    cfg.trainer.strategy = "ddp" if cfg.trainer.strategy == "fsdp" else "fsdp"
    torch.testing.assert_close(train(cfg, folder / f"other{rank}"), weights, rtol=1e-4, atol=1e-6)


WEIGHT = "timesteps.weight={_target_: lightning_modules.losses.timesteps.p2, _partial_: true}"
INITIAL = ["distillation.normalization=initial_error", "timesteps=logit_normal", WEIGHT]
"""What is kept of the first batch, timesteps that are drawn, and weights of the samples."""


@pytest.mark.parametrize(
    ("strategy", "more"),
    [("ddp", INITIAL), ("fsdp", []), ("fsdp", ["trainer.accumulate_grad_batches=2"])],
    ids=["ddp", "fsdp", "fsdp_accumulated"],
)
@pytest.mark.slow
def test_two_ranks_train_like_one_process_and_end_together_on_sigterm(configure, overrides, tmp_path, strategy, more):
    """Weights, their average, momenta and logged values agree with those of one process, and resuming in all bits."""
    job = [*overrides, "trainer.checkpoint_every=3", *more]
    weights = train(configure(*job).copy(), tmp_path / "one")
    (tmp_path / "two" / "terminated").mkdir(parents=True)
    cfg = configure(*job, f"trainer={strategy}", "trainer.accelerator=cpu")
    with two_ranks(train_terminate_and_resume, cfg, tmp_path / "two"):
        pass
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / "two" / f"{rank}.pt"), weights, rtol=1e-4, atol=1e-6)
    folders = [tmp_path / name for name in ("one", "two", "two/terminated")]
    one, two, resumed = (read_repeatable_history(folder / "history" / "distil.csv") for folder in folders)
    assert resumed == two and [row[:2] for row in two] == [row[:2] for row in one]
    assert [row[2] for row in two] == pytest.approx([row[2] for row in one], rel=1e-4)
    one, two, resumed = (trained_state(folder / "checkpoints" / "distil" / "step=0000003.ckpt") for folder in folders)
    assert differences(resumed, two) == []
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


class GradientBreaks(Distillation):
    """The derivative of the loss is not finite in the third step, on rank 1 alone."""

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = super().losses(batch)
        breaks = self.global_step == 2 and self.global_rank == 1
        zero = (self.student.network.conv_in.bias.sum() * 0).sqrt() if breaks else 0
        return losses | {"loss": losses["loss"] + zero}


def break_gradient(rank: int, cfg: DictConfig, folder: Path) -> None:
    teacher = tiny_backbone("UNet2DModel")
    module = distillation(teacher.pruned(bypasses(REMOVED)), teacher, GradientBreaks, folder / "failure")
    message = r"the gradient of student.network.conv_in.bias is not finite at optimiser step 2 .*; no step was taken"
    with pytest.raises(NonFiniteLoss, match=message):
        fit(module, schema.build(cfg.data), cfg.trainer, folder, "distil")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.slow
def test_all_ranks_stop_on_a_gradient_that_is_not_finite_on_one(configure, overrides, tmp_path, strategy):
    cfg = configure(*overrides, f"trainer={strategy}", "trainer.accelerator=cpu")
    with two_ranks(break_gradient, cfg, tmp_path):
        pass
    assert files(tmp_path / "failure") == {f"non_finite_rank{rank}.safetensors" for rank in range(2)}


class Batches(pl.LightningDataModule):
    """The same batch of four samples for ever; a rank gets its samples of it."""

    def __init__(self, batch: dict[str, Any]) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> Any:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return itertools.repeat(self.select(self.batch, rank, world))

    def select(self, batch: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
        return {
            name: self.select(rows, rank, world) if isinstance(rows, dict) else rows[rank::world]
            for name, rows in batch.items()
        }


BF16 = "trainer.precision=bf16-mixed"
SHARDED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "recomputed": ("UNet2DConditionModel", {}, ["trainer.checkpoint_activations=blocks"]),
    "rounded": ("UNet2DConditionModel", {"taps": "units"}, [BF16, "trainer.checkpoint_activations=blocks"]),
    "first block": ("dit", {"taps": "units"}, []),
    "consistency": ("UNet2DModel", {"cls": Consistency}, []),
    "tied": ("llama", {"taps": "units"}, []),
    "adapters": ("llama", {"lora": Lora(["q_proj", "down_proj"], rank=2), "w_feat": 0}, [BF16]),
}
"""{what is special: (network, options of its distillation, overrides)}"""


def distil_families(confs: dict[str, DictConfig], folder: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of a student of each network after its distillation, adapters merged."""
    return {name: distil_family(name, conf, folder) for name, conf in confs.items()}


def make_distillation(name: str) -> Distillation:
    family, options, _ = SHARDED[name]
    teacher = tiny_backbone(family)
    module = distillation(teacher.pruned(bypasses(teacher.survivors()[1:2])), teacher, **options)
    module.make_optimizer = functools.partial(torch.optim.SGD, lr=0.05)
    return module


def distil_family(name: str, conf: DictConfig, folder: Path) -> dict[str, Tensor]:
    module = make_distillation(name)
    batches = Batches(tiny_batch(tiny_backbone(SHARDED[name][0])))
    fit(module, batches, conf, folder / name, "distil", callbacks=[WarmedUpEMA(0.9)])
    return module.result().network.state_dict()


def flatten(weights: dict[str, Tensor]) -> Tensor:
    """All floating-point tensors in one."""
    return torch.cat([tensor.double().flatten() for tensor in weights.values() if tensor.is_floating_point()])


def distil_and_store(rank: int, confs: dict[str, DictConfig], folder: Path) -> None:
    torch.save(distil_families(confs, folder), folder / f"{rank}.pt")


@pytest.mark.slow
def test_every_family_is_distilled_in_parts_as_in_one_process(configure, tmp_path):
    one, two = (
        {
            name: configure("debug=tiny", "trainer.steps=2", *kind, *more).trainer
            for name, (_, _, more) in SHARDED.items()
        }
        for kind in (["trainer=cpu"], ["trainer=fsdp", "trainer.accelerator=cpu"])
    )
    (tmp_path / "two").mkdir()
    with two_ranks(distil_and_store, two, tmp_path / "two"):
        pass
    found = [torch.load(tmp_path / "two" / f"{rank}.pt") for rank in range(2)]
    expected = distil_families(one, tmp_path / "one")
    for name, (_, _, more) in SHARDED.items():
        start = flatten(make_distillation(name).result().network.state_dict())
        change = flatten(expected[name]) - start
        assert change.norm() > 0
        for rank in range(2):
            error = flatten(found[rank][name]) - start - change
            assert error.norm() < (0.1 if more[:1] == [BF16] else 1e-3) * change.norm(), (name, rank)


@pytest.mark.parametrize("more", [[], ["trainer.accumulate_grad_batches=2"]], ids=["plain", "accumulated"])
def test_a_training_resumes_with_the_same_bits_after_sigterm(configure, overrides, tmp_path, capsys, more):
    cfg = configure(*overrides, "trainer.checkpoint_every=3", *more)
    weights = train(cfg, tmp_path / "undisturbed")
    batch = 1 * cfg.trainer.accumulate_grad_batches
    with pytest.raises(SystemExit) as caught:
        train(cfg, tmp_path / "terminated", Terminate(batch))
    assert caught.value.code == SIGTERM_EXIT_CODE
    assert "distil: stopped by SIGTERM after step 2; the same command goes on from there" in capsys.readouterr().out
    assert files(tmp_path / "terminated" / "checkpoints") == {"distil/step=0000002.ckpt"}
    resumed = train(cfg, tmp_path / "terminated")
    assert differences(resumed, weights) == []
    ends = [tmp_path / name / "checkpoints" / "distil" / "step=0000003.ckpt" for name in ("terminated", "undisturbed")]
    assert differences(*map(trained_state, ends)) == []
    histories = [tmp_path / name / "history" / "distil.csv" for name in ("terminated", "undisturbed")]
    assert read_repeatable_history(histories[0]) == read_repeatable_history(histories[1])


def test_sigterm_outside_of_training_calls_the_previous_handler(monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        callback = EndOnSigterm()
    finally:
        signal.signal(signal.SIGTERM, before)
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            callback.handle(signal.SIGTERM, None)
        assert caught.value.code == SIGTERM_EXIT_CODE
    assert received == [signal.SIGTERM, signal.SIGTERM]
