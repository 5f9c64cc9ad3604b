"""Fills the page of configuration fields from the schema: names, types, defaults and docstrings."""

import ast
import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conf import schema  # noqa: E402  it lies one folder up


def docstrings(source: str) -> dict[tuple[str, str], str]:
    """Return {(class, field): the string below the field} of a module's classes."""
    found = {}
    for kind in ast.parse(source).body:
        if isinstance(kind, ast.ClassDef):
            for field, after in zip(kind.body, kind.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                    found[kind.name, ast.unparse(field.target)] = str(ast.literal_eval(after.value))
    return found


def rows(kind: Any, prefix: str, texts: dict[tuple[str, str], str]) -> list[str]:
    """Return a row of a Markdown table per field of a dataclass, those of nested dataclasses after their own."""
    lines = []
    for field in dataclasses.fields(kind):
        name, nested = f"{prefix}{field.name}", field.default_factory
        if dataclasses.is_dataclass(nested):
            lines += rows(nested, f"{name}.", texts)
            continue
        default = "" if field.default in (dataclasses.MISSING, "???") else f"`{field.default}`"
        text = " ".join(texts.get((kind.__name__, field.name), "").split()).replace("|", "\\|")
        type_name = str(getattr(field.type, "__name__", field.type)).replace("|", "\\|")
        lines.append(f"| `{name}` | {type_name} | {default} | {text} |")
    return lines


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the table in the place of its mark: mkdocs calls this for every page."""
    if page.file.src_uri != "fields.md":
        return markdown
    texts = docstrings((ROOT / "conf" / "schema.py").read_text())
    table = ["| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows(schema.Config, "", texts)]
    return markdown.replace("<!-- fields -->", "\n".join(table))
