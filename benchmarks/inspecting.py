"""How long `boardbench inspect` takes, beside Python's own start.

The whole command on a model of 4 MB, in its forms, and in turn with them `python -c pass`:
what the command is slower by is what boardbench costs. Each is a fresh process with its bytecode cached. The
processor's time is told beside it: that hardly changes when something else runs on the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import programs
from report import MODELS, Check, Report, note
from report import run as run_benchmarks

# The largest of the supplied models: 4 MB.
MODEL = "tf2_mobilenet_v2_1.0_224_ptq.tflite"
FORMS = {
    "page": [],
    "JSON": ["--format", "json"],
    "page, Edge TPU predicted": ["--target", "edgetpu"],
    "JSON, with a requirement": ["--format", "json", "--target", "edgetpu", "--require", "cpu_ops>=0", "-q"],
}
START = "python -c pass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inspecting")
    group.add_argument("--inspect-rounds", type=int, default=40, help="rounds (default 40)")
    group.add_argument("--inspect-model", type=Path, default=MODELS / MODEL, help="the model file")


def measure(arguments: argparse.Namespace) -> Report:
    model = arguments.inspect_model
    commands = {START: [sys.executable, "-c", "pass"]}
    commands |= {
        name: [*programs.program("boardbench"), "inspect", str(model), *options]
        for name, options in FORMS.items()
    }
    for command in commands.values():
        seconds(command)  # writes what bytecode is not there yet
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(arguments.inspect_rounds):
        for name in random.sample(list(commands), len(commands)):
            times[name].append(seconds(commands[name]))
        if number % 10 == 9:
            note(f"inspecting: round {number + 1} of {arguments.inspect_rounds}")
    walls = {name: [wall for wall, _ in found] for name, found in times.items()}
    rows = []
    for name, found in times.items():
        more = [one - start for one, start in zip(walls[name], walls[START], strict=True)]
        rows.append(
            [
                name,
                statistics.median(walls[name]) * 1e3,
                f"{min(walls[name]) * 1e3:.0f} … {max(walls[name]) * 1e3:.0f}",
                "" if name == START else statistics.median(more) * 1e3,
                statistics.median(cpu for _, cpu in found) * 1e3,
            ]
        )
    size = model.stat().st_size / 1e6
    return Report(
        "inspecting a file",
        f"{model.name}, {size:.1f} MB; {arguments.inspect_rounds} rounds, each form a fresh process, in an "
        "order that is drawn anew; medians in ms; more: than Python's start in the same round",
        ("", "whole command ms", "range", "more ms", "processor ms"),
        rows,
        [
            Check(f"boardbench inspect, {name}, median", statistics.median(walls[name]), 0.1, "s")
            for name in ("page", "JSON")
        ],
        {"seconds": times},
    )


def seconds(command: list[str]) -> tuple[float, float]:
    """How long the command takes, from the start of its process to its end; and the processor's time."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=environment, check=True)
    wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    sys.exit(run_benchmarks([(measure, add_arguments)], __doc__, section="inspecting"))
