"""One run in one real child process: its result, its faults, its deadlines, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent import run as run_module
from boardbench.agent import wire, worker
from boardbench.agent.board.identify import identify
from boardbench.agent.config import AgentConfig, DeadlinesConfig, SpecConfig
from boardbench.agent.plan import Job, plan
from boardbench.agent.run import ERRORS, Attempt
from boardbench.v1 import agent_pb2, board_pb2, model_pb2, result_pb2

FAKE = board_pb2.RuntimeStatus(
    name="fake", available=True, version="boardbench-fake 1", formats=["fake"], devices=["cpu", "faketpu"]
)
MODEL = model_pb2.Model(sha256="0" * 64, name="m.fake", format="fake", size_bytes=1)

# Short, and long enough for a busy machine to start Python and import NumPy.
QUICK = result_pb2.BenchmarkSpec(duration_seconds=0.0, min_runs=3, warm_up_seconds=0.0, warm_up_runs=1)


class Harness:
    """Makes attempts; keeps what they said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[wire.WorkerNews] = []
        self.on_event: Callable[[Any], None] = lambda event: None
        self.deadlines: dict[str, float] = {}
        self.root = Path("/")

    def attempt(
        self,
        model: Path | None = None,
        spec: result_pb2.BenchmarkSpec = QUICK,
        interpreter: str = sys.executable,
    ) -> Attempt:
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        job = Job(
            run_id="run",
            model=MODEL,
            model_path=model or self.folder / "none.fake",
            inputs_path=None,
            asked=spec,
            plan=plan(MODEL, spec, (FAKE,), SpecConfig()),
            created_at=wire.timestamp(time.time_ns()),
            board=identify(Path("/"), device_id="it", labels={}),
            interpreter=interpreter,
            scratch=scratch,
        )
        config = AgentConfig(deadlines=DeadlinesConfig(**self.deadlines), sys_root=self.root)
        return Attempt(job, config, self._take)

    async def execute(self, *arguments: Any, **options: Any) -> result_pb2.RunResult:
        return await self.attempt(*arguments, **options).execute()

    def stages(self) -> list[str]:
        return [
            result_pb2.Stage.Name(event.stage).removeprefix("STAGE_")
            for event in self.events
            if isinstance(event, agent_pb2.StageEvent)
        ]

    def _take(self, event: wire.WorkerNews) -> None:
        self.events.append(event)
        self.on_event(event)


@pytest.fixture
def harness(tmp_path: Path, fake_engine: None) -> Harness:
    return Harness(tmp_path)


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- a run that works


async def test_result_is_whole(harness: Harness, fake_model: Callable[..., Path]) -> None:
    model = fake_model(ops=[{"type": "CONV_2D", "unit": "UNIT_TPU"}])
    result = await harness.execute(model)
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert not result.HasField("error")
    assert (result.run_id, result.model, result.spec) == ("run", MODEL, QUICK)
    assert result.latency.count == len(result.latency.samples_nanoseconds) >= 3
    assert result.runtime.version == "boardbench-fake 1"
    assert result.runtime.interpreter.version.startswith("CPython 3.")
    assert result.effective_spec.max_runs == SpecConfig().max_runs
    assert result.effective_spec.timeout_seconds == SpecConfig().timeout_seconds
    assert result.environment.boardbench_version
    assert result.environment.HasField("load_average_before")
    assert result.environment.HasField("clock_read_seconds"), "the worker's part is there too"
    before = result.environment.memory_available_before_bytes
    assert 0 < result.environment.memory_available_least_bytes <= before
    times = [result.created_at, result.started_at, result.finished_at]
    assert sorted(each.ToNanoseconds() for each in times) == [each.ToNanoseconds() for each in times]
    assert result.board.device_id == "it"


async def test_stages_come_in_their_order(harness: Harness, fake_model: Callable[..., Path]) -> None:
    await harness.execute(fake_model())
    of_a_worker = [number for number in result_pb2.Stage.values() if 1 <= number <= result_pb2.STAGE_REPORT]
    names = [result_pb2.Stage.Name(number) for number in of_a_worker]
    assert harness.stages() == [name.removeprefix("STAGE_") for name in names]


