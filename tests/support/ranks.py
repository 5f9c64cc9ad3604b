"""Two ranks of one job, started as torchrun does."""

import contextlib
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only

from experiments.engine import ranks


@contextlib.contextmanager
def two_ranks(function: Callable[..., Any], *arguments: Any, seconds: float = 300) -> Iterator[None]:
    """Run function(rank, *arguments) in two processes; at the end of the block both have to end without an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in names.items()})
        rank_zero_only.rank = rank  # this and the next line are what an import in this process would have found
        ranks.PARENT_PID = os.getppid()
        try:
            function(rank, *arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
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
