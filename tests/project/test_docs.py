"""Every Python block of the README and the docs runs; every link inside them leads somewhere."""

import copy
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fastkd
import fastkd.functional

pytest.importorskip("timm", reason="the docs show live timm models")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL), 1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        exec(compile(block, "block", "exec"), {})  # the page's own code


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 10


def test_shown_commands_exist() -> None:
    """The options in all command lines of the pages parse, and the targets, files and modules are there."""
    pytest.importorskip("jsonargparse", reason="parses the command line")
    from fastkd.train.cli import parser

    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    parsers = {command: parser(command) for command in ("train", "eval", "look", "export", "invert")}
    seen = set()
    for page in PAGES:
        for block in re.findall(r"^```sh\n(?!#!)(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", "").splitlines():
                words = [word for word in shlex.split(line, comments=True) if word != "..."]
                head, *rest = words or [""]
                seen.add(head)
                if head == "fastkd":
                    given = rest[: rest.index("--config")] if "--config" in rest else rest  # the file is not there
                    parsers[rest[0]].parse_args(given, defaults=False)
                elif head == "make":
                    assert rest[0] in targets, line
                elif head == "python":
                    name = rest[1].replace(".", "/") if rest[0] == "-m" else rest[0]
                    assert any((ROOT / f"{name}{end}").exists() for end in ("", ".py")), line
    assert seen >= {"fastkd", "make", "python", "pip"}


def test_citation_is_that_of_the_file() -> None:
    """The README's BibTeX entry has the title and the authors of CITATION.cff."""
    entry, source = (ROOT / "README.md").read_text(), (ROOT / "CITATION.cff").read_text()
    title = re.search(r'^title: "(.+)"', source, re.MULTILINE)
    author = re.search(r"- name: (.+)", source)
    assert title and author and f"title = {{{title[1]}}}" in entry and f"author = {{{{{author[1]}}}}}" in entry


def test_the_comparison_is_with_this_version() -> None:
    assert f"\n| fastkd | {fastkd.__version__} | " in (ROOT / "docs/comparison.md").read_text()


def test_readme_fits_a_stranger() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_measured_tables_are_generated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """README and docs show the committed measurements, to the letter; pictures carry the digest of theirs."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate

    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_equations_are_those_of_the_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the site typesets is an equation of a docstring as it is now, and none has been left as plain text."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import docstrings

    found = []
    for module in map(importlib.import_module, docstrings.MODULES):
        for name in docstrings.names(module):
            lines = (inspect.getdoc(getattr(module, name)) or "").splitlines()
            found += ["\n".join(line[4:] for line in lines[a:b]) for a, b in docstrings.blocks(lines)]
    assert docstrings.EQUATIONS.keys() <= set(found)
    assert all(any(word in text for word in ("import ", "with ")) for text in set(found) - docstrings.EQUATIONS.keys())
    lines = ["Compare `manifold_loss` and `None` with |x|, as relation_loss does."]
    docstrings.render(None, "function", "", None, None, lines)
    full = ":py:obj:`{0} <fastkd.functional.{0}>`".format
    assert lines == [f"Compare {full('manifold_loss')} and ``None`` with \\|x\\|, as {full('relation_loss')} does."]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.exhaustive  # `make docs` builds it too
@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason="the site's theme is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", str(ROOT / "docs")]
    built = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "cannot be differentiated twice" in re.sub("<[^>]+>", "", (tmp_path / "messages.html").read_text())
    api = (tmp_path / "api.html").read_text()
    assert all(f'id="fastkd.functional.{name}"' in api for name in fastkd.functional.__all__)


def test_cures_are_for_messages_that_exist() -> None:
    """What install.md explains is what build, loader and dispatcher say, and none of theirs is left out."""
    explained = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/install.md").read_text(), re.MULTILINE)
    places = ("setup.py", "fastkd/_extension.py", "fastkd/info.py", "fastkd/ops/_dispatch.py")
    source = " ".join((ROOT / place).read_text() for place in places)
    messages = [text for text in explained if " " in text]
    assert len(messages) > 15
    for message in messages:
        assert message in source, message
    for reason in re.findall(r'return f?"([^"]+)"', (ROOT / "fastkd/ops/_dispatch.py").read_text()):
        if " " in reason:
            assert any(message in reason for message in messages), reason


def test_pictures_show_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of picture is drawn, twice to the same bytes, and other data give another digest."""
    pytest.importorskip("matplotlib", reason="draws the pictures")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import plots

    bars = [{"case": "a/b", "others": {"eager": 3.0, "compile": 0.7}}, {"case": "a/c", "others": {"eager": 2.0}}]
    rows = [
        {"sweep": "s", "variable": "tokens", "provider": name, "sizes": [1, 2, 4], "seconds": [1.0, 2.0, None],
         "bytes": [None] * 3, "time": 1.0, "memory": None}
        for name in ("fastkd", "eager")
    ]  # fmt: skip
    roof = {"copy": 1e10, "matmul": 1e11, "cases": [{"case": "a/b", "flops": 1e9, "bytes": 1e6, "seconds": 0.02}]}
    for draw, data, word in (
        (plots.speedups, bars, "over eager"),
        (plots.scaling, rows, "fastkd, exponent 1.00"),
        (plots.roofline, roof, "operations per byte"),
    ):
        for name in ("first", "second"):
            plots.write(tmp_path / f"{name}.svg", data, draw, (5, 3))
        first = (tmp_path / "first.svg").read_text()
        assert first == (tmp_path / "second.svg").read_text() and word in first
        assert plots.drawn_from(tmp_path / "first.svg") == plots.digest(data) != plots.digest([data])
    assert plots.drawn_from(tmp_path / "missing.svg") is None


def test_two_machines_stand_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second file of results adds columns and panels, takes the headline if it is newer, and may lack cases."""
    pytest.importorskip("matplotlib", reason="draws the pictures")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate
    import plots

    found = max(generate.results("cases"), key=lambda one: len(one["cases"]))
    other = copy.deepcopy(found)
    other["header"] |= {"machine": "zz-other", "cpu": "Another CPU", "date": "2099-01-01T00:00:00+00:00"}
    left_out = next(row["case"] for row in other["cases"] if row["case"] not in dict(generate.HEADLINE))
    other["cases"] = [row for row in other["cases"] if row["case"] != left_out]
    for row in other["cases"]:
        row["providers"]["fastkd"]["median"] /= 10
    other["dropins"] = generate.results("dropins")[0]["dropins"]  # as `make bench` writes both tables
    for name, one in (("one", found), ("zz", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    text = generate.cases()
    assert "ms (B)" in text and "(B) Another CPU" in text and f"**{left_out}**" in text
    assert "ratio (B)" in generate.bars()
    assert "Another CPU" in generate.numbers()
    assert generate.migrations().count("Another CPU, 2099-01-01") == len(generate.MIGRATIONS)
    drawn = {name: (data, draw, size) for name, data, draw, size in generate.pictures()}
    for name in ("overview-time", "overview-memory"):
        data, draw, size = drawn[name]
        assert [one["title"] for one in data] == [found["header"]["cpu"], "Another CPU"]
        plots.write(tmp_path / "both.svg", data, draw, size)
        assert "Another CPU" in (tmp_path / "both.svg").read_text()


def test_changelog_begins_with_the_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first and first[1] == fastkd.__version__
