"""Tables for the pages of fields and choices, made from conf/schema.py and from the YAML files of conf/."""

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conf import schema  # noqa: E402  the repository has to be on the path first

GROUPS = (
    *("task", "teacher", "criterion", "selection", "repair", "distillation"),
    *("data", "noise_scheduler", "timesteps", "sampler"),
    *(
        "optimizer",
        "lr_scheduler",
        "evaluation",
        "trainer",
        "callbacks",
        "logger",
        "pipeline",
        "pretrain",
        "experiment",
        "launcher",
        "sweep",
        "debug",
    ),
)
"""The groups of conf/ in the order of the page: what is pruned, how, on which data, how it is trained and measured."""


def read_docstrings(source: str) -> dict[tuple[str, str], str]:
    """Return {(class, field): docstring of the field} for the classes of a module."""
    texts = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for field, following in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr):
                    texts[node.name, ast.unparse(field.target)] = str(ast.literal_eval(following.value))
    return texts


def field_rows(kind: Any, prefix: str, texts: dict[tuple[str, str], str]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (path, type, default, meaning) for each field of a dataclass and of the dataclasses in it."""
    for field in dataclasses.fields(kind):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.default_factory):
            yield from field_rows(field.default_factory, f"{path}.", texts)
            continue
        type_name = str(getattr(field.type, "__name__", field.type))
        meaning = " ".join(texts.get((kind.__name__, field.name), "").split())
        if not prefix and field.name in GROUPS:
            meaning += f" [choices](choices.md#{field.name})"
        yield path, "node" if type_name == "Any" else type_name, default_of(field), meaning.strip()


def default_of(field: dataclasses.Field) -> str:
    """Return the default of a field as YAML writes it; "required" where a choice or the user has to give it."""
    if field.default == "???":
        return "required"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    words = {"None": "null", "True": "true", "False": "false"}  # as text: True == 1
    return f"`{words.get(str(field.default), field.default)}`"


def fields_page() -> str:
    """Return one Markdown table per part of the configuration: first the fields of the top level, then each part."""
    texts = read_docstrings((ROOT / "conf" / "schema.py").read_text())
    parts: dict[str, list[str]] = {"": []}
    for path, *cells in field_rows(schema.Config, "", texts):
        row = " | ".join([f"`{path}`", *(cell.replace("|", "\\|") for cell in cells)])
        parts.setdefault(path.rpartition(".")[0], []).append(f"| {row} |")
    lines = []
    for part, rows in parts.items():
        title = f"`{part}`" if part else "Top level"
        lines += [f"## {title}", "", "| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def choices_page() -> str:
    """Return a section per group of conf/ with every file of it, folded, under its name and the line it begins with."""
    lines = []
    for group in GROUPS:
        lines += [f"## `{group}`", ""]
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            text = path.read_text().rstrip()
            title = f"{path.stem}: {first_sentence(text)}".rstrip(": ").replace('"', "'")
            lines += [f'??? abstract "{title}"', "    ```yaml"]
            lines += [f"    {line}".rstrip() for line in text.splitlines()]
            lines += ["    ```", ""]
    return "\n".join(lines)


def first_sentence(text: str) -> str:
    """Return the first sentence of the comment that a YAML file begins with, "" where there is none."""
    comment = []
    for line in text.splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# ") or line.startswith("#  "):
            break
        comment.append(line[2:])
    sentence = re.split(r"(?<! al)\.\s|: (?=python )", " ".join(comment))[0]
    return sentence.rstrip(".:")
