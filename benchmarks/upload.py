"""How fast a large file reaches the agent, what that costs it in memory, and what a second push costs."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import programs
from report import Check, Report, note, run

from boardbench.cli.address import Address
from boardbench.cli.client import AgentClient
from boardbench.cli.source import Source
from boardbench.cli.tflite_build import ModelBuilder, Options

_MB = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("upload")
    group.add_argument("--megabytes", type=int, default=200, help="size of the file (default 200)")
    group.add_argument("--pushes", type=int, default=10, help="number of pushes (default 10)")


def measure(arguments: argparse.Namespace) -> Report:
    rows: list[list[object]] = []
    speeds, whole_speeds, growths, seconds_again, connected = [], [], [], [], []
    with programs.folder() as root, programs.agent(root) as (pid, ports):
        address = Address("127.0.0.1", ports["grpc"])
        for number in range(arguments.pushes):
            path = write_model(root / f"large{number}.tflite", arguments.megabytes)
            size = path.stat().st_size
            floor = copy_seconds(path, root / "copy")
            # What the agent keeps of earlier pushes belongs to this one's starting point.
            before = programs.memory_bytes(pid)["rss"]
            programs.reset_peak(pid)
            opened = time.perf_counter()
            with Source(path) as source, AgentClient(address) as client:
                hashed = time.perf_counter()
                client.describe()
                begin = time.perf_counter()
                done = client.push(source)
                end = time.perf_counter()
            assert not done.already_present
            growth = programs.peak_rss_bytes(pid) - before
            with Source(path) as source, AgentClient(address) as client:
                sent: list[int] = []
                client.describe()
                again = time.perf_counter()
                done = client.push(source, on_sent=sent.append)
                again_seconds = time.perf_counter() - again
            assert done.already_present and not sent, "the second push sent bytes"
            speeds.append(size / _MB / (end - begin))
            whole_speeds.append(size / _MB / (end - opened))
            growths.append(growth / _MB)
            seconds_again.append(again_seconds)
            connected.append(begin - hashed)
            rows.append(
                [
                    number + 1,
                    speeds[-1],
                    whole_speeds[-1],
                    size / _MB / floor,
                    growths[-1],
                    again_seconds * 1e3,
                ]
            )
            with AgentClient(address) as client:
                client.delete_model(done.model.sha256)
            path.unlink()
            note(f"upload: push {number + 1} of {arguments.pushes}")
    rows.append(
        [
            "median",
            *(statistics.median(column) for column in zip(*[row[1:] for row in rows], strict=True)),  # type: ignore[type-var]
        ]
    )
    return Report(
        "upload",
        f"{arguments.megabytes} MB of incompressible model on loopback, the agent a process of its own; "
        "transfer: from the first message to the agent's answer that the file is verified and on the disk; "
        "with hash: the client's own hashing before it included; copy: the same bytes read, written, synced "
        "by one process; memory: peak of the agent's resident set during the push less what it was before",
        ("push", "transfer MB/s", "with hash MB/s", "copy MB/s", "memory MB", "second push ms"),
        rows,
        [
            Check("upload, median", statistics.median(speeds), 200, "MB/s", at_least=True),
            Check("memory that the agent grows by, largest", max(growths), 32, "MB"),
            Check(
                "second push, connected to answered, median",
                statistics.median(seconds_again) * 1e3,
                50,
                "ms",
            ),
        ],
        {
            "connect ms": [each * 1e3 for each in connected],
        },
    )


def write_model(path: Path, megabytes: int) -> Path:
    """A model file of that size: one addition of random constants, another one at every call."""
    model = ModelBuilder()
    graph = model.subgraph()
    elements = megabytes * _MB - 2048
    data = graph.tensor("data", [1, elements], scale=0.1)
    constant = graph.tensor("constant", [1, elements], scale=0.1, data=os.urandom(elements))
    total = graph.tensor("total", [1, elements], scale=0.2)
    graph.operator("ADD", [data, constant], [total], Options("AddOptions"), version=2)
    graph.inputs(data)
    graph.outputs(total)
    path.write_bytes(model.finish())
    return path


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds to read the file once, write it elsewhere and sync it: the least that any upload does."""
    begin = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(1 << 20):
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__, section="upload"))
