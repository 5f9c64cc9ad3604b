"""How much faster prefix reuse scores all units, and that the scores are the same bits.

    python -m experiments.scoring_speed            # on the embedded teacher; writes results.csv beside this file

Plain loop and prefix reuse take turns in one process on the same batch; the ratio is what counts, not the seconds.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from tqdm import tqdm

from conf.schema import ROOT
from lightning_modules.backbones import load_teacher
from lightning_modules.backbones.diffusion import DiffusionBackbone
from lightning_modules.backbones.replay import Replay


def bound(backbone: DiffusionBackbone) -> float:
    """The largest speed-up there can be by MACs: all forwards, over one dense pass and what is behind each unit."""
    network = backbone.network
    macs, names = backbone.macs(), {module: name for name, module in network.named_modules()}
    units = {unit.name: network.get_submodule(unit.name) for unit in backbone.units()}
    replay = Replay(network, list(units.values()))
    with torch.inference_mode(), replay.recording():
        backbone.predict(backbone.example_inputs(1, "cpu"))
    costs = [macs.of(names[part]) for part, _ in replay.record]
    behind = 0
    for name, unit in units.items():
        behind += sum(costs[replay.first_call(unit) + 1 :]) + macs.of(f"{name}.conv_shortcut")
    return (len(units) + 1) * macs.linear / (macs.linear + behind)


@torch.inference_mode()
def compare(backbone: DiffusionBackbone, batch: int, repeats: int) -> tuple[float, float, bool]:
    """Median seconds of the plain loop and of prefix reuse, and whether every output is equal bit for bit."""
    names = [unit.name for unit in backbone.units()]
    inputs = backbone.example_inputs(batch, "cpu")
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(0))
    inputs["timestep"] = torch.arange(batch) * 1000 // batch

    def plain() -> dict[str | None, Tensor]:
        found: dict[str | None, Tensor] = {None: backbone.predict(inputs)}
        for name in names:
            with backbone.without([name]):
                found[name] = backbone.predict(inputs)
        return found

    def reuse() -> dict[str | None, Tensor]:
        return dict(backbone.predict_without_each(inputs, names))

    a, b = plain(), reuse()  # these warm up, too
    equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return *(
        statistics.median(column)
        for column in zip(*(in_turns(plain, reuse) for _ in tqdm(range(repeats), "rounds")), strict=True)
    ), equal


def in_turns(*calls: Callable[[], object]) -> list[float]:
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.scoring_speed", description=__doc__)
    parser.add_argument("--teacher", default=str(ROOT / "assets" / "teacher"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.csv")
    options = parser.parse_args()

    backbone = load_teacher(options.teacher, DDPMScheduler())
    plain, reuse, equal = compare(backbone, options.batch, options.repeats)
    row = {
        "units": len(backbone.units()),
        "batch": options.batch,
        "plain_s": f"{plain:.3f}",
        "reuse_s": f"{reuse:.3f}",
        "speedup": f"{plain / reuse:.2f}",
        "bound_by_macs": f"{bound(backbone):.2f}",
        "equal_bits": equal,
        "machine": f"cpu, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
    }
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    print("\n".join(f"{name + ':':<16}{value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
