"""How long from `boardbench push` to the first inference, beside loading the model by hand.

By hand: a fresh Python process imports the engine, loads the model and runs it once; its own start is not
counted. boardbench: from the start of the command's process, over the upload, the queue and the worker's
start, to the event that says that the first inference is done. The model is new to the agent every time.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import programs
from report import Check, Report, note
from report import run as run_benchmarks

from boardbench.cli.address import Address
from boardbench.cli.client import AgentClient
from boardbench.cli.demo_models import build_onnx, build_tflite
from boardbench.v1 import agent_pb2, result_pb2

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
            firsts, wholes = ([each[place] for each in pushes] for place in (0, 1))
            more = [one - other for one, other in zip(firsts, hands, strict=True)]
            rows.append(
                [
                    runtime,
                    statistics.median(hands) * 1e3,
                    statistics.median(firsts) * 1e3,
                    statistics.median(more) * 1e3,
                    f"{min(more) * 1e3:.0f} … {max(more) * 1e3:.0f}",
                    statistics.median(wholes) * 1e3,
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
            details[runtime] = {"by hand s": hands, "first inference s": firsts, "whole command s": wholes}
    return Report(
        "push to first inference",
        f"{arguments.first_rounds} rounds an engine, the two in turn; medians in ms; least … greatest of the "
        "difference",
        ("", "by hand ms", "first inference ms", "more ms", "range", "whole command ms"),
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


def pushed(path: Path, address: Address) -> tuple[float, float]:
    """Seconds to the first inference, and to the end of the command; the agent then forgets the model."""
    command = [
        *programs.program("boardbench"), "push", str(path), "--to", str(address), "--format", "json",
        "--duration", "0", "--min-runs", "1", "--max-runs", "1",
    ]  # fmt: skip
    begin = time.time()
    with AgentClient(address) as client:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            # The stage after it begins when the first inference is done; both sides have one clock here.
            first = next(
                event.time.ToNanoseconds() / 1e9
                for event in client.watch(run_of(client, process))
                if event.stage.stage == result_pb2.STAGE_WARM_UP
            )
            said, _ = process.communicate()
            end = time.time()
        if process.returncode:
            raise SystemExit(f"boardbench push failed with {process.returncode}:\n{said}")
        for stored in client.list_models():
            client.delete_model(stored.model.sha256)
    return first - begin, end - begin


def run_of(client: AgentClient, process: subprocess.Popen[str]) -> str:
    """Id of the run that the command starts, as soon as it is there."""
    while process.poll() is None:
        for run in client.list_runs():
            if run.state != agent_pb2.RUN_STATE_ENDED:
                return run.run_id
        time.sleep(0.01)
    raise SystemExit(f"boardbench push started no run:\n{process.communicate()[0]}")


if __name__ == "__main__":
    sys.exit(run_benchmarks([(measure, add_arguments)], __doc__, section="first_inference"))
