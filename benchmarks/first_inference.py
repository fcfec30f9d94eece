"""How long from `boardbench push` to the first inference, beside loading the model by hand.

By hand: a fresh Python process imports the engine, loads the model and runs it once; its own start is not
counted. boardbench: the whole command with a single counted inference, from the start of its process over
the upload, the queue, the worker's start, the first inference, memory and placement to the printed result and
the end of the process. That is more than "to the first inference", so the bound is kept with something to
spare. The model is new to the agent every time.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import programs
from report import Check, Report, note, run

from boardbench.cli.address import Address
from boardbench.cli.client import AgentClient
from boardbench.cli.demo_models import build_onnx, build_tflite

BY_HAND = {
    "tflite": """
import sys, time
begin = time.perf_counter()
import numpy
from ai_edge_litert.interpreter import Interpreter
imported = time.perf_counter()
interpreter = Interpreter(model_path=sys.argv[1])
interpreter.allocate_tensors()
loaded = time.perf_counter()
interpreter.invoke()
print(imported - begin, loaded - imported, time.perf_counter() - loaded)
""",
    "onnxruntime": """
import sys, time
begin = time.perf_counter()
import numpy, onnxruntime
imported = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
loaded = time.perf_counter()
session.run(None, {each.name: numpy.zeros(each.shape, numpy.float32) for each in session.get_inputs()})
print(imported - begin, loaded - imported, time.perf_counter() - loaded)
""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("first inference")
    group.add_argument("--first-rounds", type=int, default=10, help="rounds for each engine (default 10)")


def measure(arguments: argparse.Namespace) -> Report:
    rows: list[list[object]] = []
    checks = []
    details: dict[str, object] = {}
    with programs.folder() as root, programs.agent(root) as (_, ports):
        address = Address("127.0.0.1", ports["grpc"])
        for runtime, model in (("tflite", build_tflite()), ("onnxruntime", build_onnx())):
            suffix = ".tflite" if runtime == "tflite" else ".onnx"
            hands, pushes = [], []
            path = root / f"model{suffix}"
            path.write_bytes(model)
            for number in range(arguments.first_rounds):
                for what in ("hand", "push") if number % 2 else ("push", "hand"):
                    if what == "hand":
                        hands.append(by_hand(runtime, path))
                    else:
                        pushes.append(pushed(path, address))
                note(f"first inference: {runtime}, round {number + 1} of {arguments.first_rounds}")
            hand, push = statistics.median(hands), statistics.median(pushes)
            more = [one - other for one, other in zip(pushes, hands, strict=True)]
            rows.append(
                [
                    runtime,
                    hand * 1e3,
                    push * 1e3,
                    statistics.median(more) * 1e3,
                    f"{min(more) * 1e3:.0f} … {max(more) * 1e3:.0f}",
                ]
            )
            checks.append(
                Check(
                    f"push to first inference more than by hand, {runtime}, median",
                    statistics.median(more),
                    1,
                    "s",
                )
            )
            details[runtime] = {"by hand s": hands, "push s": pushes}
    return Report(
        "push to first inference",
        f"{arguments.first_rounds} rounds an engine, the two in turn; medians in ms; least … greatest of the "
        "difference",
        ("", "by hand ms", "boardbench push ms", "more ms", "range"),
        rows,
        checks,
        details,
    )


def by_hand(runtime: str, path: Path) -> float:
    """Seconds to import the engine, load the model and run it once, the start of Python not counted."""
    done = subprocess.run(
        [sys.executable, "-c", BY_HAND[runtime], str(path)], capture_output=True, text=True, check=True
    )
    return sum(float(each) for each in done.stdout.split())


def pushed(path: Path, address: Address) -> float:
    """Seconds of the whole command; the agent then forgets the model."""
    command = [
        *programs.program("boardbench"), "push", str(path), "--to", str(address), "--format", "json",
        "--duration", "0", "--min-runs", "1", "--max-runs", "1", "--warm-up", "0",
    ]  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"boardbench push failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    with AgentClient(address) as client:
        for stored in client.list_models():
            client.delete_model(stored.model.sha256)
    return seconds


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__))
