"""What sampling the sensors costs the model that is measured: latency with it and without, in turn.

One process runs a real model all the time, in stretches; another one, in the place of the agent, samples
every sensor at ten a second in some of the stretches and waits in the others. A round has a stretch with
sampling and two without, in an order that is drawn anew; the ratio of medians is taken within the round. The
second stretch without shows what the machine itself does to such a ratio.

The sensors are those of this machine and, since a test machine has few, those of the tree of a board
(tests/boards/jetson_orin_nano): as many files of the same form are opened, read and parsed, but no bus is
asked, so what a driver does behind a file is not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

from report import MODELS, REPOSITORY, Check, Report, note, run

from boardbench.agent.board.sampler import Sampler
from boardbench.agent.board.sensors import find_all

TREE = REPOSITORY / "tests" / "boards" / "jetson_orin_nano"
HERTZ = 10.0

# Runs the model for as long as each line says, and answers with every duration.
WORKER = """
import json, sys, time
import numpy
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
generator = numpy.random.default_rng(0)
for detail in interpreter.get_input_details():
    information = numpy.iinfo(detail["dtype"])
    data = generator.integers(information.min, information.max + 1, detail["shape"], detail["dtype"])
    interpreter.set_tensor(detail["index"], data)
print("ready", flush=True)
for line in sys.stdin:
    end = time.perf_counter() + float(line)
    samples = []
    while (begin := time.perf_counter_ns()) < end * 1e9:
        interpreter.invoke()
        samples.append(time.perf_counter_ns() - begin)
    print(json.dumps(samples), flush=True)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sensors")
    group.add_argument("--sensor-rounds", type=int, default=150, help="rounds of all three (default 150)")
    group.add_argument("--sensor-seconds", type=float, default=0.5, help="of each stretch (default 0.5)")


def measure(arguments: argparse.Namespace) -> Report:
    model = MODELS / "mobilenet_v1_0.25_128_quant.tflite"
    sensors = [*find_all(Path("/")), *find_all(TREE)]
    arms = ("with", "without", "without again")
    medians: dict[str, list[float]] = {arm: [] for arm in arms}
    tails: dict[str, list[float]] = {arm: [] for arm in arms}
    shares: list[float] = []
    readings, left_out = 0, ()
    order = random.Random(4)
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None

        def stretch(seconds: float) -> list[int]:
            worker.stdin.write(f"{seconds}\n")
            worker.stdin.flush()
            return list(json.loads(worker.stdout.readline()))

        assert worker.stdout.readline().strip() == "ready"
        stretch(2.0)
        for number in range(arguments.sensor_rounds):
            for arm in order.sample(arms, len(arms)):
                # No limit to the cost: what all sensors take is what is asked.
                sampler = Sampler(sensors, hertz=HERTZ, cost_share=0)
                if arm == "with":
                    sampler.start()
                samples = sorted(stretch(arguments.sensor_seconds))
                if arm == "with":
                    sampler.stop()
                    shares.append(sampler.cost.cpu_share or 0.0)
                    readings, left_out = len(sampler.series()), sampler.cost.left_out
                medians[arm].append(statistics.median(samples))
                tails[arm].append(samples[math.ceil(0.99 * len(samples)) - 1])
            if (number + 1) % 20 == 0:
                note(f"sensors: round {number + 1} of {arguments.sensor_rounds}")
        worker.stdin.close()
    rows = []
    effects: dict[str, float] = {}
    for arm in ("with", "without again"):
        ratios = [one / other for one, other in zip(medians[arm], medians["without"], strict=True)]
        tail = [one / other for one, other in zip(tails[arm], tails["without"], strict=True)]
        low, high = bounds(ratios)
        effects[arm] = (statistics.median(ratios) - 1) * 100
        rows.append(
            [
                f"{arm} / without",
                f"{effects[arm]:+.3f}",
                f"{(low - 1) * 100:+.3f} … {(high - 1) * 100:+.3f}",
                f"{(statistics.median(tail) - 1) * 100:+.2f}",
            ]
        )
    without_ms = statistics.median(medians["without"]) / 1e6
    method = (
        f"{model.name}, 1 thread; {len(sensors)} sensors ({readings} series, of this machine and of the tree",
        f"{TREE.name}) at {HERTZ:g} a second, which takes {statistics.median(shares):.2%} of one processor;",
        f"{arguments.sensor_rounds} rounds of stretches of {arguments.sensor_seconds:g} s, median",
        f"without {without_ms:.4f} ms; ratios of medians of the same round, in percent of difference;",
        "bounds: 95 %, of the median ratio" + (f"; left out: {left_out}" if left_out else ""),
    )
    return Report(
        "sensors",
        " ".join(method),
        ("", "p50 %", "95 % bounds", "p99 %"),
        rows,
        [Check("median latency with sampling, difference", abs(effects["with"]), 0.5, "%")],
        {"medians ns": medians, "p99 ns": tails, "cpu shares": shares},
    )


def bounds(values: list[float]) -> tuple[float, float]:
    """Order statistics that enclose the median with 95 % (normal approximation of the binomial)."""
    ranked = sorted(values)
    half = 1.96 * math.sqrt(len(ranked)) / 2
    low = max(0, math.floor(len(ranked) / 2 - half))
    high = min(len(ranked) - 1, math.ceil(len(ranked) / 2 + half))
    return ranked[low], ranked[high]


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__, section="sensors"))
