"""What an engine has to keep to, as tests, for boardbench's own engines and for those of others.

A test module says which engine, and how to make a small model for it; everything else is inherited::

    from boardbench.testkit import EngineContract, Subject

    class TestHailo(EngineContract):
        subjects = (Subject("hailo", ".hef", closed=make_model, device="hailo8", computes=the_same_in_numpy),)

``pytest_plugins = ["boardbench.testkit"]`` in ``conftest.py`` adds the fixture ``bench_child``.
Needs pytest and NumPy (``boardbench[testkit]``).
"""

from __future__ import annotations

import pytest

# A failing assertion then shows its values. Before the import, or it is too late.
pytest.register_assert_rewrite("boardbench.testkit.contract")

from boardbench.testkit.child import Answer, BenchChild, bench_child  # noqa: E402
from boardbench.testkit.contract import EngineContract, Subject, available  # noqa: E402

__all__ = ["Answer", "BenchChild", "EngineContract", "Subject", "available", "bench_child"]
