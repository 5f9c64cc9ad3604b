"""What the stages of a job share: their times, and what to say when one runs out of memory."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig

from experiments.engine.artefacts import read_json, write_json
from experiments.engine.ranks import is_rank_zero
from lightning_modules.metrics.cost import peak_memory, reset_peak_memory


class OutOfMemory(RuntimeError):
    """The machine has too little memory for a stage; the message says what lowers it."""


class Stages:
    """`with stages("distil"): ...` times a stage; `seconds` has the sums, over all processes that worked on the run.

    A stage that was killed is not counted, as nothing says how long it had worked.
    """

    def __init__(self, cfg: DictConfig, device: torch.device, note: Path) -> None:
        self.cfg, self.device, self.note = cfg, device, note
        self.seconds: dict[str, float] = read_json(note) if note.exists() else {}
        reset_peak_memory()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a stage, and say what to do when it runs out of memory."""
        start = time.monotonic()
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            text = str(error).lower()
            if (
                not isinstance(error, MemoryError | torch.OutOfMemoryError)
                and "allocate memory" not in text
                and "not enough memory" not in text
            ):
                raise
            cfg = self.cfg
            raise OutOfMemory(
                f"out of memory in stage {name!r} (peak so far {peak_memory(self.device) / 2**30:.1f} GiB; "
                f"data.batch_size={cfg.data.batch_size}, calibration.batch_size={cfg.calibration.batch_size}, "
                f"evaluation.batch_size={cfg.evaluation.batch_size}). Lower the batch size of that stage; "
                "trainer.accumulate_grad_batches keeps the effective batch, trainer.precision=bf16-mixed halves "
                "activations"
            ) from error
        self.seconds[name] = round(self.seconds.get(name, 0) + time.monotonic() - start, 2)
        if is_rank_zero():
            write_json(self.note, self.seconds)
