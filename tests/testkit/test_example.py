"""The example of an engine from elsewhere passes its own tests, and the page about it says what is in it."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "plugin-affine"
PAGE = REPOSITORY / "docs" / "adding-an-engine.md"


def pytest_in(folder: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest as a third party runs it, with the distribution installed beside boardbench."""
    environment = {
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("BOARDBENCH_", "PYTEST_"))
        },
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
    )


def test_the_example_passes_its_tests(affine_site: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLE, tmp_path / "example", ignore=shutil.ignore_patterns("src"))
    done = pytest_in(folder, affine_site)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 40, done.stdout
    assert "skipped" not in done.stdout


# What is left out of the engine, and a test that has to notice. Each is the example with one thing wrong.
MUTANTS = {
    "shared": ("fetch", "return {'y': returned}", "test_what_was_fetched_is_a_copy"),
    "stale": ("fetch", "self.first = getattr(self, 'first', returned); return {'y': self.first.copy()}",
              "test_equal_feeds_give_equal_outputs_call_after_call or test_fetch_is_of_the_latest_inference"
              " or test_two_models_do_not_disturb_each_other"),
    "wrong": ("fetch", "return {'y': returned + 1}", "test_it_computes"),
    "renamed": ("fetch", "return {'z': returned.copy()}", "test_outputs_are_as_they_were_announced"),
    "guessing": ("placement", "return placement.known([], evidence=Evidence.PARTITION, detail='x')",
                 "test_the_placement_adds_up"),
    "unclosable": ("close", "assert not hasattr(self, 'closed'); self.closed = True",
                   "test_closing_twice_is_closing_once"),
    "changing": ("bind", "feeds['x'][...] = 0; return lambda: feeds['x']", "test_feeds_are_not_changed"),
}  # fmt: skip
REFUSING = {
    "lenient": ("options = {}", "test_an_unknown_option_is_refused_by_name"),
    "anywhere": ("device = 'cpu'", "test_an_unknown_device_is_refused_with_those_that_there_are"),
    "deaf": ("threads = None", "test_threads_are_recorded"),
    "rigid": ("shapes = {}", "test_an_open_size_is_settled_by_name_or_position"),
}


def test_the_contract_notices_what_is_wrong(affine_site: Path, tmp_path: Path) -> None:
    """A suite that can't fail proves nothing: each engine here breaks one rule, and the test for it fails."""
    site = shutil.copytree(affine_site, tmp_path / "site")
    (site / "boardbench_affine-1.0.0.dist-info" / "entry_points.txt").write_text(
        "[boardbench.runtimes]\n"
        + "".join(f"{name} = mutants:{name.upper()}\n" for name in (*MUTANTS, *REFUSING))
    )
    source = """
        from boardbench.agent.bench import placement
        from boardbench.agent.bench.runtimes import Engine
        from boardbench.agent.domain import Evidence
        from boardbench_affine.engine import AffineModel, AffineRuntime
    """
    source = textwrap.dedent(source)
    for name in (*MUTANTS, *REFUSING):
        loads = "model = super().load(file, **asked)"
        model = ""
        if name in MUTANTS:
            method, body, _ = MUTANTS[name]
            taken = {"fetch": "self, returned", "bind": "self, feeds"}.get(method, "self")
            model = f"class {name}_model(AffineModel):\n    def {method}({taken}):\n        {body}\n"
            loads += f"; model.__class__ = {name}_model"
        else:
            key, _, value = REFUSING[name][0].partition(" = ")
            loads = f"asked[{key!r}] = {value}; {loads}"
        source += textwrap.dedent(f"""
            class {name}(AffineRuntime):
                name = {name!r}
                def load(self, file, **asked):
                    {loads}
                    return model

            {name.upper()} = Engine({name!r}, "mutants", {name!r}, ("affine",), magic=b"AFFINE1\\n",
                                    profiler="boardbench_affine.profiler", contract=1)
        """)
        source += "\n" + model
    (site / "mutants.py").write_text(source)
    tests = """
        import numpy as np
        from boardbench.testkit import EngineContract, Subject
        from test_affine import relu_and_itself

        class TestMutants(EngineContract):
            subjects = tuple(
                Subject(name, ".affine", relu_and_itself, lambda: relu_and_itself(-1), threads=False,
                        computes=lambda x: np.maximum(x, 0) + x)
                for name in %s
            )
    """
    (tmp_path / "test_mutants.py").write_text(textwrap.dedent(tests) % repr((*MUTANTS, *REFUSING)))
    shutil.copy(EXAMPLE / "tests" / "test_affine.py", site / "test_affine.py")
    done = pytest_in(tmp_path, site, "-k", "not probe and not run_comes and not its_process and not heavy")
    failed = set(re.findall(r"FAILED \S+::(test_\w+)\[([\w-]+?)(?:-.*)?\]", done.stdout))
    assert failed, done.stdout + done.stderr
    expected = {
        **{name: test for name, (_, _, test) in MUTANTS.items()},
        **{n: t for n, (_, t) in REFUSING.items()},
    }
    unnoticed = {
        name: tests
        for name, tests in expected.items()
        if not any((test, name) in failed for test in tests.split(" or "))
    }
    assert not unnoticed, done.stdout[-6000:]
    # And each breaks that rule, and not everything.
    fine = ("test_its_version_is_package_and_number", "test_a_file_that_is_not_there_is_refused_by_its_name")
    assert not [(test, name) for test in fine for name in expected if (test, name) in failed], failed
    assert not [name for name in REFUSING if ("test_it_computes", name) in failed], failed
    assert len(failed) < 3 * len(expected), failed


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def test_the_page_shows_the_example_as_it_is() -> None:
    entry, configured = blocks("toml")
    assert entry in (EXAMPLE / "pyproject.toml").read_text()
    assert "[runtimes.affine]" in configured
    declaration, tests = blocks("python")
    source = (EXAMPLE / "src" / "boardbench_affine" / "__init__.py").read_text()
    assert declaration.partition("\n\n")[2] in source
    assert tests.partition("\n\n\n")[2] in (EXAMPLE / "tests" / "test_affine.py").read_text()


def test_the_page_names_what_there_is() -> None:
    text = PAGE.read_text()
    for path in re.findall(r"`(examples/[\w/-]+/|boardbench/agent/[\w/]+\.py)`", text):
        assert (REPOSITORY / path).exists() or (REPOSITORY / "agent" / path).exists(), path
    modules = re.findall(r"^\| `(boardbench\.[\w.]+)` \| (.*) \|$", text, re.M)
    assert len(modules) == 6
    for module, about in modules:
        loaded = importlib.import_module(module)
        for name in re.findall(r"`(\w+)`", about):
            assert hasattr(loaded, name), f"{module} has no {name}"


@pytest.mark.parametrize("field", ["name", "module", "formats", "magic", "suffixes", "profiler", "contract"])
def test_the_page_explains_every_field_of_a_declaration(field: str) -> None:
    from boardbench.agent.bench.runtimes import CONTRACT, Engine

    assert field in Engine.__dataclass_fields__
    assert re.search(rf"^\| `{field}`", PAGE.read_text(), re.M)
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", PAGE.read_text(), re.M))))
    assert set(Engine.__dataclass_fields__) - {"environment"} <= explained
    assert f"it is made for, {CONTRACT}" in PAGE.read_text()
