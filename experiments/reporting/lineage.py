"""The artifacts of a W&B run, each made from the one before: teacher, scores, plan, networks, export."""

import fnmatch
import logging
from pathlib import Path
from typing import Any

import wandb

from conf.schema import ROOT
from experiments.engine.artefacts import digest, read_json
from experiments.engine.run import MANIFEST
from experiments.reporting.run_files import read_plans

log = logging.getLogger(__name__)

KINDS = {
    "scores*.json": "scores",
    "plan*.json": "plan",
    "networks/*": "network",
    "weights": "network",
    "export": "export",
}
"""{pattern of a path below a run's folder: type of its artifact}"""


def log_lineage(run: Any, folder: Path, run_id: str, teacher_path: str | None) -> None:
    """Log a finished run's artifacts in the order in which they were made, each as the input of the next.

    JSON files are uploaded. Networks and exports are references to where they are, with checksums; the teacher is a
    reference without, as its fingerprint is in its name. Where wandb does not take them, that is logged as a warning,
    because the job is done.

    Args:
        run: the W&B run, online or offline.
        folder: the run's folder.
        run_id: id of the run, whose first eight characters end the names of its artifacts.
        teacher_path: `teacher.path` of the configuration: a folder or an id on the hub; None where there is no teacher.
    """
    artifacts = [] if teacher_path is None else [make_teacher_artifact(folder, teacher_path)]
    artifacts += [make_artifact(folder, path, kind, run_id) for path, kind in list_artefacts(folder)]
    for number, artifact in enumerate(artifacts):
        if number:
            artifact.metadata |= {"made_from": artifacts[number - 1].name}
        try:  # `use_artifact` refuses to work offline; this is what it calls itself
            run._log_artifact(artifact, is_user_created=True, use_after_commit=number + 1 < len(artifacts))
        except (AttributeError, TypeError, wandb.Error) as error:
            log.warning("wandb %s does not log the artifact %s: %s", wandb.__version__, artifact.name, error)
            return


def list_artefacts(folder: Path) -> list[tuple[str, str]]:
    """Return (path below the run's folder, type) of what is an artifact, in the order in which stages made it."""
    entries = [name for name in read_json(folder / MANIFEST)["entries"] if (folder / name).exists()]
    kinds = ((name, next((KINDS[key] for key in KINDS if fnmatch.fnmatch(name, key)), None)) for name in entries)
    return [(name, kind) for name, kind in kinds if kind is not None]


def make_artifact(folder: Path, path: str, kind: str, run_id: str) -> wandb.Artifact:
    """Return the artifact of a file or folder of a run.

    Scores are named by their content, because the runs of a sweep share them.
    """
    suffix = digest(read_json(folder / path)["scores"]) if kind == "scores" else run_id
    artifact = wandb.Artifact(f"{Path(path).stem}-{suffix[:8]}", type=kind)
    if (folder / path).is_dir():
        artifact.add_reference((folder / path).resolve().as_uri(), name=Path(path).name)
    else:
        artifact.add_file(str(folder / path))
    return artifact


def make_teacher_artifact(folder: Path, path: str) -> wandb.Artifact:
    """Return the artifact of the teacher of a run, a reference to its folder or to its page on the hub."""
    fingerprint = next((plan["teacher"] for plan in read_plans(folder)), digest(path))
    local = Path(path.replace("ROOT", str(ROOT), 1) if path.startswith("ROOT") else path).expanduser()
    address = local.resolve().as_uri() if local.exists() else f"https://huggingface.co/{path}"
    artifact = wandb.Artifact(f"teacher-{fingerprint[:8]}", type="teacher", metadata={"fingerprint": fingerprint})
    artifact.add_reference(address, name="teacher", checksum=False)
    return artifact


def make_run_artifact(folder: Path, name: str, kind: str, run_id: str) -> wandb.Artifact:
    """Return the artifact with all JSON files of a run, named `name` and the first characters of the run's id."""
    artifact = wandb.Artifact(f"{name}-{run_id[:8]}", type=kind, metadata={"run_id": run_id})
    for path in sorted(folder.glob("*.json")):
        if not path.name.startswith("."):
            artifact.add_file(str(path))
    return artifact
