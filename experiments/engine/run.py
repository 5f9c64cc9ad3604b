"""A run: its folder, its lock, and what in the folder is its own."""

import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from experiments.engine import artefacts
from experiments.engine.artefacts import (
    TEMPORARY,
    UnwritableDirectory,
    digest,
    explain_full_disk,
    find_changed_files,
    format_json,
    hash_files,
    list_partials,
    make_folder,
    read_json,
    remove,
    write_json,
    write_text,
)
from experiments.engine.identity import RESULT_VERSION, as_written, effective, fingerprint, named_files, portable
from experiments.engine.locks import describe_this_process, has_ended, read_holder
from experiments.engine.ranks import barrier, is_rank_zero

log = logging.getLogger(__name__)


class RunBusy(RuntimeError):
    """Another process works on the same run."""


class ForeignFolder(ValueError):
    """Files that no run has made stand where a run would write."""


ENTRIES = (
    *("config.yaml", "run.log", "measured.json", "finished.json", "report.html", "figures", "sounds"),
    *("wandb", "logs"),
)
"""What a run writes directly below its own folder, beside the artefacts of its stages."""

MANIFEST = ".manifest.json"
"""The file that says which paths below a run's folder belong to the run, and what their contents were."""


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
        self.measured: dict[str, Any] = {}
        """the content of measured.json: figures that depend on the machine"""
        self.folder = Path(cfg.paths.runs) / cfg.name / f"{cfg.label}-{self.id[:8]}"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, content: Any) -> None:
        """Write one of the run's JSON artefacts, once for all ranks, which all call this."""
        if is_rank_zero():
            self.write_alone(name, content)
        barrier()

    def write_alone(self, name: str, content: Any) -> None:
        """Write one of the run's JSON artefacts; rank 0 alone calls this."""
        text = format_json(content)
        self.note_hashes(name, {"": hashlib.sha256(text.encode()).hexdigest()})
        write_text(self / name, text)

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """Yield a temporary folder that becomes the artefact `name` at the end of the block; for rank 0 alone."""
        with artefacts.staged(self / name) as partial:
            yield partial
            self.note_hashes(name, hash_files(partial))

    def note_hashes(self, name: str, hashes: dict[str, str]) -> None:
        """Add the hashes of an artefact to the manifest. That comes first: then an artefact never lacks its hash."""
        manifest = self.read_manifest()
        manifest.setdefault("sha256", {})[name] = hashes
        write_json(self / MANIFEST, manifest)

    def read_manifest(self) -> dict[str, Any]:
        """Return {"run": id, "entries": paths of the run, "sha256": {artefact: {file: hash}}}.

        What earlier versions made has no hashes; without a manifest there are none at all.
        """
        manifest: dict[str, Any] = read_json(self / MANIFEST) if (self / MANIFEST).exists() else {}
        return manifest

    def list_changes(self) -> dict[str, list[str]]:
        """Return {artefact: files that have changed since the run wrote them}, of artefacts that are there."""
        hashes: dict[str, dict[str, str]] = self.read_manifest().get("sha256", {})
        there = {name: files for name, files in hashes.items() if os.path.lexists(self / name)}
        changes = {name: find_changed_files(self / name, files) for name, files in there.items()}
        return {name: files for name, files in changes.items() if files}

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end, and what it says of itself is what it wrote."""
        if not (self / "finished.json").exists():
            return False
        hashes = self.read_manifest().get("sha256", {})
        return not any(
            find_changed_files(self / name, hashes[name])
            for name in ("finished.json", "metrics.json")
            if name in hashes
        )

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
            holder = read_holder(self / ".holder.json")
            remedy = (
                "that process has ended, but one that it has started still holds the lock: stop it"
                if has_ended(holder)
                else "wait for it or stop it"
            )
            raise RunBusy(
                f"run {self.folder} is being made by process {holder['pid']} on {holder['host']}; {remedy}"
            ) from error
        except OSError as error:
            raise UnwritableDirectory(
                f"{self.folder} cannot be written to ({error.strerror}); choose another folder with paths.runs=..."
            ) from error
        with lock, explain_full_disk(self.folder):
            lock.release()  # `with` took it a second time
            self.claim([*ENTRIES, *artefacts])
            write_json(self / ".holder.json", describe_this_process())
            self.clean()
            config = OmegaConf.create(portable(as_written(self.cfg)))
            text = f"# run {self.id}; ROOT is the folder of secateur\n{OmegaConf.to_yaml(config)}"
            write_text(self / "config.yaml", text)
            with logged(self / "run.log"):
                self.discard_changed()
                self.measured = read_json(self / "measured.json") if (self / "measured.json").exists() else {}
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
        if (self / MANIFEST).exists():
            return
        if taken := [name for name in entries if os.path.lexists(self / name)]:
            remove(self / ".lock")
            raise ForeignFolder(
                f"{self / taken[0]} was made by no run of this version (the folder has no .manifest.json); move it "
                "away, or choose another folder with paths.runs=..."
            )
        write_json(self / MANIFEST, {"run": self.id, "entries": list(entries)})

    def entries(self) -> list[str]:
        """Return the paths that belong to the run, as its manifest has them."""
        entries: list[str] = read_json(self / MANIFEST)["entries"]
        return entries

    def clean(self) -> None:
        """Remove what a killed process was writing; with `force=true`, all that runs have made (not cached scores)."""
        if self.cfg.force:
            self.clear(self.entries())
        for name in self.entries():
            for partial in list_partials(self / name):
                remove(partial)
        for partial in (self / "samples").glob(f".*.{TEMPORARY}"):
            remove(partial)

    def discard_changed(self) -> None:
        """Take away, with a warning, artefacts that have changed since the run wrote them, so that they are made again.

        A file may have been edited on purpose: it is kept under another name.
        """
        for name, files in self.list_changes().items():
            path = self / name
            if name != "finished.json":
                remove(self / "finished.json")
            if path.is_file():
                os.replace(path, kept := path.with_name(f"{path.name}.changed"))
                outcome = f"it is kept as {kept.name} and made again"
            else:
                remove(path)
                outcome = f"it is removed and made again ({', '.join(files)} differ)"
            advice = "; a plan of your own goes in by selection=given selection.units=[...]" * name.startswith("plan")
            log.warning("%s is not what this run has written: %s%s", path, outcome, advice)

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
        made = [name for name in self.entries() if name not in ("config.yaml", "run.log")] if is_rank_zero() else [""]
        new = not any(os.path.lexists(self / name) for name in made)
        try:
            yield
        except BaseException:
            if new:
                self.clear(self.entries())
                for name in (MANIFEST, ".holder.json", ".lock"):
                    remove(self / name)
                for folder in (self.folder, *self.folder.parents[: len(Path(self.cfg.name).parts)]):
                    with contextlib.suppress(OSError):  # it is not empty
                        folder.rmdir()
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
