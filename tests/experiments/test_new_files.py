"""The command `python -m experiments.new`: what it writes passes its own test and runs in a job as it stands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.images import pictures, write_mnist
from support.process import ROOT
from support.results import the_run

from experiments.engine.artefacts import read_json
from experiments.engine.pipeline import run_pipeline
from experiments.scaffold import command
from experiments.scaffold.command import GROUPS, NewFiles, fill_template

KINDS = {"criterion": "increase", "loss": "absolute", "stage": "count", "data": "circles"}


def write_all(folder: Path, package: str) -> dict[str, NewFiles]:
    files = {kind: NewFiles(kind, name, folder, package) for kind, name in KINDS.items()}
    for each in files.values():
        each.write()
    return files


@pytest.mark.slow
def test_what_is_written_passes_its_own_tests(tmp_path):
    """One call for all four, as starting Python takes most of it."""
    write_all(tmp_path, "own")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "tests")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "10 passed" in done.stdout


def test_a_job_uses_all_that_is_written(tmp_path, configure, overrides, data_folder, monkeypatch, quick_end):
    files = write_all(tmp_path / "lab", "own_of_a_job")
    monkeypatch.syspath_prepend(tmp_path / "lab")
    for group in set(GROUPS.values()):
        (data_folder / group).mkdir(exist_ok=True)
        for file in (tmp_path / "lab" / "conf" / group).glob("*.yaml"):
            (data_folder / group / f"{file.stem}.yaml").write_text(file.read_text())
    kept = [override for override in overrides if not override.startswith("data=")]
    small = ["data.train.size=8", "data.train.count=48"]
    run_pipeline(configure(*kept, *(each.override for each in files.values()), *small))
    run = the_run(tmp_path / "runs")
    assert set(read_json(run / "counts.json")) == {"teacher", "pruned", "distilled"}
    assert "train/feature/" in (run / "history" / "distil.csv").read_text()
    assert len(read_json(run / "scores.json")["scores"]) == 12


def test_data_at_a_path_are_one_file_by_what_lies_there(tmp_path, configure, data_folder):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "moths").mkdir()
    for number, picture in enumerate(pictures(3, 8)):
        Image.fromarray(picture).save(tmp_path / "moths" / f"{number}.png")
    (tmp_path / "moths" / "notes.txt").touch()
    np.savez(tmp_path / "set.npz", x=pictures(3, 8))
    for path, begins, field in (
        ("mnist", "idx", "train.path"),
        ("moths", "image_folder", "path"),
        ("set.npz", "npz", "train.path"),
    ):
        name = f"new_{begins}"
        files = NewFiles("data", name, tmp_path / "lab", "own", str(tmp_path / path))
        assert [file.name for file in files.write()] == [f"{name}.yaml", f"test_{name}.py"]
        content = (tmp_path / "lab" / "conf" / "data" / f"{name}.yaml").read_text()
        (data_folder / "data" / f"{name}.yaml").write_text(content)
        cfg = configure(f"data={name}")
        value = cfg.data.path if field == "path" else cfg.data.train.path
        assert value == str(tmp_path / path) and cfg.data.name == name
        assert f"conf/data/{begins}.yaml" in content


@pytest.mark.parametrize("name", ["set #1", "a: b", "${seed}", r"a\${seed}", 'it\'s "it" \u00e9'])
def test_a_path_of_any_characters_is_written_as_it_is(tmp_path, configure, data_folder, name):
    for folder, file in ((tmp_path / name / "pictures", "0.png"), (tmp_path / name / "videos", "0.mp4")):
        folder.mkdir(parents=True)
        (folder / file).touch()
        files = NewFiles("data", folder.name, tmp_path / "lab", "own", str(folder))
        (data_folder / "data" / f"{folder.name}.yaml").write_text(next(iter(files.render().values())))
    assert configure("data=pictures").data.path == str(tmp_path / name / "pictures")
    assert configure("data=videos").data.train.path == str(tmp_path / name / "videos")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "My-Moths"}, "NAME=My-Moths is no name of a Python module"),
        ({"name": "class"}, "NAME=class is no name of a Python module"),
        ({"name": "null"}, "NAME=null is no text in YAML; choose another name, such as my_null"),
        ({"folder": Path("/a\nb")}, r"--folder='/a\\nb' has characters that cannot be printed"),
        ({"name": "taylor"}, "NAME=taylor: criterion=taylor exists; choose another name"),
        ({"package": "torch"}, "--package=torch: Python has a package of that name"),
        ({"path": "/x"}, "--path=/x is for data; leave it out for a criterion"),
        ({"kind": "data", "path": "PATH/odd"}, r"has no files that a reader knows; it has: \.odd \(1\)"),
        ({"kind": "data", "path": "PATH/nothing"}, "nothing does not exist"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, changes, message):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a.odd").touch()
    fields = {"kind": "criterion", "name": "increase", "folder": tmp_path / "lab", "package": "own"} | changes
    if "path" in fields:
        fields["path"] = fields["path"].replace("PATH", str(tmp_path))
    with pytest.raises((ValueError, OSError), match=message):
        NewFiles(**fields).write()
    assert not (tmp_path / "lab").exists()


def test_no_file_is_written_over(tmp_path):
    NewFiles("criterion", "increase", tmp_path, "own").write()
    (tmp_path / "conf" / "criterion" / "increase.yaml").unlink()
    with pytest.raises(ValueError, match=r"increase\.py exists; choose another NAME or --folder, or remove it"):
        NewFiles("criterion", "increase", tmp_path, "own").write()
    assert not (tmp_path / "conf" / "criterion" / "increase.yaml").exists()


def test_the_command_prints_files_and_what_runs_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["new", "data", "circles", "--folder", str(tmp_path / "my lab")])
    command.main()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    folder, conf = (shlex.quote(f"{tmp_path}/my lab{part}") for part in ("", "/conf"))
    assert f"{tmp_path}/my lab/own/circles.py" in lines
    assert lines[-3:] == [
        f"PYTHONPATH={folder} python -m pytest {folder}/tests/test_circles.py",
        f"PYTHONPATH={folder} python -m experiments.data --config-dir {conf} data=circles",
        f"PYTHONPATH={folder} python train.py --config-dir {conf} data=circles",
    ]
    assert (tmp_path / "my lab" / "tests" / "test_circles.py").exists()


@pytest.mark.parametrize(
    ("kind", "name", "class_name", "pipeline"),
    [
        ("criterion", "increase", "Increase", ""),
        ("loss", "absolute", "Absolute", ""),
        ("stage", "count", "Count", "counted"),
    ],
)
def test_the_examples_of_the_docs_are_those_of_the_templates(kind, name, class_name, pipeline):
    page = (ROOT / "docs" / "extending.md").read_text()
    values = {
        "name": name,
        "class_name": class_name,
        "module": "my_package",
        "pipeline": pipeline,
        "config_dir": "~/conf",
    }
    written = fill_template(f"{kind}.py", **values)
    assert re.search(r"^class .*", written, re.M | re.S)[0].strip() in page
    assert fill_template(f"{kind}.yaml", **values).partition("\n")[2].strip() in page
