"""The check that a training fits its device, the advice where it does not, and `python -m experiments.memory`."""

import dataclasses
import functools
import logging
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.distillation import distillation
from support.networks import bypasses, tiny_backbone
from support.results import the_run

from conf.schema import ConfigError
from experiments.engine import memory
from experiments.engine.clock import OutOfMemory
from experiments.engine.memory import MARGIN, check_fits, describe_training, guard_memory, list_options
from experiments.engine.pipeline import run_pipeline
from experiments.tools import memory as tool
from lightning_modules.modules.distillation import Distillation
from lightning_modules.training.memory import TrainingSettings, estimate_memory

DATA: Any = SimpleNamespace(sample_shape=lambda: (3, 8, 8))
"""what the check needs of a data module"""


def small_training() -> Distillation:
    teacher = tiny_backbone("UNet2DModel")
    return distillation(teacher.pruned(bypasses(teacher.survivors()[:1])), teacher)


def read_options(message: str) -> list[tuple[float, str]]:
    """The options that a message names: memory in GiB and overrides."""
    return [(float(gib), text) for gib, text in re.findall(r"^  ([\d.]+) GiB: (.+)$", message, re.MULTILINE)]


# What is estimated


def test_settings_are_those_of_one_device(configure: Any, overrides: list[str]) -> None:
    module = small_training()
    cfg = configure(*overrides, "data.batch_size=12", "trainer.checkpoint_activations=blocks", "ema_decay=null")
    one = TrainingSettings(12, "32-true", "blocks", averages=False)
    assert describe_training(cfg, module, "cpu") == one
    cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.strategy = 2, 3, "ddp"
    assert describe_training(cfg, module, "cpu") == dataclasses.replace(one, batch_size=2, copies_gradients=True)
    cfg.trainer.strategy = "fsdp"
    assert describe_training(cfg, module, "cpu") == dataclasses.replace(one, batch_size=2, shards=6)


def test_pictures_are_encoded_unless_latents_are_stored(configure: Any, overrides: list[str]) -> None:
    teacher = tiny_backbone("sd")
    module, cfg = distillation(teacher.copy(), teacher), configure(*overrides)
    assert describe_training(cfg, module, "cpu").encodes
    cfg.latents = "/latents"
    assert not describe_training(cfg, module, "cpu").encodes


# What would save memory


def test_options_change_what_they_name(configure: Any, overrides: list[str]) -> None:
    cfg = configure(*overrides, "trainer.accumulate_grad_batches=3")
    options = dict(list_options(cfg, TrainingSettings(9, encodes=True)))
    assert options == {
        "data.batch_size=3 trainer.accumulate_grad_batches=9": {"batch_size": 3},
        "trainer.precision=bf16-mixed": {"precision": "bf16-mixed"},
        "ema_decay=null": {"averages": False},
        "latents=FOLDER (python -m experiments.precompute)": {"encodes": False},
        "trainer.checkpoint_activations=blocks": {"checkpoint_activations": "blocks"},
        "data.batch_size=3 trainer.accumulate_grad_batches=9 trainer.precision=bf16-mixed ema_decay=null "
        "latents=FOLDER (python -m experiments.precompute) trainer.checkpoint_activations=blocks": {
            **{"batch_size": 3, "precision": "bf16-mixed", "averages": False, "encodes": False},
            "checkpoint_activations": "blocks",
        },
    }


def test_options_of_several_ranks_keep_the_samples_of_a_step(configure: Any, overrides: list[str]) -> None:
    cfg = configure(*overrides, "trainer.devices=2")
    settings = TrainingSettings(8, "bf16-mixed", "blocks", averages=False, copies_gradients=True)
    assert [text for text, _ in list_options(cfg, settings)] == [
        "data.batch_size=8 trainer.accumulate_grad_batches=2",
        "trainer=fsdp",
        "data.batch_size=8 trainer.accumulate_grad_batches=2 trainer=fsdp",
    ]


def test_nothing_is_offered_that_is_chosen_already(configure: Any, overrides: list[str]) -> None:
    assert list_options(configure(*overrides), TrainingSettings(1, "bf16-mixed", "blocks", averages=False)) == []


# The check


def test_a_training_that_fits_is_logged(configure: Any, overrides: list[str], caplog: Any) -> None:
    module, settings = small_training(), TrainingSettings(8)
    needed = estimate_memory(module, settings).total
    with caplog.at_level(logging.INFO):
        check_fits(configure(*overrides), module, "distil", settings, (), math.ceil(needed / (1 + MARGIN)))
    assert re.search(r"distil: about 0\.\d+ GiB of memory are needed \(networks .*activations .*\); free", caplog.text)


@pytest.mark.slow
def test_a_training_that_does_not_fit_is_refused_with_options_by_effect(configure: Any, overrides: list[str]) -> None:
    module, settings = small_training(), TrainingSettings(64)
    estimate = estimate_memory(module, settings)
    with pytest.raises(ConfigError) as error:
        check_fits(configure(*overrides), module, "distil", settings, (), math.ceil(estimate.total / (1 + MARGIN)) - 1)
    message = str(error.value)
    assert message.startswith("distil: about ") and "but free on the device are" in message
    options = read_options(message)
    sizes = [gib for gib, _ in options]
    assert sizes == sorted(sizes) and sizes[-1] < estimate.total / 2**30 + 0.0005
    half = estimate_memory(module, dataclasses.replace(settings, batch_size=32)).total
    assert (round(half / 2**30, 3), "data.batch_size=32 trainer.accumulate_grad_batches=2") in options
    assert len(options[0][1].split()) > 3  # all together save most


