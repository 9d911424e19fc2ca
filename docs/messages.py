"""A Sphinx hook that builds the table of error messages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx
else:
    Sphinx = Any

PACKAGE = Path(__file__).parent.parent / "fastkd"
PLACE = "<!-- every message, by messages.py -->"


def _text(node: ast.expr) -> str:
    """Return the text of a message, with `...` for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "..."


def raised() -> Iterator[tuple[str, str, str]]:
    """Yield (module, error, message) for every error that fastkd raises itself."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                error, message = ast.unparse(node.exc.func), _text(node.exc.args[0])
                if re.search(r"[a-z]{3} ", message):
                    yield module, error, re.sub(r"\s+", " ", message)


def insert(app: "Sphinx", page: str, source: list[str]) -> None:
    """Replace the placeholder in messages.md by the table of messages."""
    if PLACE not in source[0]:
        return
    rows = [f"| `{message.replace('|', '/')}` | `{error}` | `{module}` |" for module, error, message in raised()]
    table = "\n".join(["| message | error | from |", "|---|---|---|", *rows])
    source[0] = source[0].replace(PLACE, table)
