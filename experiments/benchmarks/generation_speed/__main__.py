"""Measures how fast language models generate text: latency and throughput of several models side by side.

    python -m experiments.benchmarks.generation_speed stories15m runs/prune/<run>/export
    python -m experiments.benchmarks.generation_speed /models/llama /runs/a/export /runs/b/export \
        --device cuda --dtype bfloat16 \
        --batch 1 4 16 --length 128 512 --runs 30 --warmup 10 --out results

The protocol is that of the code of Shortened LLaMA (arXiv 2402.02834): a batch repeats one prompt, tokens are sampled
with top-k 50 and top-p 0.95, and every output has exactly `length` tokens. The models take turns, run by run, so that a
change of the machine's load affects all of them. Means are over the runs after the warm-up; the mean throughput is that
of the throughputs of single runs.
"""

import argparse
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from conf.schema import ROOT, build, register
from experiments.reporting.figures import save_figure, set_log_scale
from lightning_modules.backbones.language.backbone import LanguageBackbone
from lightning_modules.backbones.language.load import load_language_model
from lightning_modules.metrics.cost import device_name

PROMPT = "The Leaning Tower of Pisa is known for"


def load_model(name: str) -> Any:
    """Return a language model: a teacher by the name of its configuration, else one by its folder or hub id."""
    path = ROOT / "conf" / "teacher" / f"{name}.yaml"
    if not path.exists():
        return load_language_model(name, length=2)  # the length only matters for costs, which are not counted here
    register()  # resolves paths below this repository
    teacher = build(OmegaConf.load(path))  # type: ignore[arg-type]
    if not teacher.writes_text:
        raise ValueError(f"{name} is a {type(teacher).__name__}, not a language model")
    return teacher


def shorten_names(paths: list[str]) -> list[str]:
    """Return a short name per model: the run's folder for an export, else the last part of the path.

    Equal names are numbered.
    """
    parts = [Path(path).resolve().parent.name if Path(path).name == "export" else Path(path).name for path in paths]
    return [part if parts.count(part) == 1 else f"{part} ({number})" for number, part in enumerate(parts, 1)]


def encode_prompt(model: LanguageBackbone) -> Tensor:
    """Return the (1,L) token ids of the prompt; a model without a tokenizer gets the ids 0, 1, ..., one per word."""
    if model.tokenizer is None:
        return torch.arange(len(PROMPT.split())).unsqueeze(0)
    return model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]


def check_lengths(models: Mapping[str, LanguageBackbone], lengths: list[int]) -> None:
    """Raise ValueError where prompt and output together are longer than the context of a model."""
    for name, model in models.items():
        room = model.network.config.max_position_embeddings - encode_prompt(model).shape[1]
        if max(lengths) > room:
            raise ValueError(
                f"--length {max(lengths)}: after the prompt, {name} has room for {room} tokens; choose at most that"
            )


