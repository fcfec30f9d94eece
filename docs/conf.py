"""Sphinx settings: `make docs` builds the pages into site/."""

from __future__ import annotations

import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

project = "boardbench"
author = "the boardbench authors"
copyright = "the boardbench authors"  # noqa: A001 - Sphinx's own name
release = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "autoapi.extension"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "boardbench"

# The API reference is read from the source, without importing it: no engine is needed to build it.
autoapi_dirs = [
    str(REPOSITORY / "agent" / "boardbench"),
    str(REPOSITORY / "collector" / "boardbench"),
]
autoapi_root = "api"
autoapi_options = ["members", "undoc-members", "show-module-summary"]
autoapi_python_use_implicit_namespaces = True
autoapi_member_order = "bysource"
autoapi_ignore = ["*/__main__.py", "*_pb2*"]
suppress_warnings = ["autoapi.python_import_resolution"]
