"""The pages around the code: short where they have to be, with links that lead somewhere and code that runs."""

import dataclasses
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from support.process import ROOT

from conf import __version__, schema

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "experiments").rglob("README.md"))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith(("http", "data:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_modules_that_a_page_names_are_there(page):
    text = page.read_text()
    if page.name == "CHANGELOG.md":  # it names what was
        text = ""
    packages = "tests|criteria|lightning_modules|datamodules|experiments|conf"
    for name in re.findall(rf"`((?:{packages})/[\w/.]*\w\.(?:py|yaml))`", text):
        if "/mine" not in name and "/x." not in name and "/y." not in name:
            assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m (experiments[\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_python_page_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    assert len([line for line in block.splitlines() if line.strip()]) <= 25
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.fullmatch(r"\d+ units removed, \d{7} parameters left\n", done.stdout)
    assert (tmp_path / "pruned_ddpm" / "model_index.json").exists()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_every_field_is_on_the_page_of_fields(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import hooks

    table = hooks.on_page_markdown("<!-- fields -->", Page("fields.md"))

    def names(kind: Any, prefix: str = "") -> list[str]:
        found = []
        for field in dataclasses.fields(kind):
            nested = field.default_factory
            path = f"{prefix}{field.name}"
            found += names(nested, f"{path}.") if dataclasses.is_dataclass(nested) else [path]
        return found

    assert re.findall(r"^\| `([\w.]+)`", table, re.M) == names(schema.Config)
    assert "optimiser steps" in table
    assert hooks.on_page_markdown("text", Page("tour.md")) == "text"


@dataclasses.dataclass
class Page:
    """As mkdocs gives a page to a hook."""

    src_uri: str

    @property
    def file(self) -> "Page":
        return self


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.parent.name for path in (tmp_path / "site").rglob("index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= pages
    fetched = [
        address
        for path in (tmp_path / "site").rglob("*.html")
        for address in re.findall(r"<(?:link|script)[^>]*(?:href|src)=\"(https?://[^\"]+)", path.read_text())
        if "canonical" not in path.read_text().split(address)[0][-60:]
    ]
    assert fetched == []  # nothing is loaded from elsewhere
