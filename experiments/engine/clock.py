"""Times the parts of a job, and explains what to change when one runs out of memory."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import torch
from omegaconf import DictConfig

from lightning_modules.metrics.cost import peak_memory, reset_peak_memory

log = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """The machine has too little memory for a part of the job; the message says what lowers it."""


class Clock:
    """Adds up the seconds of each part of a job: `with clock("distil"): ...` adds to `seconds["distil"]`.

    A block that ends with an error, or whose process is killed, does not count.

    Args:
        cfg: the job's configuration, for the advice on memory.
        device: the device whose peak memory the advice names.
        seconds: {part: seconds} of earlier processes that worked on the same run.
        save: called with `seconds` after each block.
    """

    def __init__(
        self,
        cfg: DictConfig,
        device: torch.device,
        seconds: dict[str, float] | None = None,
        save: Callable[[dict[str, float]], None] = lambda seconds: None,
    ) -> None:
        self.cfg, self.device, self.save = cfg, device, save
        self.seconds = dict(seconds or {})
        reset_peak_memory()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block; raises OutOfMemory in place of an error of Python or torch that says that memory is full."""
        log.debug("%s: begins", name)
        start = time.monotonic()
        with explain_out_of_memory(lambda error: self.advise(name)):
            yield
        seconds = time.monotonic() - start
        log.debug("%s: %.2f s", name, seconds)
        self.seconds[name] = round(self.seconds.get(name, 0) + seconds, 2)
        self.save(self.seconds)

    def advise(self, name: str) -> str:
        """Return the message for a part that ran out of memory: the peak so far, and which fields lower it."""
        cfg = self.cfg
        return (
            f"out of memory in stage {name!r} (peak so far {peak_memory(self.device) / 2**30:.1f} GiB; "
            f"data.batch_size={cfg.data.batch_size}, calibration.batch_size={cfg.calibration.batch_size}, "
            f"evaluation.batch_size={cfg.evaluation.batch_size}). Lower the batch size of that stage; "
            "trainer.accumulate_grad_batches keeps the effective batch size, trainer.precision=bf16-mixed halves "
            "activations"
        )


@contextlib.contextmanager
def explain_out_of_memory(advise: Callable[[BaseException], str]) -> Iterator[None]:
    """Raise OutOfMemory in place of an error of Python or torch that says that memory is full.

    Args:
        advise: returns the message for such an error. It is not called for an OutOfMemory of a block inside, whose
            advice is closer to the cause.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(advise(error)) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of Python or torch says that no memory was left."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "allocate memory" in text
        or "not enough memory" in text
    )


def take_first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    return str(error).partition("\n")[0] or type(error).__name__
