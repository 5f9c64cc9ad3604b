"""A run writes and removes its own files only, wherever links lead and whatever else lies beside them."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
from support.results import files, the_run

from conf.schema import ConfigError
from experiments.engine.artefacts import read_json
from experiments.engine.identity import fingerprint, read_config
from experiments.engine.pipeline import run_pipeline
from experiments.engine.run import ForeignFolder, Run
from experiments.reporting.set_page import report_set
from lightning_modules.backbones.files import list_weight_files


@pytest.fixture
def precious(tmp_path) -> Path:
    """A folder of somebody's, with a hidden part."""
    folder = tmp_path / "precious"
    (folder / ".hidden").mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    (folder / ".hidden" / "key").write_text("secret")
    return folder


def folder_of(cfg: Any) -> Path:
    return Run(cfg, fingerprint(list_weight_files(cfg.teacher.path), Path(cfg.paths.cache))).folder


@pytest.mark.parametrize("force", ["false", "true"])
def test_a_link_in_place_of_a_run_is_refused(configure, overrides, precious, force):
    cfg = configure(*overrides, f"force={force}")
    folder = folder_of(cfg)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(precious)
    before = {name: (precious / name).read_text() for name in files(precious)}
    with pytest.raises(ForeignFolder, match=rf"{re.escape(str(folder))} is a symbolic link \(to .*precious\)"):
        run_pipeline(cfg)
    assert {name: (precious / name).read_text() for name in files(precious)} == before


def test_a_link_that_leads_out_of_paths_runs_is_refused(configure, overrides, precious):
    cfg = configure(*overrides)
    study = folder_of(cfg).parent
    study.parent.mkdir(parents=True, exist_ok=True)
    study.symlink_to(precious)
    with pytest.raises(ForeignFolder, match=r"lies outside paths.runs"):
        run_pipeline(cfg)
    assert files(precious) == {"thesis.txt", ".hidden/key"}


def test_paths_runs_itself_may_be_a_link(configure, overrides, tmp_path, quick_end):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    run_pipeline(configure(*overrides))
    assert (the_run(tmp_path / "disk") / "finished.json").exists()


@pytest.mark.slow
def test_foreign_files_in_the_folder_of_a_run_are_kept(configure, overrides, quick_end):
    cfg = configure(*overrides)
    folder = folder_of(cfg)
    mine = [folder / name for name in ("note.txt", ".git/HEAD", ".nfs000000000001", ".plan.json.swp", "data/x.png")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    run_pipeline(cfg)
    (folder / "finished.json").unlink()
    (folder / "plan.json").unlink()  # the plan is made again, and all that was made from it
    run_pipeline(cfg)
    run_pipeline(configure(*overrides, "force=true"))
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)


@pytest.mark.parametrize("name", ["plan.json", "samples"])
def test_a_foreign_file_with_the_name_of_an_artefact_is_refused(configure, overrides, name):
    cfg = configure(*overrides)
    path = folder_of(cfg) / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ForeignFolder, match=rf"{re.escape(str(path))} was made by no run"):
        run_pipeline(cfg)
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_force_replaces_a_linked_export_and_keeps_its_target(configure, overrides, tmp_path, quick_end):
    run_pipeline(configure(*overrides))
    export = the_run(tmp_path / "runs") / "export"
    export.rename(tmp_path / "moved")
    export.symlink_to(tmp_path / "moved")
    before = files(tmp_path / "moved")
    run_pipeline(configure(*overrides, "force=true"))
    assert not export.is_symlink() and files(export) == files(tmp_path / "moved") == before


@pytest.mark.parametrize(
    "override",
    ["name=../../x", "name=/abs", "name=a/../b", "name=.cache", "name='a//b'", "label=a/../../x", "label=/abs"],
)
def test_names_that_lead_out_of_the_folder_for_runs_are_refused(configure, override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"^{key}='.*' is no name of a folder below paths.runs"):
        configure(override)


def test_a_label_that_no_file_system_takes_is_refused(configure):
    with pytest.raises(ConfigError, match="label has 300 characters; choose at most 200"):
        configure("label=" + 300 * "x")


# Configurations from elsewhere


@pytest.fixture
def study(configure, overrides, tmp_path, unverified) -> Path:
    """A folder with one finished run, whose configuration was changed by somebody else."""
    run_pipeline(configure(*overrides, "distillation=none"))
    return tmp_path / "runs"


def change(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


def test_a_foreign_configuration_reads_no_environment_variable(study, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    change(the_run(study), "name: knapsack", "name: ${oc.env:HF_TOKEN}")
    assert read_config(the_run(study))["selection"]["name"] == "${oc.env:HF_TOKEN}"
    page = report_set(study)
    written = [path.read_text() for path in page.parent.rglob("*") if path.suffix in (".csv", ".md", ".html")]
    assert len(written) == 3 and not any("hf_secret" in text for text in written)
    assert any("${oc.env:HF_TOKEN}" in text for text in written)


@pytest.mark.parametrize("name", ["=1+1", "+cmd", "@sum", "-2+3"])
@pytest.mark.slow
def test_no_cell_of_a_table_is_a_formula(study, name):
    change(the_run(study), "name: knapsack", f"name: '{name}'")
    with open(report_set(study).parent / "results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["selection"] == f"'{name}"
    assert float(row["output_loss"]) > 0  # numbers stay numbers


def test_dollar_signs_in_names_are_drawn_literally(study):
    change(the_run(study), "name: knapsack", "name: $\\frac{$")
    change(the_run(study), "name: output_loss", "name: $x^")
    assert report_set(study).exists()


def test_a_report_can_be_written_elsewhere(study, tmp_path):
    before = files(study)
    page = report_set(study, tmp_path / "pages" / "report")
    assert files(study) == before and page == tmp_path / "pages" / "report" / "index.html"
    (link,) = re.findall('<li><a href="(.*?)">', page.read_text())
    assert (page.parent / link).resolve() == the_run(study) / "report.html"


def test_a_report_removes_only_its_own_old_pictures(study):
    folder = report_set(study).parent
    (folder / "mine.png").write_bytes(b"mine")
    drawn = read_json(folder / ".manifest.json")["pictures"]
    (folder / ".manifest.json").write_text('{"pictures": ["gone.png", "../../kept.png"]}')
    (folder / "gone.png").write_bytes(b"old")
    (study.parent / "kept.png").write_bytes(b"kept")
    report_set(study)
    assert {path.name for path in folder.glob("*.png")} == {"mine.png", *drawn}
    assert (study.parent / "kept.png").read_bytes() == b"kept"
