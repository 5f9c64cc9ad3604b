"""Writing a network as an ONNX file, and checking in onnxruntime alone that it computes the same."""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.nested import flatten_dict, unflatten_dict
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import move
from lightning_modules.export.verify import ExportMismatch, compare_outputs, run_in_clean_process

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Packages of the extra `onnx`: the first two are torch's for the export, the last one is for the comparison"""

ONNX_TOLERANCE = 1e-4
"""The largest difference allowed in onnxruntime, whose kernels round otherwise, as a share of the largest value"""

TRACED_SAMPLES = 2
"""Number of samples in the forward pass that the exporter follows"""

CHECKED_SAMPLES = (1, 3)
"""Numbers of samples for which outputs are compared: other ones than TRACED_SAMPLES, because the batch is dynamic"""


def check_onnx(network: NetworkBackbone) -> None:
    """Raise ValueError where a network cannot be written as ONNX: a missing package, or a kind of network."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"export.onnx=true needs {', '.join(missing)}: pip install -e '.[onnx]'")
    if not network.has_onnx:
        raise ValueError(
            f"export.onnx=true: a {type(network.network).__name__} cannot be written as ONNX; choose false, with which "
            f"only the export for {network.library} is written"
        )


def export_onnx(network: NetworkBackbone, folder: Path) -> float:
    """Write <folder>/model.onnx, with its weights beside it, and return its largest difference in onnxruntime.

    The inputs have the names of the network's arguments (those of an inner dictionary after a dot) and a dynamic first
    dimension `batch`; the output is `output`. Raises ExportMismatch where torch's exporter does not take the network,
    or where onnxruntime, in a process without torch and this project, differs by more than ONNX_TOLERANCE.
    """
    network.to("cpu").eval()
    arguments, more = (get_arguments(network, samples) for samples in (TRACED_SAMPLES, TRACED_SAMPLES + 1))
    folder.mkdir()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about the exporter's own code
            torch.onnx.export(
                FlatArguments(network, list(arguments)),
                tuple(arguments.values()),
                folder / "model.onnx",
                input_names=list(arguments),
                output_names=["output"],
                dynamic_shapes={"values": tuple(mark_batch(value, more[name]) for name, value in arguments.items())},
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch raises many kinds, and there is no common class
        raise ExportMismatch(
            f"export.onnx=true: torch's exporter does not take this {type(network.network).__name__}; choose false. It "
            f"said: {str(error)[:1000]}"
        ) from error
    return compare_in_onnxruntime(network, folder)


class FlatArguments(nn.Module):
    """A network that is called with the values of its arguments in an order, without dictionaries.

    Args:
        network: the network.
        names: names of the arguments; `outer.inner` is the entry `inner` of the argument `outer`.
    """

    def __init__(self, network: NetworkBackbone, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *values: Tensor) -> Tensor:
        output: Tensor = self.network(**unflatten_dict(dict(zip(self.names, values, strict=True))))
        return output


def get_arguments(network: NetworkBackbone, samples: int) -> dict[str, Tensor]:
    """Return arguments of a network for some samples, on the CPU, by their names in the ONNX file."""
    return flatten_dict(move(network.random_arguments(samples), "cpu"))


def mark_batch(fewer: Tensor, more: Tensor) -> dict[int, Any] | None:
    """Return {0: the dimension `batch`} where the first size of an argument depends on the number of samples.

    `fewer` and `more` are the argument for two numbers of samples.
    """
    return {0: torch.export.Dim("batch")} if fewer.shape[:1] != more.shape[:1] else None


def compare_in_onnxruntime(network: NetworkBackbone, folder: Path) -> float:
    """Return the largest difference between a network's outputs and those of <folder>/model.onnx in onnxruntime.

    Raises ExportMismatch where it is more than ONNX_TOLERANCE of the largest absolute value.
    """
    batches = {str(samples): get_arguments(network, samples) for samples in CHECKED_SAMPLES}
    expected = {name: network.expected_outputs(unflatten_dict(batch))["output"] for name, batch in batches.items()}
    outputs = run_in_clean_process("onnx", folder, batches)
    results = [compare_outputs(outputs[name], expected[name], ONNX_TOLERANCE) for name in expected]
    largest = max(difference for difference, _ in results)
    if not all(same for _, same in results):
        raise ExportMismatch(
            f"{folder}/model.onnx differs by {largest:.3g} in onnxruntime from the network that was exported"
        )
    return largest


def describe_onnx(network: NetworkBackbone, difference: float) -> str:
    """Return how the ONNX export of a network is opened, and how far it is from the network, in Markdown."""
    arguments, more = (get_arguments(network, samples) for samples in (1, 2))
    rows = "\n".join(
        f"| `{name}` | {describe_shape(value, more[name])} | {str(value.dtype).removeprefix('torch.')} |"
        for name, value in arguments.items()
    )
    return f"""
The folder `onnx` has the network alone, for onnxruntime and other programs that open ONNX:

    import onnxruntime
    session = onnxruntime.InferenceSession("onnx/model.onnx")
    (output,) = session.run(["output"], inputs)  # inputs: a dictionary of NumPy arrays

| input | shape | type |
| --- | --- | --- |
{rows}

In onnxruntime on a CPU its largest difference from this network was {difference:.3g}, with random inputs.
"""


def describe_shape(tensor: Tensor, of_more: Tensor) -> str:
    """Return a shape as text, with `batch` where it depends on the number of samples; see `mark_batch`."""
    sizes = zip(tensor.shape, of_more.shape, strict=True)
    return ", ".join("batch" if fewer != more else str(fewer) for fewer, more in sizes)
