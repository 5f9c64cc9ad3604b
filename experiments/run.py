"""A run: its identity, its directory, its lock, and artefacts that are complete or absent."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.utilities import rank_zero_only

from conf.schema import ROOT
from datamodules.latents import read_manifest
from datamodules.sources import data_root

RESULT_VERSION = 1
"""Goes up when the same configuration would give another result."""

NO_EFFECT = {
    "": ("name", "label", "force", "logger", "paths", "precompute"),
    "trainer": ("accelerator", "devices", "num_nodes", "strategy", "resume", "checkpoint_every", "log_every_n_steps"),
    "data": ("num_workers", "max_bad_fraction"),
    "teacher": ("get",),
    "calibration": ("memory_gib",),
    "evaluation": ("latency_batch", "latency_repeats"),
    "export": ("push_to_hub",),
}
"""What is not part of a run's identity: it cannot change a result, or (devices) only within noise."""

PACKAGES = ("conf", "criteria", "datamodules", "experiments", "lightning_modules")
"""This project's own packages."""

PARENT = os.getppid()
"""The process that has started this one, which may be gone by the time that one asks."""

WORDS = ("architecture", "classes", "data", "prompts")
"""Keys whose values are labels and texts, which name no file even where there is one of that name."""


class RunBusy(RuntimeError):
    """Another process works on the same run."""


class UnwritableDirectory(OSError):
    """The folder for runs cannot be made or written to."""


class ForeignFolder(ValueError):
    """Files that no run has made stand where a run would write."""


ENTRIES = (
    *("config.yaml", "scores.json", "plan.json", "seconds.json", "metrics.csv", "metrics.json", "measured.json"),
    *("finished.json", "report.html", "student", "distilled", "weights", "checkpoints", "samples", "sounds", "figures"),
    *("export", "failure", "wandb"),
)
"""Every file and folder that a run writes directly below its own folder; nothing else there is ever removed."""

TEMPORARY = "?" * 8
"""The random ending of a temporary file or folder, as a pattern: tempfile makes endings of eight characters."""


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with open(handle, "w") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")
    os.chmod(partial, 0o644)
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is named."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); delete it to have it made again") from error


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield partial
        remove(path)
        os.chmod(partial, 0o755)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def digest(content: Any) -> str:
    """sha256 of anything JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def portable(content: Any) -> Any:
    """A configuration without the place where this repository lies, and with 4e5 and 400000 the same."""
    if isinstance(content, dict):
        return {key: portable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [portable(value) for value in content]
    if isinstance(content, float) and content.is_integer():
        return int(content)
    if isinstance(content, str) and (content == str(ROOT) or content.startswith(f"{ROOT}{os.sep}")):
        return f"ROOT{content[len(str(ROOT)) :]}"
    return content


def without_modules(content: Any) -> Any:
    """A configuration in which this project's own classes are named by package and class, without their modules.

    A class that moves to another module of its package is the same class: runs and scores that name it stay valid.
    """
    if isinstance(content, list):
        return [without_modules(value) for value in content]
    if not isinstance(content, dict):
        return content
    named = {key: without_modules(value) for key, value in content.items()}
    package, _, rest = str(named.get("_target_", "")).partition(".")
    if package in PACKAGES:
        named["_target_"] = f"{package}.{rest.rpartition('.')[2]}"
    return named


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run, from its config.yaml, as plain values.

    Interpolations stand resolved in it. Any that are left came with a file of somebody else's, and stay as they are
    written: `${oc.env:HF_TOKEN}` in a folder from elsewhere must not read this machine's token.
    """
    content: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
    return content


