"""A run: its folder, its lock, and what in the folder is its own."""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from experiments.engine.artefacts import UnwritableDirectory, digest, make_folder, read_json, remove, write_json
from experiments.engine.data_identity import DATA_FILE, check_data_unchanged, with_first_paths
from experiments.engine.identity import RESULT_VERSION, effective, fingerprint, named_files, portable
from experiments.engine.ranks import barrier, is_rank_zero


class RunBusy(RuntimeError):
    """Another process works on the same run."""


class ForeignFolder(ValueError):
    """Files that no run has made stand where a run would write."""


ENTRIES = (
    *("config.yaml", DATA_FILE, "run.log", "measured.json", "finished.json", "report.html", "figures", "sounds"),
    *("wandb", "logs"),
)
"""What a run writes directly below its own folder, beside the artefacts of its stages."""

TEMPORARY = "?" * 8
"""The random ending of a temporary file or folder, as a pattern: tempfile makes endings of eight characters."""


class Run:
    """The directory `paths.runs/name/label-id8`, a function of the configuration and of the weights it names."""

    def __init__(self, cfg: DictConfig, teacher: str, fingerprints: dict[str, str] | None = None) -> None:
        """Name the run; `fingerprints` are those of its data (see fingerprint_data), None where they do not matter."""
        self.cfg, self.fingerprints = cfg, fingerprints or {}
        self.cache = Path(cfg.paths.cache)
        content = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(content, dict)
        named = [{key: content["evaluation"][key] for key in ("metrics", "prompts")}, content["pretrain"]]
        named.append((content["data"] or {}).get("statistics"))
        for data in (content["data"], content["calibration"].get("data")):
            if data and "tokenizer" in data and not data.get("hub"):  # texts are small
                named.append([data["tokenizer"], *(data.get(name) for name in ("train", "holdout", "path"))])
        config = with_first_paths(effective(cfg), self.fingerprints, self.cache)
        key = {"config": config, "teacher": teacher, "version": RESULT_VERSION}
        if files := named_files(named):
            key["files"] = fingerprint(files, self.cache)
        self.id = digest(key)[:16]
        self.measured: dict[str, Any] = {}
        """the content of measured.json: figures that depend on the machine"""
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
    def opened(self, artefacts: Sequence[str] = ()) -> Iterator[None]:
        """Make the folder, hold its lock, and write the log of what happens inside into it.

        `artefacts` are the paths of what the stages make. Raises RunBusy naming the process that has the lock, and
        ForeignFolder where the folder is a link, lies outside paths.runs, or holds files under a run's names that no
        run has made.
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
            self.claim([*ENTRIES, *artefacts])
            write_json(self / ".holder.json", {"pid": os.getpid(), "host": socket.gethostname()})
            self.clean()
            self.note_data()
            config = OmegaConf.create(portable(OmegaConf.to_container(self.cfg, resolve=True)))
            text = f"# run {self.id}; ROOT is the folder of secateur\n{OmegaConf.to_yaml(config)}"
            (self / "config.yaml").write_text(text)
            self.measured = read_json(self / "measured.json") if (self / "measured.json").exists() else {}
            with logged(self / "run.log"):
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

    def claim(self, entries: Sequence[str]) -> None:
        """Write the manifest: the paths below the folder that belong to the run.

        It is written before anything else, and only where none of these paths is taken, so that what has such a name
        later was made by a run. Raises ForeignFolder naming the first one that is taken.
        """
        manifest = self / ".manifest.json"
        if manifest.exists():
            return
        if taken := [name for name in entries if os.path.lexists(self / name)]:
            raise ForeignFolder(
                f"{self / taken[0]} was made by no run of this version (the folder has no .manifest.json); move it "
                "away, or choose another folder with paths.runs=..."
            )
        write_json(manifest, {"run": self.id, "entries": list(entries)})

    def entries(self) -> list[str]:
        """Return the paths that belong to the run, as its manifest has them."""
        entries: list[str] = read_json(self / ".manifest.json")["entries"]
        return entries

    def clean(self) -> None:
        """Remove what a killed process was writing; with `force=true`, all that runs have made (not cached scores)."""
        if self.cfg.force:
            self.clear(self.entries())
        for path in map(Path, self.entries()):
            for partial in (self.folder / path.parent).glob(f".{path.name}.{TEMPORARY}"):
                remove(partial)
        for partial in (self / "samples").glob(f".*.{TEMPORARY}"):
            remove(partial)

    def note_data(self) -> None:
        """Write the fingerprints of the run's data. Raises ChangedData where the run was begun with other data."""
        if self.cfg.force:
            remove(self / DATA_FILE)
        check_data_unchanged(self.folder, self.fingerprints, self.cfg)
        before = read_json(self / DATA_FILE) if (self / DATA_FILE).exists() else {}
        write_json(self / DATA_FILE, before | self.fingerprints)

    def clear(self, paths: Sequence[str]) -> None:
        """Remove some of what runs have made; the run is not finished from then on."""
        remove(self / "finished.json")  # first: a run that is cut off here is not finished
        for path in paths:
            remove(self / path)

    @contextlib.contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Remove the folder again where the block refuses the configuration of a run that has made nothing yet.

        Somebody's own files in it stay.
        """
        made = (
            [name for name in self.entries() if name not in ("config.yaml", DATA_FILE, "run.log")]
            if is_rank_zero()
            else [""]
        )
        new = not any(os.path.lexists(self / name) for name in made)
        try:
            yield
        except BaseException:
            if new:
                self.clear(self.entries())
                for name in (".manifest.json", ".holder.json", ".lock"):
                    remove(self / name)
                with contextlib.suppress(OSError):  # it is not empty
                    self.folder.rmdir()
                    self.folder.parent.rmdir()
            raise


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Append what is logged inside to a file, and the traceback of an error that ends the block."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException:
        handler.handle(logging.LogRecord("secateur", logging.ERROR, __file__, 0, "stopped", (), sys.exc_info()))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
