"""Whether the bounds hold when the measurement ends by the rule: benchmarks/coverage.py in small."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SIMULATE = Path(__file__).resolve().parents[3] / "benchmarks" / "simulate.py"


@pytest.fixture(scope="module")
def simulate() -> Iterator[ModuleType]:
    found = importlib.util.spec_from_file_location("boardbench_simulate", SIMULATE)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    # Its dataclasses look for their module there.
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    yield module
    del sys.modules[found.name]


def outcome(simulate: ModuleType, name: str, experiments: int) -> object:
    return simulate.Outcome(simulate.simulate(name, experiments, seed=1))


def test_bounds_of_independent_latencies_hold_and_are_the_exact_ones(simulate: ModuleType) -> None:
    names = ("normal", "lognormal, 10 %", "bimodal, 70 to 30", "mobilenet_v1_0.5_160, shuffled")
    covered = {percentile: [] for percentile in simulate.PERCENTILES}
    for name in names:
        found = outcome(simulate, name, 60)
        assert found.flagged <= 2 / 60
        for percentile in simulate.PERCENTILES:
            assert found.told(percentile) == 1.0
            assert found.width(percentile) == pytest.approx(1.0)
            covered[percentile].append(found.coverage(percentile))
    for shares in covered.values():
        # Of 240 experiments: two standard errors below 95 %.
        assert sum(shares) / len(shares) >= 0.92


@pytest.mark.parametrize("name", ["autocorrelated, 0.6", "mobilenet_v1_0.5_160, in blocks of 50"])
def test_dependent_latencies_are_flagged_and_their_bounds_widened(simulate: ModuleType, name: str) -> None:
    found = outcome(simulate, name, 40)
    assert found.flagged == 1.0
    for percentile in ("50", "90"):
        assert found.coverage(percentile) >= 0.875, "two standard errors of 40 experiments below 95 %"
        assert found.width(percentile) > 1.3
        assert found.coverage(percentile, exact=True) < found.coverage(percentile)


@pytest.mark.parametrize("name", ["10 % slower over 1,000", "10 % faster from 200 on", "heats up, 15 %"])
def test_drifting_latencies_are_flagged(simulate: ModuleType, name: str) -> None:
    found = outcome(simulate, name, 15)
    assert all(each.drifting for each in found.experiments)


def test_every_family_can_be_measured(simulate: ModuleType) -> None:
    families = simulate.families()
    assert len({family.name for family in families}) == len(families)
    for family in families:
        (experiment,) = simulate.simulate(family.name, 1, seed=2, targets="p50=5%", most_runs=500)
        assert 96 <= experiment.runs <= 500
        truths = [family.truth(percentile, 500) for percentile in simulate.PERCENTILES]
        assert truths == sorted(truths) and truths[0] > 0


def test_an_experiment_is_the_same_for_a_seed(simulate: ModuleType) -> None:
    assert simulate.simulate("normal", 2, seed=3) == simulate.simulate("normal", 2, seed=3)
    assert simulate.simulate("normal", 2, seed=3) != simulate.simulate("normal", 2, seed=4)