async def test_progress_is_told(harness: Harness, fake_model: Callable[..., Path]) -> None:
    spec = result_pb2.BenchmarkSpec(duration_seconds=0.6, min_runs=1, warm_up_seconds=0.0, warm_up_runs=1)
    await harness.execute(fake_model(inference=[{"sleep_seconds": 0.001}]), spec)
    progress = [event for event in harness.events if isinstance(event, agent_pb2.ProgressEvent)]
    assert {event.stage for event in progress} <= {result_pb2.STAGE_WARM_UP, result_pb2.STAGE_MEASURE}
    assert progress[-1].stage == result_pb2.STAGE_MEASURE
    assert progress[-1].runs > 1


async def test_standin_is_labelled(harness: Harness, fake_model: Callable[..., Path]) -> None:
    model = fake_model(ops=[{"type": "CONV_2D", "unit": "UNIT_TPU"}])
    spec = result_pb2.BenchmarkSpec(device="faketpu")
    spec.MergeFrom(QUICK)
    result = await harness.execute(model, spec)
    assert result.placement.standin
    assert "standin-faketpu" in result.standins


async def test_emulated_board_is_labelled(harness: Harness, fake_model: Callable[..., Path]) -> None:
    attempt = harness.attempt(fake_model())
    attempt._job.board.emulator = "qemu-user"
    result = await attempt.execute()
    assert list(result.standins) == ["qemu-user"]
    assert "emulated" in [warning.code for warning in result.warnings]


async def test_sensors_that_are_a_folder_are_labelled(
    harness: Harness, fake_model: Callable[..., Path], tmp_path: Path
) -> None:
    harness.root = tmp_path / "board"
    (harness.root / "sys").mkdir(parents=True)
    result = await harness.execute(fake_model())
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert list(result.standins) == ["recorded-sensors"]


async def test_noise_does_not_reach_the_events(harness: Harness, fake_model: Callable[..., Path]) -> None:
    noise = [{"stdout": '{"event":"error"}' * 100, "times": 5000}, {"stderr": "\0\1" * 100, "times": 50}]
    result = await harness.execute(fake_model(create=noise))
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED


# --- faults


@pytest.mark.parametrize("stage", ["create", "first_inference", "inference", "placement"])
async def test_crash_names_stage_and_signal(
    harness: Harness, fake_model: Callable[..., Path], stage: str
) -> None:
    result = await harness.execute(fake_model(**{"first_inference": [], stage: [{"signal": "SIGSEGV"}]}))
    assert result.status == result_pb2.RUN_STATUS_FAILED
    assert (result.error.code, result.error.signal) == ("worker_killed", "SIGSEGV")
    assert not result.error.HasField("exit_code")
    expected = {"create": "CREATE", "first_inference": "FIRST_INFERENCE", "placement": "REPORT"}
    # Warm-up runs the model too.
    assert result.error.stage == result_pb2.Stage.Value("STAGE_" + expected.get(stage, "WARM_UP"))
    assert "SIGSEGV" in result.error.message
    assert "Segmentation fault" in result.error.output_tail
    assert result.runtime.name == "fake", "what was tried is told"
    assert result.environment.HasField("load_average_after")


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ({"signal": "SIGABRT"}, "worker_killed", ["SIGABRT", "create"]),
        ({"signal": "SIGKILL"}, "worker_killed", ["SIGKILL", "create"]),
        ({"exit_code": 7}, "worker_exited", ["exited with 7", "create"]),
        ({"exit_code": 0}, "worker_exited", ["ended by itself", "create"]),
        ({"memory_error": True}, "out_of_memory", ["memory"]),
        ({"reject": "not this one"}, "model_rejected", ["not this one"]),
    ],
)
async def test_every_end_has_its_code(
    harness: Harness, fake_model: Callable[..., Path], fault: dict[str, Any], code: str, words: list[str]
) -> None:
    result = await harness.execute(fake_model(create=[{"stdout": "last words"}, fault]))
    assert result.status == result_pb2.RUN_STATUS_FAILED
    assert result.error.code == code
    for word in words:
        assert word in result.error.message
    assert "last words" in result.error.output_tail
    assert result.error.stage == result_pb2.STAGE_CREATE


async def test_model_is_called_by_its_name_and_not_by_its_file_in_the_store(
    harness: Harness, tmp_path: Path
) -> None:
    stored = tmp_path / f"{MODEL.sha256}.fake"
    stored.write_text("no fake model")
    result = await harness.execute(stored)
    assert result.error.code == "model_rejected"
    assert result.error.message.startswith("m.fake is no model")


