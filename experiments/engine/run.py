"""The folder of a run: its name, its lock, which files in it belong to the run, and whether they have changed."""

import contextlib
import hashlib
import itertools
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
from experiments.engine.data_identity import DATA_FILE, check_data_unchanged, with_first_paths
from experiments.engine.identity import (
    RESULT_VERSION,
    fingerprint,
    get_effective_settings,
    get_written_settings,
    list_distillations,
    list_named_files,
    make_portable,
)
from experiments.engine.locks import describe_this_process, has_ended, read_holder
from experiments.engine.ranks import barrier, is_rank_zero
from lightning_modules.disk import explain_full_disk

log = logging.getLogger(__name__)


class RunBusy(RuntimeError):
    """Another process works on the same run."""


class RunLocked(RuntimeError):
    """The process that worked on a run has ended, and its lock is still held: there is nothing to wait for."""


class ForeignFolder(ValueError):
    """The run's folder is a link, lies outside `paths.runs`, or contains a run's file names that no run wrote."""


ENTRIES = (
    *("config.yaml", DATA_FILE, "run.log", "measured.json", "finished.json", "report.html", "figures", "sounds"),
    *("wandb", "logs"),
)
"""Names of what a run writes into its folder, beside the artefacts of its stages."""

MANIFEST = ".manifest.json"
"""The file that says which paths below a run's folder belong to the run, and what their contents were."""


