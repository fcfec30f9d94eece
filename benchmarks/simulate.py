"""Simulated measurements: latencies whose percentiles are known, measured until they are precise enough.

What stops the measurement and what says how sure it is are boardbench's own; only the clock is replaced, by
latencies drawn from a family or from a recorded trace. Deterministic for a seed.
"""

from __future__ import annotations

import functools
import json
import lzma
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from boardbench.agent.bench import series, stats, stopping

TRACES = Path(__file__).with_name("traces")
PERCENTILES = ("50", "90", "99")
TARGETS = "p50=1%,p99=5%"
MOST_RUNS = 6_000
"""Where a measurement ends that has not become precise: 6 s of a model of a millisecond."""

MILLISECOND = 1e6

Draw = Callable[[numpy.random.Generator, int], Any]
"""A trace of so many latencies in ns, in order."""

Truth = Callable[[str, int], float]
"""The percentile, in ns, of the distribution that a trace of so many latencies is drawn from."""


@dataclass(frozen=True)
class Family:
    """A kind of trace.

    ``kind`` is "independent", "dependent", "recorded", "rare", "drifting" or "wandering".
    """

    name: str
    kind: str
    draw: Draw
    truth: Truth


# Distributions: mixtures of lognormals, given as (weight, median in ms, standard deviation of the logarithm).

Mixture = Sequence[tuple[float, float, float]]


def _below(mixture: Mixture, milliseconds: float) -> float:
    at = math.log(milliseconds)
    return sum(
        weight * 0.5 * math.erfc((math.log(median) - at) / (sigma * math.sqrt(2)))
        for weight, median, sigma in mixture
    )


@functools.cache
def _quantile(mixture: tuple[tuple[float, float, float], ...], percentile: str) -> float:
    low, high = 1e-3, 1e3
    while high - low > 1e-12 * high:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _below(mixture, middle) < float(percentile) / 100 else (low, middle)
    return high * MILLISECOND


def _fixed(mixture: Mixture) -> Truth:
    return lambda percentile, _: _quantile(tuple(mixture), percentile)


def _independent(name: str, mixture: Mixture) -> Family:
    def draw(random: numpy.random.Generator, count: int) -> Any:
        which = random.choice(len(mixture), count, p=[weight for weight, _, _ in mixture])
        medians = numpy.array([median for _, median, _ in mixture])[which]
        sigmas = numpy.array([sigma for _, _, sigma in mixture])[which]
        return MILLISECOND * medians * numpy.exp(sigmas * random.standard_normal(count))

    return Family(name, "independent", draw, _fixed(mixture))


def _normal() -> Family:
    def draw(random: numpy.random.Generator, count: int) -> Any:
        return MILLISECOND * (1 + 0.05 * random.standard_normal(count))

    z = {"50": 0.0, "90": 1.2815515655446004, "99": 2.3263478740408408}
    return Family("normal", "independent", draw, lambda each, _: MILLISECOND * (1 + 0.05 * z[each]))


def _pareto() -> Family:
    """A tenth of the latency has a tail without a third moment."""

    def draw(random: numpy.random.Generator, count: int) -> Any:
        return MILLISECOND * (0.9 + 0.1 * (1 + random.pareto(2.5, count)))

    return Family(
        "heavy tail",
        "independent",
        draw,
        lambda each, _: MILLISECOND * (0.9 + 0.1 * (1 - float(each) / 100) ** (-1 / 2.5)),
    )


def _autoregressive(factor: float) -> Family:
    """Logarithms are a first-order autoregression: each is ``factor`` times the last one, and chance."""
    sigma = 0.05
    memory = math.ceil(math.log(1e-6) / math.log(factor))
    kernel = factor ** numpy.arange(memory)

    def draw(random: numpy.random.Generator, count: int) -> Any:
        noise = random.standard_normal(count + memory - 1) * math.sqrt(1 - factor * factor)
        return MILLISECOND * numpy.exp(sigma * numpy.convolve(noise, kernel, mode="valid"))

    return Family(f"autocorrelated, {factor:g}", "dependent", draw, _fixed([(1.0, 1.0, sigma)]))


