"""Exports as ONNX: they compute what the network does, in a process with neither torch nor this project."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.classification import tiny_classifier
from support.language import tiny_language
from support.networks import bypasses, replacements, tiny_backbone
from support.pipeline_parts import load_tiny_teacher
from support.pipelines import tiny_pipeline
from test_export import GONE

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.export import reload_common, to_onnx
from lightning_modules.export.to_onnx import (
    ONNX_TOLERANCE,
    check_onnx,
    compare_in_onnxruntime,
    describe_onnx,
    export_onnx,
)
from lightning_modules.export.verify import ExportMismatch


def narrowed() -> NetworkBackbone:
    """Return a classifier that lost every fifth channel."""
    teacher = tiny_classifier()
    return teacher.pruned([{"unit": unit.name, "kind": "slice"} for unit in teacher.units()[::5]])


def pruned(kind: str, folder: Path, level: str = "depth") -> NetworkBackbone:
    """Return a tiny diffusion network without the blocks GONE[kind], or every seventh unit of another level."""
    teacher = load_tiny_teacher(tiny_pipeline(kind, folder))
    if level == "depth":
        return teacher.pruned(bypasses(GONE[kind]))
    names = [unit.name for unit in teacher.units(level)][::7]
    changes = {"operator": replacements(names), "channel": [{"unit": name, "kind": "slice"} for name in names]}
    return teacher.pruned(changes[level])


def check_parity(network: NetworkBackbone, folder: Path, shapes: dict[str, list[Any]]) -> None:
    """Fail unless an export has inputs of these shapes, and outputs that are this network's and not another's."""
    difference = export_onnx(network, folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    found = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    assert found == shapes
    assert [value.name for value in graph.output] == ["output"]
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx.data"}

    largest = max(
        float(network.expected_outputs(network.random_arguments(samples))["output"].abs().max()) for samples in (1, 3)
    )
    assert 0 <= difference <= ONNX_TOLERANCE * largest
    assert compare_in_onnxruntime(network, folder) == difference
    other = network.copy()
    with torch.no_grad():
        for weight in other.network.parameters():
            weight.mul_(1.01)
    with pytest.raises(ExportMismatch, match=r"model\.onnx differs by .* in onnxruntime from the network"):
        compare_in_onnxruntime(other, folder)


def test_a_narrowed_classifier_computes_the_same_in_onnxruntime(tmp_path):
    check_parity(narrowed(), tmp_path / "onnx", {"image": ["batch", 3, 8, 8]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("ddpm", {"sample": ["batch", 3, 16, 16], "timestep": ["batch"]}),
        ("sd", {"sample": ["batch", 4, 8, 8], "timestep": ["batch"], "encoder_hidden_states": ["batch", 77, 8]}),
        ("dit", {"hidden_states": ["batch", 4, 8, 8], "timestep": ["batch"], "class_labels": ["batch"]}),
    ],
)
def test_a_pruned_denoiser_computes_the_same_in_onnxruntime(kind, shapes, tmp_path):
    check_parity(pruned(kind, tmp_path / "teacher"), tmp_path / "onnx", shapes)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["operator", "channel"])
def test_other_kinds_of_plans_compute_the_same_in_onnxruntime(level, tmp_path):
    shapes = {"sample": ["batch", 3, 16, 16], "timestep": ["batch"]}
    check_parity(pruned("ddpm", tmp_path / "teacher", level), tmp_path / "onnx", shapes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_further_families_compute_the_same_in_onnxruntime(kind, tmp_path):
    network = pruned(kind, tmp_path / "teacher")
    assert export_onnx(network, tmp_path / "onnx") < ONNX_TOLERANCE


def test_the_program_that_opens_an_onnx_export_can_import_neither_torch_nor_this_project(tmp_path):
    program = """
import importlib, sys
sys.path.insert(0, sys.argv.pop(1))
import reload_common
try:
    reload_common.read_command("np", absent=("torch",))
except FileNotFoundError:
    pass
for name in ("torch", "conf.schema", "lightning_modules.export"):
    assert name not in sys.modules
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
import onnxruntime
"""
    folder = str(Path(reload_common.__file__).parent)
    command = [sys.executable, "-c", program, folder, "export", str(tmp_path / "absent"), "output", "1"]
    subprocess.run(command, check=True, cwd=tmp_path)


@pytest.mark.parametrize("name", to_onnx.PACKAGES)
def test_a_missing_package_is_named_with_how_to_install_it(name, monkeypatch):
    find_spec = to_onnx.importlib.util.find_spec
    monkeypatch.setattr(to_onnx.importlib.util, "find_spec", lambda found: None if found == name else find_spec(found))
    with pytest.raises(ValueError, match=rf"export\.onnx=true needs {name}: pip install -e '\.\[onnx\]'"):
        check_onnx(tiny_classifier())


def test_networks_without_an_onnx_export_are_refused_by_name():
    for network, name in ((tiny_language(), "LlamaForCausalLM"), (tiny_backbone("pixart"), "PixArtTransformer2DModel")):
        with pytest.raises(ValueError, match=rf"export\.onnx=true: a {name} cannot be written as ONNX; choose false"):
            check_onnx(network)


def test_what_the_exporter_says_stands_behind_the_name_of_the_network(monkeypatch, tmp_path):
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportMismatch, match=r"take this CifarResNet; choose false\. It said: no such operator"):
        export_onnx(tiny_classifier(), tmp_path / "onnx")


def test_the_description_names_inputs_and_the_difference():
    text = describe_onnx(tiny_classifier(), 1.25e-6)
    assert "| `image` | batch, 3, 8, 8 | float32 |" in text and "was 1.25e-06," in text
