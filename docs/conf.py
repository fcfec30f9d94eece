"""Sphinx settings: `make docs` builds the pages into site/."""

from __future__ import annotations

from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

REPOSITORY = Path(__file__).resolve().parent.parent

project = "boardbench"
author = "the boardbench authors"
copyright = "the boardbench authors"
release = distribution_version("boardbench")

extensions = ["myst_parser", "autoapi.extension", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
smartquotes = False  # they would make a dash of the two hyphens of an option
html_theme = "furo"
html_title = "boardbench"

# The API reference is read from the source, without importing it: no engine is needed to build it.
autoapi_dirs = [
    str(REPOSITORY / "agent" / "boardbench"),
    str(REPOSITORY / "collector" / "boardbench"),
]
autoapi_root = "api"
autoapi_add_toctree_entry = False
autoapi_options = ["members", "undoc-members", "show-module-summary"]
autoapi_python_use_implicit_namespaces = True
autoapi_member_order = "bysource"
autoapi_ignore = ["*/__main__.py", "*_pb2*"]
suppress_warnings = ["autoapi.python_import_resolution", "myst.header", "ref.python"]
# Pages that others include.
exclude_patterns = ["generated"]


def _figures(
    _app: object, _what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Makes an indented block after a paragraph a literal one: docstrings draw trees and layouts that way."""
    found: list[str] = []
    for line in lines:
        indented = line.startswith("    ")
        if indented and found and not found[-1]:
            before = next((text for text in reversed(found) if text), "")
            if before and not before.startswith(" ") and not before.endswith("::"):
                found += ["::", ""]
        found.append(line)
    lines[:] = found


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _figures)
