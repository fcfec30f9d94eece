"""The documentation says what the code does: generated tables are current, codes are all explained."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(generator: ModuleType) -> None:
    pages = generator.pages()
    assert {path.name for path in (DOCS / "generated").iterdir()} == set(pages)
    stale = [name for name, text in pages.items() if (DOCS / "generated" / name).read_text() != text]
    assert not stale, f"run `python docs/generate.py` and commit: {stale}"


def test_every_generated_page_is_included_somewhere(generator: ModuleType) -> None:
    written = "".join(path.read_text() for path in DOCS.glob("*.md"))
    assert not [name for name in generator.pages() if f"generated/{name}" not in written]


def test_every_page_has_one_title() -> None:
    """A second one would stand in the contents as a page of its own."""
    several = {}
    for path in DOCS.glob("*.md"):
        prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
        if len(titles := re.findall(r"^# .*", prose, re.M)) != 1:
            several[path.name] = titles
    assert not several


def test_every_error_code_of_a_run_is_explained() -> None:
    pages = (DOCS / "warnings-and-errors.md", DOCS / "generated" / "warnings.md")
    explained = {code for page in pages for code in re.findall(r"^\| `([a-z_]+)` \|", page.read_text(), re.M)}
    used = set()
    for path in (REPOSITORY / "agent" / "boardbench" / "agent").rglob("*.py"):
        used |= set(re.findall(r"""\bcode=["']([a-z_]+)["']""", path.read_text()))
    main = (REPOSITORY / "agent" / "boardbench" / "agent" / "bench" / "__main__.py").read_text()
    used |= set(re.findall(r"""\(\w+, "([a-z_]+)"\)""", main))
    assert len(used) > 10, "the codes are no longer found: mend this test"
    assert used - explained == set(), "explain them in docs/warnings-and-errors.md"


def test_every_option_of_an_engine_is_explained() -> None:
    page = (DOCS / "engines.md").read_text()
    folder = REPOSITORY / "agent" / "boardbench" / "agent" / "bench" / "runtimes"
    missing = []
    for engine in ("tflite", "onnx"):
        text = (folder / f"{engine}.py").read_text()
        names = re.findall(r"""reader\.\w+\(\s*["']([a-z_.]+)["']""", text)
        assert names, f"no options found in {engine}.py: mend this test"
        missing += [f"{engine}: {name}" for name in names if f"`{name}" not in page]
    assert not missing
