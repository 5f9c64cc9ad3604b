"""The command `python -m experiments.status`: how the sweeps below a folder stand, in whatever process they run."""

import argparse
import sys
from pathlib import Path

from experiments.engine.sweep import format_sweep, read_sweep


def main() -> None:
    """Print every sweep below a folder of runs, the newest one last."""
    parser = argparse.ArgumentParser(prog="python -m experiments.status", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="the folder of runs (paths.runs)")
    root = parser.parse_args().folder
    sweeps = sorted((read_sweep(path.parent) for path in root.glob(".sweep/*/sweep.json")), key=lambda s: s["started"])
    if not sweeps:
        sys.exit(f"{root} has no sweep (looked for .sweep/*/sweep.json); a sweep is `python train.py -m ...`")
    print("\n\n".join(map(format_sweep, sweeps)))


if __name__ == "__main__":
    main()
