"""The examples of the README and of the pages: commands compose, the criterion scores harm, stages make a list."""

import ast
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from support.networks import last_layers, tiny_backbone, tiny_batch
from support.process import ROOT

from criteria.scores.task_loss import TaskLoss
from experiments.engine.pipeline import make_stages

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
README = (ROOT / "README.md").read_text()
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
OUTSIDE = (ROOT / "tests" / "experiments" / "test_from_outside.py").read_text()
"""The test that runs the examples of extending.md, as classes and files outside the repository."""


def blocks(text: str, kind: str) -> list[str]:
    return [content for language, content in BLOCK.findall(text) if language == kind]


def yaml_files(text: str) -> dict[str, str]:
    """{group/name.yaml: content} of the YAML blocks whose first line is the path of a file in a folder conf."""
    files = {}
    for block in blocks(text, "yaml"):
        path, _, content = block.partition("\n")
        files[path.rpartition("conf/")[2]] = content
    return files


# The README


@pytest.fixture
def criterion() -> Any:
    (block,) = [block for block in blocks(README, "python") if "class Mine" in block]
    module: dict[str, Any] = {}
    exec(block, module)
    return module["Mine"]()


def scores_of(criterion: Any, backbone: Any) -> dict[str, float]:
    criterion.start(backbone, backbone.units(), 0)
    with torch.no_grad():
        criterion.update(tiny_batch(backbone, 4))
    return {name: entry["score"] for name, entry in criterion.finish().items()}


def test_the_readmes_criterion_is_the_increase_of_the_task_loss(criterion):
    backbone = tiny_backbone("UNet2DModel")
    means = scores_of(TaskLoss(), backbone)
    assert scores_of(criterion, backbone) == pytest.approx({name: 4 * mean for name, mean in means.items()}, abs=1e-5)


def test_the_readmes_criterion_is_zero_where_removing_changes_nothing(criterion):
    backbone = tiny_backbone("UNet2DModel")
    unit = next(unit.name for unit in backbone.units() if unit.kind == "attention")
    for layer in last_layers(backbone.network.get_submodule(unit)):
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    scores = scores_of(criterion, backbone)
    assert scores[unit] == 0
    assert sum(score == 0 for score in scores.values()) == 1


def test_the_readmes_files_belong_together():
    files = yaml_files(README)
    assert set(files) == {"data/moths.yaml", "criterion/mine.yaml"}
    assert files["data/moths.yaml"] in (ROOT / "docs" / "datasets.md").read_text()  # which is run
    module = re.search(r"^# (criteria/scores/mine)\.py$", README, re.M)[1].replace("/", ".")
    assert yaml.safe_load(files["criterion/mine.yaml"]) == {"name": "mine", "_target_": f"{module}.Mine"}


# Extending


@pytest.mark.parametrize("block", blocks(EXTENDING, "python"), ids=lambda block: re.search(r"class (\w+)", block)[1])
def test_the_classes_of_the_page_are_those_that_are_run(block):
    body = block[re.search("^class|^def", block, re.M).start() :]
    assert body in OUTSIDE


def test_the_files_of_the_page_are_those_that_are_run():
    (files,) = (
        node for node in ast.parse(OUTSIDE).body if isinstance(node, ast.Assign) and node.targets[0].id == "FILES"
    )
    run = {
        name: content.replace("foreign_package", "my_package")
        for name, content in ast.literal_eval(files.value).items()
    }
    shown = yaml_files(EXTENDING)
    shown.pop("pipeline/rounds.yaml")  # the test below
    assert {name: yaml.safe_load(content) for name, content in shown.items()} == {
        name: yaml.safe_load(content) for name, content in run.items()
    }


def test_the_pages_list_of_stages_can_be_made(configure, overrides, data_folder):
    (data_folder / "pipeline").mkdir(exist_ok=True)
    (data_folder / "pipeline" / "rounds.yaml").write_text(yaml_files(EXTENDING)["pipeline/rounds.yaml"])
    stages = make_stages(configure(*overrides, "pipeline=rounds"))
    assert [stage.makes for stage in stages if stage.makes] == [
        "pruned",
        "distilled",
        "pruned_again",
        "distilled_again",
    ]
    assert [stage.settings for stage in stages if stage.settings] == [
        {"selection": {"ratio": 0.2}},
        {"selection": {"ratio": 0.3}},
    ]


# Commands


def commands() -> Iterator[str]:
    """The arguments of every complete command of the pages that runs train.py or stores latents."""
    pages = ("README", "docs/tour", "docs/stable_diffusion", "docs/sweeps", "docs/tasks", "docs/latents")
    texts = [(ROOT / f"{page}.md").read_text() for page in pages]
    lines = [line for text in texts for block in blocks(text, "bash") for line in block.replace("\\\n", "").split("\n")]
    for line in lines:
        program, *words = shlex.split(line, comments=True) or [""]
        given = words[1:] if words[:1] == ["train.py"] else words[2:]
        runs = words[:1] == ["train.py"] or words[:2] == ["-m", "experiments.precompute"]
        if program.endswith("python") and runs and not {"...", "--config-dir", "criterion=mine"} & set(given):
            yield shlex.join(word for word in given if word not in ("-m", "--cfg", "job"))


def values_of(argument: str) -> list[str]:
    """Return an override; of a sweep those of its first and its last value."""
    (override,) = OverridesParser.create().parse_overrides([argument])
    if not override.is_sweep_override():
        return [argument]
    values = list(override.sweep_string_iterator())
    return [f"{override.get_key_element()}={value}" for value in (values[0], values[-1])]


@pytest.mark.parametrize("command", dict.fromkeys(commands()), ids=lambda command: command or "none")
def test_a_command_can_be_composed(configure, command):
    values = [values_of(argument) for argument in shlex.split(command)]
    for end in {0, -1} if any(len(each) > 1 for each in values) else {0}:
        configure(*(each[end] for each in values))