def test_what_cannot_be_estimated_is_trained_all_the_same(configure: Any, overrides: list[str], caplog: Any) -> None:
    module = small_training()
    module.make_optimizer = functools.partial(torch.optim.Adafactor, lr=1e-3)
    trained = []
    with guard_memory(configure(*overrides), module, "distil", torch.device("cpu"), DATA):
        trained.append(module)
    assert trained and "distil: the memory of a Distillation cannot be estimated: " in caplog.text


def test_the_memory_of_a_gpu_is_what_is_free_and_what_this_process_can_use_again(
    configure: Any, overrides: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**19)
    checked: list[Any] = []
    monkeypatch.setattr(memory, "check_fits", lambda *arguments: checked.append(arguments))

    with guard_memory(configure(*overrides), small_training(), "distil", torch.device("cuda"), DATA, " Note"):
        assert checked[0][-3:] == ((3, 8, 8), 2**20 + 2**19, " Note")
    monkeypatch.setattr(memory, "is_rank_zero", lambda: False)
    with guard_memory(configure(*overrides), small_training(), "distil", torch.device("cuda"), DATA):
        assert len(checked) == 1  # the first rank checks for all


def test_a_module_that_reads_values_is_not_estimated_and_not_refused(
    configure: Any, overrides: list[str], caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Distillation, "losses", lambda self, batch: {"loss": torch.zeros((), device="meta").item()})
    check_fits(configure(*overrides), small_training(), "distil", TrainingSettings(8), (), 0)
    assert "the memory of a Distillation cannot be estimated: " in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nMore lines"), "CUDA out of memory."),
        (RuntimeError("can't allocate memory"), "can't allocate memory"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("shapes cannot be multiplied"), None),
    ],
    ids=["cuda", "cpu", "python", "another_error"],
)
def test_errors_that_say_that_memory_is_full_are_explained(
    configure: Any, overrides: list[str], monkeypatch: Any, error: Exception, reason: str | None
) -> None:
    monkeypatch.setattr(memory, "advise", lambda *arguments: "Advice")
    guard = guard_memory(configure(*overrides), small_training(), "distil", torch.device("cpu"), DATA, " Note")
    with pytest.raises((RuntimeError, MemoryError)) as caught, guard:
        raise error
    if reason is None:
        assert caught.value is error
    else:
        assert type(caught.value) is OutOfMemory and caught.value.__cause__ is error
        assert str(caught.value) == f"out of memory in stage 'distil' ({reason}). Advice Note"


# In a job


@pytest.mark.usefixtures("quick_end")
def test_a_job_on_a_cpu_logs_what_it_holds(configure: Any, overrides: list[str], tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):  # the level that Hydra sets for train.py
        run_pipeline(configure(*overrides))
    log = (the_run(tmp_path / "runs") / "run.log").read_text()
    assert re.search(r"distil: about [\d.]+ GiB of memory are needed \(networks .*\) besides activations", log)


@pytest.mark.usefixtures("quick_end")
@pytest.mark.slow
def test_running_out_of_memory_ends_with_options(configure: Any, overrides: list[str], monkeypatch: Any) -> None:
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    losses = Distillation.losses

    def run_out(self: Any, batch: Any) -> Any:
        if next(self.parameters()).is_meta:
            return losses(self, batch)
        raise full

    monkeypatch.setattr(Distillation, "losses", run_out)
    with pytest.raises(OutOfMemory) as error:
        run_pipeline(configure(*overrides))
    message = str(error.value)
    assert message.startswith(f"out of memory in stage 'distil' ({full}). Estimated memory with these settings: ")
    assert "data.batch_size=2 trainer.accumulate_grad_batches=2" in [text for _, text in read_options(message)]
    assert error.value.__cause__ is full


# The program


@pytest.mark.slow
def test_the_program_prints_a_row_for_every_batch_and_level(
    overrides: list[str], data_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    given = [f"hydra.searchpath=[file://{data_folder}]", *overrides]
    monkeypatch.setattr(sys, "argv", ["memory", *given])
    tool.run()
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [
        [batch, "bf16-mixed", level] for batch in "421" for level in ("none", "blocks")
    ]
    estimates = [[float(cell) for cell in row[3:]] for row in cells]
    assert all(sum(parts) == pytest.approx(total, abs=0.03) for *parts, total in estimates)
    assert "not measured on a GPU" in output


SLOW = [pytest.param(f"laptop_diff_{name}_50", marks=pytest.mark.slow) for name in ("sd15", "sdxl")]


@pytest.mark.parametrize("recipe", ["bk_sdm_base", *SLOW])
def test_published_teachers_need_no_weights(configure: Any, recipe: str) -> None:
    cfg = (
        configure(f"experiment={recipe}", "data.path=/nowhere")
        if "sdxl" in recipe
        else configure(f"experiment={recipe}")
    )
    module = tool.make_module(cfg)
    student, teacher = (backbone.params() for backbone in module.networks())
    assert next(module.parameters()).is_meta
    if recipe == "bk_sdm_base":
        assert (student, teacher) == (579_384_964, 859_520_964)
    else:
        assert 0.48 * teacher <= student <= 0.5 * teacher


def test_nothing_to_train_is_refused(overrides: list[str], data_folder: Path, monkeypatch: Any) -> None:
    given = [f"hydra.searchpath=[file://{data_folder}]", *overrides, "distillation=none"]
    monkeypatch.setattr(sys, "argv", ["memory", *given])
    with pytest.raises(SystemExit, match="distillation=none: nothing is trained"):
        tool.run()
