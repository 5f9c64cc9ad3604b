"""The pages around the code: links lead to files, names are those of the code, and the site builds."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra.utils
import pytest
import yaml
from support.process import ROOT

from conf import __version__, schema

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "experiments").rglob("README.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) < 200


@each_page
def test_links_to_files_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[#)]", page.read_text()):  # the strict build of the site checks anchors
        if not target.startswith(("http", "data:")):
            assert (page.parent / target).exists(), target


@each_page
def test_files_and_modules_that_a_page_names_are_there(page):
    text = page.read_text()
    packages = "tests|criteria|lightning_modules|datamodules|experiments|conf|docs"
    for name in re.findall(rf"`((?:{packages})/[\w/.]*\w\.(?:py|yaml|md))`", text):
        if "/mine." not in name and "/x." not in name and "/y." not in name:
            assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m (experiments[\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_fault_of_the_reliability_page_has_its_test():
    rows = re.findall(r"^\| (?!fault|---)(.+) \|$", text_of("docs/reliability.md"), re.M)
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, row
        for path, name in tests:
            assert re.search(rf"^def {name}\(", text_of(path), re.M), (path, name)


@pytest.mark.slow
def test_the_python_page_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", text_of("docs/python.md"), re.S)
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 25
    command = [sys.executable, "-c", "\n".join(blocks)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^\d+ units removed, \d{7} parameters left$", done.stdout, re.M)
    assert re.search(r"^least harm: [\w.]+$", done.stdout, re.M)
    assert (tmp_path / "pruned_ddpm" / "model_index.json").exists()


@pytest.fixture
def fields(monkeypatch) -> ModuleType:
    """docs/fields.py, as the site's hooks import it."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import fields

    return fields


def test_every_field_is_on_the_page_of_fields(fields):
    def names(kind: Any, prefix: str = "") -> list[str]:
        paths = []
        for field in dataclasses.fields(kind):
            nested, path = field.default_factory, f"{prefix}{field.name}"
            paths += names(nested, f"{path}.") if dataclasses.is_dataclass(nested) else [path]
        return paths

    table = fields.fields_page()
    assert sorted(re.findall(r"^\| `([\w.]+)`", table, re.M)) == sorted(names(schema.Config))
    assert "| `trainer.steps` | int | required | optimiser steps |" in table
    assert "| `ema_decay` | float \\| None | `0.999` |" in table


def choices(group: str) -> set[str]:
    return {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def test_every_file_of_conf_is_on_the_page_of_choices(fields):
    groups = {path.parent.name for path in (ROOT / "conf").glob("*/*.yaml")}
    assert groups == set(fields.GROUPS)
    page = fields.choices_page()
    for section in page.split("## `")[1:]:
        group = section.partition("`")[0]
        assert set(re.findall(r'^\?\?\? abstract "(\w[\w.]*)', section, re.M)) == choices(group), group


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# One thing: two words. Another.\nname: x", "One thing: two words"),
        ("# @package _global_\n# It is (He et al. 2015)\n# long: python train.py\n", "It is (He et al. 2015) long"),
        ("# A title.\n#\n#     python train.py\n", "A title"),
        ("name: x # a comment", ""),
    ],
)
def test_the_first_sentence_of_a_file(fields, text, sentence):
    assert fields.first_sentence(text) == sentence


GROUPS = (
    *("task", "teacher", "criterion", "selection", "repair", "distillation", "noise_scheduler", "timesteps"),
    *("sampler", "optimizer", "lr_scheduler", "trainer", "logger", "callbacks", "pipeline", "launcher", "sweep"),
    "debug",
)


@pytest.mark.parametrize("group", GROUPS)
def test_the_table_of_groups_has_every_choice(group):
    (row,) = re.findall(rf"^\| [^|]*`{group}`[^|]* \| (.*) \|$", text_of("docs/sweeps.md"), re.M)
    assert choices(group) <= set(re.findall(r"`([\w.]+)`", row))


def test_the_page_of_papers_has_every_recipe():
    assert choices("experiment") <= set(re.findall(r"`(?:experiment=)?(\w+)`", text_of("docs/papers.md")))


def test_classes_have_moved_where_the_changelog_says():
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", text_of("CHANGELOG.md"), re.M)
    assert len(rows) > 50
    for before, after in rows:
        assert callable(hydra.utils.get_object(after)), after
        assert before != after


def test_versions_agree():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["version"] == __version__
    assert f"## {__version__}" in text_of("CHANGELOG.md")


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "site"
    pages = {path.parent.name for path in site.rglob("index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= pages
    assert not list(site.glob("*.py"))
    for study in (ROOT / "experiments" / "studies").iterdir():
        if (study / "README.md").exists():
            assert (site / "repository" / study.relative_to(ROOT) / "index.html").exists()
    assert broken_links(site) == []
    fetched = [
        address
        for path in site.rglob("*.html")
        for address in re.findall(r"<(?:link|script)[^>]*(?:href|src)=\"(https?://[^\"]+)", path.read_text())
        if "canonical" not in path.read_text().split(address)[0][-60:]
    ]
    assert fetched == []  # nothing is loaded from elsewhere


def broken_links(site: Path) -> list[tuple[str, str]]:
    """Return (page, link) for every relative link or picture of the site that leads to no file of it."""
    broken = []
    for page in site.rglob("index.html"):
        for link in re.findall(r"(?:href|src)=\"([^\"#?]+)", page.read_text()):
            if ":" not in link and not (page.parent / link).exists():
                broken.append((page.relative_to(site).as_posix(), link))
    return broken