def make_generation(model: LanguageBackbone, batch: int, length: int, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that samples `length` tokens for each of `batch` equal prompts."""
    tokens = encode_prompt(model).expand(batch, -1).to(device)
    config = GenerationConfig(
        do_sample=True,
        top_k=50,
        top_p=0.95,
        min_new_tokens=length,
        max_new_tokens=length,
        pad_token_id=0,
        eos_token_id=model.network.config.eos_token_id,
    )
    mask = torch.ones_like(tokens)
    return functools.partial(model.network.generate, tokens, attention_mask=mask, generation_config=config)


@torch.inference_mode()
def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a call takes, measured by CUDA events on a GPU, elsewhere by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


def measure_peak_bytes(call: Callable[[], Any], model: LanguageBackbone, device: torch.device) -> int | None:
    """Return the bytes of GPU memory of a model's weights and one generation, without other models; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    time_call(call, device)
    weights = sum(weight.numel() * weight.element_size() for weight in model.network.parameters())
    return torch.cuda.max_memory_allocated(device) - before + weights


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]], runs: int, warmup: int, device: torch.device, description: str
) -> dict[str, list[float]]:
    """Return {name: seconds of each run after the warm-up} of calls that take turns.

    Args:
        calls: what is timed, by name.
        runs: how often each call is made.
        warmup: how many of these runs are not counted.
        device: the device that the calls use.
        description: of the progress bar.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in tqdm(range(runs), desc=description):
        for name, call in calls.items():
            seconds = time_call(call, device)
            if run >= warmup:
                times[name].append(seconds)
    return times


def make_rows(times: Mapping[str, list[float]], batch: int, length: int) -> list[dict[str, Any]]:
    """Return a row per model: means and standard deviations over its runs, and the latency's ratio to the first model.

    Latencies are in seconds, throughputs in tokens per second.
    """
    first = mean(next(iter(times.values())))
    rows = []
    for name, seconds in times.items():
        throughputs = [batch * length / latency for latency in seconds]
        row = {"model": name, "batch": batch, "length": length, "runs": len(seconds)}
        row |= {"latency_s": mean(seconds), "latency_std": pstdev(seconds)}
        row |= {"throughput": mean(throughputs), "throughput_std": pstdev(throughputs)}
        rows.append(row | {"latency_ratio": mean(seconds) / first})
    return rows


def describe_model(model: LanguageBackbone) -> dict[str, Any]:
    """Return the number of parameters and of layers, and the width of the hidden states."""
    config = model.network.config
    return {"params": model.params(), "layers": config.num_hidden_layers, "width": config.hidden_size}


def draw_speeds(table: pd.DataFrame, path: Path) -> Path:
    """Draw latency and throughput over the batch size: a line per model, a column of panels per length."""
    lengths = sorted(table["length"].unique())
    figure, axes = plt.subplots(2, len(lengths), figsize=(4.6 * len(lengths), 6.4), squeeze=False)
    rows = (("latency_s", "latency, s"), ("throughput", "throughput, tokens/s"))
    for (column, label), panels in zip(rows, axes, strict=True):
        for length, axis in zip(lengths, panels, strict=True):
            for name, part in table[table["length"] == length].groupby("model", sort=False):
                axis.plot(part["batch"], part[column], marker="o", ms=4, label=name)
            axis.set_xscale("log", base=2)
            set_log_scale(axis, "y")
            axis.set_xticks(sorted(table["batch"].unique()), labels=[str(n) for n in sorted(table["batch"].unique())])
            axis.set_xlabel("batch")
            axis.set_ylabel(label)
            axis.set_title(f"{length} tokens", fontsize=10)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    return save_figure(figure, path)


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line, or of a list of arguments; exits where they are out of range."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.generation_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", help="folders (exports), hub ids or teachers; ratios are to the first")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, nargs="+", default=[32])
    parser.add_argument("--runs", type=int, default=6, help="of each model, batch and length, warm-up included")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/generation_speed"), help="a folder for results.csv and speed.png"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.warmup < options.runs:
        parser.error(f"--warmup {options.warmup} leaves no run of --runs {options.runs}; choose less")
    if min([*options.batch, *options.length]) < 1:
        parser.error("--batch and --length: choose whole numbers of 1 or more")
    return options


def main() -> None:
    options = read_options()
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    )
    models = {
        name: load_model(path).to(device, getattr(torch, options.dtype)).eval()
        for name, path in zip(shorten_names(options.models), options.models, strict=True)
    }
    check_lengths(models, options.length)
    machine = {"device": device_name(device), "dtype": options.dtype, "torch": str(torch.__version__)}
    machine["transformers"] = transformers.__version__
    rows: list[dict[str, Any]] = []
    for length in options.length:
        for batch in options.batch:
            calls = {name: make_generation(model, batch, length, device) for name, model in models.items()}
            times = time_in_turns(calls, options.runs, options.warmup, device, f"batch {batch}, {length} tokens")
            for row in make_rows(times, batch, length):
                name = row["model"]
                peak = {"peak_bytes": measure_peak_bytes(calls[name], models[name], device)}
                rows.append({"model": name, **describe_model(models[name]), **row, **peak, **machine})
    table = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "results.csv", index=False)
    draw_speeds(table, options.out / "speed.png")
    columns = ["model", "params", "layers", "width", "batch", "length", "latency_s", "throughput", "latency_ratio"]
    print(table[[*columns, *(["peak_bytes"] if device.type == "cuda" else [])]].to_string(index=False))
    print(f"{device_name(device)}, {options.dtype}; {options.out}/results.csv, {options.out}/speed.png")


if __name__ == "__main__":
    main()
