"""Every Python block of the README and the docs runs; every link inside them leads somewhere."""

import re
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


def test_measured_tables_are_generated() -> None:
    """README and docs show the committed measurements, to the letter; pictures carry the digest of theirs."""
    check = subprocess.run([sys.executable, str(ROOT / "docs/generate.py"), "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


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


def test_changelog_begins_with_the_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first and first[1] == fastkd.__version__
