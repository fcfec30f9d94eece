"""What boardbench adds to an inference: its figures beside a bare loop and beside LiteRT's own tool.

One round runs all three, each in a fresh process, in an order that is drawn anew; the ratios are taken
within a round, so that what the machine does meanwhile meets all three alike. All use the same model, the
same number of threads, the same warm-up time and the same number of counted inferences; the percentiles of
all three are computed here, from their raw samples, by one rule.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from programs import program
from report import MODELS, Check, Report, note, run

WARM_UP_SECONDS = 0.5

# The loop that anybody would write first.
BARE = """
import json, sys, time
import numpy
from ai_edge_litert.interpreter import Interpreter
model, threads, runs, warm_up = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
interpreter = Interpreter(model_path=model, num_threads=threads)
interpreter.allocate_tensors()
generator = numpy.random.default_rng(0)
for detail in interpreter.get_input_details():
    information = numpy.iinfo(detail["dtype"])
    data = generator.integers(information.min, information.max + 1, detail["shape"], detail["dtype"])
    interpreter.set_tensor(detail["index"], data)
end = time.perf_counter() + warm_up
while time.perf_counter() < end:
    interpreter.invoke()
samples = []
for _ in range(runs):
    begin = time.perf_counter_ns()
    interpreter.invoke()
    samples.append(time.perf_counter_ns() - begin)
print(json.dumps(samples))
"""

# Its timed loop is untouched: it hands all sorted times (in ms) to its own percentile(), which notes them.
# Its result file rounds to 0.01 ms, 3 % of a run of this model, and has no p90.
LITERT_TOOL = """
import json, sys
from ai_edge_litert.tools import benchmark_litert_model as tool
noted, percentile = {}, tool.percentile
def noting(sorted_data, p):
    noted["samples"] = [round(each * 1e6) for each in sorted_data]
    return percentile(sorted_data, p)
tool.percentile = noting
report = sys.argv.pop(1)
tool.main()
open(report, "w").write(json.dumps(noted["samples"]))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("overhead")
    group.add_argument("--rounds", type=int, default=40, help="rounds of all three (default 40)")
    group.add_argument("--runs", type=int, default=1000, help="counted inferences of each (default 1000)")
    group.add_argument("--threads", type=int, default=1, help="threads of all three (default 1)")


def measure(arguments: argparse.Namespace) -> Report:
    model = MODELS / "mobilenet_v1_0.25_128_quant.tflite"
    tools = {"bare loop": bare_loop, "boardbench run": boardbench, "LiteRT's tool": litert_tool}
    samples: dict[str, list[list[int]]] = {name: [] for name in tools}
    order = random.Random(2)
    for number in range(arguments.rounds):
        for name in order.sample(sorted(tools), len(tools)):
            samples[name].append(tools[name](model, arguments))
        note(f"overhead: round {number + 1} of {arguments.rounds}")
    rows = []
    details: dict[str, object] = {
        "rounds": arguments.rounds,
        "runs": arguments.runs,
        "threads": arguments.threads,
    }
    ratios: dict[tuple[str, int], float] = {}
    for name, rounds in samples.items():
        row: list[object] = [name]
        for p in (50, 90):
            values = [percentile(each, p) for each in rounds]
            against = [
                value / percentile(bare, p) for value, bare in zip(values, samples["bare loop"], strict=True)
            ]
            ratios[name, p] = statistics.median(against)
            row += [
                statistics.median(values) / 1e6,
                f"{ratios[name, p]:.4f}",
                f"{min(against):.3f} … {max(against):.3f}",
            ]
            details[f"{name} p{p} ns"] = values
        rows.append(row)
    ours, theirs = ratios["boardbench run", 50], ratios["LiteRT's tool", 50]
    return Report(
        "harness overhead",
        f"{model.name}, threads: {arguments.threads}, {arguments.runs} inferences after {WARM_UP_SECONDS} s "
        f"of warm-up, {arguments.rounds} rounds, each in a fresh process; times in ms (median of rounds), "
        "ratios to the bare loop of the same round (median; least … greatest)",
        ("", "p50 ms", "p50 ratio", "range", "p90 ms", "p90 ratio", "range"),
        rows,
        [
            Check("median latency against the bare loop, difference", abs(ours - 1) * 100, 1, "%"),
            Check(
                "p90 against the bare loop, difference", abs(ratios["boardbench run", 90] - 1) * 100, 5, "%"
            ),
            Check("median latency against LiteRT's own tool, ratio", ours / theirs, 1, "times"),
        ],
        details,
    )


def percentile(samples: list[int], p: float) -> float:
    """The smallest sample that at least p % of the samples do not exceed."""
    ranked = sorted(samples)
    return float(ranked[max(1, math.ceil(len(ranked) * p / 100)) - 1])


def bare_loop(model: Path, arguments: argparse.Namespace) -> list[int]:
    command = [
        sys.executable, "-c", BARE, str(model), str(arguments.threads), str(arguments.runs),
        str(WARM_UP_SECONDS),
    ]  # fmt: skip
    return list(json.loads(output(command)))


def litert_tool(model: Path, arguments: argparse.Namespace) -> list[int]:
    # It warms up by count; the model takes a third of a millisecond on a fast machine and 20 on a slow one.
    warm_up = max(5, round(WARM_UP_SECONDS / 0.001))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "samples.json"
        output([
            sys.executable, "-c", LITERT_TOOL, str(report), f"--model={model}",
            f"--num_threads={arguments.threads}", f"--num_runs={arguments.runs}", f"--warmup_runs={warm_up}",
        ])  # fmt: skip
        return list(json.loads(report.read_text()))


def boardbench(model: Path, arguments: argparse.Namespace) -> list[int]:
    answer = output([
        *program("boardbench"), "run", str(model), "--runtime", "tflite", "--format", "json",
        "--threads", str(arguments.threads), "--duration", "0",
        "--min-runs", str(arguments.runs), "--max-runs", str(arguments.runs),
    ])  # fmt: skip
    result = json.loads(answer)
    latency = result["latency"]
    samples = [int(each) for each in latency["samples_nanoseconds"]]
    told = next(each["seconds"] for each in latency["percentiles"] if each["percentile"] == 50)
    assert abs(told * 1e9 - percentile(samples, 50)) < 1, "boardbench's own median is not that of its samples"
    return samples


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    if done.returncode:
        raise SystemExit(f"{command[:4]} … failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__, section="overhead"))
