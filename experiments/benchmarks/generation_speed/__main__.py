"""How fast language models write: latency and throughput of generation, of any number of models side by side.

    python -m experiments.benchmarks.generation_speed stories15m runs/prune/<run>/export
    python -m experiments.benchmarks.generation_speed /models/llama /runs/a/export /runs/b/export \
        --device cuda --dtype bfloat16 \
        --batch 1 4 16 --length 128 512 --runs 30 --warmup 10 --out results

The protocol is that of Shortened LLaMA (arXiv 2402.02834, by its code): one prompt as often as the batch is large,
sampling with top-k 50 and top-p 0.95, an output of exactly `length` tokens. The models take turns, run by run, so that
their ratios are of one measurement; means are of the runs after the warm-up, those of the throughput over each run's.
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
from experiments.reporting.figures import save
from lightning_modules.backbones.language.backbone import LanguageBackbone
from lightning_modules.backbones.language.load import load_language_model
from lightning_modules.metrics.cost import device_name

PROMPT = "The Leaning Tower of Pisa is known for"


def load(name: str) -> Any:
    """Return a language model: a teacher by the name of its configuration, else one by its folder or hub id."""
    path = ROOT / "conf" / "teacher" / f"{name}.yaml"
    if not path.exists():
        return load_language_model(name, length=2)  # of the costs, which are not counted here: any network has it
    register()  # for paths below this repository
    teacher = build(OmegaConf.load(path))  # type: ignore[arg-type]
    if not teacher.writes_text:
        raise ValueError(f"{name} is no language model, but a {type(teacher).__name__}")
    return teacher


def named(names: list[str]) -> list[str]:
    """Short names of models: the run's folder for its export, the last part of other paths, numbered where equal."""
    parts = [Path(name).resolve().parent.name if Path(name).name == "export" else Path(name).name for name in names]
    return [part if parts.count(part) == 1 else f"{part} ({place + 1})" for place, part in enumerate(parts)]


def prompt_ids(model: LanguageBackbone) -> Tensor:
    """(1,L) token ids of the prompt; of a model without a tokenizer the first ones there are, as many as words."""
    if model.tokenizer is None:
        return torch.arange(len(PROMPT.split())).unsqueeze(0)
    return model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]


def check_lengths(models: Mapping[str, LanguageBackbone], lengths: list[int]) -> None:
    """Raise ValueError where prompt and output are longer than what a model is made for."""
    for name, model in models.items():
        room = model.network.config.max_position_embeddings - prompt_ids(model).shape[1]
        if max(lengths) > room:
            raise ValueError(f"--length {max(lengths)}: {name} is made for {room} tokens after the prompt; choose less")


def generation(model: LanguageBackbone, batch: int, length: int, device: torch.device) -> Callable[[], Tensor]:
    """A call that samples `length` tokens for each of `batch` equal prompts."""
    tokens = prompt_ids(model).expand(batch, -1).to(device)
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
def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes: by events of the GPU, elsewhere by the clock."""
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


def peak_bytes(call: Callable[[], Any], model: LanguageBackbone, device: torch.device) -> int | None:
    """What a model and one generation of it take on a GPU, without the other models; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    seconds(call, device)
    own = sum(weight.numel() * weight.element_size() for weight in model.network.parameters())
    return torch.cuda.max_memory_allocated(device) - before + own


def in_turns(
    calls: Mapping[str, Callable[[], Any]], runs: int, warmup: int, device: torch.device, what: str
) -> dict[str, list[float]]:
    """Seconds of each run after the warm-up, by name; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in tqdm(range(runs), desc=what):
        for name, call in calls.items():
            taken = seconds(call, device)
            if run >= warmup:
                times[name].append(taken)
    return times


def rows_of(times: Mapping[str, list[float]], batch: int, length: int) -> list[dict[str, Any]]:
    """A row a model: means and deviations over its runs, and the ratios to the first model."""
    first = mean(next(iter(times.values())))
    rows = []
    for name, taken in times.items():
        throughputs = [batch * length / each for each in taken]
        row = {"model": name, "batch": batch, "length": length, "runs": len(taken)}
        row |= {"latency_s": mean(taken), "latency_std": pstdev(taken)}
        row |= {"throughput": mean(throughputs), "throughput_std": pstdev(throughputs)}
        rows.append(row | {"latency_ratio": mean(taken) / first})
    return rows


def facts(model: LanguageBackbone) -> dict[str, Any]:
    config = model.network.config
    return {"params": model.params(), "layers": config.num_hidden_layers, "width": config.hidden_size}


def draw(table: pd.DataFrame, path: Path) -> None:
    """Latency and throughput over the batch, a line a model, a column of panels a length."""
    lengths = sorted(table["length"].unique())
    figure, axes = plt.subplots(2, len(lengths), figsize=(4.6 * len(lengths), 6.4), squeeze=False)
    rows = (("latency_s", "latency, s"), ("throughput", "throughput, tokens/s"))
    for (column, label), panels in zip(rows, axes, strict=True):
        for length, axis in zip(lengths, panels, strict=True):
            for name, part in table[table["length"] == length].groupby("model", sort=False):
                axis.plot(part["batch"], part[column], marker="o", ms=4, label=name)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sorted(table["batch"].unique()), labels=[str(n) for n in sorted(table["batch"].unique())])
            axis.set_xlabel("batch")
            axis.set_ylabel(label)
            axis.set_title(f"{length} tokens", fontsize=10)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.generation_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", help="folders (exports), hub ids, or teachers by name; the first is 1.00")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, nargs="+", default=[32])
    parser.add_argument(
        "--runs", type=int, default=6, help="of each model, batch and length, with those of the warm-up"
    )
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
    options = options_of()
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    )
    models = {
        name: load(path).to(device, getattr(torch, options.dtype)).eval()
        for name, path in zip(named(options.models), options.models, strict=True)
    }
    check_lengths(models, options.length)
    machine = {"device": device_name(device), "dtype": options.dtype, "torch": str(torch.__version__)}
    machine["transformers"] = transformers.__version__
    rows: list[dict[str, Any]] = []
    for length in options.length:
        for batch in options.batch:
            calls = {name: generation(model, batch, length, device) for name, model in models.items()}
            times = in_turns(calls, options.runs, options.warmup, device, f"batch {batch}, {length} tokens")
            for row in rows_of(times, batch, length):
                name = row["model"]
                peak = {"peak_bytes": peak_bytes(calls[name], models[name], device)}
                rows.append({"model": name, **facts(models[name]), **row, **peak, **machine})
    table = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "results.csv", index=False)
    draw(table, options.out / "speed.png")
    shown = ["model", "params", "layers", "width", "batch", "length", "latency_s", "throughput", "latency_ratio"]
    print(table[[*shown, *(["peak_bytes"] if device.type == "cuda" else [])]].to_string(index=False))
    print(f"{device_name(device)}, {options.dtype}; {options.out}/results.csv, {options.out}/speed.png")


if __name__ == "__main__":
    main()
