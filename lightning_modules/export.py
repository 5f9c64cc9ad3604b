"""A folder that opens with diffusers alone, and the proof that it does."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file

from lightning_modules.backbones import pruned_unet
from lightning_modules.backbones.unet import UNetBackbone

CLEAN_LOAD = """
import sys
class Absent:  # this project must not be needed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("conf", "criteria", "datamodules", "experiments", "lightning_modules", "train"):
            raise ModuleNotFoundError(f"{name} belongs to the exporting project")
sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
from diffusers import DiffusionPipeline
folder, inputs, output, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
unet = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, low_cpu_mem_usage=False).unet.eval()
with torch.inference_mode():
    result = unet(**load_file(inputs), return_dict=False)[0]
save_file({"output": result.contiguous()}, output)
"""


class ExportMismatch(RuntimeError):
    """An export does not load, or does not compute what the network in memory does."""


def export(student: UNetBackbone, folder: Path) -> None:
    """Write a DDPMPipeline: scheduler/, unet/ with safetensors, and the class of the network beside its weights.

    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` opens it where only diffusers is installed;
    without `trust_remote_code` it is refused, rather than opened as a stock network with untrained parts.
    """
    pipeline: Any = DDPMPipeline(student.unet, student.noise_scheduler)
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    content["unet"] = ["pruned_unet", type(student.unet).__name__]
    index.write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(pruned_unet.__file__, folder / "unet" / "pruned_unet.py")


def verify(student: UNetBackbone, folder: Path) -> float:
    """Load an export in a process that cannot import this project; returns the largest difference of its output.

    Raises ExportMismatch where it does not load or differs by more than 1e-5 of the output's largest value.
    """
    network = student.unet.to("cpu").eval()
    inputs = student.example_inputs(2, "cpu")
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(0))
    inputs["timestep"] = torch.tensor([10, 500])
    with torch.inference_mode():
        expected = network(**inputs, return_dict=False)[0]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        save_file(inputs, work / "inputs.safetensors")
        arguments = [
            folder.resolve(),
            work / "inputs.safetensors",
            work / "output.safetensors",
            torch.get_num_threads(),
        ]
        process = subprocess.run(
            [sys.executable, "-c", CLEAN_LOAD, *map(str, arguments)],
            cwd=work,
            capture_output=True,
            text=True,
            env=clean_environment(work),
        )
        if process.returncode:
            raise ExportMismatch(f"{folder} does not load in a clean process:\n{process.stderr[-2000:]}")
        found = load_file(work / "output.safetensors")["output"]
    difference = float((found - expected).abs().max())
    if not difference <= 1e-5 * float(expected.abs().max()):
        raise ExportMismatch(
            f"{folder} reloads, but its output differs by {difference:.3g} from the network that was exported"
        )
    return difference


def clean_environment(work: Path) -> dict[str, str]:
    """This process's environment, without what would make the project importable, and with a cache of its own."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    }
    return kept | {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
