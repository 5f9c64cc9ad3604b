"""The page of a set of runs: one file with all its data, and names that say what differs."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.config import composed
from support.results import read_markdown
from support.runs import NETWORKS, write_run

from experiments.engine.artefacts import read_json
from experiments.reporting import figures, thumbnails
from experiments.reporting.run_names import name_run
from experiments.reporting.run_page import report_run
from experiments.reporting.set_page import collect_runs, report_set
from experiments.reporting.tables import average_over_seeds, shorten_field
from experiments.reporting.thumbnails import embed_thumbnail

VALUES = {"clip_score": 25.0, "kid": 0.0125}
ATTACK = "</script><img src=x onerror=alert(1)><!--"


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the content of the script with the data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.data = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "content"}) and not self.data:
            self.data = data


def read_content(page: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Tags(page.read_text()).data)
    return content


def test_the_page_holds_the_content_of_every_run(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, f"knapsack-{seed}", 0.3, VALUES, f"train.py seed={seed}", seed=seed)
    write_run(tmp_path, "taylor", 0.5, {"clip_score": 20.0}, criterion__name="taylor")
    page = report_set(tmp_path)
    content = read_content(page)
    assert [(run["name"], run["row"]) for run in content["runs"]] == [
        ("knapsack-0 (t, d, magnitude, 0.3, none)", 0),
        ("knapsack-1 (t, d, magnitude, 0.3, none)", 0),
        ("taylor (t, d, knapsack, 0.5, none)", 1),
    ]
    first, _, last = content["runs"]
    assert (page.parent / first["page"]).resolve() == tmp_path / "knapsack-0" / "report.html"
    assert first["groups"].items() >= {"method": "magnitude", "data": "d", "teacher": "t", "seed": 0}.items()
    assert first["values"].items() >= {"ratio": 0.3, "eval/kid": 0.0125, "teacher/clip_score": 25.0}.items()
    assert last["values"]["eval/kid"] is None
    assert first["panel"]["command"] == "python train.py seed=0"
    (strip,) = first["panel"]["strips"]
    assert content["units"] == [["down.0", "down.1", "down.2", "down.3"]] and strip["names"] == 0
    assert (strip["kept"], strip["scores"]) == ([1.0, 0.0, 1.0, 1.0], [1.0, 0.1, 0.01, 0.001])
    assert content["better"] == {
        **{f"{network}/clip_score": "higher" for network in ("eval", "pruned")},
        **{f"{network}/kid": "lower" for network in ("eval", "pruned")},
    }
    assert list(content["numbers"])[:2] == ["ratio", "eval/clip_score"]


def test_the_page_loads_nothing(tmp_path):
    write_run(tmp_path, "one", 0.3, VALUES)
    page = report_set(tmp_path).read_text()
    assert "<h1>" in page and ": 1 run</h1>" in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    assert policy and "default-src 'none'" in policy[1] and "http" not in policy[1]
    tags = Tags(page).tags
    assert not any(attributes.keys() & {"src", "srcset", "data"} for _, attributes in tags)
    assert not {tag for tag, _ in tags} & {"link", "iframe", "object", "embed"}


def test_no_text_of_a_run_becomes_markup(tmp_path):
    fields = {"criterion__name": ATTACK, "data__name": ATTACK, "optimizer__note": ATTACK}
    write_run(tmp_path, "one", 0.3, VALUES, ATTACK, **fields)
    write_run(tmp_path, "two</a><script>alert(1)<", 0.5, VALUES)
    page = report_set(tmp_path)
    tags = Tags(page.read_text()).tags
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in tags)
    assert [attributes.get("type") for tag, attributes in tags if tag == "script"] == ["application/json", None, None]
    runs = read_content(page)["runs"]
    assert {run["groups"]["criterion"] for run in runs} == {ATTACK, "magnitude"}
    assert f"python {ATTACK}" in {run["panel"]["command"] for run in runs}


def test_a_link_to_a_run_leads_to_its_page_whatever_its_name(tmp_path):
    run = write_run(tmp_path / "javascript:alert(1)", "50% of #1", 0.3, VALUES)
    page = report_set(tmp_path, tmp_path)
    (link,) = re.findall('<li><a href="(.*?)">', page.read_text())
    assert link == "javascript%3Aalert%281%29/50%25%20of%20%231/report.html" and run.is_dir()


def test_the_page_of_a_run_leads_to_that_of_its_set(tmp_path):
    run = write_run(tmp_path, "one", 0.3, VALUES)
    report_run(run)
    (link,) = re.findall(r'<a href="(\.\./.*?)">', (run / "report.html").read_text())
    assert (run / link).resolve() == report_set(tmp_path)


# Pictures


def decode(address: str) -> np.ndarray:
    head, text = address.split(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_a_thumbnail_has_a_row_per_network(tmp_path):
    run = write_run(tmp_path, "one", 0.3, VALUES)
    picture = decode(embed_thumbnail(run, NETWORKS))
    assert picture.shape == (3 * 4, thumbnails.COLUMNS * 4, 3)
    assert [int(picture[4 * row + 2, 2, 0]) for row in range(3)] == pytest.approx([0, 60, 120], abs=4)
    grey = np.zeros((8, 4, 4, 1), np.uint8)
    for network in NETWORKS:
        np.save(run / "samples" / network / "images.npy", grey)
    assert decode(embed_thumbnail(run, NETWORKS)).shape[:2] == (12, 24)
    assert embed_thumbnail(run, ["none"]) is None


def test_thumbnails_of_many_runs_are_smaller(tmp_path):
    run, rng = write_run(tmp_path, "one", 0.3, VALUES), np.random.default_rng(0)
    for network in NETWORKS:
        np.save(run / "samples" / network / "images.npy", rng.integers(0, 256, (8, 200, 100, 3), np.uint8))
    sizes = {runs: len(embed_thumbnail(run, NETWORKS, runs)) * 3 / 4 for runs in (1, 100, 1000)}
    assert sizes[1] <= thumbnails.LARGEST + 30 and sizes[1] > sizes[1000]
    assert all(runs * (size - 30) <= thumbnails.ALL for runs, size in sizes.items())  # 30: what stands before the data
    tile = thumbnails.TILE
    assert decode(embed_thumbnail(run, NETWORKS)).shape == (3 * tile, thumbnails.COLUMNS * tile // 2, 3)


# Names


def test_methods_on_other_data_are_told_apart_by_names(tmp_path):
    write_run(tmp_path, "one", 0.3, VALUES, data__train={"_partial_": True, "path": "a" * 200})
    other = {"_partial_": True, "path": "b" * 200, "crop": True}
    fields = {"data__name": "moths", "data__train": other, "teacher__name": "u", "teacher__path": "/u"}
    write_run(tmp_path, "two", 0.3, VALUES, task__name="t2i", **fields)
    table = average_over_seeds(collect_runs(tmp_path))
    assert set(table["method"]) == {
        "magnitude, task uig, teacher t, data d",
        "magnitude, task t2i, teacher u, data moths",
    }


def test_the_table_names_the_data_where_it_differs(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path, name, 0.3, VALUES, data__name=name)
    report_set(tmp_path)
    rows = read_markdown(tmp_path / "report" / "table.md")
    assert list(rows["data"]) == ["one", "two"] and not {"task", "teacher"} & set(rows)


def test_data_sets_of_one_name_are_told_apart_by_what_differs(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path, name, 0.3, VALUES, data__train={"_partial_": name == "a", "path": name * 200})
    methods = list(average_over_seeds(collect_runs(tmp_path))["method"])
    assert sorted(method.partition("#")[0] for method in methods) == [
        f"magnitude, path=...{name * 28}" for name in ("a", "b")
    ]


@pytest.mark.parametrize(("name", "short"), [("a.b.lr", "lr"), ("a.samples", "a.samples"), ("x", "x")])
def test_a_field_is_named_by_its_shortest_unique_end(name, short):
    assert shorten_field(name, ["a.b.lr", "a.samples", "c.samples", "x", "a.x"]) == short


@pytest.mark.parametrize(
    ("overrides", "addition"),
    [
        ([], ""),
        (["experiment=quickstart"], ""),
        (["selection=bk_sdm"], ""),
        (["task=t2i"], " (t2i)"),
        (["data=digits_sample"], " (digits_sample)"),
        (["task=t2i", "data=cifar10_sample"], " (t2i, cifar10_sample)"),
        (["repair=least_squares"], " (least_squares)"),
        (["experiment=pretrain_cifar10_classifier"], " (cifar10)"),
        (
            ["experiment=laptop_diff_sd15_50", "selection.ratio=0.7", "criterion=taylor"],
            " (t2i, laion_aesthetics_v2_6.5_212k, taylor, knapsack, 0.7, normalized)",
        ),
    ],
)
def test_the_name_of_a_run_says_what_its_folder_does_not(overrides, addition):
    cfg = composed(*overrides)
    folder = f"{cfg.label}-0123abcd"
    groups = ("task", "teacher", "data", "criterion", "repair", "distillation")
    names = {group: {"name": cfg[group].name} for group in groups}
    selection = {key: cfg.selection.get(key) for key in ("name", "ratio", "target", "variant")}
    config = {**names, "selection": selection, "pretrain": None if cfg.pretrain is None else {"architecture": "a"}}
    assert name_run(folder, config) == folder + addition


def test_figures_of_several_teachers_have_titles_and_short_names(tmp_path, monkeypatch):
    drawn = []

    def draw(table, columns, labels, path, *_: object, title: str = "", **options: object) -> Path:
        drawn.append((title, sorted(set(table["method"]))))
        path.write_bytes(b"")
        return path

    monkeypatch.setattr(figures, "draw_curves", draw)
    for name in ("t", "u"):
        for ratio in (0.3, 0.5):
            write_run(tmp_path, f"{name}-{ratio}", ratio, VALUES, teacher__name=name)
    report_set(tmp_path)
    assert {(title, *methods) for title, methods in drawn if title} == {
        ("uig, t, d", "magnitude"),
        ("uig, u, d", "magnitude"),
    }
    assert read_json(tmp_path / "report" / ".manifest.json")["pictures"]
