"""Sphinx configuration of the documentation site (make docs)."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")  # the walk-throughs' networks are tiny
DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent), str(DOCS.parent / "examples")]

import docstrings  # noqa: E402 - beside this file
import messages  # noqa: E402

from fastkd import __version__  # noqa: E402

project = "fastkd"
author = "the fastkd authors"
project_copyright = f"2026, {author}, Apache License 2.0"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax and its fonts, copied into the site
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "walkthroughs"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
html_theme = "furo"
html_title = f"fastkd {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
html_show_sphinx = False

# Each walk-through runs when the site is built, in this process. One that fails ends the build.
sphinx_gallery_conf = {
    "examples_dirs": "walkthroughs",
    "gallery_dirs": "walkthrough",
    "filename_pattern": "/",
    "run_stale_examples": True,  # an unchanged walk-through can still be broken by a module that it imports
    "within_subsection_order": "ExampleTitleSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "remove_config_comments": True,
}


def setup(app: messages.Sphinx) -> None:
    app.connect("source-read", messages.insert)
    app.connect("source-read", docstrings.insert)
    app.connect("autodoc-process-docstring", docstrings.render)
