"""U-Nets as backbones: what bypassing a unit means, what it saves, and what is refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from helpers_networks import FAMILIES, bypasses, same_tensors, tiny_backbone, tiny_batch, with_zeroed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conf.schema import ROOT
from datamodules.sources import MissingData
from lightning_modules.backbones import load_teacher
from lightning_modules.backbones.files import weight_files
from lightning_modules.backbones.pruned_unet import Bypass, removable
from lightning_modules.backbones.unet import UNetBackbone
from lightning_modules.export import export

WEIGHTS = "diffusion_pytorch_model.safetensors"
PRUNED_WEIGHTS = "diffusion_pytorch_model.pruned.safetensors"
TWO_UNITS = ["down_blocks.1.attentions.0", "up_blocks.0.resnets.0"]


@pytest.fixture(params=FAMILIES)
def backbone(request) -> UNetBackbone:
    return tiny_backbone(request.param)


@pytest.fixture
def inputs(backbone: UNetBackbone) -> dict:
    return backbone.calibration_inputs(tiny_batch(backbone), seed=0)


def names_of(backbone: UNetBackbone) -> list[str]:
    return [name for name, module in removable(backbone.network).items() if not isinstance(module, Bypass)]


# What a bypass is


@torch.no_grad()
def test_bypassing_any_one_unit_equals_zeroing_its_last_layer(backbone, inputs):
    dense = backbone.predict(inputs)
    for name in names_of(backbone):
        expected = with_zeroed(backbone, [name]).predict(inputs)
        with backbone.without([name]):
            found = backbone.predict(inputs)
        assert torch.equal(found, expected), name
        assert not torch.equal(found, dense), f"{name} does nothing in this network: the test says nothing about it"


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(data=st.data())
@torch.no_grad()
def test_bypassing_any_subset_equals_zeroing_the_last_layers_and_equals_the_pruned_network(family, data):
    backbone = tiny_backbone(family)
    inputs = backbone.calibration_inputs(tiny_batch(backbone, 2), seed=0)
    names = data.draw(st.lists(st.sampled_from(names_of(backbone)), unique=True))
    with backbone.without(names):
        found = backbone.predict(inputs)
    assert torch.equal(found, with_zeroed(backbone, names).predict(inputs))
    assert torch.equal(found, backbone.pruned(bypasses(names)).predict(inputs))


@torch.no_grad()
def test_without_restores_every_bit_also_after_an_error_inside(backbone, inputs):
    modules, state = dict(backbone.named_modules()), {k: v.clone() for k, v in backbone.state_dict().items()}
    dense = backbone.predict(inputs)
    with backbone.without(names_of(backbone)):
        assert not torch.equal(backbone.predict(inputs), dense)
    with pytest.raises(ZeroDivisionError), backbone.without(TWO_UNITS), backbone.without(["mid_block.resnets.0"]):
        raise ZeroDivisionError
    assert dict(backbone.named_modules()) == modules  # the same objects
    assert same_tensors(backbone.state_dict(), state)
    assert torch.equal(backbone.predict(inputs), dense)


@torch.no_grad()
def test_a_pruned_network_can_be_pruned_again(backbone, inputs, tmp_path):
    once = backbone.pruned(bypasses(TWO_UNITS))
    twice = once.pruned(bypasses(["mid_block.resnets.1"]))
    together = backbone.pruned(bypasses([*TWO_UNITS, "mid_block.resnets.1"]))
    assert names_of(once) == [name for name in names_of(backbone) if name not in TWO_UNITS]
    assert same_tensors(twice.state_dict(), together.state_dict())
    assert torch.equal(twice.predict(inputs), together.predict(inputs))
    twice.save(tmp_path / "twice")
    assert torch.equal(load_teacher(str(tmp_path / "twice"), DDPMScheduler()).predict(inputs), twice.predict(inputs))
    with pytest.raises(
        ValueError, match=rf"plan\.units: '{TWO_UNITS[0]}' is not a unit of this network; the nearest are"
    ):
        once.pruned(bypasses(TWO_UNITS[:1]))


def test_pruning_copies_the_weights(backbone):
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    student = backbone.pruned(bypasses(TWO_UNITS))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert same_tensors(backbone.state_dict(), before)


@torch.no_grad()
def test_prefix_reuse_equals_running_the_network_anew_for_each_unit(backbone, inputs):
    names = names_of(backbone)
    expected = {None: backbone.predict(inputs)}
    for name in names:
        with backbone.without([name]):
            expected[name] = backbone.predict(inputs)
    order = [*reversed(names), names[3]]  # any order, also twice
    found = list(backbone.predict_without_each(inputs, order))
    assert [name for name, _ in found] == [None, *order]
    for name, output in found:
        assert torch.equal(output, expected[name]), name
    once = backbone.pruned(bypasses(TWO_UNITS))  # bypasses are parts of a network like any other
    for name, output in list(once.predict_without_each(inputs, names_of(once))):
        with once.without([name] if name else []):
            assert torch.equal(output, once.predict(inputs)), name


@torch.no_grad()
def test_the_network_is_whole_between_two_outputs_of_prefix_reuse(backbone, inputs):
    dense = backbone.predict(inputs)
    for _ in backbone.predict_without_each(inputs, TWO_UNITS):
        assert torch.equal(backbone.predict(inputs), dense)


@torch.no_grad()
def test_prefix_reuse_leaves_the_network_as_it_was_also_when_it_is_given_up(backbone, inputs):
    modules, dense = dict(backbone.named_modules()), backbone.predict(inputs)
    for taken in (1, 2, 5):
        outputs = backbone.predict_without_each(inputs, names_of(backbone))
        for _ in range(taken):
            next(outputs)
        outputs.close()
        assert dict(backbone.named_modules()) == modules
        assert not any("forward" in vars(module) for module in backbone.modules())
        assert torch.equal(backbone.predict(inputs), dense)


# What it saves


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_removed_units_add_up_to_what_the_student_lacks(family, data):
    teacher = tiny_backbone(family)
    units = teacher.units()
    removed = data.draw(st.lists(st.sampled_from(units), unique=True))
    student = teacher.pruned(bypasses([unit.name for unit in removed]))
    assert teacher.params() - sum(unit.params for unit in removed) == student.params()
    assert teacher.macs().linear - sum(unit.macs for unit in removed) == student.macs().linear
    assert [unit for unit in units if unit not in removed] == student.units()


def test_units_come_in_the_order_of_the_forward_pass(backbone, inputs):
    called = []
    units = removable(backbone.network)
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name)) for name, module in units.items()
    ]
    backbone.predict(inputs)
    for handle in handles:
        handle.remove()
    assert called == list(units) == [unit.name for unit in backbone.units()]


def test_sd1_shape_has_the_published_size_and_cost():
    """Nothing is computed or held in memory: the network lives on the meta device."""
    with torch.device("meta"):
        backbone = UNetBackbone(UNet2DConditionModel(sample_size=64, cross_attention_dim=768), DDPMScheduler())
    units, macs = backbone.units(), backbone.macs()
    assert [unit.kind for unit in units].count("resnet") == 22
    assert [unit.kind for unit in units].count("transformer") == 16
    assert len(units) == 38
    assert backbone.params() == 859_520_964
    assert round(macs.linear / 1e9, 2) == 338.61
    assert round(macs.attention / 1e9, 2) == 63.03
    assert round(sum(unit.params for unit in units) / backbone.params(), 3) == 0.909


def test_the_embedded_teacher_has_the_units_its_configuration_promises():
    backbone = load_teacher(str(ROOT / "assets" / "teacher"), DDPMScheduler())
    kinds = [unit.kind for unit in backbone.units()]
    assert (kinds.count("resnet"), kinds.count("attention"), len(kinds)) == (22, 6, 28)
    assert backbone.params() == 8_952_067


# Files


@torch.no_grad()
def test_a_saved_network_loads_with_the_same_bits(backbone, inputs, tmp_path):
    for name, weights, network in (
        ("dense", WEIGHTS, backbone),
        ("pruned", PRUNED_WEIGHTS, backbone.pruned(bypasses(TWO_UNITS))),
    ):
        network.save(tmp_path / name)
        loaded = load_teacher(str(tmp_path / name), DDPMScheduler())
        assert type(loaded.network) is type(network.network)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["config.json", weights]
        assert same_tensors(loaded.state_dict(), network.state_dict())
        assert torch.equal(loaded.predict(inputs), network.predict(inputs))
        assert not loaded.network.training


def test_a_network_in_the_unet_folder_of_a_pipeline_is_found(teacher_folder, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "pipeline" / "unet")
    assert weight_files(str(tmp_path / "pipeline")) == [
        tmp_path / "pipeline" / "unet" / name for name in ("config.json", WEIGHTS)
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


def test_a_missing_folder_says_what_is_wanted(tmp_path):
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
    assert "cannot be read" in refusal(folder)
    assert not (tmp_path / "boom").exists()


def test_weights_that_are_tensors_in_a_pickle_are_read_without_executing_it_and_said_so(folder, caplog):
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
