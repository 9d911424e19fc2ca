"""The layers and stems of CONTRIBUTING.md, enforced."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml")
LOW = {"fastkd._precision"}
OPS = {"fastkd.ops"} | LOW
PUBLIC = {"fastkd.functional"} | OPS
# What each part may import of this repository; a name covers what lies below it.
ALLOWED = {
    "kernels": {"kernels"},
    "fastkd/_precision.py": set(),
    "fastkd/_version.py": set(),
    "fastkd/_extension.py": {"fastkd._built_for", "fastkd._C", "fastkd._version", "fastkd.ops._schemas"},
    "fastkd/reference": {"fastkd.reference"} | LOW,
    "fastkd/eager": {"fastkd.eager"} | LOW,
    "fastkd/ops": {"fastkd.ops", "fastkd.eager", "fastkd._extension"} | LOW,
    "fastkd/functional": {"fastkd.functional", "fastkd.distributed", "fastkd.ops"},
    "fastkd/capture": PUBLIC | {"fastkd.capture"},
    "fastkd/distributed/__init__.py": {
        "fastkd.functional",
        "fastkd.distributed",
    },  # the same names, with the default group
    "fastkd/distributed": OPS | {"fastkd.distributed", "fastkd.eager"},
    "fastkd/losses": PUBLIC | {"fastkd.distributed", "fastkd.losses"},
    "fastkd/compat": PUBLIC | {"fastkd.compat", "fastkd.losses", "fastkd.capture", "fastkd.distributed"},
    "fastkd/testing.py": {"fastkd._C", "fastkd.ops"},
    "fastkd/info.py": {"fastkd._extension", "fastkd._version", "fastkd.ops"},
    "fastkd/train": {
        "fastkd.info",
        "fastkd.train",
        "fastkd.backend",
        "fastkd.losses",
        "fastkd.functional",
        "fastkd.capture",
        "fastkd.distributed",
        "fastkd._version",
    },
}
PLACES = {
    "reference": "fastkd/reference/{}.py",
    "ops": "fastkd/ops/{}.py",
    "eager": "fastkd/eager/{}.py",
    "csrc/cpu": "csrc/cpu/{}.cpp",
    "csrc/cuda": "csrc/cuda/{}.cu",
    "kernels": "kernels/{}.py",
}


def sources(rule: str) -> list[Path]:
    """Return the files of a rule; a file with a rule of its own is not in its folder's."""
    path = ROOT / rule
    if rule.endswith(".py"):
        return [path]
    return sorted(file for file in path.rglob("*.py") if str(file.relative_to(ROOT)) not in ALLOWED)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of this repository; `from fastkd import x` counts as fastkd.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = ".".join(path.relative_to(ROOT).with_suffix("").parts[: -node.level])
                module = f"{package}.{module}".strip(".")
            names = [f"fastkd.{alias.name}" for alias in node.names] if module == "fastkd" else [module]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.startswith(("fastkd", "kernels")))


@pytest.mark.parametrize(
    ("path", "rule"),
    [(path, rule) for rule in ALLOWED for path in sources(rule) if path.exists()],
    ids=lambda x: str(x).removeprefix(f"{ROOT}/"),
)
def test_imports_point_downwards(path: Path, rule: str) -> None:
    for line, name in imports(path):
        allowed = any(name == low or name.startswith(f"{low}.") for low in ALLOWED[rule])
        assert allowed, f"{path.relative_to(ROOT)}:{line} imports {name}"


@pytest.mark.parametrize("folder", ["fastkd/ops", "fastkd/eager"])
def test_stems_do_not_import_each_other(folder: str) -> None:
    for path in (ROOT / folder).glob("[a-z]*.py"):
        for line, name in imports(path):
            last = name.rpartition(".")[2]
            sideways = last != path.stem and not last.startswith("_") and (ROOT / folder / f"{last}.py").exists()
            own_layer = name.startswith(f"{folder.replace('/', '.')}.")
            assert not (own_layer and sideways), f"{path.relative_to(ROOT)}:{line} imports {name}"


def stem_of(name: str) -> str:
    """Return the stem that a file of kernels/ or csrc/ belongs to: `_attention_rows.py` is a part of attention."""
    return name.strip("_").split(".")[0].split("_")[0]


def test_kernels_import_the_parts_of_their_own_stem_alone() -> None:
    """A stem's file may be split into parts, `_<stem>_<part>.py`, of which `<stem>.py` is the only entrance."""
    for path in (ROOT / "kernels").glob("*.py"):
        for line, name in imports(path):
            module = name.removeprefix("kernels.")
            own_part = stem_of(module) == stem_of(path.stem) and module.startswith("_")
            assert module == "_common" or own_part, f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_sources_include_the_parts_of_their_own_stem_alone() -> None:
    stems = {
        path.stem
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu") and path.parent.stem != "csrc"
    }
    for path in (ROOT / "csrc").rglob("*.*"):
        for included in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            part = Path(included).name
            if stem_of(part) in stems:
                assert stem_of(part) == stem_of(path.name), f"{path.relative_to(ROOT)} includes {included}"


def test_files_stay_short() -> None:
    """A file of the library that passes 450 lines is split into parts."""
    paths = [*(ROOT / "fastkd").rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths if path.suffix != ".so"
    }
    assert not {path: length for path, length in lengths.items() if length > 450}


def test_every_source_has_a_rule() -> None:
    covered = {path for rule in ALLOWED for path in sources(rule)}
    top = {"fastkd/__init__.py", "fastkd/__main__.py", "fastkd/_built_for.py"}
    everything = {*(ROOT / "fastkd").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")}
    assert {str(p.relative_to(ROOT)) for p in everything - covered} <= top


def test_kernels_directory_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the published package 'kernels'"


def test_stems_stand_in_the_table() -> None:
    table = re.search(r"<!-- stems.*?-->\n(.*?)<!-- /stems -->", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert table, "CONTRIBUTING.md lost its table of stems"
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].strip().splitlines()]
    written = {row[0]: {place for place, mark in zip(head[1:], row[1:], strict=True) if mark} for row in rows}
    stems = {path.stem for path in (ROOT / "fastkd/ops").glob("[a-z]*.py")}
    built = {stem: {place for place, p in PLACES.items() if (ROOT / p.format(stem)).exists()} for stem in stems}
    assert written == built
    for stem in stems:
        assert [*(ROOT / f"tests/{stem}").glob("test_*.py")], f"tests/{stem} holds no tests"


def test_launchers_are_annotated() -> None:
    """mypy checks their types; jitted functions have none."""
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [x.arg for x in arguments if x.annotation is None and x.arg != "self"]
            assert node.returns and not untyped, f"{path.name}:{node.lineno} {node.name} {untyped}"


def test_nothing_that_pre_commit_bans() -> None:
    hook = r"- id: (no-\S+)\n +name: .+\n +entry: '(.+)'\n +language: pygrep\n +files: '(.+)'\n +exclude: '(.+)'"
    bans = re.findall(hook, (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(bans) == 6
    folders = ("fastkd", "kernels", "csrc", "tests", "benchmarks", "examples", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.*")] + list(ROOT.glob("*.*"))
    names = {str(path.relative_to(ROOT)): path for path in paths if path.suffix in SOURCES}
    for name, banned, files, exclude in bans:
        searched = [n for n in names if re.search(files, n) and not re.search(exclude, n)]
        assert searched, f"{name} looks at no file"
        found = [n for n in searched if re.search(banned, names[n].read_text())]
        assert not found, f"{name}: {found}"