def _bursts(name: str, kind: str, length: float, share: float) -> Family:
    """A neighbour takes a half more for so many inferences on average, that share of the time."""
    mixture = ((1 - share, 1.0, 0.03), (share, 1.5, 0.03))

    def draw(random: numpy.random.Generator, count: int) -> Any:
        slow = numpy.zeros(count, dtype=int)
        place = 0
        state = random.random() < share
        while place < count:
            stay = random.geometric(1 / (length if state else length * (1 - share) / share))
            slow[place : place + stay] = state
            place += stay
            state = not state
        return MILLISECOND * (1 + 0.5 * slow) * numpy.exp(0.03 * random.standard_normal(count))

    return Family(name, kind, draw, _fixed(mixture))


def _drifting(name: str, factor: Callable[[Any], Any]) -> Family:
    """The median at inference i is ``factor(i)``; the truth is that of all inferences of the run together."""
    sigma = 0.05

    def draw(random: numpy.random.Generator, count: int) -> Any:
        return MILLISECOND * factor(numpy.arange(count)) * numpy.exp(sigma * random.standard_normal(count))

    def truth(percentile: str, count: int) -> float:
        # The drift is smooth, or one step: 200 places stand for all.
        places = (numpy.arange(200) + 0.5) / 200 * count
        medians = factor(places)
        return _quantile(tuple((1 / 200, float(median), sigma) for median in medians), percentile)

    return Family(name, "drifting", draw, truth)


# Recorded traces.


@dataclass(frozen=True)
class Trace:
    """A recording: what ran where and how, and every inference in ns in the order it ran."""

    name: str
    model: str
    how: str
    samples: tuple[int, ...] = field(repr=False)


@functools.cache
def trace(name: str) -> Trace:
    """A recording by the name of its file."""
    with lzma.open(TRACES / f"{name}.json.xz", "rt") as file:
        content = json.load(file)
    return Trace(name, content["model"], content["how"], tuple(content["samples_nanoseconds"]))


RECORDED = (
    "mobilenet_v1_0.25_128",
    "mobilenet_v1_0.5_160",
    "keras_lstm_mnist",
    "tf2_mobilenet_v2_1.0_224",
    "movenet_single_pose_lightning",
    "deeplabv3_mnv2_dm05",
    "three_convolutions",
)


