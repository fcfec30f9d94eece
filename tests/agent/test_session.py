"""Runs of several processes and of groups: real workers of the fake engine, and programs in their place."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent import caches, wire
from boardbench.agent.board.identify import identify
from boardbench.agent.config import AgentConfig, DeadlinesConfig, StoreConfig
from boardbench.agent.plan import Job, plan
from boardbench.agent.session import ERRORS, Session, turns
from boardbench.v1 import agent_pb2, board_pb2, model_pb2, result_pb2, scenario_pb2

FAKE = board_pb2.RuntimeStatus(
    name="fake", available=True, version="boardbench-fake 1", formats=["fake"], devices=["cpu", "faketpu"]
)
INTERLEAVED = result_pb2.GROUP_MODE_INTERLEAVED
CONCURRENT = result_pb2.GROUP_MODE_CONCURRENT


def spec(**fields: Any) -> result_pb2.BenchmarkSpec:
    given = {"duration_seconds": 0.0, "min_runs": 30, "warm_up_seconds": 0.0, "warm_up_runs": 1} | fields
    return result_pb2.BenchmarkSpec(**given)


def group(mode: result_pb2.GroupMode.ValueType, **fields: Any) -> result_pb2.BenchmarkSpec:
    return spec(group=result_pb2.RunGroup(id="g", size=2, mode=mode), **fields)


NVPMODEL = """\
#!/bin/sh
# A stand-in of NVIDIA's, which keeps its status like this.
echo "set $2" >> {folder}/calls
[ "$2" = 2 ] && { echo "NVPM ERROR: not this one"; exit 1; }
echo "pmode:000$2" > {folder}/var/lib/nvpmodel/status
"""


def jetson(folder: Path) -> Path:
    """A board in mode 1 of three, the third of which can't be set."""
    modes = "".join(
        f"< POWER_MODEL ID={at} NAME={name} >\n" for at, name in enumerate(("MAXN", "15W", "BAD"))
    )
    for path, text in (
        ("etc/nvpmodel.conf", modes),
        ("var/lib/nvpmodel/status", "pmode:0001\n"),
        ("usr/sbin/nvpmodel", NVPMODEL.replace("{folder}", str(folder))),
    ):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    (folder / "usr/sbin/nvpmodel").chmod(0o755)
    return folder


