"""Two ranks of one job, started as torchrun does."""

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from pytorch_lightning.utilities import rank_zero_only

from conf import schema
from experiments.engine import ranks

STARTER = multiprocessing.get_context("forkserver")
"""Ranks are forked by a process that has imported the project and never used a GPU: a process that has used one, as
this one may have, cannot be forked. Nothing of this process is inherited, its monkeypatches neither."""
STARTER.set_forkserver_preload(["experiments.engine.pipeline", "support.networks"])


def find_free_port() -> int:
    """Return the number of a TCP port of this machine that no process uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def two_ranks(
    function: Callable[..., Any], *arguments: Any, patches: Mapping[str, Any] | None = None, seconds: float = 300
) -> Iterator[None]:
    """Run function(rank, *arguments) in two processes; at the end of the block both have to end without an error.

    The function, its arguments and `patches`, {dotted name: what stands there in both processes}, are pickled:
    functions have to be those of a module.
    """
    shared = (find_free_port(), function, arguments, dict(patches or {}))
    processes = [STARTER.Process(target=run_rank, args=(rank, *shared)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join(seconds)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def run_rank(
    rank: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], patches: dict[str, Any]
) -> None:
    """Run function(rank, *arguments) in this process as one of two ranks, and end the process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in names.items()})
    rank_zero_only.rank = rank  # this and the next line are what an import in this process would have found
    ranks.PARENT_PID = os.getppid()
    schema.register()
    for name, value in patches.items():
        pytest.MonkeyPatch().setattr(name, value)
    try:
        function(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
