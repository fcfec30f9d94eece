"""How long a figure of a given precision takes: boardbench beside the tools of the trade.

boardbench measures until the bounds of p50 lie within 1 % and those of p99 within 5 %, and says how long that
took. The others can't be asked for a precision. Each is told the number of inferences that boardbench needed,
as if somebody had known it beforehand, and its time for them is compared; LoadGen as MLPerf runs it (at least
600 s, the minimum of the SingleStream scenario) and benchmark_app as it is (60 s) are told with their own
minimum. Bounds of all are those of order statistics, computed here from the raw samples.

https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc#scenarios
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from overhead import output
from programs import program
from report import Check, Report, note, run
from tools import ENGINES, WARM_UP_SECONDS, Subject, raw_benchmark_app, raw_litert_tool, raw_loop, subjects_of

from boardbench.agent.bench import stats

LOADGEN_SECONDS = 600.0
BENCHMARK_APP_SECONDS = 60.0
PRECISION = "p50=1%,p99=5%"
WIDTHS = (("50", 0.01), ("99", 0.05))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision")
    group.add_argument("--precision-rounds", type=int, default=2, help="rounds (default 2)")
    group.add_argument(
        "--precision-models", type=int, nargs="+", default=[1, 3], help="which of the four (default 1 3)"
    )
    group.add_argument(
        "--precision-seconds", type=float, default=60.0, help="give up after this time (default 60)"
    )


def measure(arguments: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        return _measure(arguments, Path(folder))


def _measure(arguments: argparse.Namespace, folder: Path) -> Report:
    rows: list[list[object]] = []
    checks: list[Check] = []
    details: dict[str, object] = {}
    order = random.Random(4)
    longest = 0.0
    for engine in ENGINES:
        every = subjects_of(engine, folder, 1.5)
        for subject in (every[number] for number in arguments.precision_models):
            name = f"{engine}, {subject.model.stem}"
            found: dict[str, list[dict[str, float]]] = {}
            for number in range(arguments.precision_rounds):
                ours = _boardbench(subject, arguments.precision_seconds)
                found.setdefault("boardbench", []).append(ours)
                told = replace(subject, runs=int(ours["inferences"]))
                others = {"bare loop, told how many": raw_loop}
                if engine == "tflite":
                    others["LiteRT's tool, told how many"] = raw_litert_tool
                if engine == "openvino":
                    others["benchmark_app, told how many"] = raw_benchmark_app
                for other in order.sample(sorted(others), len(others)):
                    found.setdefault(other, []).append(_told(others[other](told, folder)))
                note(f"precision: {name}: {number + 1} of {arguments.precision_rounds}")
            rows += [[f"{name}: {who}", *_medians(rounds)] for who, rounds in found.items()]
            details[name] = found
            seconds = statistics.median(each["seconds"] for each in found["boardbench"])
            if all(each["precise"] for each in found["boardbench"]):
                longest = max(longest, seconds)
    checks.append(
        Check(
            "longest median time to the precision, among the models that got there, against LoadGen's least",
            longest,
            LOADGEN_SECONDS / 10,
            "s",
        )
    )
    return Report(
        "time to a precision",
        f"{PRECISION} at 95 %, one thread, {arguments.precision_rounds} rounds; medians. Seconds: of the "
        "counted inferences. Widths: the farther bound's distance over the percentile; precise: share of the "
        f"rounds in which both were reached. LoadGen as MLPerf asks for it takes {LOADGEN_SECONDS:.0f} s, "
        f"benchmark_app as it is {BENCHMARK_APP_SECONDS:.0f} s, whatever the model",
        ("", "inferences", "seconds", "p50 ± %", "p99 ± %", "precise"),
        rows,
        checks,
        details,
    )


def _medians(rounds: list[dict[str, float]]) -> list[object]:
    shown: list[object] = [
        int(statistics.median(each["inferences"] for each in rounds)),
        statistics.median(each["seconds"] for each in rounds),
    ]
    for percentile, _ in WIDTHS:
        known = [each[percentile] for each in rounds if percentile in each]
        shown.append(statistics.median(known) * 100 if known else "")
    return [*shown, f"{statistics.mean(each['precise'] for each in rounds):.0%}"]


def _boardbench(subject: Subject, most_seconds: float) -> dict[str, float]:
    answer = output([
        *program("boardbench"), "run", str(subject.model), "--runtime", subject.engine, "--format", "json",
        "--threads", "1", "--no-profile", "--warm-up", str(WARM_UP_SECONDS), "--precision", PRECISION,
        "--duration", "0", "--max-duration", str(most_seconds),
    ])  # fmt: skip
    return _told([int(each) for each in json.loads(answer)["latency"]["samples_nanoseconds"]])


def _told(samples: list[int]) -> dict[str, float]:
    ordered = sorted(samples)
    found = {"inferences": float(len(samples)), "seconds": sum(samples) / 1e9, "precise": 1.0}
    for percentile, wanted in WIDTHS:
        bounds = stats.bounds(percentile, len(ordered), 0.95)
        if bounds is None:
            found["precise"] = 0.0
            continue
        low, high = (ordered[each - 1] for each in bounds)
        value = ordered[stats.rank(percentile, len(ordered)) - 1]
        width = max(high - value, value - low) / value
        found[percentile] = width
        if width > wanted:
            found["precise"] = 0.0
    return found


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__, section="precision"))