def effective(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration without what cannot change a result."""
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    if cfg.latents is not None:  # what they are, not where
        content["latents"] = read_manifest(cfg.latents)["id"]
    return without_no_effect(content)


def without_no_effect(config: Any) -> dict[str, Any]:
    """Plain values of a configuration without what cannot change a result."""
    content: dict[str, Any] = without_modules(portable(config))
    for group, names in NO_EFFECT.items():
        if group == "evaluation" and (content["selection"] or {}).get("budget") == "latency":
            continue  # what is measured decides the plan
        for name in names:
            ((content[group] or {}) if group else content).pop(name, None)
    for name in NO_EFFECT["data"]:
        (content["calibration"].get("data") or {}).pop(name, None)
    return content


def fingerprint(files: list[Path], cache: Path) -> str:
    """sha256 over the contents of some files; each file's own is remembered by (path, size, mtime)."""
    make_folder(cache / "fingerprints")
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.name, file)):
        target = file.resolve()
        if target.parent.name == "blobs" and len(target.name) == 64:  # the hub's cache names files by their sha256
            total.update(f"{file.name}:{target.name}\n".encode())
            continue
        stat = file.stat()
        note = cache / "fingerprints" / f"{digest([str(file.resolve()), stat.st_size, stat.st_mtime_ns])[:16]}.json"
        if not note.exists():
            with open(file, "rb") as stream:
                write_json(note, hashlib.file_digest(stream, "sha256").hexdigest())
        total.update(f"{file.name}:{read_json(note)}\n".encode())
    return total.hexdigest()


