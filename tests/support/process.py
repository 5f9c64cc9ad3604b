"""train.py as a process of its own, as a user starts it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def train(
    *arguments: str, check: bool = True, config_dir: Path | None = None, timeout: float = 1800, **options: object
) -> subprocess.CompletedProcess:
    """Run train.py as a user does, in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py")]
    if config_dir:
        command += ["--config-dir", str(config_dir)]
    try:
        process = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=timeout, **options)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired as error:
        printed = [(each or b"").decode()[-4000:] for each in (error.stdout, error.stderr)]
        raise AssertionError("\n".join([f"train.py has not ended in {timeout} s", *printed])) from None
    if check and process.returncode:
        raise AssertionError(process.stdout[-2000:] + process.stderr[-4000:])
    return process
