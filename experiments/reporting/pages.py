"""HTML pages that are one file each, whatever they show."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
)
PAGES.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Write a page from a file of templates/ and return its path; a variable without a value is an error."""
    path.write_text(PAGES.get_template(template).render(**content))
    return path


def encode_address(content: bytes, media_type: str) -> str:
    """Return a picture or a sound as a `data:` address, which a page holds instead of a link to a file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
