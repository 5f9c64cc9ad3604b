"""Hooks of mkdocs: generated tables, and the files of the repository that pages link to."""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

from fields import choices_page, fields_page  # noqa: E402  it lies beside this file

COPIES = "repository"
"""Folder of the site that holds the linked files of the repository, under their paths in it."""
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)])")
"""The path in a Markdown link or picture, without its anchor; addresses have a colon."""


def source_of(uri: str) -> Path:
    """Return the file behind a page of the site."""
    return ROOT / uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else DOCS / uri


def uri_of(path: Path) -> str:
    """Return the place in the site of a file of docs/, or of any other file of the repository."""
    return path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else f"{COPIES}/{path.relative_to(ROOT)}"


def linked_files(page: Path) -> list[Path]:
    """Return the files of the repository that a Markdown file links to."""
    paths = [(page.parent / link).resolve() for link in LINK.findall(page.read_text())]
    return [path for path in paths if path.is_file() and path.is_relative_to(ROOT)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to, and those that the added pages link to."""
    pages = [source_of(file.src_uri) for file in files.documentation_pages()]
    while pages:
        for path in linked_files(pages.pop()):
            if files.get_file_from_path(uri_of(path)) is None:
                files.append(File.generated(config, uri_of(path), abs_src_path=str(path)))
                pages += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in generated tables, and point links at the copies of files outside docs/."""
    uri = page.file.src_uri
    if uri == "fields.md":
        return markdown.replace("<!-- fields -->", fields_page())
    if uri == "choices.md":
        return markdown.replace("<!-- choices -->", choices_page())

    def relative(match: re.Match[str]) -> str:
        path = (source_of(uri).parent / match[1]).resolve()
        return posixpath.relpath(uri_of(path), posixpath.dirname(uri)) if path.is_relative_to(ROOT) else match[1]

    return LINK.sub(relative, markdown)
