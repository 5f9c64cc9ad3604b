"""Networks in files: what is written and read back, what is refused and how that is said; samples from seeds."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from support.networks import UNETS, bypasses, same_tensors, tiny_backbone, tiny_batch

from datamodules.readers.base import MissingData
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.files import list_weight_files
from lightning_modules.backbones.loading import load_network
from lightning_modules.export.export import export

WEIGHTS = "diffusion_pytorch_model.safetensors"
PRUNED_WEIGHTS = "diffusion_pytorch_model.pruned.safetensors"
TWO_UNITS = ["down_blocks.1.attentions.0", "up_blocks.0.resnets.0"]


# Files


@pytest.mark.parametrize("family", UNETS)
@torch.no_grad()
def test_a_saved_network_loads_with_the_same_bits(family, tmp_path):
    backbone = tiny_backbone(family)
    inputs = backbone.calibration_inputs(tiny_batch(backbone), seed=0)
    for name, weights, network in (
        ("dense", WEIGHTS, backbone),
        ("pruned", PRUNED_WEIGHTS, backbone.pruned(bypasses(TWO_UNITS))),
    ):
        network.save(tmp_path / name)
        loaded = backbone.adopt(load_network(tmp_path / name))
        assert type(loaded.network) is type(network.network)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["config.json", weights]
        assert same_tensors(loaded.state_dict(), network.state_dict())
        torch.testing.assert_close(loaded.predict(inputs), network.predict(inputs), rtol=1e-5, atol=1e-6)
        assert not loaded.network.training


def test_a_conditional_network_without_its_pipeline_is_refused(tmp_path):
    tiny_backbone("UNet2DConditionModel").save(tmp_path)
    assert "holds a UNet2DConditionModel without its pipeline" in refusal(tmp_path)


def test_a_network_in_the_unet_folder_of_a_pipeline_is_found(teacher_folder, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "pipeline" / "unet")
    assert list_weight_files(str(tmp_path / "pipeline")) == [
        tmp_path / "pipeline" / "unet" / name for name in ("config.json", WEIGHTS, "scheduler_config.json")
    ]


def test_opening_a_pruned_network_as_a_stock_one_is_refused(teacher, tmp_path):
    """And not filled with random numbers where units are missing."""
    teacher.pruned(bypasses(TWO_UNITS)).save(tmp_path)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        UNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)


def test_an_export_is_refused_without_trust_remote_code(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    student = teacher.pruned(bypasses(TWO_UNITS))
    export(student, tmp_path / "export")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "export")
    assert not list((tmp_path / "export").rglob("*.bin"))


@pytest.fixture
def folder(teacher_folder, tmp_path) -> Path:
    """A copy of the tiny teacher to damage."""
    return shutil.copytree(teacher_folder, tmp_path / "damaged")


def refusal(folder: Path | str, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        load_teacher(str(folder), DDPMScheduler())
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_weights_that_are_not_finite_are_refused_by_name(folder):
    for value in (float("nan"), float("inf")):
        tensors = load_file(folder / WEIGHTS)
        tensors["conv_in.bias"][3] = value
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        assert "not finite: conv_in.bias" in refusal(folder)


def test_a_missing_folder_is_reported_with_what_is_expected(tmp_path):
    message = refusal(tmp_path / "absent", MissingData)
    assert f"teacher.path='{tmp_path / 'absent'}' does not exist" in message
    assert "config.json" in message and "*.safetensors" in message and "hub id" in message
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty", MissingData)


def test_a_hub_id_without_a_network_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("nobody/nothing", MissingData)
    assert "hf download nobody/nothing" in message and "set teacher.path" in message


def test_an_unknown_architecture_lists_the_choices(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNet1DModel"}))
    message = refusal(folder)
    assert "_class_name='UNet1DModel'" in message
    for name in ("UNet2DModel", "UNet2DConditionModel", "PrunedUNet2DModel", "PrunedUNet2DConditionModel"):
        assert name in message.partition("choose one of: ")[2].split(", ")


def test_a_damaged_config_is_named(folder):
    (folder / "config.json").write_text('{"_class_name": "UNet2D')
    assert str(folder / "config.json") in refusal(folder)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_pickled_weights_are_never_opened(folder, tmp_path):
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    load_teacher(str(folder), DDPMScheduler())  # safetensors beside it
    (folder / WEIGHTS).unlink()
    assert "diffusion_pytorch_model.bin is pickled and holds more than tensors" in refusal(folder)
    assert not (tmp_path / "boom").exists()


def test_pickled_tensors_are_read_without_execution_and_logged(folder, caplog):
    expected = load_teacher(str(folder), DDPMScheduler()).state_dict()
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert same_tensors(load_teacher(str(folder), DDPMScheduler()).state_dict(), expected)
    assert "weights_only=True" in caplog.text and str(folder) in caplog.text


@pytest.mark.parametrize("kept", [0, 0.5, 0.999])
def test_a_cut_off_weights_file_is_named(folder, kept):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(kept * len(content))])
    assert str(folder / WEIGHTS) in refusal(folder)


def test_weights_that_do_not_fit_the_config_are_refused_by_name(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({("lost." + k if k == "conv_in.bias" else k): v for k, v in tensors.items()}, folder / WEIGHTS)
    message = refusal(folder)
    assert "missing_keys: conv_in.bias" in message and "unexpected_keys: lost.conv_in.bias" in message


def test_a_weight_of_another_shape_is_refused_by_name(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: (v[:-1].contiguous() if k == "conv_in.bias" else v) for k, v in tensors.items()}, folder / WEIGHTS)
    assert "conv_in.bias" in refusal(folder)


# Samples

SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm_solver": DPMSolverMultistepScheduler}


@pytest.mark.parametrize("name", SAMPLERS)
@torch.no_grad()
def test_an_image_depends_on_its_own_seed_only(teacher, name):
    sampler, seeds = SAMPLERS[name].from_config, torch.tensor([5, 3, 8, 2])

    def generate(seeds: torch.Tensor) -> torch.Tensor:
        return teacher.decode(teacher.generate({"seed": seeds}, sampler, 4))

    together = generate(seeds)
    assert together.shape == (4, 8, 8, 3) and together.dtype == torch.uint8
    assert torch.equal(generate(seeds), together)
    alone = torch.cat([generate(seed[None]) for seed in seeds])
    assert int((together.int() - alone.int()).abs().max()) <= 1
    assert len({image.numpy().tobytes() for image in together}) == 4
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(generate(seeds), together)
