"""Sphinx configuration of the documentation site (make docs)."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import messages  # noqa: E402 - beside this file

from fastkd import __version__  # noqa: E402

project = "fastkd"
author = "the fastkd authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
html_theme = "furo"
html_title = f"fastkd {release}"


def setup(app: messages.Sphinx) -> None:
    app.connect("source-read", messages.insert)
    app.connect("autodoc-process-docstring", messages.keep_equations)
