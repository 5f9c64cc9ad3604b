"""The command `python -m experiments.new`: files of a user's own to begin with, outside of the repository.

    python -m experiments.new criterion increase --folder ~/lab
    python -m experiments.new data moths --folder ~/lab --path /pictures/moths     # one YAML file and its test

A criterion, a loss, a stage and a data set without --path are a YAML file in FOLDER/conf, a class in a package in
FOLDER and a test in FOLDER/tests. All of them run as they are written.
"""

import argparse
import importlib.util
import json
import keyword
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from conf.schema import ROOT
from experiments.scaffold.readers import find_reader


def quote_yaml(text: str) -> str:
    """Return a text as a quoted string of YAML, in which OmegaConf sees no interpolation."""
    escaped = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return json.dumps(escaped, ensure_ascii=False)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
)
TEMPLATES.filters["quote_yaml"] = quote_yaml
GROUPS = {"data": "data", "criterion": "criterion", "loss": "distillation", "stage": "pipeline"}
"""{kind: the group of conf/ that its file belongs to}"""


@dataclass(frozen=True)
class NewFiles:
    """The files of one kind and name.

    Args:
        kind: one of GROUPS.
        name: name of the choice, and of the module.
        folder: the folder that the files are written into.
        package: name of the package in it.
        path: of a data set, where its samples lie; None writes a class that makes some.

    Raises ValueError for a name that is no Python name, or that is taken.
    """

    kind: str
    name: str
    folder: Path
    package: str
    path: str | None = None

    def __post_init__(self) -> None:
        for field, value in (("NAME", self.name), ("--package", self.package)):
            if not re.fullmatch(r"[a-z_][a-z0-9_]*", value) or keyword.iskeyword(value):
                raise ValueError(
                    f"{field}={value} is no name of a Python module; choose lower-case letters, digits and _, such as "
                    "my_moths"
                )
        if not isinstance(yaml.safe_load(self.name), str):
            raise ValueError(f"NAME={self.name} is no text in YAML; choose another name, such as my_{self.name}")
        if not str(self.folder).isprintable():
            raise ValueError(f"--folder={str(self.folder)!r} has characters that cannot be printed; choose another one")
        if (ROOT / "conf" / GROUPS[self.kind] / f"{self.choice}.yaml").exists():
            raise ValueError(f"NAME={self.name}: {GROUPS[self.kind]}={self.choice} exists; choose another name")
        if is_taken(self.package, self.folder):
            raise ValueError(f"--package={self.package}: Python has a package of that name; choose another one")
        if self.path is not None and self.kind != "data":
            raise ValueError(f"--path={self.path} is for data; leave it out for a {self.kind}")

    @property
    def choice(self) -> str:
        """The name of the choice: of a stage that of the pipeline that it stands in."""
        return f"with_{self.name}" if self.kind == "stage" else self.name

    @property
    def override(self) -> str:
        """The argument of train.py that chooses the file."""
        return f"{GROUPS[self.kind]}={self.choice}"

    def render(self) -> dict[Path, str]:
        """Return {file: content}, the YAML file first."""
        template = f"{self.kind}.yaml"
        content: dict[str, object] = {}
        if self.path is not None:
            reader = find_reader(self.path)
            template = "data_at_path.yaml"
            content = {"path": str(Path(self.path).expanduser().absolute()), "reader": reader.choice}
            content["is_nested"] = reader.is_nested
        choice = self.folder / "conf" / GROUPS[self.kind] / f"{self.choice}.yaml"
        files = {choice: self.fill(template, **content)}
        if self.path is None:
            if not (self.folder / self.package / "__init__.py").exists():
                files[self.folder / self.package / "__init__.py"] = ""
            files[self.folder / self.package / f"{self.name}.py"] = self.fill(f"{self.kind}.py")
        files[self.folder / "tests" / f"test_{self.name}.py"] = self.fill(f"test_{self.kind}.py")
        return files

    def fill(self, template: str, **more: object) -> str:
        """Return the content of a template of templates/."""
        return fill_template(
            template,
            name=self.name,
            class_name="".join(part.capitalize() for part in self.name.split("_")),
            module=f"{self.package}.{self.name}",
            pipeline=self.choice,
            config_dir=shlex.quote(str(self.folder / "conf")),
            **more,
        )

    def write(self) -> list[Path]:
        """Write the files and return their paths. Raises ValueError, and writes none, where one of them exists."""
        files = self.render()
        for file in files:
            if file.exists():
                raise ValueError(f"{file} exists; choose another NAME or --folder, or remove it")
        for file, content in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return list(files)

    def list_commands(self) -> list[str]:
        """Return the commands that test and run the files, from the folder of this repository."""
        folder = shlex.quote(str(self.folder))
        prefix = "" if self.path is not None else f"PYTHONPATH={folder} "
        config = f"--config-dir {shlex.quote(str(self.folder / 'conf'))} {self.override}"
        commands = [f"{prefix}python -m pytest {folder}/tests/test_{self.name}.py"]
        if self.kind == "data":
            commands.append(f"{prefix}python -m experiments.data {config}")
        return [*commands, f"{prefix}python train.py {config}"]


def fill_template(template: str, **values: object) -> str:
    """Return the content of a template of templates/; a variable without a value is an error."""
    return TEMPLATES.get_template(f"{template}.j2").render(**values)


def is_taken(package: str, folder: Path) -> bool:
    """Return whether Python finds a package or module of this name that does not lie in `folder`."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin != str(folder / package / "__init__.py")


def main() -> None:
    """Write a file of conf/, a class and a test to begin with, outside of the repository; print what runs them."""
    parser = argparse.ArgumentParser(prog="python -m experiments.new", description=main.__doc__)
    parser.add_argument("kind", choices=tuple(GROUPS))
    parser.add_argument("name", metavar="NAME", help="name of the choice, such as my_moths")
    parser.add_argument("--folder", type=Path, required=True, help="a folder of your own, which need not exist")
    parser.add_argument("--package", default="own", help="name of the Python package in it (default: own)")
    parser.add_argument("--path", help="of data: where the samples lie; the reader is chosen by what is there")
    arguments = vars(parser.parse_args())
    arguments["folder"] = arguments["folder"].expanduser().absolute()
    try:
        files = NewFiles(**arguments)
        paths = files.write()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print("written:", *(f"  {path}" for path in paths), "next, in the folder of secateur:", sep="\n")
    print("\n".join(f"  {command}" for command in files.list_commands()))


if __name__ == "__main__":
    main()