class Run:
    """A run in the folder `paths.runs/<name>/<label>-<first 8 characters of its id>`.

    The id is a hash of the effective settings and of the contents of the files that they name.

    Args:
        cfg: the configuration of the job.
        teacher: fingerprint of the teacher's files.
        fingerprints: fingerprints of the data sets (see fingerprint_data); None where they have no effect.
    """

    def __init__(self, cfg: DictConfig, teacher: str, fingerprints: dict[str, str] | None = None) -> None:
        self.cfg, self.fingerprints = cfg, fingerprints or {}
        self.cache = Path(cfg.paths.cache)
        config = with_first_paths(get_effective_settings(cfg), self.fingerprints, self.cache)
        key = {"config": config, "teacher": teacher, "version": RESULT_VERSION}
        if files := list_named_files(select_parts_with_files(cfg)):
            key["files"] = fingerprint(files, self.cache)
        self.id = digest(key)[:16]
        self.measured: dict[str, Any] = {}
        """the content of measured.json: figures that depend on the machine"""
        self.folder = Path(cfg.paths.runs) / cfg.name / f"{cfg.label}-{self.id[:8]}"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, content: Any) -> None:
        """Write a JSON artefact on rank 0, while the other ranks wait; all ranks call this."""
        if is_rank_zero():
            self.write_on_rank_zero(name, content)
        barrier()

    def write_on_rank_zero(self, name: str, content: Any) -> None:
        """Write a JSON artefact; only rank 0 calls this."""
        self.write_text_on_rank_zero(name, format_json(content))

    def write_text_on_rank_zero(self, name: str, text: str) -> None:
        """Write a text as an artefact; only rank 0 calls this."""
        self.note_hashes(name, {"": hashlib.sha256(text.encode()).hexdigest()})
        write_text(self / name, text)

    @contextlib.contextmanager
    def write_folder(self, name: str) -> Iterator[Path]:
        """Yield a temporary folder that becomes the artefact `name` at the end of the block; only on rank 0."""
        with artefacts.write_folder(self / name) as partial:
            yield partial
            self.note_hashes(name, hash_files(partial))

    def note_hashes(self, name: str, hashes: dict[str, str]) -> None:
        """Add the hashes of an artefact to the manifest, before the artefact itself, so that it never lacks them."""
        manifest = self.read_manifest()
        manifest.setdefault("sha256", {})[name] = hashes
        write_json(self / MANIFEST, manifest)

    def read_manifest(self) -> dict[str, Any]:
        """Return {"run": id, "entries": paths of the run, "sha256": {artefact: {file: hash}}}; {} without a manifest.

        Artefacts of earlier versions have no hashes.
        """
        manifest: dict[str, Any] = read_json(self / MANIFEST) if (self / MANIFEST).exists() else {}
        return manifest

    def list_changes(self) -> dict[str, list[str]]:
        """Return {artefact: its files that have changed since the run wrote them} of existing artefacts."""
        hashes: dict[str, dict[str, str]] = self.read_manifest().get("sha256", {})
        existing = [name for name in hashes if os.path.lexists(self / name)]
        changes = {name: find_changed_files(self / name, hashes[name]) for name in existing}
        return {name: files for name, files in changes.items() if files}

    @property
    def finished(self) -> bool:
        """Whether the run is finished, and its metrics and summary are still those that it wrote."""
        if not (self / "finished.json").exists():
            return False
        hashes = self.read_manifest().get("sha256", {})
        return not any(
            find_changed_files(self / name, hashes[name])
            for name in ("finished.json", "metrics.json")
            if name in hashes
        )

    @contextlib.contextmanager
    def open(self, paths: Sequence[str] = ()) -> Iterator[None]:
        """Make the folder, hold its lock during the block, and write what is logged there to run.log.

        `paths` are those of the artefacts of all stages. Raises RunBusy naming the process that holds the lock, and
        ForeignFolder where the folder is a link, lies outside paths.runs, or contains files that no run has made under
        the names of a run's files.
        """
        self.check_folder()
        make_folder(self.folder)
        if not is_rank_zero():
            yield
            return
        lock = FileLock(self / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            holder = read_holder(self / ".holder.json")
            maker = f"run {self.folder} is being made by process {holder['pid']} on {holder['host']}"
            if has_ended(holder):
                remedy = "that process has ended, but one that it has started still holds the lock: stop it"
                raise RunLocked(f"{maker}; {remedy}") from error
            raise RunBusy(f"{maker}; wait for it or stop it") from error
        except OSError as error:
            raise UnwritableDirectory(
                f"{self.folder} cannot be written to ({error.strerror}); choose another folder with paths.runs=..."
            ) from error
        with lock, explain_full_disk(self.folder):
            lock.release()  # `with` has acquired it a second time
            self.claim([*ENTRIES, *paths])
            write_json(self / ".holder.json", describe_this_process())
            self.clean()
            self.note_data()
            config = OmegaConf.create(make_portable(get_written_settings(self.cfg)))
            text = f"# run {self.id}; ROOT is the folder of secateur\n{OmegaConf.to_yaml(config)}"
            write_text(self / "config.yaml", text)
            with log_to(self / "run.log"):
                self.discard_changed()
                self.measured = read_json(self / "measured.json") if (self / "measured.json").exists() else {}
                yield

    def check_folder(self) -> None:
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
        """Write the manifest, the paths below the folder that belong to the run.

        It is written before anything else, and only where none of these paths exists, so that whatever has one of these
        names later was made by a run. Raises ForeignFolder naming the first path that exists.
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
        """Remove partly written files of killed processes.

        With `force=true` everything that earlier runs wrote in this folder is removed (not the shared cache).
        """
        if self.cfg.force:
            self.clear(self.entries())
        for name in self.entries():
            for partial in list_partials(self / name):
                remove(partial)
        for partial in (self / "samples").glob(f".*.{TEMPORARY}"):
            remove(partial)

    def discard_changed(self) -> None:
        """Rename artefacts that have changed since the run wrote them, with a warning, so that they are made again.

        They are kept directly below the run's folder, as somebody may have edited them on purpose.
        """
        for name, files in self.list_changes().items():
            path = self / name
            if name != "finished.json":
                remove(self / "finished.json")
            names = (f"{name.replace('/', '-')}.changed{number or ''}" for number in itertools.count())
            kept = next(self / unused for unused in names if not os.path.lexists(self / unused))
            os.replace(path, kept)
            differing = f" ({', '.join(files)})" if kept.is_dir() else ""
            advice = "; a plan of your own goes in by selection=given selection.units=[...]" * name.startswith("plan")
            log.warning(
                "%s is not what this run has written%s: it is kept as %s and made again%s",
                path,
                differing,
                kept.name,
                advice,
            )

    def note_data(self) -> None:
        """Write the fingerprints of the run's data. Raises ChangedData where the run was begun with other data."""
        if self.cfg.force:
            remove(self / DATA_FILE)
        check_data_unchanged(self.folder, self.fingerprints, self.cfg)
        before = read_json(self / DATA_FILE) if (self / DATA_FILE).exists() else {}
        write_json(self / DATA_FILE, before | self.fingerprints)

    def clear(self, paths: Sequence[str]) -> None:
        """Remove some of the files and folders of the run, which is not finished from then on."""
        remove(self / "finished.json")  # first, as a run that is interrupted here is not finished
        for path in paths:
            remove(self / path)

    @contextlib.contextmanager
    def discard_on_error(self) -> Iterator[None]:
        """Remove the run's files and folder where an error ends the block and the run has no artefact yet.

        Files that no run has made stay.
        """
        early = ("config.yaml", DATA_FILE, "run.log")  # written before the block
        is_new = is_rank_zero() and not any(
            os.path.lexists(self / name) for name in self.entries() if name not in early
        )
        try:
            yield
        except BaseException:
            if is_new:
                self.clear(self.entries())
                for name in (MANIFEST, ".holder.json", ".lock"):
                    remove(self / name)
                for folder in (self.folder, *self.folder.parents[: len(Path(self.cfg.name).parts)]):
                    with contextlib.suppress(OSError):  # it is not empty
                        folder.rmdir()
            raise


def select_parts_with_files(cfg: DictConfig) -> list[Any]:
    """Return the parts of a configuration whose files are part of a run's identity by their contents.

    They are measures, prompts, statistics, the module of a pretraining, another teacher of a distillation, and texts
    (which are small), not pictures.
    """
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    parts = [{key: content["evaluation"][key] for key in ("metrics", "prompts")}, content["pretrain"]]
    parts.append((content["data"] or {}).get("statistics"))
    parts.append([node.get("teacher") for node in list_distillations(content)])
    for data in (content["data"], content["calibration"].get("data")):
        if data and "tokenizer" in data and not data.get("hub"):
            parts.append([data["tokenizer"], *(data.get(name) for name in ("train", "holdout", "path"))])
    return parts


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append what is logged during the block to a file, and the traceback of an error that ends it."""
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
