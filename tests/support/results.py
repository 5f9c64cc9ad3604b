"""What a job leaves behind, in a form that two jobs can be compared in."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lightning_modules.nested import leaves_by_path
from lightning_modules.training.monitor import MEASURED


def the_run(runs: Path) -> Path:
    """The folder of the only run below `runs`, of whichever name."""
    (config,) = runs.glob("*/*/config.yaml")
    return config.parent


def files(folder: Path) -> set[str]:
    """The paths of all files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, int]:
    """When each file below a folder was last written."""
    return {name: (folder / name).stat().st_mtime_ns for name in files(folder)}


def read_markdown(path: Path) -> pd.DataFrame:
    """The only table of a Markdown file, as texts."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in path.read_text().splitlines()]
    return pd.DataFrame(rows[2:], columns=rows[0])


def read_repeatable_history(path: Path) -> list[tuple[int, str, float]]:
    """The rows (step, name, value) of a history without what depends on the machine."""
    table = pd.read_csv(path)
    table = table[~table["name"].str.endswith(MEASURED)]
    return list(table.itertuples(index=False, name=None))


TRAINED = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")


def trained_state(checkpoint: Path) -> dict[str, Any]:
    """Weights, their moving average, optimiser and schedule of a checkpoint, as {path: value}."""
    content = torch.load(checkpoint, weights_only=True)
    return leaves_by_path({name: content[name] for name in TRAINED if name in content})


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names under which two sets of values are not the same, bit for bit."""

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y

    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name]))


def results(run: Path) -> dict[str, Any]:
    """All that must not depend on interruptions: scores, plan, metrics, weights, samples and the last checkpoint."""
    kept = {name for name in files(run) if name.endswith((".safetensors", ".npy"))}
    kept |= {"scores.json", "plan.json", "metrics.json"}
    newest = max((run / "checkpoints" / "distil").iterdir())
    return {name: (run / name).read_bytes() for name in kept} | {"checkpoint": newest.name} | trained_state(newest)