async def test_exit_code_is_told(harness: Harness, fake_model: Callable[..., Path]) -> None:
    result = await harness.execute(fake_model(create=[{"exit_code": 7}]))
    assert (result.error.exit_code, result.error.signal) == (7, "")


@pytest.mark.parametrize(
    ("cgroup", "counter", "others"),
    [
        ("0::/agent\n", "sys/fs/cgroup/agent/memory.events", None),
        ("5:cpu:/\n4:memory:/agent\n", "sys/fs/cgroup/memory/agent/memory.oom_control", None),
        ("", "proc/vmstat", None),
        # Kills in other groups are none of ours.
        ("0::/agent\n", "proc/vmstat", "sys/fs/cgroup/agent/memory.events"),
    ],
)
async def test_kill_for_want_of_memory_needs_evidence(
    harness: Harness,
    fake_model: Callable[..., Path],
    tmp_path: Path,
    cgroup: str,
    counter: str,
    others: str | None,
) -> None:
    harness.root = tmp_path / "root"
    for name, text in {"proc/self/cgroup": cgroup, counter: "oom_kill 3\n", others: "oom_kill 3\n"}.items():
        if name is not None:
            (harness.root / name).parent.mkdir(parents=True, exist_ok=True)
            (harness.root / name).write_text(text)

    def kernel(event: wire.WorkerNews) -> None:
        if isinstance(event, agent_pb2.StageEvent) and event.stage == result_pb2.STAGE_FIRST_INFERENCE:
            (harness.root / counter).write_text("oom_kill 4\n")

    harness.on_event = kernel
    result = await harness.execute(fake_model(first_inference=[{"signal": "SIGKILL"}]))
    if others is None:
        assert result.error.code == "out_of_memory"
        assert "from 3 to 4" in result.error.message
        assert "first inference" in result.error.message
    else:
        assert result.error.code == "worker_killed"


async def test_interpreter_that_is_not_there(harness: Harness) -> None:
    result = await harness.execute(interpreter="/nowhere/python")
    assert result.status == result_pb2.RUN_STATUS_FAILED
    assert result.error.code == "worker_not_started"
    assert "/nowhere/python" in result.error.message
    assert "[runtimes]" in result.error.message


# --- deadlines


async def test_stage_that_hangs_is_killed(harness: Harness, fake_model: Callable[..., Path]) -> None:
    harness.deadlines = {"create_seconds": 0.3}
    result = await harness.execute(fake_model(create=[{"stdout": "about to hang"}, {"hang": True}]))
    assert result.error.code == "deadline"
    assert result.error.stage == result_pb2.STAGE_CREATE
    for words in ("stage create", "0.3 s", "deadlines.create_seconds"):
        assert words in result.error.message
    assert "about to hang" in result.error.output_tail


async def test_whole_run_has_a_deadline(harness: Harness, fake_model: Callable[..., Path]) -> None:
    spec = result_pb2.BenchmarkSpec(duration_seconds=0.1, timeout_seconds=2.0)
    result = await harness.execute(fake_model(create=[{"hang": True}]), spec)
    assert result.error.code == "deadline"
    assert "timeout_seconds" in result.error.message


async def test_slow_model_gets_the_time_it_needs(harness: Harness, fake_model: Callable[..., Path]) -> None:
    """Deadlines of warm-up and measurement grow with the first inference."""
    harness.deadlines = {"warm_up_seconds": 0.1, "measure_seconds": 0.1}
    result = await harness.execute(fake_model(inference=[{"sleep_seconds": 0.3}]))
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error.message


