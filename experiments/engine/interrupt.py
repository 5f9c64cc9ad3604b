"""What a job says when its user stops it."""

import contextlib
from collections.abc import Iterator

from experiments.engine.job import Job
from experiments.engine.ranks import is_rank_zero

INTERRUPTED = 130
"""exit code of a process that Ctrl-C has ended: 128 and the number of SIGINT"""


@contextlib.contextmanager
def explained_interrupt(job: Job, stage: str) -> Iterator[None]:
    """Say where the same command goes on, and end with code 130, where Ctrl-C ends the block.

    Inside a Trainer, Lightning turns KeyboardInterrupt into SystemExit(1).
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if not isinstance(error if isinstance(error, KeyboardInterrupt) else error.__context__, KeyboardInterrupt):
            raise
        if is_rank_zero():
            step = newest_step(job, stage)
            place = f"stage {stage}" if step is None else f"step {step} of stage {stage}"
            print(f"\nstopped: the same command goes on from {place} ({job.run.folder})", flush=True)
        raise SystemExit(INTERRUPTED) from error


def newest_step(job: Job, stage: str) -> int | None:
    """Return the optimiser step of the newest checkpoint of a stage; None where there is none."""
    steps = [int(path.stem.removeprefix("step=")) for path in (job.run / "checkpoints" / stage).glob("step=*.ckpt")]
    return max(steps, default=None)
