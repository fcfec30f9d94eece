"""Minutes of kills in random order: every job ends once, nothing acknowledged is lost or stored twice.

``BOARDBENCH_SOAK_SECONDS`` says for how long (600), ``BOARDBENCH_SOAK_SEED`` which order (random, and told).
"""

from __future__ import annotations

import collections
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BOARDS = 3
SECONDS = float(os.environ.get("BOARDBENCH_SOAK_SECONDS", "600"))
SEED = int(os.environ.get("BOARDBENCH_SOAK_SEED", str(random.SystemRandom().randrange(1 << 32))))
ENDED = ("JOB_STATE_DONE", "JOB_STATE_DEAD")
# Whatever kills interrupt is tried so often that it gets through in the end.
ATTEMPTS = 100


class Lab:
    """A collector and boards behind wires, each of which may be killed at any moment and comes back."""

    def __init__(self, programs: Any) -> None:
        self.programs = programs
        self.options = ("--heartbeat", "0.5")
        self.collector = programs.collector(options=self.options)
        self.address = self.collector.address
        self.wires = [programs.wire(self.address) for _ in range(BOARDS)]
        self.boards = [self.start(number) for number in range(BOARDS)]
        self.kills: collections.Counter[str] = collections.Counter()

    def start(self, number: int) -> Any:
        return self.programs.agent(
            f"board{number}",
            collector=self.wires[number].address,
            listen="",
            environment={"BOARDBENCH_FAKE_RUNTIME": "1"},
        )

    def hit(self, chance: random.Random) -> None:
        """Kills one of them with SIGKILL and has it back after a while, or cuts a wire."""
        what = chance.choice(["collector", "board", "board", "wire", "wire"])
        self.kills[what] += 1
        pause = chance.uniform(0.0, 1.0)
        if what == "collector":
            self.collector.program.kill()
            time.sleep(pause)
            self.collector = self.programs.collector(listen=self.address, options=self.options)
        elif what == "board":
            number = chance.randrange(BOARDS)
            self.boards[number].program.kill()
            time.sleep(pause)
            self.boards[number] = self.start(number)
        else:
            chance.choice(self.wires).cut()


class Submitter(threading.Thread):
    """Queues small jobs for all boards, each request as often as it takes, and once more."""

    def __init__(self, address: str, model: Path) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._model = model
        self.enough = threading.Event()
        self.jobs: set[str] = set()
        self.problems: list[str] = []

    def run(self) -> None:
        from boardbench.cli.address import parse_address
        from boardbench.cli.client import JobsClient
        from boardbench.cli.errors import CliError
        from boardbench.cli.source import Source
        from boardbench.v1 import job_pb2, result_pb2

        spec = result_pb2.BenchmarkSpec(
            duration_seconds=0.0, min_runs=3, warm_up_seconds=0.0, profile_runs=0, idle_seconds=0.0
        )
        with Source(self._model) as source:
            while not self.enough.is_set():
                request = job_pb2.SubmitJobsRequest(
                    request_id=uuid.uuid4().hex,
                    on=["device_id=*"],
                    spec=spec,
                    max_attempts=ATTEMPTS,
                    timeout_seconds=7200,
                )
                answers: list[set[str]] = []
                while len(answers) < 2 and not self.enough.is_set():
                    try:
                        with JobsClient(parse_address(self._address, 0)) as client:
                            request.model_sha256 = client.push(source).model.sha256
                            answers.append({job.job_id for job in client.submit(request)})
                    except CliError:
                        time.sleep(0.1)
                for answer in answers:
                    self.jobs |= answer
                if len(answers) == 2 and answers[0] != answers[1]:
                    self.problems.append(f"request {request.request_id} gave {answers}")
                self.enough.wait(2.0)


def jobs_of(address: str) -> dict[str, dict[str, Any]]:
    from google.protobuf import json_format

    from boardbench.cli.address import parse_address
    from boardbench.cli.client import JobsClient
    from boardbench.v1 import job_pb2

    with JobsClient(parse_address(address, 0)) as client:
        return {
            job.job_id: json_format.MessageToDict(job, preserving_proto_field_name=True)
            for job in client.jobs(job_pb2.JobFilter())
        }


def results_of(address: str) -> list[Any]:
    from boardbench.cli.address import parse_address
    from boardbench.cli.client import CollectorClient

    with CollectorClient(parse_address(address, 0)) as client:
        return list(client.results(limit=1_000_000, summary=True))


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 1200)
def test_every_job_ends_once_whatever_is_killed(
    programs: Any,
    tmp_path: Path,
    eventually: Callable[..., Any],
) -> None:
    model = tmp_path / "m.fake"
    model.write_text('boardbench-fake/1\n{"create": [{"sleep_seconds": 0.3}]}' + " " * 300_000)
    lab = Lab(programs)
    eventually("all boards are there", lambda: len(up(lab.address)) == BOARDS, 60.0)
    submitter = Submitter(lab.address, model)
    submitter.start()
    chance = random.Random(SEED)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        time.sleep(chance.uniform(0.2, 3.0))
        lab.hit(chance)
    submitter.enough.set()
    submitter.join(60)
    told = f"seed {SEED}, {dict(lab.kills)} kills, {len(submitter.jobs)} jobs"
    assert submitter.jobs, told
    assert not submitter.problems, told

    def over() -> bool:
        return all(job["state"] in ENDED for job in jobs_of(lab.address).values())

    eventually(f"all jobs have ended ({told})", over, 900.0)
    jobs = jobs_of(lab.address)
    assert submitter.jobs <= set(jobs), told
    eventually("all spools are empty", lambda: emptied(lab.address), 120.0)
    results = results_of(lab.address)
    runs = collections.Counter(result.run_id for result in results)
    assert max(runs.values()) == 1, f"{told}: stored twice: {[run for run, n in runs.items() if n > 1]}"
    succeeded = collections.Counter(
        result.run_id.rpartition("-")[0] for result in results if result.status == 1
    )
    for job_id, job in jobs.items():
        assert job["state"] == "JOB_STATE_DONE", f"{told}: {job}"
        assert succeeded[job_id] == 1, f"{told}: {succeeded[job_id]} times: {job}"
        assert job["run_id"] in runs, f"{told}: the result of {job} is lost"
    sys.stdout.write(f"{told}: {len(results)} results, each once\n")


def up(address: str) -> list[Any]:
    from boardbench.cli.address import parse_address
    from boardbench.cli.client import CollectorClient

    with CollectorClient(parse_address(address, 0)) as client:
        return client.devices(["up=true"])


def emptied(address: str) -> bool:
    found = up(address)
    return len(found) == BOARDS and all(device.heartbeat.spool_pending == 0 for device in found)
