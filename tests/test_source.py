"""The shape of the source: which way imports go, how small train.py is, and that nothing opens a pickle."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.process import ROOT

PACKAGES = ("conf", "criteria", "datamodules", "experiments", "lightning_modules")


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """The absolute names a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def belongs(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_no_two_test_files_have_one_name():
    """pytest imports a test file by its name alone: of two with one name it collects the first, and then fails."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert names and [name for name, times in names.items() if times > 1] == []


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("conf", ()),
        ("datamodules", ()),
        ("criteria", ("datamodules.seeding",)),
        ("lightning_modules", ("criteria", "datamodules")),
        ("experiments", ("lightning_modules", "criteria", "datamodules")),
    ],
)
def test_imports_go_one_way(package, allowed):
    """train -> experiments -> lightning_modules -> criteria; conf is for all, and knows none of them."""
    files = sources(package)
    assert files
    for path in files:
        ours = [name for name in imported(path) if belongs(name, "train", "tests", *PACKAGES)]
        assert [name for name in ours if not belongs(name, package, "conf", *allowed)] == [], path


def modules() -> dict[str, Path]:
    """{dotted name: file} of all modules of the packages."""
    found = {}
    for path in sources(*PACKAGES):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_no_modules_import_each_other_in_a_circle():
    known = modules()

    def needed(path: Path) -> set[str]:
        """The modules that a file imports: those that it names, or in which the names are that it imports."""
        return {name if name in known else name.rpartition(".")[0] for name in imported(path)} & known.keys()

    graph = {name: needed(path) - {name} for name, path in known.items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert sorted(graph) == []


FAMILY = re.compile(r"isinstance\([^()]*\b\w*Backbone\b|\.library\s*[!=]=|type\(\w+\) is \w*Backbone")
METHOD = re.compile(r"isinstance\([^()]*\b(BkSdm|Budgeted|Refined|Bottleneck|Criterion|Selection)\b")


@pytest.mark.parametrize(
    "source",
    ["isinstance(x, DiffusionBackbone)", "isinstance(a.b, A | UNetBackbone)", 'n.library == "torch"', "x.library != y"],
)
def test_a_test_of_a_family_is_seen(source):
    assert FAMILY.search(source)


def test_objects_are_asked_and_not_their_families():
    """Outside the backbones nothing tests which family a network is of, nor which selection or criterion is at work."""
    for path in sources(*PACKAGES):
        text = path.read_text()
        if not path.is_relative_to(ROOT / "lightning_modules" / "backbones"):
            assert not FAMILY.search(text), path
        if not path.is_relative_to(ROOT / "criteria"):
            assert not re.search(
                r"isinstance\([^()]*\b(BkSdm|Budgeted|Refined|Bottleneck|Criterion|Selection)\b", text
            ), path


def test_train_wires_and_nothing_else():
    source = (ROOT / "train.py").read_text()
    assert len(source.splitlines()) < 150
    ours = [name for name in imported(ROOT / "train.py") if belongs(name, "tests", *PACKAGES)]
    assert [name for name in ours if not belongs(name, "conf", "experiments")] == []


PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib")
UNSAFE = ("torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "eval", "exec")


def unsafe(source: str) -> list[str]:
    """What in a source could run code that is hidden in data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        flags = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if (
            ("weights_only" in flags and flags["weights_only"] is not True)
            or (name == "torch.load" and flags.get("weights_only") is not True)
            or name in UNSAFE
            or (name in ("np.load", "numpy.load") and flags.get("allow_pickle") is not False)
            or flags.get("allow_pickle") is True
        ):
            found.append(ast.unparse(node))
    return found


ALLOWED = {"lightning_modules/training/checkpoints.py": ["torch.save(checkpoint, file)"]}
"""{file: its exceptions}: checkpoints are dictionaries of tensors and plain values, read with weights_only=True."""


@pytest.mark.parametrize(
    "path", [ROOT / "train.py", *sources(*PACKAGES)], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_no_source_loads_or_saves_pickles(path):
    assert unsafe(path.read_text()) == ALLOWED.get(path.relative_to(ROOT).as_posix(), [])


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "trainer.fit(module, weights_only=False)",
        "import pickle",
        "from pickle import load",
        "torch.save(model, path)",
        "yaml.load(stream)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "exec(text)",
    ],
)
def test_the_scan_for_pickles_finds_them(source):
    assert unsafe(source) != []
