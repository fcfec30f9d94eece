"""Boards that nobody can reach work for a collector: real programs, killed and cut off in the middle."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Eventually = Callable[..., Any]


@dataclass
class Lab:
    """A collector, and agents that listen nowhere."""

    programs: Any
    collector: Any
    eventually: Eventually

    def board(self, name: str, *, labels: str = "", **environment: str) -> Any:
        """An agent behind a NAT, known to the collector."""
        settings = {"BOARDBENCH_AGENT_LABELS": f"lab=zurich,{labels}".strip(",")} | environment
        made = start_board(self.programs, name, self.collector.address, settings)
        self.eventually(f"{name} is up", lambda: self.devices(f"device_id=board-{name}", "up=true"))
        return made

    def cli(self, *arguments: object, code: int | None = 0) -> Any:
        return self.programs.client(*arguments, code=code)

    def push(self, model: Path, *arguments: object, code: int | None = 0) -> Any:
        return self.cli("push", model, "--via", self.collector.address, *arguments, code=code)

    def devices(self, *terms: str) -> list[dict[str, Any]]:
        on = [part for term in terms for part in ("--on", term)]
        answer = self.cli("devices", *on, "--via", self.collector.address, "--format", "json")
        return list(answer.json)

    def jobs(self, *arguments: object) -> list[dict[str, Any]]:
        """Jobs, asked without starting a client: that takes longer than some of them last."""
        from google.protobuf import json_format

        from boardbench.cli.address import parse_address
        from boardbench.cli.client import JobsClient
        from boardbench.v1 import job_pb2

        with JobsClient(parse_address(self.collector.address, 0)) as client:
            found = client.jobs(job_pb2.JobFilter(job_ids=[str(argument) for argument in arguments]))
            return [json_format.MessageToDict(job, preserving_proto_field_name=True) for job in found]

    def job(self, job_id: str) -> dict[str, Any]:
        (found,) = self.jobs(job_id)
        return found

    def until(self, job_id: str, *states: str) -> dict[str, Any]:
        names = [f"JOB_STATE_{state}" for state in states]

        def there() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["state"] in names else None

        return dict(self.eventually(f"the job is {' or '.join(states)}", there, 60.0))

    def results(self) -> list[dict[str, Any]]:
        return list(self.collector.results())


def start_board(programs: Any, name: str, collector: str, settings: dict[str, str]) -> Any:
    return programs.agent(name, collector=collector, listen="", environment=settings)


@pytest.fixture
def lab(programs: Any, eventually: Eventually) -> Iterator[Lab]:
    yield Lab(programs, programs.collector(options=("--heartbeat", "0.5")), eventually)


LONG = ("--duration", "6", "--profile-runs", "0", "--idle", "0")
# It ends by what is done to it, and not before.
ENDLESS = ("--duration", "3600", "--profile-runs", "0", "--idle", "0")
SHORT = ("--duration", "0.2", "--profile-runs", "0", "--idle", "0")


def test_a_model_goes_once_to_the_collector_and_once_to_each_board_behind_a_nat(
    lab: Lab, demo_tflite: Path
) -> None:
    for name in ("a", "b"):
        lab.board(name)
    for _ in range(2):
        answer = lab.push(demo_tflite, "--on", "lab=zurich", *SHORT, "--format", "json")
        assert {result["board"]["device_id"] for result in answer.json} == {"board-a", "board-b"}
        assert {result["status"] for result in answer.json} == {"RUN_STATUS_SUCCEEDED"}
    assert len(lab.results()) == 4
    assert all(not device.get("address") for device in lab.devices())
    for name in ("a", "b"):
        log = (lab.programs.folder / f"{name}.log").read_text()
        assert "listening" not in log
    # The board with the shortest queue, and one only.
    (one,) = lab.push(demo_tflite, "--count", "1", *SHORT, "--format", "json", "--detach").json
    assert lab.until(one["job_id"], "DONE")["attempts"] == 1
    # A person sees a table, and a gate that does not hold is the exit code.
    table = lab.push(demo_tflite, "--all", *SHORT, "--require", "p50<=1ns", code=1)
    assert "board-a" in table.out
    assert "p50" in table.err
    listed = lab.cli("jobs", "--via", lab.collector.address)
    assert listed.out.count("done") == 7


def test_runs_that_are_pushed_and_jobs_share_one_queue(lab: Lab, demo_tflite: Path) -> None:
    board = lab.programs.agent("open", collector=lab.collector.address)
    lab.eventually("it is up", lambda: lab.devices("up=true"))
    (job,) = lab.push(demo_tflite, "--all", *ENDLESS, "--detach", "--format", "json").json
    lab.until(job["job_id"], "RUNNING")
    # The model is there already, under the same SHA-256, and the run waits for that of the job.
    lab.cli("push", demo_tflite, "--to", board.address, *SHORT, "--detach")
    states = {run["run_id"]: run["state"] for run in board.runs()}
    job_run = lab.job(job["job_id"])["run_id"]
    assert states.pop(job_run) == "RUN_STATE_RUNNING"
    assert list(states.values()) == ["RUN_STATE_QUEUED"]
    lab.cli("jobs", "cancel", job["job_id"], "--via", lab.collector.address)
    lab.until(job["job_id"], "CANCELLED")
    lab.eventually("both are stored", lambda: len(lab.results()) == 2)
    ended = {result["run_id"]: result["status"] for result in lab.results()}
    assert ended.pop(job_run) == "RUN_STATUS_CANCELLED"
    assert list(ended.values()) == ["RUN_STATUS_SUCCEEDED"]


def test_nobody_meets_the_terms(lab: Lab, demo_tflite: Path) -> None:
    lab.board("a")
    answer = lab.push(demo_tflite, "--on", "lab=geneva", *SHORT, code=None)
    assert answer.code in (1, 2)
    assert "lab=geneva" in answer.err
    assert "Traceback" not in answer.err


def test_an_agent_that_is_killed_in_the_middle_does_the_job_once(lab: Lab, demo_tflite: Path) -> None:
    board = lab.board("a")
    (job,) = lab.push(demo_tflite, "--all", *LONG, "--detach", "--format", "json").json
    lab.until(job["job_id"], "RUNNING")
    board.program.kill()
    lab.board("a")
    ended = lab.until(job["job_id"], "DONE", "DEAD")
    assert (ended["state"], ended["run_status"]) == ("JOB_STATE_DONE", "RUN_STATUS_SUCCEEDED")
    assert ended["attempts"] == 2
    done = [result for result in lab.results() if result["status"] == "RUN_STATUS_SUCCEEDED"]
    assert [result["run_id"] for result in done] == [ended["run_id"]]


def test_a_collector_that_is_killed_in_the_middle_has_the_job_done_once(lab: Lab, demo_tflite: Path) -> None:
    board = lab.board("a")
    follower = lab.programs.client.begin(
        "push", demo_tflite, "--via", lab.collector.address, "--all", *LONG, "--format", "json"
    )
    job = lab.eventually(
        "it runs",
        lambda: next((job for job in lab.jobs() if job["state"] == "JOB_STATE_RUNNING"), None),
        60.0,
    )
    lab.collector.program.kill()
    lab.collector = lab.programs.collector(listen=lab.collector.address, options=("--heartbeat", "0.5"))
    ended = lab.until(job["job_id"], "DONE", "DEAD")
    assert (ended["state"], ended["run_status"]) == ("JOB_STATE_DONE", "RUN_STATUS_SUCCEEDED")
    assert ended["attempts"] == 1
    assert [result["run_id"] for result in lab.results()] == [ended["run_id"]]
    assert board.program.running
    assert follower.process.wait(60) == 0
    assert json.loads(follower.log())["run_id"] == ended["run_id"]


def test_a_cancelled_job_ends_on_the_board_too(lab: Lab, demo_tflite: Path) -> None:
    lab.board("a")
    push = (demo_tflite, "--all", *ENDLESS, "--detach", "--format", "json")
    jobs = [lab.push(*push).json[0] for _ in range(3)]
    lab.until(jobs[0]["job_id"], "RUNNING")
    ids = [job["job_id"] for job in jobs]
    lab.cli("jobs", "cancel", *ids, "--via", lab.collector.address)
    for job_id in ids:
        lab.until(job_id, "CANCELLED")
    lab.eventually("the board is idle", lambda: not lab.devices()[0]["heartbeat"].get("running_run_id"), 20.0)
    assert {result["status"] for result in lab.results()} <= {"RUN_STATUS_CANCELLED"}
    again = lab.cli("jobs", "watch", ids[0], "--via", lab.collector.address, code=1)
    assert "was cancelled" in again.err


def test_ctrl_c_cancels_the_jobs(lab: Lab, demo_tflite: Path) -> None:
    lab.board("a")
    client = lab.programs.client.begin(
        "push", demo_tflite, "--via", lab.collector.address, "--all", "--duration", "60"
    )
    lab.eventually("it runs", lambda: any(job["state"] == "JOB_STATE_RUNNING" for job in lab.jobs()), 60.0)
    client.process.send_signal(signal.SIGINT)
    assert client.process.wait(60) == 130
    assert {job["state"] for job in lab.jobs()} == {"JOB_STATE_CANCELLED"}


def test_a_reserved_board_works_for_its_holder_alone(lab: Lab, demo_tflite: Path) -> None:
    lab.board("a", labels="rack=1")
    via = ("--via", lab.collector.address)
    reserved = lab.cli("devices", "reserve", "--on", "rack=1", "--holder", "anna", "--reason", "demo", *via)
    assert "anna" in reserved.out
    (waiting,) = lab.push(
        demo_tflite, "--on", "rack=1", "--holder", "bert", *SHORT, "--detach", "--format", "json"
    ).json
    lab.push(demo_tflite, "--on", "rack=1", "--holder", "anna", *SHORT)
    assert lab.job(waiting["job_id"])["state"] == "JOB_STATE_QUEUED"
    refused = lab.cli("devices", "reserve", "--on", "rack=1", "--holder", "bert", *via, code=1)
    assert "anna" in refused.err
    released = lab.cli("devices", "release", "--holder", "anna", *via)
    assert "given back by" in released.out and "holder" not in released.out
    lab.until(waiting["job_id"], "DONE")
    # The operator's label goes before the agent's.
    lab.cli("devices", "label", "rack=7", "--on", "rack=1", *via)
    assert len(lab.devices("rack=7")) == 1
    assert not lab.devices("rack=1")


def test_a_collector_that_is_set_back_gets_what_it_lost(lab: Lab, demo_tflite: Path) -> None:
    lab.board("a")
    lab.push(demo_tflite, "--all", *SHORT)
    store = lab.programs.folder / "collector"
    lab.collector.program.end()
    shutil.copytree(store, lab.programs.folder / "backup")
    lab.collector = lab.programs.collector(listen=lab.collector.address, options=("--heartbeat", "0.5"))
    lab.eventually("the board is back", lambda: lab.devices("up=true"), 60.0)
    for _ in range(2):
        lab.push(demo_tflite, "--all", *SHORT)
    before = {result["run_id"] for result in lab.results()}
    assert len(before) == 3
    lab.collector.program.end()
    shutil.rmtree(store)
    shutil.move(lab.programs.folder / "backup", store)
    lab.collector = lab.programs.collector(listen=lab.collector.address, options=("--heartbeat", "0.5"))
    lab.eventually(
        "it has all results again",
        lambda: {result["run_id"] for result in lab.results()} == before,
        60.0,
    )


def test_a_second_agent_with_one_identity_is_told_of(lab: Lab) -> None:
    lab.board("a")
    twin = lab.programs.agent("twin", collector=lab.collector.address, device_id="board-a")

    def complaint() -> str:
        described = lab.cli("devices", "--to", twin.address, "--format", "json").json
        return str(described["collector"].get("error", ""))

    lab.eventually("the second one knows why", lambda: "another agent reports as this board" in complaint())
    lab.eventually("the collector lists it", lambda: lab.devices("device_id=board-a")[0].get("problems"))
    assert "another agent reports as this board" in twin.program.log()


def test_a_suite_runs_and_is_watched_over_restarts(lab: Lab, demo_tflite: Path, tmp_path: Path) -> None:
    lab.board("a")
    shutil.copy(demo_tflite, tmp_path / "m.tflite")
    (tmp_path / "incoming").mkdir()
    file = tmp_path / "nightly.toml"
    file.write_text(
        """
        name = "nightly"
        models = ["m.tflite"]
        require = ["p50<=10s"]
        [defaults]
        duration = 0.2
        profile-runs = 0
        [boards.zurich]
        on = ["lab=zurich"]
        [runtimes.one]
        threads = 1
        [runtimes.two]
        threads = 2
        [schedule]
        folders = ["incoming"]
        settle = 0.2
        """
    )
    via = ("--via", lab.collector.address)
    checked = lab.cli("suite", "check", file, *via, "--format", "json").json
    assert [(case["name"], case["boards"]) for case in checked] == [
        ("m.tflite one zurich", 1),
        ("m.tflite two zurich", 1),
    ]
    first = lab.cli("suite", "run", file, "--id", "monday", *via, "--format", "json").json
    assert sorted(result["effective_spec"]["threads"] for result in first) == [1, 2]
    again = lab.cli("suite", "run", file, "--id", "monday", *via, "--format", "json").json
    assert sorted(result["run_id"] for result in again) == sorted(result["run_id"] for result in first)
    assert {job["tags"]["suite"] for job in lab.jobs()} == {"nightly"}
    lab.cli("suite", "run", file, "--case", "nothing*", *via, code=2)

    watching = lab.programs.client.begin("suite", "watch", file, *via)
    lab.eventually("it waits", lambda: "waiting for" in watching.log())
    shutil.copy(demo_tflite, tmp_path / "incoming" / "new.tflite")
    lab.eventually("the file is queued", lambda: "2 jobs queued" in watching.log())
    assert watching.end() == 0
    assert lab.cli("suite", "watch", file, *via, "--once").out == ""
    assert len(lab.jobs()) == 4

    # It went down after it had queued a round and before it had written that down.
    (state,) = (lab.programs.folder / ".local/state/boardbench/suites").glob("nightly-*.json")
    told = json.loads(state.read_text())
    state.write_text(json.dumps(told | {"files": {}}))
    once = ("suite", "watch", file, *via, "--once")
    assert "2 jobs queued" in lab.cli(*once).out
    assert len(lab.jobs()) == 4

    # A round by the clock that was missed is made up for, once.
    file.write_text(file.read_text().replace("folders =", 'cron = "0 3 * * *"\nfolders ='))
    state.write_text(json.dumps(told | {"tick": told["tick"] - 3 * 86400}))
    assert lab.cli(*once).out.count("2 jobs queued") == 1
    assert lab.cli(*once).out == ""
    assert len(lab.jobs()) == 6
    for job in lab.jobs():
        lab.until(job["job_id"], "DONE")


def test_a_board_whose_disk_is_full_gives_the_job_back_and_says_so(
    lab: Lab, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    model = tmp_path / "large.onnx"
    model.write_bytes(bytes(20 << 20))
    made = lab.programs.agent(
        "full", collector=lab.collector.address, listen="", data_dir=small_disk(8 << 20) / "data"
    )
    lab.eventually("it is up", lambda: lab.devices(f"device_id={made.device_id}", "up=true"))
    (job,) = lab.push(model, "--all", "--detach", "--format", "json").json

    def reason() -> str:
        return str(lab.job(job["job_id"]).get("reason", ""))

    lab.eventually("the reason is told", lambda: "returned by the board" in reason())
    assert "make room on the board" in reason()
    assert made.program.running
