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
from PIL import Image
from support.images import pictures
from support.process import ROOT

from train import main

PAGE = (ROOT / "docs" / "datasets.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
COMMANDS = [text.strip() for kind, text in BLOCKS if kind == "bash"]


@pytest.fixture
def here(tmp_path: Path, overrides: list[str]) -> Callable[[str], list[str]]:
    """The page's files and data, below a temporary folder; here(command) -> arguments of a tiny job."""

    def moved(text: str) -> str:
        return re.sub(r"(?<![\w.])(~|/pictures|/tables)(?=/)", lambda match: f"{tmp_path}/{match[1].strip('/~')}", text)

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
    (tmp_path / "tables").mkdir()
    pq.write_table(
        pa.table({"scan": [encoded(picture) for picture in pictures(24, 10)], "finding": np.arange(24) % 3}),
        tmp_path / "tables" / "scans-0.parquet",
    )
    kept = [override for override in overrides if not override.startswith("data=")]

    def make(command: str) -> list[str]:
        program, script, *given = shlex.split(moved(command))
        assert (program, script) == ("python", "train.py")
        small = ["data.train.size=8", "data.train.start=8"] if "data=scans" in given else ["data.size=8"]
        small += [] if "data=scans" in given else ["data.holdout_images=8"]
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
    ]
    assert all("--config-dir ~/conf" in command for command in COMMANDS)


@pytest.fixture
def run(here, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """run(command): train.py with these arguments, in this process."""

    def make(command: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *here(command)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        main()

    return make


@pytest.mark.parametrize("command", [COMMANDS[0], *COMMANDS[2:]])
def test_an_example_runs(run, tmp_path, command, quick_end):
    run(command)
    assert len(list((tmp_path / "runs").rglob("finished.json"))) == 1


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
