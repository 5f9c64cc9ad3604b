"""The examples of docs/datasets.md, taken from the page and run."""

import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from support.images import pictures, write_mnist
from support.process import ROOT

from experiments.inspection import command as inspection
from train import main

PAGE = (ROOT / "docs" / "datasets.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
LINES = [line for kind, text in BLOCKS if kind == "bash" for line in text.strip().splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python train.py")]
INSPECTIONS = [line for line in LINES if line.startswith("python -m experiments.data")]


@pytest.fixture
def here(tmp_path: Path, overrides: list[str]) -> Callable[[str], list[str]]:
    """The page's files and data, below a temporary folder; here(command) -> arguments of a tiny job."""

    def moved(text: str) -> str:
        return re.sub(
            r"(?<![\w.])(~|/pictures|/tables|/usr/share/datasets)(?=/)",
            lambda match: f"{tmp_path}/{match[1].strip('/~')}",
            text,
        )

    for kind, text in BLOCKS:
        if kind == "yaml":
            file = Path(moved(text.splitlines()[0].removeprefix("# ")))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(moved(text))
    for folder in ("moths", "shop"):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        for number, picture in enumerate(pictures(24, 10)):
            Image.fromarray(picture).save(tmp_path / "pictures" / folder / f"{number}.png")
    lines = [f"{number},{number}.png,a thing" for number in range(24)]
    (tmp_path / "pictures" / "shop" / "products.csv").write_text("\n".join(["key,image,title", *lines]))
    (tmp_path / "pictures" / "slices").mkdir()
    for number, picture in enumerate(pictures(24, 10)):
        Image.fromarray(picture[..., 0].astype(np.uint16) * 16).save(tmp_path / "pictures" / "slices" / f"{number}.png")
    write_mnist(tmp_path / "usr" / "share" / "datasets" / "fashion-mnist")
    (tmp_path / "tables").mkdir()
    pq.write_table(
        pa.table({"scan": [encoded(picture) for picture in pictures(24, 10)], "finding": np.arange(24) % 3}),
        tmp_path / "tables" / "scans-0.parquet",
    )
    kept = [override for override in overrides if not override.startswith("data=")]

    def make(command: str) -> list[str]:
        given = shlex.split(
            moved(command).removeprefix("python ").removeprefix("train.py").removeprefix("-m experiments.data")
        )
        kinds = {"data=scans": ["data.train.size=8", "data.train.start=8"], "data=fashion": ["data.train.size=8"]}
        small = next((kinds[name] for name in given if name in kinds), ["data.size=8", "data.holdout_images=8"])
        return [*given, *kept, *small]

    return make


def encoded(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def test_the_page_has_these_examples():
    assert [command.split("data=")[1] for command in COMMANDS] == [
        "moths",
        "shop",
        "shop data.caption_column=title",
        "scans",
        "fashion",
        "slices",
    ]
    assert {line.split("data=")[1] for line in INSPECTIONS} == {"moths", "fashion", "slices"}
    assert all("--config-dir ~/conf" in command for command in LINES)


@pytest.fixture
def run(here, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """run(command): train.py or experiments.data with these arguments, in this process."""

    def make(command: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *here(command)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        inspection.run() if command in INSPECTIONS else main()

    return make


@pytest.mark.parametrize("command", [COMMANDS[0], *COMMANDS[2:]])
@pytest.mark.slow
def test_an_example_runs(run, tmp_path, command, quick_end):
    run(command)
    assert len(list((tmp_path / "runs").rglob("finished.json"))) == 1


@pytest.mark.parametrize("command", dict.fromkeys(INSPECTIONS))
def test_a_look_before_a_job_writes_a_page(run, tmp_path, command):
    run(command)
    assert [path.stem for path in (tmp_path / "runs" / "data").glob("*.html")] == [command.split("data=")[1]]


def test_the_table_of_fields_is_that_of_the_folder():
    table = PAGE[PAGE.index("| field | default |") :].partition("\n\n")[0].splitlines()[2:]
    fields = [name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    content = yaml.safe_load((ROOT / "conf" / "data" / "image_folder.yaml").read_text())
    assert sorted(fields) == sorted(content.keys() - {"name", "_target_"})


def test_a_wrong_column_is_answered_as_the_page_says(run, tmp_path, capsys):
    (said,) = [text.strip() for kind, text in BLOCKS if not kind]
    with pytest.raises(SystemExit) as caught:
        run(COMMANDS[1])
    assert caught.value.code == 1
    assert said.replace("/pictures", f"{tmp_path}/pictures") in capsys.readouterr().err
    assert not list(tmp_path.rglob("scores.json"))


def test_the_data_sets_on_the_page_are_there_and_read_as_it_says():
    table = PAGE[PAGE.index("| `data` |") :].partition("\n\n")[0].splitlines()[2:]
    for line in table:
        names, _, reader = [re.findall(r"`([\w.]+)`", cell) for cell in line.strip("|").split("|")]
        for name in names:
            text = (ROOT / "conf" / "data" / f"{name}.yaml").read_text()
            inherited = re.search(r"^defaults: \[(\w+)\]$", text, re.M)
            text += (ROOT / "conf" / "data" / f"{inherited[1]}.yaml").read_text() if inherited else ""
            assert reader[0] in text, name
