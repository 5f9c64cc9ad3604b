"""Logged values in a CSV file."""

import csv
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

HISTORY_FIELDS = ("step", "name", "value")

# Silence Lightning's announcements, and deprecation warnings about code inside Lightning and torchdata.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
for message in (
    ".*set_vital.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
    ".*in eval mode at the start of training.*",
):
    warnings.filterwarnings("ignore", message=message)


class History(Logger):
    """A logger that appends every value to a CSV file with the columns step, name and value."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        path.parent.mkdir(exist_ok=True)

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows([step, name, repr(float(value))] for name, value in sorted(metrics.items()))

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Remove the rows from optimiser step `step` on, which a resumed run logs again, and truncated rows."""
        rows = []
        if step and self.path.exists():
            with open(self.path, newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) < step]
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            csv.writer(file).writerows([HISTORY_FIELDS, *rows])
        os.replace(partial, self.path)
