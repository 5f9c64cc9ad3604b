"""Provenance of a result: versions, commit and command."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from typing import Any

from conf import __version__
from conf.schema import ROOT
from experiments.engine.sweep import compose_job_command, open_record

LIBRARIES = ("torch", "diffusers", "transformers", "pytorch-lightning", "hydra-core", "numpy")


def collect_provenance() -> dict[str, Any]:
    """Return the versions of this project, of Python and of the libraries that decide results, and the command.

    `command` is what was called, and `job_command` what runs this job alone if it is one of a sweep. `commit` is None
    where the project is not a git checkout; `dirty` tells whether files differ from that commit.
    """
    record = open_record()
    return {
        "secateur": __version__,
        **read_commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "command": shlex.join(sys.argv),
        "job_command": compose_job_command(record.content) if record.in_sweep else shlex.join(sys.argv),
    }


def read_commit() -> dict[str, Any]:
    """Return the commit of this checkout and whether tracked files were changed since; None for both without git."""
    try:
        head, status = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": head.strip(), "dirty": bool(status.strip())}
