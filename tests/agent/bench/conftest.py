"""The real worker as a child process, and small models for it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from boardbench.testkit.child import BRIEF

WORKER = Path(__file__).resolve().parents[3] / "agent" / "boardbench" / "agent" / "bench" / "__main__.py"

# A worker that takes longer is stuck: an import of an engine on a busy machine takes some seconds.
DEADLINE_SECONDS = 120.0


@dataclass
class Outcome:
    """What a worker said and how it ended."""

    events: list[dict[str, Any]]
    exit_code: int
    output: str

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def stages(self) -> list[str]:
        return [event["stage"].removeprefix("STAGE_") for event in self.of("stage")]

    @property
    def result(self) -> dict[str, Any]:
        kinds = [event["event"] for event in self.events]
        found = self.events[: kinds.index("profiling")] if "profiling" in kinds else self.events
        assert [event["event"] for event in found[-1:]] == ["result"], (self.events, self.output)
        result: dict[str, Any] = found[-1]["result"]
        return result

    @property
    def error(self) -> dict[str, Any]:
        assert [event["event"] for event in self.events[-1:]] == ["error"], (self.events, self.output)
        error: dict[str, Any] = self.events[-1]["error"]
        return error


@dataclass
class Child:
    """A worker that runs; closed by the fixture."""

    process: subprocess.Popen[bytes]
    events: list[dict[str, Any]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    output: bytes = b""
    threads: list[threading.Thread] = field(default_factory=list)

    def read_events(self, descriptor: int) -> None:
        with open(descriptor, "rb") as stream:
            for line in stream:
                with self.changed:
                    self.events.append(json.loads(line))
                    self.changed.notify_all()

    def read_output(self) -> None:
        assert self.process.stdout is not None
        self.output = self.process.stdout.read()

    def wait_for(self, predicate: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Returns as soon as the events fulfil the predicate; fails at the deadline."""
        with self.changed:
            assert self.changed.wait_for(lambda: predicate(self.events), DEADLINE_SECONDS), self.events

    def outcome(self) -> Outcome:
        code = self.process.wait(DEADLINE_SECONDS)
        for thread in self.threads:
            thread.join(DEADLINE_SECONDS)
        return Outcome(self.events, code, self.output.decode(errors="replace"))


class Worker:
    """Starts workers under an interpreter."""

    def __init__(self) -> None:
        self.children: list[Child] = []

    def start(
        self,
        job: bytes | dict[str, Any],
        *,
        environ: dict[str, str] | None = None,
        python: str = sys.executable,
    ) -> Child:
        reading, writing = os.pipe()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("BOARDBENCH_")}
        environment.pop("PYTHONPATH", None)
        environment["BOARDBENCH_FAKE_RUNTIME"] = "1"
        process = subprocess.Popen(
            [python, str(WORKER), "--events-fd", str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            env={**environment, **(environ or {})},
        )
        os.close(writing)
        child = Child(process)
        self.children.append(child)
        for target, arguments in ((child.read_events, (reading,)), (child.read_output, ())):
            thread = threading.Thread(target=target, args=arguments, daemon=True)
            thread.start()
            child.threads.append(thread)
        assert process.stdin is not None
        process.stdin.write(job if isinstance(job, bytes) else json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        return child

    def run(self, job: bytes | dict[str, Any], **options: Any) -> Outcome:
        return self.start(job, **options).outcome()

    def close(self) -> None:
        for child in self.children:
            child.process.kill()
            child.process.wait()
            for stream in (child.process.stdin, child.process.stdout):
                assert stream is not None
                stream.close()
            for thread in child.threads:
                thread.join(DEADLINE_SECONDS)


@pytest.fixture
def worker() -> Any:
    """Starts real workers; those still running are killed at the end."""
    workers = Worker()
    yield workers
    workers.close()


@pytest.fixture(params=["ai_edge_litert", "tflite_runtime"])
def python(request: pytest.FixtureRequest) -> str:
    """A Python with one of TensorFlow Lite's two interpreters."""
    if importlib.util.find_spec(request.param):
        return sys.executable
    variable = f"BOARDBENCH_{request.param.upper()}_PYTHON"
    other = os.environ.get(variable)
    if not other:
        pytest.skip(f"{request.param} is not installed here: set {variable} to a Python that has it")
    return other


@pytest.fixture
def fake_job(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A job for the fake engine: ``fake_job(inference=[...], job={...})``."""

    def make(*, job: dict[str, Any] | None = None, **content: Any) -> dict[str, Any]:
        model = tmp_path / "model.fake"
        model.write_text("boardbench-fake/1\n" + json.dumps(content), encoding="utf-8")
        return {
            "kind": "run",
            "runtime": "fake",
            "format": "fake",
            "model_path": str(model),
            **BRIEF,
            **(job or {}),
        }

    return make
