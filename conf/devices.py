"""The GPUs of this machine, and which of them a job of a sweep uses that has a process of its own."""

import itertools
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

JOBS_WITHOUT_GPU = 2
"""jobs that run at once on a machine without a GPU: the data of one load while the other computes"""

_slots: list[FileLock] = []
"""the lock by which this process holds its devices, until it ends"""


def list_gpus() -> list[str]:
    """Return the ids of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them.

    torch is not asked, as it is imported later, and fixes its devices then.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return list(itertools.takewhile(lambda gpu: gpu not in ("", "-1"), map(str.strip, visible.split(","))))
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def count_job_slots(devices: int) -> int:
    """Return how many jobs with this number of devices can run at once on this machine."""
    gpus = len(list_gpus())
    return max(1, gpus // devices) if gpus else JOBS_WITHOUT_GPU


def claim_gpus(folder: Path, gpus: list[str], devices: int) -> None:
    """Choose `devices` of some GPUs for this process that no other process of the sweep uses, until this process ends.

    Where more jobs run at once than there are GPUs for, some share theirs. `folder` is the sweep's; the processes find
    their places by locks in it. It has to be called before CUDA starts; later calls change nothing.
    """
    if _slots or not gpus:
        return
    if len(gpus) <= devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return
    folder = folder / "devices"
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        lock = FileLock(folder / f"{socket.gethostname()}-{number}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        _slots.append(lock)
        first = number % (len(gpus) // devices) * devices
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + devices])
        return
