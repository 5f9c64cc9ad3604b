"""Jobs that are stopped while they train."""

import contextlib
from collections.abc import Iterator

import pytest

from lightning_modules.training.progress import StageBar


@contextlib.contextmanager
def ctrl_c_after_step(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    """Press Ctrl-C after this step of every training in the block."""
    update = StageBar.on_train_batch_end

    def update_or_stop(bar, trainer, *arguments) -> None:
        update(bar, trainer, *arguments)
        if trainer.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageBar, "on_train_batch_end", update_or_stop)
        yield
