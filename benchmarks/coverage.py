"""Whether the bounds hold: thousands of simulated measurements whose true percentiles are known.

Each is stopped by boardbench's own rule at p50 to 1 % and p99 to 5 %, at latest after 6,000 inferences, and
its percentiles, bounds and warnings are boardbench's own. A family of traces is independent latencies of one
distribution, dependent ones, drifting ones, or a recording of a real model drawn in blocks or as it was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence

import simulate
from report import Check, Report, note, run

CHUNK = 100
SEED = 4
LEAST_COVERAGE = 0.94
MOST_FALSE_FLAGS = 0.01
LEAST_FLAGGED = 0.99
MOST_SILENT = 0.06
# Kinds of traces whose bounds must hold.
COVERED = ("independent", "dependent")
# Kinds of traces about which there must be a warning.
FLAGGED = ("dependent", "recorded", "drifting", "wandering")
# The least of LoadGen's SingleStream: min_duration in mlperf.conf of mlcommons/inference.
LOADGEN_SECONDS = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("coverage")
    group.add_argument(
        "--experiments",
        type=int,
        default=1000,
        help="of each family, and twice as many where one percent of coverage is at stake (default 1000)",
    )
    group.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes (default: one a processor)"
    )


def measure(arguments: argparse.Namespace) -> Report:
    families = simulate.families()
    counts = {
        family.name: arguments.experiments * (2 if family.kind in COVERED else 1) for family in families
    }
    outcomes = _outcomes(counts, arguments.jobs)
    rows: list[Sequence[object]] = []
    for family in families:
        outcome = outcomes[family.name]
        row: list[object] = [
            f"{family.name} ({family.kind})",
            f"{outcome.runs:.0f}",
            f"{outcome.precise:.0%}",
        ]
        for percentile in simulate.PERCENTILES:
            told = outcome.told(percentile)
            row += [
                f"{outcome.coverage(percentile):.1%}" + ("" if told > 0.995 else f" of {told:.0%}"),
                f"{outcome.coverage(percentile, exact=True):.1%}",
                f"{outcome.width(percentile):.2f}",
            ]
        rows.append([*row, f"{outcome.flagged:.1%}"])
    named = {family.name: (family, outcomes[family.name]) for family in families}
    return Report(
        "coverage",
        f"{arguments.experiments} simulated measurements a family, twice as many of independent and of "
        "dependent latencies. Each is ended by the rule for p50 to 1 % and p99 to 5 %, at latest after "
        f"{simulate.MOST_RUNS} inferences; their median is told. "
        "Precise: share that got there. p50, p90, p99: share whose 95 % bounds enclose the truth, of "
        "those in which the percentile is told. Exact: the same of order-statistic bounds that take "
        "samples for independent. Width: median of that of the bounds over that of the exact ones. "
        "Flagged: a warning of dependence or of drift.",
        (
            "traces",
            "inferences",
            "precise",
            *(
                f"{head}{percentile}"
                for percentile in simulate.PERCENTILES
                for head in ("p", "exact p", "width p")
            ),
            "flagged",
        ),
        rows,
        _checks(named),
        {
            name: {
                "experiments": len(outcome.experiments),
                "coverage": {each: outcome.coverage(each) for each in simulate.PERCENTILES},
                "silently missed": {each: outcome.silent(each) for each in simulate.PERCENTILES},
            }
            for name, (_, outcome) in named.items()
        },
    )


def _checks(named: dict[str, tuple[simulate.Family, simulate.Outcome]]) -> list[Check]:
    def of(*kinds: str) -> list[simulate.Outcome]:
        return [outcome for family, outcome in named.values() if family.kind in kinds]

    def each(outcomes: list[simulate.Outcome]) -> list[tuple[simulate.Outcome, str]]:
        return [(outcome, percentile) for outcome in outcomes for percentile in simulate.PERCENTILES]

    independent, dependent = each(of("independent")), each(of("dependent"))
    return [
        Check(
            "independent: least coverage",
            min(outcome.coverage(percentile) for outcome, percentile in independent) * 100,
            LEAST_COVERAGE * 100,
            "%",
            at_least=True,
        ),
        Check(
            "independent: greatest median width over the exact bounds'",
            round(max(outcome.width(percentile) for outcome, percentile in independent), 9),
            1,
            "times",
        ),
        Check(
            "independent: flagged, most of one family",
            max(outcome.flagged for outcome in of("independent")) * 100,
            MOST_FALSE_FLAGS * 100,
            "%",
        ),
        Check(
            "dependent: least coverage",
            min(outcome.coverage(percentile) for outcome, percentile in dependent) * 100,
            LEAST_COVERAGE * 100,
            "%",
            at_least=True,
        ),
        Check(
            "dependent, recorded, drifting and wandering: flagged, least of one family",
            min(outcome.flagged for outcome in of(*FLAGGED)) * 100,
            LEAST_FLAGGED * 100,
            "%",
            at_least=True,
        ),
        Check(
            "the same: bounds that miss and no word of it, most of one family",
            max(outcome.silent(percentile) for outcome, percentile in each(of(*FLAGGED))) * 100,
            MOST_SILENT * 100,
            "%",
        ),
    ]


def measure_time(arguments: argparse.Namespace) -> Report:
    """How long it takes to be so precise on recorded latencies."""
    variants = [
        (name, block, simulate.recorded(name, block).name) for name in simulate.RECORDED for block in (1, 50)
    ]
    targets = ("p50=1%", "p50=1%,p99=5%")
    rows: list[Sequence[object]] = []
    found: dict[str, float] = {}
    for name, block, title in variants:
        row: list[object] = [title]
        for target in targets:
            # As many as a minute has of it: a tenth of LoadGen's time.
            samples = simulate.trace(name).samples
            most = int(LOADGEN_SECONDS / 10 / (sum(samples) / len(samples) / 1e9))
            outcome = _time(name, block, target, min(most, MOST_RUNS), arguments.jobs)
            row += [f"{outcome.runs:.0f}", outcome.seconds, f"{outcome.precise:.0%}"]
            if outcome.precise >= 0.5:
                found[f"{title} {target}"] = outcome.seconds
        rows.append(row)
    return Report(
        "time to a precision, simulated",
        f"{TIMED} simulated measurements each on latencies of a recording, shuffled (a steady board) or in "
        "blocks of 50 (one that wanders); medians of inferences and of their seconds; precise: share that "
        f"got there within a minute and {MOST_RUNS} inferences",
        (
            "traces",
            *(f"{head}{target}" for target in targets for head in ("inferences for ", "s for ", "precise, ")),
        ),
        rows,
        [
            Check(
                "longest median time among those that got there, against a tenth of LoadGen's least",
                max(found.values()),
                LOADGEN_SECONDS / 10,
                "s",
            )
        ],
        dict(found),
    )


TIMED = 100
MOST_RUNS = 60_000


def _time(name: str, block: int, target: str, most_runs: int, jobs: int) -> simulate.Outcome:
    work = [(name, block, target, most_runs, seed) for seed in range(TIMED // 10)]
    with multiprocessing.Pool(jobs) as pool:
        parts = pool.map(_time_some, work, chunksize=1)
    note(f"time: {name}, {block}, {target}")
    return simulate.Outcome(tuple(each for part in parts for each in part))


def _time_some(work: tuple[str, int, str, int, int]) -> list[simulate.Experiment]:
    name, block, target, most_runs, seed = work
    family = simulate.recorded(name, block)
    random = simulate.generator(SEED + seed, f"{name} {block} {target}")
    return [simulate.experiment(family, random, target, most_runs) for _ in range(10)]


def _outcomes(counts: dict[str, int], jobs: int) -> dict[str, simulate.Outcome]:
    work = [
        (name, min(CHUNK, count - begin), SEED + 1000 * (begin // CHUNK))
        for name, count in counts.items()
        for begin in range(0, count, CHUNK)
    ]
    found: dict[str, list[simulate.Experiment]] = {name: [] for name in counts}
    with multiprocessing.Pool(jobs) as pool:
        for (name, _, _), experiments in zip(work, pool.imap(_some, work), strict=True):
            found[name] += experiments
            if len(found[name]) == counts[name]:
                note(f"coverage: {name}")
    return {name: simulate.Outcome(tuple(experiments)) for name, experiments in found.items()}


def _some(work: tuple[str, int, int]) -> tuple[simulate.Experiment, ...]:
    return simulate.simulate(*work)


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments), (measure_time, lambda _: None)], __doc__, section="coverage"))