def make_folder(path: Path) -> None:
    """Raises UnwritableDirectory, saying what to choose, where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableDirectory(
            f"{error.filename} cannot be made ({error.strerror}); choose a folder that can, with paths.runs=..."
        ) from error


def is_rank_zero() -> bool:
    """Is this the process that writes? Lightning reads the rank from torchrun, Slurm or its own launcher."""
    return getattr(rank_zero_only, "rank", 0) == 0


def barrier() -> None:
    """Wait for the other ranks, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def meet(trainer: Trainer) -> None:
    """Wait for the other ranks where torchrun or Slurm has started them, so that all of them agree from here on.

    Those that Lightning itself starts come with its first Trainer, when all that is made before it is there; in later
    jobs of a sweep they meet here, too.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ParallelStrategy) and not isinstance(strategy.cluster_environment, LightningEnvironment):
        assert strategy.launcher is not None
        strategy.launcher.launch(strategy.setup_environment)
    barrier()


def wait_for(path: Path) -> None:
    """Wait until rank 0 has written a file or a folder; raises RuntimeError where what has started this rank is gone.

    That is rank 0 itself, where Lightning has started the ranks; torchrun and Slurm end those that are left.
    """
    while not path.exists():
        if os.getppid() != PARENT:
            raise RuntimeError(f"the process that was to write {path} has ended; what it printed says why")
        time.sleep(0.2)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes what is shared at `path`. The ranks of one job enter together with rank 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")) if is_rank_zero() else contextlib.nullcontext():
        yield


def agreed(value: bool) -> bool:
    """What rank 0 says, on all ranks."""
    said = [value]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(said)
    return said[0]


def cached(folder: Path, key: Any, compute: Callable[[], Any]) -> Any:
    """A JSON result under the hash of `key`: computed once, also by processes that ask at the same time.

    What is stored carries its key, so that a file can be told from a stranger's.
    """
    path = folder / f"{digest(key)}.json"
    with locked(path):
        if agreed(path.exists()):
            return read_json(path)["result"]
        result = compute()
        if is_rank_zero():
            write_json(path, {"key": key, "result": result})
        return result


def named_files(content: Any) -> list[Path]:
    """The files that part of a configuration names, also below $SECATEUR_DATA; of folders weights, notes and texts.

    WORDS name none, nor does the `text` of a measure whose data are on the hub: it is a split of them.
    """
    if isinstance(content, dict):
        words = (*WORDS, "text") if content.get("hub") else WORDS
        content = [part for key, part in content.items() if isinstance(part, dict) or key not in words]
    if isinstance(content, list):
        return [file for part in content for file in named_files(part)]
    if not isinstance(content, str) or not content:
        return []
    for place in (Path(os.path.expanduser(content)), data_root() / content, data_root() / "shared" / "text" / content):
        if os.path.isfile(place):  # a Path says no of a name that is too long, such as a prompt's, by an error
            return [place]
        if os.path.isdir(place):
            endings = ("*.safetensors", "*.json", "*.txt", "*.yaml", "*.jsonl")
            return sorted(file for ending in endings for file in place.rglob(ending))
    return []


class Run:
    """The directory `paths.runs/name/label-id8`, a function of the configuration and of the weights it names."""

    def __init__(self, cfg: DictConfig, teacher: str) -> None:
        self.cfg = cfg
        self.cache = Path(cfg.paths.cache)
        content = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(content, dict)
        named = [{key: content["evaluation"][key] for key in ("metrics", "prompts")}, content["pretrain"]]
        named.append((content["data"] or {}).get("statistics"))
        for data in (content["data"], content["calibration"].get("data")):
            if data and "tokenizer" in data and not data.get("hub"):  # texts are small
                named.append([data["tokenizer"], *(data.get(name) for name in ("train", "holdout", "path"))])
        key = {"config": effective(cfg), "teacher": teacher, "version": RESULT_VERSION}
        if files := named_files(named):
            key["files"] = fingerprint(files, self.cache)
        self.id = digest(key)[:16]
        self.folder = Path(cfg.paths.runs) / cfg.name / f"{cfg.label}-{self.id[:8]}"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, content: Any) -> None:
        """Write one of the run's JSON artefacts, once for all ranks."""
        if is_rank_zero():
            write_json(self / name, content)
        barrier()

    @property
    def finished(self) -> bool:
        return (self / "finished.json").exists()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the directory and hold its lock.

        Raises RunBusy naming the process that has the lock, ForeignFolder where the folder is a link, lies outside
        paths.runs, or holds files under a run's names that no run has made.
        """
        self.check_place()
        make_folder(self.folder)
        if not is_rank_zero():
            yield
            return
        lock = FileLock(self / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            holder = read_json(self / ".holder.json") if (self / ".holder.json").exists() else {"pid": "?", "host": "?"}
            raise RunBusy(
                f"run {self.folder} is being made by process {holder['pid']} on {holder['host']}; "
                "wait for it or stop it"
            ) from error
        except OSError as error:
            raise UnwritableDirectory(
                f"{self.folder} cannot be written to ({error.strerror}); choose another folder with paths.runs=..."
            ) from error
        with lock:
            lock.release()  # `with` took it a second time
            self.claim()
            write_json(self / ".holder.json", {"pid": os.getpid(), "host": socket.gethostname()})
            self.clean()
            config = OmegaConf.create(portable(OmegaConf.to_container(self.cfg, resolve=True)))
            text = f"# run {self.id}; ROOT is the folder of secateur\n{OmegaConf.to_yaml(config)}"
            (self / "config.yaml").write_text(text)
            yield

    def check_place(self) -> None:
        """Raise ForeignFolder where the run's folder is a link, or a link on the way leads out of paths.runs."""
        inside = Path(self.cfg.paths.runs).resolve() / self.cfg.name / self.folder.name
        if self.folder.is_symlink():
            raise ForeignFolder(
                f"{self.folder} is a symbolic link (to {self.folder.resolve()}), and a run writes and removes files in "
                "its own folder only; remove the link, or choose another folder with paths.runs=..."
            )
        if self.folder.resolve() != inside:
            raise ForeignFolder(
                f"{self.folder} is {self.folder.resolve()}, which lies outside paths.runs={self.cfg.paths.runs}; "
                "remove the link that leads there, or choose another folder with paths.runs=..."
            )

    def claim(self) -> None:
        """Write the manifest: the names below the folder that belong to the run.

        It is written before anything else, and only where none of these names is taken, so that what has such a name
        later was made by a run. Raises ForeignFolder naming the first one that is taken.
        """
        manifest = self / ".manifest.json"
        if manifest.exists():
            return
        if taken := [name for name in ENTRIES if os.path.lexists(self / name)]:
            raise ForeignFolder(
                f"{self / taken[0]} was made by no run of this version (the folder has no .manifest.json); move it "
                "away, or choose another folder with paths.runs=..."
            )
        write_json(manifest, {"run": self.id, "entries": ENTRIES})

    def clean(self) -> None:
        """Remove what a killed process was writing; with `force=true`, all that runs have made (not cached scores)."""
        if self.cfg.force:
            self.clear()
        for name in read_json(self / ".manifest.json")["entries"]:
            for partial in self.folder.glob(f".{name}.{TEMPORARY}"):
                remove(partial)
        for partial in (self / "samples").glob(f".*.{TEMPORARY}"):
            remove(partial)

    def clear(self, *kept: str) -> None:
        """Remove what the manifest says that runs have made, but for the entries named here."""
        remove(self / "finished.json")  # first: a run that is cut off here is not finished
        for name in read_json(self / ".manifest.json")["entries"]:
            if name not in kept:
                remove(self / name)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a symbolic link (never what it points to), where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