def recorded(name: str, block: int | None) -> Family:
    """A recording in blocks drawn at random, over its end and on from its begin; ``None``: as it was.

    In blocks it has the percentiles of the recording exactly, and its neighbours' likeness within a block. As
    it was, it begins at random, and the truth is still that of the whole recording, which wanders.
    """
    samples = numpy.array(trace(name).samples)
    ordered = sorted(trace(name).samples)

    def draw(random: numpy.random.Generator, count: int) -> Any:
        length = block or count
        begins = random.integers(0, len(samples), -(-count // length))
        places = (begins[:, None] + numpy.arange(length)[None, :]).ravel()[:count]
        return samples[places % len(samples)]

    kind = "wandering" if block is None else "independent" if block == 1 else "recorded"
    how = {None: "as it was", 1: "shuffled"}.get(block, f"in blocks of {block}")
    return Family(
        f"{name}, {how}",
        kind,
        draw,
        lambda percentile, _: float(ordered[stats.rank(percentile, len(ordered)) - 1]),
    )


def families() -> list[Family]:
    """Every kind that is looked at."""
    return [
        _normal(),
        _independent("lognormal, 10 %", [(1.0, 1.0, 0.1)]),
        _independent("lognormal, 20 %", [(1.0, 1.0, 0.2)]),
        _independent("bimodal, 70 to 30", [(0.7, 1.0, 0.02), (0.3, 1.3, 0.02)]),
        _independent("bimodal, 92 to 8", [(0.92, 1.0, 0.03), (0.08, 1.5, 0.03)]),
        _pareto(),
        *(recorded(name, 1) for name in RECORDED[:2]),
        _autoregressive(0.3),
        _autoregressive(0.6),
        _autoregressive(0.9),
        _bursts("bursts of 15, a quarter", "dependent", 15, 0.25),
        _bursts("bursts of 40, a tenth", "rare", 40, 0.1),
        *(recorded(name, 50) for name in RECORDED[:4]),
        _drifting("10 % slower over 1,000", lambda place: 1 + 0.1 * place / 1000),
        _drifting("10 % slower from 200 on", lambda place: numpy.where(place < 200, 1.0, 1.1)),
        _drifting("10 % faster from 200 on", lambda place: numpy.where(place < 200, 1.1, 1.0)),
        _drifting("heats up, 15 %", lambda place: 1.15 - 0.15 * numpy.exp(-place / 300)),
        *(recorded(name, None) for name in RECORDED[:4]),
    ]


# One measurement.


@dataclass(frozen=True)
class Told:
    """What was said of one percentile, and whether it is so."""

    covered: bool
    exact_covered: bool
    width_ratio: float


@dataclass(frozen=True)
class Experiment:
    """How one simulated measurement ended."""

    runs: int
    seconds: float
    precise: bool
    looks: int
    dependent: bool
    drifting: bool
    told: dict[str, Told]

    @property
    def flagged(self) -> bool:
        return self.dependent or self.drifting


def experiment(
    family: Family,
    random: numpy.random.Generator,
    targets: str = TARGETS,
    most_runs: int = MOST_RUNS,
) -> Experiment:
    """Measures one trace of the family until the targets are reached or the runs are over."""
    sequential = stopping.Sequential(stopping.parse(targets))
    trace = [round(each) for each in family.draw(random, most_runs).tolist()]
    looks, precise, runs = 0, False, most_runs
    while sequential.next_look <= most_runs and not precise:
        runs = sequential.next_look
        precise = sequential.look(trace[:runs]).over
        looks += 1
    runs = runs if precise else most_runs
    samples = trace[:runs]
    ordered = sorted(samples)
    latency = stats.latency(samples, percentiles=PERCENTILES)
    told = {}
    for each in latency.percentiles:
        percentile = stats.text(each.percentile)
        truth = family.truth(percentile, runs)
        low, high = stats.bounds(percentile, runs) or (1, runs)
        exact = ordered[low - 1], ordered[high - 1]
        told[percentile] = Told(
            # A latency is a whole number of ns.
            covered=each.low_seconds * 1e9 - 1 <= truth <= each.high_seconds * 1e9 + 1,
            exact_covered=exact[0] - 1 <= truth <= exact[1] + 1,
            width_ratio=(each.high_seconds - each.low_seconds) * 1e9 / max(1, exact[1] - exact[0]),
        )
    return Experiment(
        runs=runs,
        seconds=sum(samples) / 1e9,
        precise=precise,
        looks=looks,
        dependent=stats.depends(samples, ordered).found,
        drifting=series.drift(samples, ordered) is not None,
        told=told,
    )


@dataclass(frozen=True)
class Outcome:
    """Many experiments of one family taken together; shares are from 0 to 1."""

    experiments: tuple[Experiment, ...]

    def coverage(self, percentile: str, *, exact: bool = False) -> float:
        """Of those in which bounds are told."""
        told = [each.told[percentile] for each in self.experiments if percentile in each.told]
        return sum(each.exact_covered if exact else each.covered for each in told) / max(1, len(told))

    def told(self, percentile: str) -> float:
        return sum(percentile in each.told for each in self.experiments) / len(self.experiments)

    def silent(self, percentile: str) -> float:
        """Share in which the bounds do not hold and nothing says that they might not."""
        return sum(
            percentile in each.told and not each.told[percentile].covered and not each.flagged
            for each in self.experiments
        ) / len(self.experiments)

    def width(self, percentile: str) -> float:
        """Median of the width of the bounds over that of the exact ones."""
        return middle(
            [each.told[percentile].width_ratio for each in self.experiments if percentile in each.told]
        )

    @property
    def flagged(self) -> float:
        return sum(each.flagged for each in self.experiments) / len(self.experiments)

    @property
    def precise(self) -> float:
        return sum(each.precise for each in self.experiments) / len(self.experiments)

    @property
    def runs(self) -> float:
        return middle([each.runs for each in self.experiments])

    @property
    def seconds(self) -> float:
        return middle([each.seconds for each in self.experiments])


def middle(values: Sequence[float]) -> float:
    """The median; not a number for none."""
    return float(numpy.median(values)) if len(values) else math.nan


def simulate(name: str, experiments: int, seed: int, **how: Any) -> tuple[Experiment, ...]:
    """So many experiments of the family of that name."""
    family = next(each for each in families() if each.name == name)
    random = generator(seed, name)
    return tuple(experiment(family, random, **how) for _ in range(experiments))


def generator(seed: int, name: str) -> numpy.random.Generator:
    """The random numbers that belong to a name."""
    return numpy.random.default_rng([seed, *name.encode()])
