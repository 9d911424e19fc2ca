"""Docstrings and help texts begin as sentences or name the thing they describe."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("benchmarks", "docs", "examples", "experiments", "fastkd", "kernels", "setup.py", __file__)
DOCSTRING = ("Of ", "Less ", "As ", "What ", "Where ", "With ", "Or ", "Its ")
HELP = ("of ", "its ", "where ", "as ", "with ", "or ")


def sources(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(p for p in path.rglob("*.py") if "_build" not in p.parts)


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def _begins(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return _begins(node.values[0]) if node.values else ""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def help_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every `help=` and of every first argument of `option`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            texts = [keyword.value for keyword in node.keywords if keyword.arg == "help"]
            if ast.unparse(node.func) == "option":
                texts += node.args[:1]
            yield from ((text.lineno, _begins(text)) for text in texts)


def refused(source: str) -> list[str]:
    tree = ast.parse(source)
    found = [(line, text) for line, text in docstrings(tree) if text.startswith(DOCSTRING)]
    found += [(line, text) for line, text in help_texts(tree) if text.lower().startswith(HELP)]
    return [f"{line}: {text.splitlines()[0]}" for line, text in sorted(found)]


@pytest.mark.parametrize("place", PLACES)
def test_texts_begin_as_sentences(place: str) -> None:
    paths = sources(place)
    assert paths, place
    wrong = [f"{path.relative_to(ROOT)}:{text}" for path in paths for text in refused(path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("opening", [text.strip() for text in DOCSTRING])
def test_such_a_docstring_is_refused(opening: str) -> None:
    for before in (
        "",
        "class A:\n    ",
        "def f():\n    ",
        "async def f():\n    ",
        "class A:\n    def f(self):\n        ",
    ):
        assert refused(f'{before}"""{opening} rows of a group.\n\nMore."""') != []
        assert refused(f'{before}"""{opening}ten rows of a group."""') == []


@pytest.mark.parametrize("opening", ["Of", "Its", "Where", "As", "With", "Or"])
def test_such_a_help_text_is_refused(opening: str) -> None:
    for call in ("p.add_argument('--x', help={})", "option({}, 1)"):
        for text in (f"'{opening} the first layer.'", f"f'{opening.lower()} {{x}}'"):
            assert refused(call.format(text)) != []
        assert refused(call.format("'Weight of the first layer.'")) == []
