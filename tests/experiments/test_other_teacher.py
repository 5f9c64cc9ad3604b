"""Distillation from another network than the one that is pruned."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from support.distillation import REMOVED, distillation, losses_of
from support.networks import TINY, bypasses, same_tensors, tiny_backbone, tiny_batch
from support.results import the_run

from conf.schema import ConfigError
from datamodules.readers.base import MissingData
from experiments.engine.pipeline import run_pipeline
from experiments.engine.stages.score import Score
from experiments.tools.memory import make_module
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.other_teacher import check_other_teacher
from lightning_modules.modules.distillation import Distillation

pytestmark = pytest.mark.usefixtures("quick_end")


def saved(folder: Path, scheduler: Any = None, seed: int = 1, **changes: Any) -> Path:
    """A network like the tiny teacher, of other weights and with some changes of its configuration."""
    torch.manual_seed(seed)
    UNet2DModel(**(TINY | changes)).save_pretrained(folder)
    (scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def run_job(configure, overrides, tmp_path):
    """run_job(name, *more) -> the run of a job below a folder of this name."""

    def run(name: str, *more: str) -> Path:
        run_pipeline(configure(*overrides, f"paths.runs={tmp_path / name}", *more))
        return the_run(tmp_path / name)

    return run


def weights_of(run: Path, network: str = "distilled") -> dict[str, Any]:
    return load_file(next((run / "networks" / network).glob("*.safetensors")))


@pytest.mark.slow
def test_a_copy_of_the_pruned_network_teaches_in_the_same_bits(run_job, teacher_folder, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "copy")
    own, other = run_job("own"), run_job("other", f"distillation.teacher={copy}")
    assert same_tensors(weights_of(own), weights_of(other))
    assert own.name != other.name  # the configuration names another network


@pytest.mark.slow
def test_another_network_teaches_the_student_and_is_part_of_the_runs_identity(run_job, tmp_path):
    other = saved(tmp_path / "teaching")
    first, own = run_job("first", f"distillation.teacher={other}"), run_job("own")
    assert not same_tensors(weights_of(first), weights_of(own))
    assert same_tensors(*(weights_of(run, "pruned") for run in (first, own)))
    saved(other, seed=2)  # other weights at the same path
    assert run_job("second", f"distillation.teacher={other}").name != first.name


def test_a_stage_may_have_a_teacher_of_its_own(configure, overrides, tmp_path):
    other = saved(tmp_path / "teaching")
    settings = f"+pipeline.stages.distil.settings={{distillation:{{teacher:'{other}'}}}}"
    seen: list[Any] = []
    job = [*overrides, settings, "distillation.teacher=null"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "check_settings", lambda settings, teacher, narrower: seen.append(teacher) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_pipeline(configure(*job))
    (teacher,) = seen
    expected = load_file(next(other.glob("*.safetensors")))
    assert same_tensors(dict(teacher.network.state_dict()), expected)


@pytest.mark.slow
def test_a_wider_network_teaches_by_its_outputs_or_by_a_mapping(run_job, tmp_path):
    wider = saved(tmp_path / "wider", block_out_channels=(16, 16))
    run = run_job("outputs", f"distillation.teacher={wider}", "distillation.w_feat=0")
    assert (run / "networks" / "distilled").exists()
    message = (
        r"^distillation\.taps=stages: distillation\.teacher=.*wider has other layers .*mapping .*or distillation\.w_f"
    )
    with pytest.raises(ConfigError, match=message):
        run_job("stages", f"distillation.teacher={wider}")
    taps = "distillation.taps={down_blocks.1: mid_block}"
    assert (run_job("mapping", f"distillation.teacher={wider}", taps) / "networks" / "distilled").exists()


def test_the_memory_of_a_training_is_that_with_the_other_network(configure, overrides, tmp_path):
    wider = saved(tmp_path / "wider", block_out_channels=(16, 16))
    module = make_module(configure(*overrides, f"distillation.teacher={wider}", "distillation.w_feat=0"))
    assert module.teacher.network.config.block_out_channels == [16, 16]


def test_feature_maps_of_other_shapes_are_named():
    teacher = tiny_backbone("UNet2DModel")
    student = teacher.pruned(bypasses(REMOVED))
    module = distillation(student, teacher, taps={"mid_block": "conv_in"})
    message = r"^distillation\.taps: the teacher's mid_block gives .*\(4, 16, 4, 4\), and the student's conv_in one of"
    with pytest.raises(ValueError, match=message):
        losses_of(module, tiny_batch(teacher))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"in_channels": 4, "out_channels": 4}, r"it does not take the same inputs: "),
        ({"out_channels": 6}, r"its output for one sample is of shape \(1, 6, 8, 8\), not \(1, 3, 8, 8\)"),
        ({"scheduler": DDPMScheduler(beta_end=0.01)}, "it has another noise schedule"),
        ({"scheduler": DDPMScheduler(prediction_type="sample")}, "it predicts 'sample', not 'epsilon'"),
    ],
    ids=["inputs", "outputs", "schedule", "prediction"],
)
def test_a_network_that_cannot_teach_is_refused_with_the_reason(run_job, monkeypatch, tmp_path, changes, reason):
    other = saved(tmp_path / "teaching", **changes)
    monkeypatch.setattr(Score, "run", lambda *_: pytest.fail("a stage ran"))
    with pytest.raises(ConfigError, match=rf"^distillation\.teacher=.* cannot teach a student of .*: {reason}"):
        run_job("refused", f"distillation.teacher={other}")
    assert not list((tmp_path / "refused").glob("debug/*"))


def test_pipelines_with_other_parts_are_refused(text_teacher, tmp_path):

    own, folder = load_teacher(str(text_teacher)), shutil.copytree(text_teacher, tmp_path / "other")
    check_other_teacher(load_teacher(str(folder)), own)
    message = r"^the VAE or a text encoder of its pipeline has other weights or another scaling factor$"
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))
    with pytest.raises(ValueError, match=message):
        check_other_teacher(load_teacher(str(folder)), own)
    shutil.copy(text_teacher / "vae" / "config.json", file)
    path = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name] + 1 for name in list(tensors)[:1]}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        check_other_teacher(load_teacher(str(folder)), own)


def test_networks_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match=r"^it is a LlamaForCausalLM, not a UNet2DModel$"):
        check_other_teacher(tiny_backbone("llama"), tiny_backbone("UNet2DModel"))
    check_other_teacher(tiny_backbone("llama"), tiny_backbone("llama"))


def test_a_teacher_that_is_not_there_is_named(run_job):
    with pytest.raises(MissingData, match=r"^distillation\.teacher=/nowhere: "):
        run_job("missing", "distillation.teacher=/nowhere")


def test_a_teacher_that_is_no_path_is_refused(configure):
    with pytest.raises(ConfigError, match=r"^distillation\.teacher=3 names no network; choose a folder or hub"):
        configure("distillation.teacher=3")