async def test_model_that_hangs_later_is_killed_all_the_same(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    harness.deadlines = {"warm_up_seconds": 0.3}
    result = await harness.execute(fake_model(first_inference=[], inference=[{"hang": True}]))
    assert (result.error.code, result.error.stage) == ("deadline", result_pb2.STAGE_WARM_UP)


# --- cancelling


@pytest.mark.parametrize("stage", ["START", "IMPORT", "CREATE", "FIRST_INFERENCE", "MEASURE", "REPORT"])
async def test_cancel_works_in_every_stage(
    harness: Harness, fake_model: Callable[..., Path], stage: str
) -> None:
    hangs = {"CREATE": "create", "FIRST_INFERENCE": "first_inference", "REPORT": "placement"}
    spec = result_pb2.BenchmarkSpec(duration_seconds=600.0 if stage == "MEASURE" else 0.0)
    spec.MergeFrom(result_pb2.BenchmarkSpec(min_runs=3, warm_up_seconds=0.0))
    content = {hangs[stage]: [{"hang": True}]} if stage in hangs else {}
    attempt = harness.attempt(fake_model(**content), spec)
    reached = asyncio.Event()

    def watch(event: wire.WorkerNews) -> None:
        if isinstance(event, agent_pb2.StageEvent) and event.stage == result_pb2.Stage.Value(
            "STAGE_" + stage
        ):
            reached.set()

    harness.on_event = watch
    running = asyncio.create_task(attempt.execute())
    await reached.wait()
    attempt.stop()
    attempt.stop()
    result = await running
    assert result.status == result_pb2.RUN_STATUS_CANCELLED
    assert not result.HasField("error")


async def test_cancel_before_the_start_starts_nothing(harness: Harness) -> None:
    attempt = harness.attempt(interpreter="/nowhere/python")
    attempt.stop()
    result = await attempt.execute()
    assert result.status == result_pb2.RUN_STATUS_CANCELLED
    assert not result.HasField("started_at")
    assert harness.events == []


async def test_finished_run_can_not_be_stopped(harness: Harness, fake_model: Callable[..., Path]) -> None:
    attempt = harness.attempt(fake_model())
    result = await attempt.execute()
    attempt.stop()
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED


# --- workers that are hostile


@pytest.mark.parametrize(
    "body",
    [
        'say(b"garbage\\n")',
        'say(b"\\xff\\x00\\n")',
        'say({"event": "probe", "runtimes": []})',
        'stage("CREATE"); stage("IMPORT")',
        'stage("CREATE"); stage("CREATE")',
        'stage("START")',
        'say({"event": "result", "result": {"run_id": "another"}})',
        'say({"event": "result", "result": {}})',
        # Longer than any line may be, and without an end.
        f'say(b"x" * {worker.LINE_LIMIT_BYTES + 1})',
    ],
)
async def test_garbage_fails_the_run_and_nothing_else(
    harness: Harness, worker_program: Callable[[str], str], body: str
) -> None:
    program = worker_program(f"{body}\ntime.sleep(600)")
    result = await harness.execute(interpreter=program)
    assert result.error.code == "protocol_error"
    assert result.error.signal == "SIGKILL"
    assert "fake" in result.error.message


async def test_flood_of_events_is_stopped(
    harness: Harness, worker_program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "EVENTS_LIMIT", 1000)
    body = """
        while True:
            say({"event": "progress", "progress": {}})
    """
    result = await harness.execute(interpreter=worker_program(body))
    assert result.error.code == "protocol_error"
    assert "1000" in result.error.message
    assert len(harness.events) < 1000, "progress is for eyes: a flood of it is not passed on"


async def test_warnings_are_bounded(harness: Harness, worker_program: Callable[[str], str]) -> None:
    body = """
        for number in range(500):
            say({"event": "warning", "warning": {"code": "w", "message": "x" * 20000}})
        say({"event": "result", "result": RESULT})
    """
    result = await harness.execute(interpreter=worker_program(body))
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert len(result.warnings) <= 70
    assert len(result.warnings[0].message) <= 8192


async def test_what_follows_a_result_is_not_heard(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    body = """
        say({"event": "result", "result": RESULT})
        say(b"garbage\\n")
        say({"event": "error", "error": {"code": "internal"}})
    """
    result = await harness.execute(interpreter=worker_program(body))
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED


async def test_result_stands_though_the_worker_crashes_after_it(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    body = """
        say({"event": "result", "result": RESULT})
        os.abort()
    """
    result = await harness.execute(interpreter=worker_program(body))
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert result.latency.count == 2
    (doubt,) = [warning for warning in result.warnings if warning.code == "worker_end"]
    assert "SIGABRT" in doubt.message


async def test_worker_that_does_not_end_is_ended(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    harness.deadlines = {"exit_seconds": 0.2}
    body = """
        say({"event": "result", "result": RESULT})
        time.sleep(600)
    """
    result = await harness.execute(interpreter=worker_program(body))
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert "worker_end" in [warning.code for warning in result.warnings]


PROFILE = """
        RESULT["placement"] = {"evidence": "EVIDENCE_PARTITION", "cpu_ops": 2, "detail": "measured"}
        say({"event": "result", "result": RESULT})
        say({"event": "profiling"})
"""


async def test_profile_is_the_placement_of_the_result(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    harness.deadlines = {"exit_seconds": 0.2}
    body = (
        PROFILE
        + """
        time.sleep(0.5)  # longer than a worker may take to end that has said everything
        say({"event": "warning", "warning": {"code": "late", "message": "not heard"}})
        say(b"garbage\\n")
        say({"event": "profile", "placement": {"evidence": "EVIDENCE_PARTITION", "cpu_ops": 2,
             "fallback_cost": {"share": 0.5}, "evidence_reports": [{"evidence": "EVIDENCE_PROFILED"}]}})
        say({"event": "profile", "placement": {"cpu_ops": 99}})
    """
    )
    result = await harness.execute(interpreter=worker_program(body))
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert result.placement.fallback_cost.share == 0.5
    assert result.placement.cpu_ops == 2
    assert [report.evidence for report in result.placement.evidence_reports] == [3]
    assert not result.warnings


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("os.abort()", "SIGABRT"),
        ("os._exit(7)", "exited with 7"),
        ("pass", "the worker ended"),
        ('say({"event": "profile", "placement": {"cpu_ops": -1}})', "the worker ended"),
    ],
)
async def test_result_stands_without_its_profile_and_says_why(
    harness: Harness, worker_program: Callable[[str], str], end: str, why: str
) -> None:
    result = await harness.execute(interpreter=worker_program(PROFILE + f"        {end}\n"))
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert result.placement.detail == "measured"
    (report,) = result.placement.evidence_reports
    assert report.detail.startswith("there is no profile: ")
    assert why in report.detail
    assert not result.warnings, "the figures are whole"


async def test_profile_that_hangs_is_ended_and_the_result_stands(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    harness.deadlines = {"report_seconds": 0.3}
    result = await harness.execute(interpreter=worker_program(PROFILE + "        time.sleep(600)\n"))
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert "it took too long" in result.placement.evidence_reports[0].detail


async def test_stop_ends_the_profile_and_keeps_the_result(
    harness: Harness, worker_program: Callable[[str], str], until: Callable[..., Any], tmp_path: Path
) -> None:
    marker = tmp_path / "profiling"
    body = PROFILE + f"        open({str(marker)!r}, 'w').close()\n        time.sleep(600)\n"
    attempt = harness.attempt(interpreter=worker_program(body))
    running = asyncio.create_task(attempt.execute())
    await until(marker.exists, "the worker profiles")
    await until(lambda: attempt._profiling, "the agent has heard of it")
    attempt.stop()
    result = await running
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert "the run was ended during it" in result.placement.evidence_reports[0].detail


@pytest.mark.parametrize("event", [{"event": "profiling"}, {"event": "profile", "placement": {}}])
async def test_profile_before_the_result_is_no_event(
    harness: Harness, worker_program: Callable[[str], str], event: dict[str, Any]
) -> None:
    result = await harness.execute(
        interpreter=worker_program(f"        say({event!r})\n        time.sleep(60)\n")
    )
    assert result.error.code == "protocol_error"


async def test_what_a_worker_starts_ends_with_it(
    harness: Harness, worker_program: Callable[[str], str], until: Callable[..., Any]
) -> None:
    body = """
        child = os.fork()
        if child == 0:
            time.sleep(600)
        print(child, flush=True)
        os._exit(3)
    """
    result = await harness.execute(interpreter=worker_program(body))
    assert result.error.code == "worker_exited"
    await until(lambda: gone(int(result.error.output_tail)), "the child's child is gone")


async def test_pipe_that_somebody_else_holds_does_not_hold_the_run(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    body = """
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.write(tell, b"x")
            time.sleep(600)
        os.read(ready, 1)
        print(child, flush=True)
        os._exit(3)
    """
    result = await harness.execute(interpreter=worker_program(body))
    escaped = int(result.error.output_tail)
    assert not gone(escaped), "it left the session, as the test wanted"
    os.kill(escaped, signal.SIGKILL)
    assert result.error.exit_code == 3


async def test_last_words_are_bounded_and_harmless_on_a_terminal(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    body = """
        sys.stdout.write("x" * 1_000_000 + "\\x1b[2Jgone\\rover\\t\\x1b[1;31mthe end\\x1b[m\\n")
        sys.stdout.flush()
        os._exit(3)
    """
    result = await harness.execute(interpreter=worker_program(body))
    tail = result.error.output_tail
    assert len(tail.encode()) <= worker.TAIL_LIMIT_BYTES + 16
    assert tail.endswith("\N{REPLACEMENT CHARACTER}[2Jgone\nover\tthe end\n")


async def test_worker_gets_its_own_surroundings(
    harness: Harness, worker_program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOARDBENCH_AGENT_LISTEN", "secret")
    body = """
        print(os.getcwd(), os.environ["TMPDIR"], os.environ["ORT_DISABLE_TELEMETRY"])
        print([name for name in os.environ if name.startswith("BOARDBENCH_AGENT_")])
        print(os.getsid(0) == os.getpid(), sorted(map(int, os.listdir("/proc/self/fd"))))
        sys.exit(3)
    """
    result = await harness.execute(interpreter=worker_program(body))
    scratch = harness.folder / "scratch"
    first, second, third = result.error.output_tail.splitlines()
    assert first == f"{scratch} {scratch} 1"
    assert second == "[]"
    # Besides 0, 1, 2 and the events there is the descriptor of the listing itself.
    assert third.startswith("True [0, 1, 2, ")
    assert third.count(",") == 4


async def test_worker_dies_with_its_agent(
    fake_model: Callable[..., Path], tmp_path: Path, until: Callable[..., Any]
) -> None:
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "boardbench.agent", "run", str(fake_model(create=[{"hang": True}])),
        "--data-dir", str(tmp_path / "data"), "--format", "jsonl", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert agent.stdout is not None
    while b"STAGE_CREATE" not in await agent.stdout.readline():
        assert agent.returncode is None
    (child,) = children(agent.pid)
    agent.kill()
    await agent.communicate()
    await until(lambda: gone(child), "the worker is gone")


async def test_crash_is_seen_without_a_pidfd(
    harness: Harness, fake_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no pidfd (other systems, old kernels, some emulators) a thread waits."""

    def refused(pid: int, flags: int = 0) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refused)
    result = await harness.execute(fake_model(create=[{"signal": "SIGSEGV"}]))
    assert result.error.signal == "SIGSEGV"


def test_every_code_is_listed() -> None:
    """No error leaves the agent under a code that the table does not have."""
    sources = [Path(run_module.__file__), Path(run_module.__file__).with_name("queue.py")]
    for source in sources:
        for line in source.read_text().splitlines():
            if 'code="' in line:
                code = line.split('code="')[1].split('"')[0]
                assert code in ERRORS, code


async def test_doubt_about_the_profile_is_heard_and_no_other(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    body = (
        PROFILE
        + """
        for code in ("late", "cost_uncertain", "high_variation"):
            say({"event": "warning", "warning": {"code": code, "severity": "SEVERITY_NOTE"}})
        say({"event": "profile", "placement": {"cpu_ops": 2}})
    """
    )
    result = await harness.execute(interpreter=worker_program(body))
    assert [warning.code for warning in result.warnings] == ["cost_uncertain"]


async def test_how_far_a_stage_came_is_told_in_the_end(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    """Of progress that comes too often only some is passed on, and always the last."""
    body = """
        for name in ("IMPORT", "CREATE", "INPUTS", "FIRST_INFERENCE", "WARM_UP", "MEASURE"):
            stage(name)
        for number in range(1, 31):
            say({"event": "progress", "progress": {"runs": number, "fraction": number / 30}})
        stage("REPORT")
        say({"event": "result", "result": RESULT})
    """
    await harness.execute(interpreter=worker_program(body))
    progress = [event for event in harness.events if isinstance(event, agent_pb2.ProgressEvent)]
    assert (progress[-1].runs, progress[-1].fraction) == (30, 1.0)
    assert progress[-1].stage == result_pb2.STAGE_MEASURE
    assert len(progress) < 30