class Harness:
    """Makes sessions; keeps what they said, by run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[tuple[str, wire.WorkerNews]] = []
        self.results: dict[str, result_pb2.RunResult] = {}
        self.order: list[str] = []
        self.on_event: Callable[[str, Any], None] = lambda run_id, event: None
        self.deadlines: dict[str, float] = {}
        self.jobs: list[Job] = []
        self.tuner: Any = None

    def add(
        self,
        run_id: str,
        model: Path | str,
        asked: result_pb2.BenchmarkSpec,
        interpreter: str = sys.executable,
    ) -> None:
        scratch = self.folder / "scratch" / run_id
        scratch.mkdir(parents=True)
        path = Path(model)
        name = model_pb2.Model(sha256="0" * 64, name=f"{run_id}.fake", format="fake", size_bytes=1)
        self.jobs.append(
            Job(
                run_id=run_id,
                model=name,
                model_path=path,
                inputs_path=None,
                asked=asked,
                plan=plan(name, asked, (FAKE,), self.config().spec),
                created_at=wire.timestamp(time.time_ns()),
                board=identify(Path("/"), device_id="it", labels={}),
                interpreter=interpreter,
                scratch=scratch,
            )
        )

    def config(self) -> AgentConfig:
        return AgentConfig(deadlines=DeadlinesConfig(**self.deadlines))

    def session(self) -> Session:
        return Session(self.jobs, self.config(), self._take, self._ended, self.tuner)

    async def execute(self) -> dict[str, result_pb2.RunResult]:
        await self.session().execute()
        return self.results

    def stages(self, run_id: str) -> list[str]:
        return [
            result_pb2.Stage.Name(event.stage).removeprefix("STAGE_")
            for each, event in self.events
            if each == run_id and isinstance(event, agent_pb2.StageEvent)
        ]

    def told(self, run_id: str) -> list[str]:
        return [
            event.code
            for each, event in self.events
            if each == run_id and isinstance(event, result_pb2.Warning)
        ]

    def left(self) -> list[Path]:
        """What is left in the scratch folders."""
        return [path for job in self.jobs for path in job.scratch.iterdir()]

    def _take(self, run_id: str, event: wire.WorkerNews) -> None:
        self.events.append((run_id, event))
        self.on_event(run_id, event)

    async def _ended(self, result: result_pb2.RunResult) -> None:
        assert result.run_id not in self.results, "a run ends once"
        self.results[result.run_id] = result
        self.order.append(result.run_id)


@pytest.fixture
def harness(tmp_path: Path, fake_engine: None) -> Harness:
    return Harness(tmp_path)


@pytest.fixture
def counting_program(tmp_path: Path, worker_program: Callable[[str], str]) -> Callable[[str], str]:
    """Like ``worker_program``; ``turn`` counts from 1 how often it was started, ``log(…)`` keeps a line."""

    def write(body: str) -> str:
        log = tmp_path / "log"
        return worker_program(
            f"""
        LOG = {str(log)!r}
        def log(*words):
            with open(LOG, "a") as file:
                file.write(" ".join(map(str, words)) + "\\n")
        STARTS = {str(tmp_path / "starts")!r} + os.path.basename(sys.argv[0])
        with open(STARTS, "a") as file:
            file.write("x")
        turn = os.path.getsize(STARTS)
        def result(samples, **more):
            count = len(samples)
            ordered = sorted(samples)
            latency = {{"count": count, "samples_nanoseconds": samples, "percentiles": [
                {{"percentile": 50, "seconds": ordered[(count - 1) // 2] / 1e9,
                 "low_seconds": ordered[0] / 1e9, "high_seconds": ordered[-1] / 1e9}}]}}
            say({{"event": "result", "result": {{"latency": latency, **more}}}})
        """
            + body
        )

    return write


def logged(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def error(result: result_pb2.RunResult) -> tuple[str, str]:
    assert result.status == result_pb2.RUN_STATUS_FAILED, result
    return result.error.code, result.error.message


def codes(result: result_pb2.RunResult) -> list[str]:
    return [warning.code for warning in result.warnings]


# --- one run


async def test_run_of_one_process_is_as_it_was(harness: Harness, fake_model: Callable[..., Path]) -> None:
    harness.add("a", fake_model(), spec())
    result = (await harness.execute())["a"]
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert not result.HasField("processes")
    assert (result.effective_spec.processes, result.effective_spec.min_runs) == (1, 30)
    assert harness.stages("a").count("START") == 1
    assert harness.left() == []


async def test_every_process_is_a_fresh_one_and_their_samples_are_one_result(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    starts: list[float] = []

    def note(_: str, event: Any) -> None:
        if isinstance(event, agent_pb2.StageEvent) and event.stage == result_pb2.STAGE_START:
            starts.append(time.time())

    harness.on_event = note
    model = fake_model(inference=[{"sleep_seconds": 0.001}], first_inference=[{"sleep_seconds": 0.01}])
    harness.add("a", model, spec(processes=3, duration_seconds=0.3, min_runs=32))
    result = (await harness.execute())["a"]
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert len(starts) == 3
    processes = result.processes.processes
    assert [process.count >= 10 for process in processes] == [True] * 3
    assert [process.first_inference_seconds > 0.01 for process in processes] == [True] * 3
    firsts = sorted(process.first_inference_seconds for process in processes)
    assert result.first_inference_seconds == firsts[1]
    began = [process.started_at.ToNanoseconds() for process in processes]
    assert sorted(set(began)) == began
    assert result.started_at == processes[0].started_at
    if result.processes.agree:
        assert sum(process.count for process in processes) == result.latency.count
        assert all(process.pooled for process in processes)
    assert len(result.latency.samples_nanoseconds) == result.latency.count
    assert result.processes.median_low_seconds <= result.processes.median_seconds
    assert result.warm_up.runs >= 3
    done = result.effective_spec
    assert (done.processes, done.min_runs, done.duration_seconds) == (3, 32, pytest.approx(0.3))
    assert result.environment.wall_seconds >= 0.3
    assert harness.left() == []


class NotedTuner:
    """A tuner that notes who has it; it can't put back what it set."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.holders: list[str] = []
        self.put_back = 0

    def acquire(self, owner: str) -> list[str]:
        self.holders.append(owner)
        return ["cpu0 governor: ondemand → performance"]

    def release(self, owner: str) -> list[str]:
        self.holders.remove(owner)
        if self.holders:
            return []
        self.put_back += 1
        return ["cpu0 governor: not put back, permission denied"]


async def test_board_is_set_up_once_for_all_processes(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    harness.tuner = tuner = NotedTuner()
    held: list[bool] = []

    def note(_: str, event: Any) -> None:
        if isinstance(event, agent_pb2.StageEvent) and event.stage == result_pb2.STAGE_START:
            held.append(bool(tuner.holders) and tuner.put_back == 0)

    harness.on_event = note
    harness.add("a", fake_model(), spec(processes=3, tune=True))
    result = (await harness.execute())["a"]
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert held == [True] * 3
    assert (tuner.put_back, tuner.holders) == (1, [])
    (told,) = [warning.message for warning in result.warnings if warning.code == "not_tuned"]
    assert told.startswith("cpu0 governor: not put back, permission denied")


async def test_board_is_put_back_when_the_first_process_fails(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    harness.tuner = tuner = NotedTuner()
    harness.add("a", fake_model(create=[{"signal": "SIGSEGV"}]), spec(processes=3, tune=True))
    result = (await harness.execute())["a"]
    assert result.error.code == "worker_killed"
    assert (tuner.put_back, tuner.holders) == (1, [])


async def test_watchers_see_one_run(harness: Harness, fake_model: Callable[..., Path]) -> None:
    """Stages come again with each process; how far it is goes on."""
    model = fake_model(inference=[{"sleep_seconds": 0.001}])
    harness.add("a", model, spec(processes=3, duration_seconds=0.9, min_runs=3))
    await harness.execute()
    one = harness.stages("a")[: len(harness.stages("a")) // 3]
    assert harness.stages("a") == one * 3
    assert one[0] == "START" and one[-1] == "REPORT"
    progress = [
        event
        for _, event in harness.events
        if isinstance(event, agent_pb2.ProgressEvent) and event.stage == result_pb2.STAGE_MEASURE
    ]
    for name in ("fraction", "runs", "elapsed_seconds"):
        values = [getattr(event, name) for event in progress]
        assert values == sorted(values), name
    assert progress[0].fraction < 1 / 3 + 1e-9
    assert progress[-1].fraction == pytest.approx(1.0)
    assert progress[-1].elapsed_seconds >= 0.9


async def test_process_that_fails_is_named_and_the_last(
    harness: Harness, counting_program: Callable[[str], str], tmp_path: Path
) -> None:
    program = counting_program("""
        log("start", turn)
        stage("IMPORT")
        if turn == 2:
            print("the end is near")
            sys.exit(7)
        result([1000000] * 9)
        """)
    harness.add("a", "none", spec(processes=4), program)
    result = (await harness.execute())["a"]
    code, message = error(result)
    assert code == "worker_exited"
    assert message.startswith("process 2 of 4: ")
    assert (result.error.exit_code, result.error.stage) == (7, result_pb2.STAGE_IMPORT)
    assert "the end is near" in result.error.output_tail
    assert not result.HasField("latency")
    assert result.started_at.ToNanoseconds() > 0
    assert logged(tmp_path) == ["start 1", "start 2"]


async def test_each_process_gets_its_share_and_one_what_is_done_once(
    harness: Harness, counting_program: Callable[[str], str], tmp_path: Path
) -> None:
    program = counting_program("""
        log(json.dumps([job["duration_seconds"], job["min_runs"], job["max_runs"], job.get("profile_runs")]))
        log(os.getcwd())
        result([1000000] * 9)
        """)
    harness.add("a", "none", spec(processes=2, duration_seconds=3, min_runs=5, max_runs=9), program)
    await harness.execute()
    first, folder, second, other = logged(tmp_path)
    assert (json.loads(first), json.loads(second)) == ([1.5, 3, 5, 0], [1.5, 2, 4, None])
    assert folder != other, "nothing of the first is there for the second"


async def test_cancel_in_the_middle(
    harness: Harness, counting_program: Callable[[str], str], tmp_path: Path
) -> None:
    program = counting_program("""
        log("start", turn)
        stage("IMPORT")
        if turn == 2:
            time.sleep(600)
        result([1000000] * 9)
        """)
    harness.add("a", "none", spec(processes=3), program)
    session = harness.session()

    def cancel(run_id: str, event: Any) -> None:
        if harness.stages("a").count("IMPORT") == 2:
            session.stop(run_id)

    harness.on_event = cancel
    await session.execute()
    result = harness.results["a"]
    assert result.status == result_pb2.RUN_STATUS_CANCELLED
    assert not result.HasField("error")
    assert logged(tmp_path) == ["start 1", "start 2"]


async def test_cancel_before_the_start_starts_nothing(harness: Harness) -> None:
    harness.add("a", "none", spec(processes=3), "/nowhere")
    session = harness.session()
    session.stop("a")
    await session.execute()
    assert harness.results["a"].status == result_pb2.RUN_STATUS_CANCELLED
    assert harness.events == []


async def test_time_is_that_of_all_processes(harness: Harness, fake_model: Callable[..., Path]) -> None:
    model = fake_model(create=[{"sleep_seconds": 1.0}])
    harness.add("a", model, spec(processes=20, timeout_seconds=5))
    began = time.monotonic()
    code, message = error((await harness.execute())["a"])
    assert code == "deadline"
    assert message.startswith("the whole run was not over after 5 s (timeout_seconds)")
    assert time.monotonic() - began >= 5
    assert 1 <= harness.stages("a").count("START") < 6


async def test_processes_that_disagree_are_not_pooled(
    harness: Harness, counting_program: Callable[[str], str]
) -> None:
    program = counting_program("""
        middle = {1: 1_000_000, 2: 1_200_000, 3: 1_050_000}[turn]
        result([middle + 100 * (n * 37 % 99) for n in range(99)], create_seconds=turn)
        """)
    harness.add("a", "none", spec(processes=3), program)
    result = (await harness.execute())["a"]
    processes = result.processes
    assert not processes.agree
    assert [process.pooled for process in processes.processes] == [False, False, True]
    assert result.latency.count == 99
    assert min(result.latency.samples_nanoseconds) == 1_050_000
    assert processes.median_seconds == pytest.approx(1.0549e-3)
    assert processes.spread_ratio == pytest.approx(0.095, abs=0.001)
    (median,) = (each for each in result.latency.percentiles if each.percentile == 50)
    # They hold for other processes, too.
    assert median.low_seconds <= processes.median_low_seconds < median.seconds
    assert median.high_seconds >= processes.median_high_seconds > median.seconds
    (warning,) = (each for each in result.warnings if each.code == "processes_disagree")
    assert warning.severity == result_pb2.SEVERITY_DOUBTFUL
    assert "1.005 to 1.205 ms" in warning.message and "process 3" in warning.message
    assert warning.evidence["processes"] == 3
    assert result.validity == result_pb2.VALIDITY_DOUBTFUL
    assert harness.told("a").count("processes_disagree") == 1
    assert result.create_seconds == 2


async def test_what_only_some_processes_doubt_names_them(
    harness: Harness, counting_program: Callable[[str], str]
) -> None:
    program = counting_program("""
        def warn(code, severity, message):
            say({"event": "warning", "warning": {"code": code, "message": message, "severity": severity}})
        warn("preempted", "SEVERITY_DOUBTFUL", "every time")
        if turn != 2:
            warn("high_variation", "SEVERITY_NOTE", f"in {turn}")
        warn("few_samples", "SEVERITY_INVALID", "only 15 were counted")
        result([1_000_000 + n for n in range(15)])
        """)
    harness.add("a", "none", spec(processes=3), program)
    result = (await harness.execute())["a"]
    told = {warning.code: warning for warning in result.warnings}
    assert told["preempted"].message == "every time"
    assert told["high_variation"].message == "processes 1, 3 of 3: in 1"
    assert "few_samples" not in told, "together they are enough"
    assert [list(process.warning_codes) for process in result.processes.processes] == [
        ["high_variation"], [], ["high_variation"]
    ]  # fmt: skip
    assert harness.told("a").count("preempted") == 1
    assert "few_samples" not in harness.told("a")


async def test_processes_that_are_placed_otherwise_are_told(
    harness: Harness, counting_program: Callable[[str], str]
) -> None:
    program = counting_program("""
        unit = "UNIT_TPU" if turn < 3 else "UNIT_CPU"
        placement = {"evidence": "EVIDENCE_PARTITION", "ops": [{"index": 0, "type": "CONV_2D", "unit": unit}]}
        result([1_000_000] * 40, placement=placement, output_sha256={"y": str(min(turn, 2))})
        """)
    harness.add("a", "none", spec(processes=3), program)
    told = {warning.code: warning for warning in (await harness.execute())["a"].warnings}
    assert "in process 3 of 3" in told["placement_differs"].message
    assert "CONV_2D" in told["placement_differs"].message
    assert told["placement_differs"].severity == result_pb2.SEVERITY_DOUBTFUL
    assert "process 2 of 3 computed other values of y" in told["outputs_differ"].message
    assert told["outputs_differ"].severity == result_pb2.SEVERITY_NOTE


async def test_precision_is_that_of_all_processes(
    harness: Harness, counting_program: Callable[[str], str]
) -> None:
    """Each is told a wider one, and what is said is what the pooled samples have."""
    program = counting_program("""
        log(job["precision"][0]["ratio"], job["precision_seconds"])
        spread = 400 if job["precision"][0]["percentile"] == 50 else 0
        samples = [1_000_000 + (n * 7919 % 1000) * spread for n in range(1000)]
        result(samples, stopping={"reason": "STOP_REASON_PRECISION"})
        """)
    asked = [result_pb2.Precision(percentile=50, ratio=0.03)]
    harness.add("a", "none", spec(processes=4, precision=asked, precision_seconds=8), program)
    result = (await harness.execute())["a"]
    assert result.stopping.reason == result_pb2.STOP_REASON_PRECISION
    (target,) = result.stopping.targets
    assert target.asked_ratio == 0.03
    assert 0 < target.reached_ratio <= 0.03
    assert "precision_not_reached" not in codes(result)
    assert list(result.effective_spec.precision) == asked
    assert result.effective_spec.precision_seconds == 8


async def test_precision_that_all_processes_together_do_not_have_is_told(
    harness: Harness, counting_program: Callable[[str], str]
) -> None:
    program = counting_program("""
        samples = [1_000_000 + (n * 7919 % 100) * 10_000 for n in range(100)]
        result(samples, stopping={"reason": "STOP_REASON_PRECISION" if turn == 1 else "STOP_REASON_DURATION"})
        """)
    asked = [result_pb2.Precision(percentile=50, ratio=0.01)]
    harness.add("a", "none", spec(processes=2, precision=asked), program)
    result = (await harness.execute())["a"]
    assert result.stopping.reason == result_pb2.STOP_REASON_DURATION
    assert result.stopping.targets[0].reached_ratio > 0.01
    (warning,) = (each for each in result.warnings if each.code == "precision_not_reached")
    assert "p50" in warning.message and "±1.00%" in warning.message


async def test_scenario_of_several_processes(
    harness: Harness, counting_program: Callable[[str], str]
) -> None:
    program = counting_program("""
        samples = [1_000_000 + 100 * (n * 37 % 99) for n in range(99)]
        service = {"count": 99, "samples_nanoseconds": [each // 2 for each in samples]}
        hertz = {1: 90.0, 2: 100.0, 3: 110.0}[turn]
        result(samples, scenario={"kind": "SCENARIO_KIND_PERIODIC", "throughput_hertz": hertz,
            "throughput_low_hertz": hertz - 1, "throughput_high_hertz": hertz + 1, "deadline_seconds": 0.01,
            "deadline_misses": turn, "most_waiting": 4 - turn, "worst_start_delay_seconds": turn / 1000,
            "service": service})
        """)
    rate = scenario_pb2.Scenario(kind=scenario_pb2.SCENARIO_KIND_PERIODIC, rate_hertz=100)
    harness.add("a", "none", spec(processes=3, scenario=rate), program)
    result = (await harness.execute())["a"]
    found = result.scenario
    assert (found.deadline_misses, found.most_waiting, found.worst_start_delay_seconds) == (6, 3, 0.003)
    # As many inferences in each, so that each counts by the time that it took.
    assert found.throughput_hertz == pytest.approx(3 / (1 / 90 + 1 / 100 + 1 / 110))
    assert found.throughput_low_hertz < 90 < 110 < found.throughput_high_hertz, "for other processes, too"
    assert (found.service.count, len(found.service.samples_nanoseconds)) == (297, 297)
    assert {each.percentile for each in found.service.percentiles} >= {50}
    assert result.effective_spec.scenario.deadline_seconds == pytest.approx(0.01)


# --- taking turns


def test_turns_are_balanced_and_the_same_for_one_seed() -> None:
    order = list(turns("ab", [6, 6], "g"))
    assert order == list(turns("ab", [6, 6], "g"))
    rounds = ["".join(order[at : at + 2]) for at in range(0, 12, 2)]
    assert all(sorted(each) == ["a", "b"] for each in rounds)
    assert all(one == other[::-1] for one, other in zip(rounds[::2], rounds[1::2], strict=True))
    places = Counter(name for at, name in enumerate(order) for _ in range(at))
    assert places["a"] == places["b"], "what changes steadily changes as much for both"
    seeds = {tuple(turns("abc", [4, 4, 4], str(seed))) for seed in range(20)}
    assert len(seeds) > 3
    assert Counter(turns("ab", [1, 3], "g")) == {"a": 1, "b": 3}


async def test_interleaved_runs_take_turns_and_are_compared(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    asked = group(INTERLEAVED, processes=6, duration_seconds=0.6, min_runs=6)
    harness.add("slow", fake_model(inference=[{"sleep_seconds": 0.006}]), asked)
    harness.add("fast", fake_model(inference=[{"sleep_seconds": 0.002}]), asked)
    results = await harness.execute()
    starts = [
        run_id
        for run_id, event in harness.events
        if isinstance(event, agent_pb2.StageEvent) and event.stage == result_pb2.STAGE_START
    ]
    assert [sorted(starts[at : at + 2]) for at in range(0, 12, 2)] == [["fast", "slow"]] * 6
    assert starts[:2] == starts[2:4][::-1]
    for run_id, other in (("slow", "fast"), ("fast", "slow")):
        result = results[run_id]
        assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error
        assert len(result.processes.processes) == 6
        assert result.effective_spec.group == asked.group
        (comparison,) = result.comparisons
        assert (comparison.run_id, comparison.model_name) == (other, f"{other}.fake")
        assert comparison.differs
        assert comparison.low_ratio < comparison.ratio < comparison.high_ratio
    assert results["slow"].comparisons[0].ratio == pytest.approx(1 / results["fast"].comparisons[0].ratio)
    assert results["slow"].comparisons[0].low_ratio > 1.5
    assert harness.left() == []


async def test_interleaved_run_that_fails_leaves_the_others(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    asked = group(INTERLEAVED, processes=3)
    harness.add("good", fake_model(), asked)
    harness.add("bad", fake_model(create=[{"signal": "SIGSEGV"}]), asked)
    results = await harness.execute()
    code, message = error(results["bad"])
    assert code == "worker_killed"
    assert message.startswith("process 1 of 3: ")
    assert results["good"].status == result_pb2.RUN_STATUS_SUCCEEDED
    assert len(results["good"].processes.processes) == 3
    assert not results["good"].comparisons
    assert harness.order == ["bad", "good"]


async def test_interleaved_run_is_cancelled_by_itself(
    harness: Harness, fake_model: Callable[..., Path], until: Callable[..., Any]
) -> None:
    """The one whose turn it is not: it ends at once, and the other goes on."""
    asked = group(INTERLEAVED, processes=3)
    names = list(turns(["a", "b"], [3, 3], "g"))
    now, later = names[0], names[1]
    harness.add("a", fake_model(), asked)
    harness.add("b", fake_model(), asked)
    session = harness.session()
    seen: list[str] = []

    def cancel(run_id: str, event: Any) -> None:
        if not seen:
            seen.append(run_id)
            assert session.run_id == now
            assert session.stage(now) == result_pb2.STAGE_START
            assert session.stage(later) == result_pb2.STAGE_UNSPECIFIED
            session.stop(later)

    harness.on_event = cancel
    await session.execute()
    assert harness.results[later].status == result_pb2.RUN_STATUS_CANCELLED
    assert harness.stages(later) == []
    assert harness.results[now].status == result_pb2.RUN_STATUS_SUCCEEDED
    assert harness.order == [later, now]


# --- at the same time

HELD = """
        assert job.get("hold") is job.get("until_told")
        name = job["model_path"].rpartition(".")[2]
        stage("IMPORT"); stage("WARM_UP")
        if not job.get("hold"):
            log("alone", name)
            stage("MEASURE")
            result([1_000_000 + n for n in range(50)], create_seconds=1.0)
            sys.exit()
        log("loads", name)
        say({"event": "ready"})
        assert sys.stdin.readline() == "go\\n"
        log("goes", name)
        stage("MEASURE")
        say({"event": "counted"})
        assert sys.stdin.readline() == "stop\\n"
        log("stops", name)
        stage("REPORT")
        result([2_000_000 + n for n in range(50)], create_seconds=9.0)
        """


async def test_all_are_let_go_when_all_are_ready_and_end_when_all_have_counted(
    harness: Harness, counting_program: Callable[[str], str], tmp_path: Path
) -> None:
    program = counting_program(HELD)
    asked = group(CONCURRENT)
    asked.group.size = 3
    for name in ("a", "b", "c"):
        harness.add(name, f"/stored.{name}", asked, program)
    results = await harness.execute()
    steps = [line.split()[0] for line in logged(tmp_path)]
    assert steps == ["alone"] * 3 + ["loads"] * 3 + ["goes"] * 3 + ["stops"] * 3
    assert logged(tmp_path)[:6] == ["alone a", "alone b", "alone c", "loads a", "loads b", "loads c"]
    for name, result in results.items():
        assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error
        interference = result.interference
        assert sorted(interference.run_ids) == sorted({"a", "b", "c"} - {name})
        assert interference.slowdown_ratio == pytest.approx(2, rel=1e-3)
        assert (
            interference.slowdown_low_ratio <= interference.slowdown_ratio <= interference.slowdown_high_ratio
        )
        assert interference.alone.count == 50
        assert result.latency.samples_nanoseconds[0] == 2_000_000
        assert result.create_seconds == 1.0, "loaded while nothing else ran"


async def test_doubts_about_what_the_others_do_are_no_doubts(
    harness: Harness, counting_program: Callable[[str], str]
) -> None:
    program = counting_program("""
        def warn(code, message):
            say({"event": "warning", "warning": {
                "code": code, "message": message, "severity": "SEVERITY_DOUBTFUL"}})
        stage("IMPORT"); stage("WARM_UP")
        if not job.get("hold"):
            warn("few_samples", "alone")
            warn("high_variation", "alone")
            warn("outputs_not_finite", "in both")
            stage("MEASURE")
            result([1_000_000 + n for n in range(50)])
            sys.exit()
        say({"event": "ready"})
        sys.stdin.readline()
        stage("MEASURE")
        say({"event": "counted"})
        sys.stdin.readline()
        warn("preempted", "together")
        warn("outputs_not_finite", "in both")
        result([2_000_000 + n for n in range(50)])
        """)
    for name in ("a", "b"):
        harness.add(name, f"/stored.{name}", group(CONCURRENT), program)
    result = (await harness.execute())["a"]
    told = {warning.code: warning for warning in result.warnings}
    assert told["preempted"].severity == result_pb2.SEVERITY_NOTE
    assert told["preempted"].message.startswith("the other runs of the group are in this: ")
    assert told["high_variation"].severity == result_pb2.SEVERITY_DOUBTFUL
    assert told["high_variation"].message == "while it was measured by itself: alone"
    assert [warning.code for warning in result.warnings].count("outputs_not_finite") == 1
    assert "few_samples" not in told, "its bounds say so"
    assert harness.told("a").count("high_variation") == 1


async def test_concurrent_runs_of_the_real_worker(harness: Harness, fake_model: Callable[..., Path]) -> None:
    asked = group(CONCURRENT, duration_seconds=0.6, min_runs=5)
    harness.add("a", fake_model(inference=[{"sleep_seconds": 0.002}]), asked)
    harness.add("b", fake_model(inference=[{"sleep_seconds": 0.02}]), asked)
    results = await harness.execute()
    for name, other in (("a", "b"), ("b", "a")):
        result = results[name]
        assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error
        assert list(result.interference.run_ids) == [other]
        interference = result.interference
        assert interference.slowdown_low_ratio <= interference.slowdown_ratio
        assert interference.slowdown_ratio <= interference.slowdown_high_ratio
        assert result.interference.alone.count >= 5
        assert result.latency.count >= 5
        assert result.effective_spec.duration_seconds == pytest.approx(0.6)
        assert harness.stages(name).count("MEASURE") == 2
    # The worker of the slow one was still under the load of the other when it counted its last.
    assert results["a"].environment.wall_seconds >= 0.6
    assert harness.left() == []


async def test_rounds_of_concurrent_runs(
    harness: Harness, counting_program: Callable[[str], str], tmp_path: Path
) -> None:
    program = counting_program(HELD)
    for name in ("a", "b"):
        harness.add(name, f"/stored.{name}", group(CONCURRENT, processes=2), program)
    results = await harness.execute()
    steps = [line.split()[0] for line in logged(tmp_path)]
    assert steps == (["alone"] * 2 + ["loads"] * 2 + ["goes"] * 2 + ["stops"] * 2) * 2
    assert [process.count for process in results["a"].processes.processes] == [50, 50]
    assert results["a"].interference.alone.count == 100


@pytest.mark.parametrize(
    ("step", "alone"),
    [("LOAD", False), ("LOAD", True), ("GO", False), ("COUNT", False)],
)
async def test_what_is_measured_at_the_same_time_ends_together(
    harness: Harness, counting_program: Callable[[str], str], tmp_path: Path, step: str, alone: bool
) -> None:
    program = counting_program(
        f"""
        STEP, ALONE = {step!r}, {alone!r}
        name = job["model_path"].rpartition(".")[2]
        def die(here):
            if name == "bad" and here == STEP and ALONE == ("hold" not in job):
                sys.exit(3)
        log(name, os.getpid())
        stage("IMPORT"); die("LOAD"); stage("WARM_UP")
        if "hold" in job:
            say({{"event": "ready"}})
            sys.stdin.readline()
            die("GO")
            stage("MEASURE")
            if name == "bad":
                say({{"event": "counted"}})
            sys.stdin.readline()
            die("COUNT")
        result([1_000_000 + n for n in range(50)])
        """.replace(
            'if name == "bad":\n                say',
            'if name == "bad" or STEP == "COUNT":\n                say',
        )
    )
    for name in ("good", "bad"):
        harness.add(name, f"/stored.{name}", group(CONCURRENT), program)
    results = await harness.execute()
    code, message = error(results["good"])
    assert code == "group_ended"
    assert "run bad (bad.fake)" in message and "failed" in message
    assert error(results["bad"])[0] == "worker_exited"
    for line in logged(tmp_path):
        assert gone(int(line.split()[1])), "nobody is left behind"
    assert harness.left() == []


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("stage", ["IMPORT", "MEASURE"])
async def test_cancel_of_one_ends_all_that_are_measured_at_the_same_time(
    harness: Harness, counting_program: Callable[[str], str], tmp_path: Path, stage: str
) -> None:
    program = counting_program("""
        log(os.getpid())
        stage("IMPORT"); stage("WARM_UP")
        if "hold" not in job:
            result([1_000_000 + n for n in range(50)])
            sys.exit()
        say({"event": "ready"})
        sys.stdin.readline()
        stage("MEASURE")
        time.sleep(600)
        """)
    for name in ("a", "b"):
        harness.add(name, f"/stored.{name}", group(CONCURRENT), program)
    session = harness.session()

    def cancel(_: str, event: Any) -> None:
        if isinstance(event, agent_pb2.StageEvent) and stage in harness.stages("b"):
            session.stop("a")

    harness.on_event = cancel
    await session.execute()
    assert harness.results["a"].status == result_pb2.RUN_STATUS_CANCELLED
    code, message = error(harness.results["b"])
    assert code == "group_ended"
    assert "run a (a.fake)" in message and "was cancelled" in message
    for line in logged(tmp_path):
        assert gone(int(line))


@pytest.mark.parametrize("mode", [INTERLEAVED, CONCURRENT])
async def test_stop_of_the_agent_ends_all_with_its_reason(
    harness: Harness, fake_model: Callable[..., Path], mode: result_pb2.GroupMode.ValueType
) -> None:
    for name in ("a", "b"):
        harness.add(name, fake_model(create=[{"hang": True}]), group(mode))
    session = harness.session()

    def stop(_: str, event: Any) -> None:
        if isinstance(event, agent_pb2.StageEvent) and event.stage == result_pb2.STAGE_CREATE:
            session.stop_all(lambda at: result_pb2.RunError(code="agent_stopped", message=str(at)))

    harness.on_event = stop
    await session.execute()
    ended = [error(harness.results[name]) for name in ("a", "b")]
    assert {code for code, _ in ended} == {"agent_stopped"}
    assert sorted(message for _, message in ended) == ["0", str(int(result_pb2.STAGE_CREATE))]


async def test_worker_that_does_not_wait_is_ended(
    harness: Harness, counting_program: Callable[[str], str]
) -> None:
    """What it measured was not beside the others."""
    program = counting_program("""
        stage("IMPORT"); stage("WARM_UP"); stage("MEASURE")
        result([1_000_000 + n for n in range(50)])
        """)
    for name in ("a", "b"):
        harness.add(name, f"/stored.{name}", group(CONCURRENT), program)
    results = await harness.execute()
    assert sorted(error(result)[0] for result in results.values()) == ["group_ended", "protocol_error"]


async def test_held_worker_is_not_bound_by_the_deadline_of_its_stage(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    """How long the others take to load is not its affair."""
    harness.deadlines = {"warm_up_seconds": 1.0, "start_seconds": 30.0}
    asked = group(CONCURRENT, duration_seconds=0.1)
    harness.add("quick", fake_model(), asked)
    harness.add("slow", fake_model(create=[{"sleep_seconds": 2.0}]), asked)
    results = await harness.execute()
    for result in results.values():
        assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error


async def test_session_that_is_given_up_leaves_no_worker(
    harness: Harness, counting_program: Callable[[str], str], tmp_path: Path, until: Callable[..., Any]
) -> None:
    program = counting_program("""
        stage("IMPORT"); stage("WARM_UP")
        if "hold" not in job:
            result([1_000_000 + n for n in range(50)])
            sys.exit()
        say({"event": "ready"})
        sys.stdin.readline()
        log(os.getpid())
        time.sleep(600)
        """)
    for name in ("a", "b"):
        harness.add(name, f"/stored.{name}", group(CONCURRENT), program)
    task = asyncio.create_task(harness.session().execute())
    await until(lambda: (tmp_path / "log").exists() and len(logged(tmp_path)) == 2, "both go")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for line in logged(tmp_path):
        assert gone(int(line))


def test_errors_are_told_with_their_meaning() -> None:
    assert all(meaning.endswith(".") for meaning in ERRORS.values())


async def test_a_run_has_the_power_mode_that_was_asked_for_and_the_board_its_own_again(
    harness: Harness, fake_model: Callable[..., Path], tmp_path: Path
) -> None:
    board = jetson(tmp_path / "board")
    config = AgentConfig(sys_root=board, data_dir=tmp_path / "data")
    harness.config = lambda: config  # type: ignore[method-assign]
    harness.add("a", fake_model(), spec(processes=2, power_mode="MAXN"))
    result = (await harness.execute())["a"]
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert result.environment.power_mode == "MAXN"
    assert result.effective_spec.power_mode == "MAXN"
    assert (board / "calls").read_text() == "set 0\nset 1\n", "once for all processes"
    assert (board / "var/lib/nvpmodel/status").read_text() == "pmode:0001\n"


async def test_a_power_mode_that_can_not_be_set_fails_the_run(
    harness: Harness, fake_model: Callable[..., Path], tmp_path: Path
) -> None:
    board = jetson(tmp_path / "board")
    config = AgentConfig(sys_root=board, data_dir=tmp_path / "data")
    harness.config = lambda: config  # type: ignore[method-assign]
    harness.add("a", fake_model(), spec(power_mode="BAD"))
    result = (await harness.execute())["a"]
    assert result.status == result_pb2.RUN_STATUS_FAILED
    assert result.error.code == "power_mode_not_set"
    assert "NVPM ERROR: not this one" in result.error.message
    assert not harness.left()


async def test_caches_of_a_run_are_told_and_bounded(
    harness: Harness, fake_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = AgentConfig(data_dir=tmp_path / "data", store=StoreConfig(cache_limit_bytes=100))
    harness.config = lambda: config  # type: ignore[method-assign]
    keep = result_pb2.CACHE_USE_KEEP
    harness.add("a", fake_model(), spec(processes=3, cache=keep))
    harness.add("b", fake_model(cache_bytes=200), spec(cache=keep, threads=2))
    first, second = (Session([job], config, harness._take, harness._ended) for job in harness.jobs)
    await first.execute()
    kept = harness.results["a"]
    assert kept.caches[0].warm, "that of the first process was found by the others"
    assert kept.create_seconds in [process.create_seconds for process in kept.processes.processes[1:]] or (
        kept.create_seconds
        == pytest.approx(sum(process.create_seconds for process in kept.processes.processes[1:]) / 2)
    )
    assert Path(kept.caches[0].path).is_relative_to(tmp_path / "data" / "caches" / "fake")
    await second.execute()
    assert "cache_not_kept" in [warning.code for warning in harness.results["b"].warnings]
    assert len(list(caches.root(tmp_path / "data").glob("fake/*"))) == 1, "that of the first is still there"
