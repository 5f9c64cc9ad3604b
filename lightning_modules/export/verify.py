"""The proof that an export loads and computes the same in a process that has only the network's own library."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import move
from lightning_modules.backbones.language.backbone import greedy

BEGIN = """
import json, pathlib, sys
class Absent:  # this project must not be needed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("conf", "criteria", "datamodules", "experiments", "lightning_modules", "train"):
            raise ModuleNotFoundError(f"{name} belongs to the exporting project")
sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
folder, inputs, output, threads, *words = sys.argv[1:]
torch.set_num_threads(int(threads))
arguments = {}
for path, value in load_file(inputs).items():
    *parents, name = path.split("/")
    place = arguments
    for parent in parents:
        place = place.setdefault(parent, {})
    place[name] = value
"""
DIFFUSERS = """
from diffusers import DiffusionPipeline
component, trust = words
index = json.loads((pathlib.Path(folder) / "model_index.json").read_text())
without = {name: None for name, value in index.items() if value == [None, None]}
pipeline = DiffusionPipeline.from_pretrained(folder, **without, trust_remote_code=trust == "1", low_cpu_mem_usage=False)
with torch.inference_mode():
    found = {"output": getattr(pipeline, component).eval()(**arguments, return_dict=False)[0]}
"""
TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = arguments["input_ids"]
with torch.inference_mode():
    found = {"output": model(**arguments, use_cache=False, return_dict=False)[0]}
    found["tokens"] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False,
                                     num_beams=1, repetition_penalty=1.0,
                                     pad_token_id=model.config.pad_token_id or 0)
if words[0]:
    found["text"] = torch.tensor(AutoTokenizer.from_pretrained(folder)(words[0])["input_ids"])
"""
TORCH = """
sys.path.insert(0, folder)
from image_networks import load
with torch.inference_mode():
    found = {"output": load(folder).eval()(arguments["image"])}
"""
END = """
save_file({name: value.contiguous() for name, value in found.items()}, output)
"""
LOAD = {"diffusers": DIFFUSERS, "transformers": TRANSFORMERS, "torch": TORCH}
"""How an export of each library is opened by somebody who has only that library, and what it then computes."""
TEXT = "Once upon a time, 3 researchers pruned a model.\n"


TOLERANCE = 1e-5
"""how much an output may differ from another of the same weights, as a share of its largest value"""


class ExportMismatch(RuntimeError):
    """An export does not load, or does not compute what the network in memory does."""


def is_stock(network: nn.Module) -> bool:
    """Does diffusers itself have the class of this network?"""
    return type(network).__module__.startswith("diffusers.")


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """A nested dictionary of tensors with its paths joined by slashes."""
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value.contiguous()}
    return found


def random_arguments(student: NetworkBackbone) -> dict[str, Any]:
    """Arguments of the network for two samples, with noise where there are numbers to be had."""
    rng = torch.Generator().manual_seed(0)
    inputs = student.example_inputs(2, "cpu")
    if student.library == "torch":
        return {"image": torch.rand(inputs["sample"].shape, generator=rng) * 2 - 1}
    if student.writes_text:
        return {"input_ids": torch.randint(student.network.config.vocab_size, inputs["sample"].shape, generator=rng)}
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=rng)
    inputs["timestep"] = torch.tensor([10, 500])
    states = inputs["conditions"].get("encoder_hidden_states")
    if states is not None:
        inputs["conditions"]["encoder_hidden_states"] = torch.randn(states.shape, generator=rng)
    assert isinstance(student, DiffusionBackbone)
    return student.arguments(inputs)


def output_of(network: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """What a network makes of its arguments, in eval mode."""
    with torch.inference_mode():
        return network.eval()(**arguments, return_dict=False)[0]


def outputs(student: NetworkBackbone, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What a reloaded export has to compute, too: the output, and of a language model the tokens it writes."""
    if student.library == "torch":
        with torch.inference_mode():
            return {"output": student.network.eval()(arguments["image"])}
    found = {"output": output_of(student.network, arguments)}
    if student.writes_text:
        found["tokens"] = greedy(student.network, arguments["input_ids"], 16)
        if student.tokenizer is not None:
            found["text"] = torch.tensor(student.tokenizer(TEXT)["input_ids"])
    return found


def difference(found: Tensor, expected: Tensor) -> tuple[float, bool]:
    """The largest difference of two outputs, and whether it is within TOLERANCE."""
    largest = float((found - expected).abs().max())
    return largest, largest <= TOLERANCE * float(expected.abs().max())


def verify(student: NetworkBackbone, folder: Path) -> float:
    """Load an export in a process that cannot import this project; returns the largest difference of its output.

    Raises ExportMismatch where it does not load or differs by more than TOLERANCE.
    """
    student.network.to("cpu")
    arguments = move(random_arguments(student), "cpu")
    expected = outputs(student, arguments)
    words: list[Any] = [TEXT if "text" in expected else ""]
    if isinstance(student, DiffusionBackbone):
        words = [student.component, int(not is_stock(student.network))]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        save_file(flat(arguments), work / "inputs.safetensors")
        files = [folder.resolve(), work / "inputs.safetensors", work / "output.safetensors"]
        script = BEGIN + LOAD[student.library] + END
        process = subprocess.run(
            [sys.executable, "-c", script, *map(str, [*files, torch.get_num_threads(), *words])],
            cwd=work,
            capture_output=True,
            text=True,
            env=clean_environment(work),
        )
        if process.returncode:
            raise ExportMismatch(f"{folder} does not load in a clean process:\n{process.stderr[-2000:]}")
        found = load_file(work / "output.safetensors")
    largest, same = difference(found["output"], expected["output"])
    if not same:
        raise ExportMismatch(
            f"{folder} reloads, but its output differs by {largest:.3g} from the network that was exported"
        )
    for name in expected.keys() - {"output"}:
        if not torch.equal(found[name], expected[name]):
            raise ExportMismatch(f"{folder} reloads, but its {name} are not those of the network that was exported")
    return largest


def clean_environment(work: Path) -> dict[str, str]:
    """This process's environment, without what would make the project importable, and with a cache of its own."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    }
    return kept | {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
