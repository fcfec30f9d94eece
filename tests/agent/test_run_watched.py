"""One run in one real child process, on the tree of a board that changes while it runs."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent import wire
from boardbench.agent.board.identify import identify
from boardbench.agent.config import AgentConfig, SensorsConfig, SpecConfig, ValidityConfig
from boardbench.agent.plan import Job, plan
from boardbench.agent.run import Attempt
from boardbench.v1 import agent_pb2, board_pb2, model_pb2, result_pb2, scenario_pb2

BOARDS = Path(__file__).parent.parent / "boards"
FIRMWARE = "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"
ZONE = "sys/class/thermal/thermal_zone0/temp"
GOVERNORS = "sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"

FAKE = board_pb2.RuntimeStatus(
    name="fake", available=True, version="boardbench-fake 1", formats=["fake"], devices=["cpu"]
)
MODEL = model_pb2.Model(sha256="0" * 64, name="m.fake", format="fake", size_bytes=1)
# What is counted is enough not to be doubted.
QUICK: dict[str, Any] = {
    "duration_seconds": 0.0,
    "min_runs": 40,
    "max_runs": 40,
    "warm_up_seconds": 0.0,
    "warm_up_runs": 1,
    "profile_runs": 0,
    # The tree has a rail.
    "idle_seconds": 0.0,
}


class Harness:
    """Makes attempts on a tree of the test's own; keeps what they said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        shutil.copytree(BOARDS / "raspberry_pi_5", self.root, symlinks=True)
        for path in self.root.glob(GOVERNORS):
            path.write_text("performance\n")
        self.events: list[wire.WorkerNews] = []
        self.on_stage: dict[str, Callable[[], None]] = {}
        self.on_progress: Callable[[agent_pb2.ProgressEvent], None] = lambda event: None
        self.settings: dict[str, Any] = {}

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def attempt(
        self, model: Path | None = None, interpreter: str = sys.executable, tuner: Any = None, **spec: Any
    ) -> Attempt:
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        config = AgentConfig(sys_root=self.root, data_dir=self.folder / "data", **self.settings)
        asked = result_pb2.BenchmarkSpec(**{**QUICK, **spec})
        job = Job(
            run_id="run",
            model=MODEL,
            model_path=model or self.folder / "none.fake",
            inputs_path=None,
            asked=asked,
            plan=plan(MODEL, asked, (FAKE,), SpecConfig()),
            created_at=wire.timestamp(time.time_ns()),
            board=identify(self.root, device_id="it", labels={}, architecture="aarch64"),
            interpreter=interpreter,
            scratch=scratch,
        )
        return Attempt(job, config, self._take, tuner=tuner)

    async def execute(self, *arguments: Any, **options: Any) -> result_pb2.RunResult:
        return await self.attempt(*arguments, **options).execute()

    def stages(self) -> list[str]:
        return [stage_of(event) for event in self.events if isinstance(event, agent_pb2.StageEvent)]

    def _take(self, event: wire.WorkerNews) -> None:
        self.events.append(event)
        if isinstance(event, agent_pb2.StageEvent) and stage_of(event) in self.on_stage:
            self.on_stage[stage_of(event)]()
        elif isinstance(event, agent_pb2.ProgressEvent):
            self.on_progress(event)


def stage_of(event: agent_pb2.StageEvent | agent_pb2.ProgressEvent) -> str:
    return result_pb2.Stage.Name(event.stage).removeprefix("STAGE_")


@pytest.fixture
def harness(tmp_path: Path, fake_engine: None) -> Harness:
    return Harness(tmp_path)


@pytest.fixture
def steady(fake_model: Callable[..., Path]) -> Path:
    """A model whose every inference takes as long as the last, long enough to be sampled."""
    return fake_model(inference=[{"sleep_seconds": 0.01}])


def of_board(result: result_pb2.RunResult) -> dict[str, int]:
    """The warnings about what surrounded it, with their severities; those about the figures left out."""
    around = (
        "throttled",
        "undervoltage",
        "throttled_before",
        "clock_moved",
        "not_cooled",
        "not_tuned",
        "governor",
    )
    return {each.code: each.severity for each in result.warnings if each.code in around}


def series(result: result_pb2.RunResult, quantity: str, source: str) -> list[float]:
    (found,) = (
        list(each.values)
        for each in result.telemetry.series
        if (each.quantity, each.source) == (quantity, source)
    )
    return found


# --- what is sampled


async def test_result_carries_what_the_sensors_said(harness: Harness, steady: Path) -> None:
    result = await harness.execute(steady)
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error.message
    assert series(result, "temperature_celsius", "cpu-thermal")[0] == 52.35
    assert series(result, "frequency_hertz", "cpu0")[0] == 1.5e9
    assert result.telemetry.rate_hertz == result.effective_spec.sample_hertz == SpecConfig().sample_hertz
    begin, end = result.telemetry.marks
    assert (begin.label, end.label) == ("measurement_begins", "measurement_ends")
    assert end.time_seconds - begin.time_seconds >= 40 * 0.01
    assert result.telemetry.HasField("cpu_share")
    environment = result.environment
    assert environment.throttling_readable
    assert environment.cpu_frequency_least_hertz == 1.5e9
    assert environment.HasField("clock_read_seconds"), "the worker's part is there too"
    assert environment.memory_available_before_bytes == 7340032 * 1024
    assert result.memory.available_drop_bytes == 0
    assert result.memory.phases, "the worker's part is there too"
    assert of_board(result) == {}


async def test_without_samples_there_is_no_telemetry(harness: Harness, steady: Path) -> None:
    result = await harness.execute(steady, sample_hertz=0.0)
    assert not result.HasField("telemetry")
    assert result.effective_spec.sample_hertz == 0
    assert result.environment.cpu_frequency_hertz == 1.5e9, "both ends are read all the same"


async def test_board_without_sensors_is_measured_too(harness: Harness, steady: Path) -> None:
    shutil.rmtree(harness.root / "sys")
    shutil.rmtree(harness.root / "usr")
    result = await harness.execute(steady)
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert result.environment.HasField("throttling_readable")
    assert not result.environment.throttling_readable
    assert not result.HasField("energy")


async def test_watching_that_fails_does_not_end_the_run(
    harness: Harness, steady: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("boardbench.agent.board.surroundings.Surroundings", broken)
    result = await harness.execute(steady)
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert "a fault of ours" in caplog.text


# --- the verdict


async def test_throttling_while_it_measures_makes_it_invalid(harness: Harness, steady: Path) -> None:
    harness.on_stage["MEASURE"] = lambda: harness.write(FIRMWARE, "40004\n")
    result = await harness.execute(steady)
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, "it is a result, and says what it is worth"
    assert of_board(result) == {"throttled": result_pb2.SEVERITY_INVALID}
    assert result.validity == result_pb2.VALIDITY_INVALID
    assert list(result.environment.throttled_during) == ["throttled"]
    told = [event for event in harness.events if isinstance(event, result_pb2.Warning)]
    assert "throttled" in [warning.code for warning in told]
    (warning,) = (warning for warning in result.warnings if warning.code == "throttled")
    assert (
        result.started_at.ToNanoseconds() < warning.time.ToNanoseconds() < result.finished_at.ToNanoseconds()
    )


async def test_undervoltage_while_the_model_is_loaded_does_not_count(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    harness.on_stage["CREATE"] = lambda: harness.write(FIRMWARE, "10001\n")
    harness.on_stage["WARM_UP"] = lambda: harness.write(FIRMWARE, "10000\n")
    model = fake_model(first_inference=[{"sleep_seconds": 0.3}], inference=[{"sleep_seconds": 0.05}])
    result = await harness.execute(model, warm_up_runs=8)
    assert of_board(result) == {"throttled_before": result_pb2.SEVERITY_NOTE}


async def test_severity_is_the_configurations(harness: Harness, steady: Path) -> None:
    harness.settings = {"validity": ValidityConfig(severity={"undervoltage": "note"})}
    harness.on_stage["MEASURE"] = lambda: harness.write(FIRMWARE, "1\n")
    result = await harness.execute(steady)
    assert of_board(result) == {"undervoltage": result_pb2.SEVERITY_NOTE}
    told = [event for event in harness.events if isinstance(event, result_pb2.Warning)]
    (event,) = (warning for warning in told if warning.code == "undervoltage")
    assert event.severity == result_pb2.SEVERITY_NOTE, "also while it is told"
    assert result.validity != result_pb2.VALIDITY_INVALID


async def test_worker_can_not_talk_the_agents_doubts_away(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    harness.on_stage["MEASURE"] = lambda: harness.write(FIRMWARE, "1\n")
    body = """
        for number in range(500):
            say({"event": "warning", "warning": {"code": "w", "severity": "SEVERITY_NOTE"}})
        for name in ("IMPORT", "CREATE", "INPUTS", "FIRST_INFERENCE", "WARM_UP", "MEASURE"):
            stage(name)
        time.sleep(0.3)
        stage("REPORT")
        say({"event": "result", "result": RESULT})
    """
    result = await harness.execute(interpreter=worker_program(body))
    assert of_board(result) == {"undervoltage": result_pb2.SEVERITY_INVALID}
    assert result.validity == result_pb2.VALIDITY_INVALID


async def test_few_samples_are_invalid_and_a_failed_run_has_no_verdict(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    result = await harness.execute(fake_model(), min_runs=3, max_runs=3)
    assert result.validity == result_pb2.VALIDITY_INVALID
    failed = await harness.execute(fake_model(create=[{"exit_code": 3}]))
    assert failed.status == result_pb2.RUN_STATUS_FAILED
    assert failed.validity == result_pb2.VALIDITY_UNSPECIFIED


async def test_windows_of_a_sustained_run_are_told_with_heat_and_clock(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    harness.on_stage["MEASURE"] = lambda: harness.write(ZONE, "70000\n")
    scenario = scenario_pb2.Scenario(kind=scenario_pb2.SCENARIO_KIND_SUSTAINED, window_seconds=0.5)
    result = await harness.execute(
        fake_model(inference=[{"sleep_seconds": 0.01}]),
        duration_seconds=1.5,
        max_runs=1000,
        scenario=scenario,
    )
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error.message
    last = result.scenario.windows[-1]
    assert last.temperature_celsius == pytest.approx(70)
    assert last.cpu_frequency_hertz == 1.5e9
    assert last.HasField("throttled")
    assert not last.throttled


# --- cooling down and idling


async def test_board_is_cooled_down_before_the_worker_starts(harness: Harness, steady: Path) -> None:
    harness.write(ZONE, "80000\n")
    seen: list[agent_pb2.ProgressEvent] = []

    def cools(event: agent_pb2.ProgressEvent) -> None:
        if stage_of(event) == "COOL_DOWN":
            seen.append(event)
            harness.write(ZONE, "60000\n" if len(seen) == 1 else "49000\n")

    harness.on_progress = cools
    result = await harness.execute(steady, cool_down_celsius=50.0, cool_down_seconds=600.0, idle_seconds=0.0)
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert harness.stages()[:2] == ["COOL_DOWN", "START"]
    assert [round(event.fraction, 3) for event in seen] == [0.0, 0.667]
    assert result.environment.temperature_before_celsius == 49
    assert result.effective_spec.cool_down_celsius == 50
    assert result.effective_spec.cool_down_seconds == 600
    assert of_board(result) == {}


async def test_board_that_does_not_cool_is_measured_with_a_warning(harness: Harness, steady: Path) -> None:
    result = await harness.execute(steady, cool_down_celsius=20.0, cool_down_seconds=0.1)
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert of_board(result) == {"not_cooled": result_pb2.SEVERITY_DOUBTFUL}
    (warning,) = (warning for warning in result.warnings if warning.code == "not_cooled")
    assert "52.4 °C, and was to be 20" in warning.message
    assert warning.evidence["wanted_celsius"] == 20
    assert result.validity == result_pb2.VALIDITY_DOUBTFUL


async def test_board_that_can_not_tell_its_heat_is_not_waited_for(harness: Harness, steady: Path) -> None:
    shutil.rmtree(harness.root / "sys/class/thermal")
    result = await harness.execute(steady, cool_down_celsius=20.0, cool_down_seconds=600.0)
    assert of_board(result) == {"not_cooled": result_pb2.SEVERITY_DOUBTFUL}
    (warning,) = (warning for warning in result.warnings if warning.code == "not_cooled")
    assert "nothing on this board tells" in warning.message


async def test_idle_board_is_measured_where_there_is_a_rail(harness: Harness, steady: Path) -> None:
    result = await harness.execute(steady, idle_seconds=0.2)
    assert harness.stages()[:2] == ["IDLE", "START"]
    assert result.effective_spec.idle_seconds == 0.2
    assert [mark.label for mark in result.telemetry.marks] == [
        "idle_begins",
        "idle_ends",
        "measurement_begins",
        "measurement_ends",
    ]
    assert series(result, "power_watts", "PMIC rails")[0] > 3


async def test_rail_makes_idling_the_default_and_without_one_there_is_none(
    harness: Harness, steady: Path
) -> None:
    harness.settings = {"spec": SpecConfig(idle_seconds=0.1)}
    result = await harness.execute(steady, idle_seconds=None)
    assert "IDLE" in harness.stages()
    assert result.effective_spec.idle_seconds == pytest.approx(0.1)
    harness.events.clear()
    harness.settings["sensors"] = SensorsConfig(without="raspberry_pi_pmic")
    result = await harness.execute(steady, idle_seconds=5.0)
    assert "IDLE" not in harness.stages()
    assert result.effective_spec.idle_seconds == 0
    (told,) = [warning for warning in result.warnings if warning.code == "idle_not_measured"]
    assert told.severity == result_pb2.SEVERITY_NOTE


@pytest.mark.parametrize("stage", ["COOL_DOWN", "IDLE"])
async def test_cancel_works_before_the_worker_is_there(harness: Harness, stage: str) -> None:
    attempt = harness.attempt(
        cool_down_celsius=20.0 if stage == "COOL_DOWN" else 90.0, cool_down_seconds=600.0, idle_seconds=600.0
    )
    reached = asyncio.Event()
    harness.on_stage[stage] = reached.set
    running = asyncio.create_task(attempt.execute())
    await reached.wait()
    attempt.stop()
    result = await running
    assert result.status == result_pb2.RUN_STATUS_CANCELLED
    assert not result.HasField("started_at"), "no worker was started"
    assert harness.stages()[-1] == stage


async def test_whole_runs_deadline_holds_while_the_board_cools(harness: Harness) -> None:
    result = await harness.execute(cool_down_celsius=20.0, cool_down_seconds=600.0, timeout_seconds=0.3)
    assert (result.error.code, result.error.stage) == ("deadline", result_pb2.STAGE_COOL_DOWN)
    assert "timeout_seconds" in result.error.message


async def test_stage_before_the_worker_is_none_of_the_workers(
    harness: Harness, worker_program: Callable[[str], str]
) -> None:
    program = worker_program('stage("IDLE")\ntime.sleep(600)')
    result = await harness.execute(interpreter=program)
    assert result.error.code == "protocol_error"


# --- set up for measuring


async def test_board_is_set_up_for_the_run_and_put_back(harness: Harness, steady: Path) -> None:
    (first, *_) = governors = sorted(harness.root.glob(GOVERNORS))
    for path in governors:
        path.write_text("ondemand\n")
        path.with_name("scaling_available_governors").write_text("ondemand performance\n")
    during: list[str] = []
    harness.on_stage["MEASURE"] = lambda: during.append(first.read_text().strip())
    result = await harness.execute(steady, tune=True)
    assert during == ["performance"]
    assert {path.read_text().strip() for path in governors} == {"ondemand"}
    assert any("ondemand → performance" in change for change in result.environment.tuned)
    assert result.environment.cpu_governor == "performance", "as it was while it was measured"
    assert result.effective_spec.tune
    assert "governor" not in of_board(result)


class Refusing:
    """A tuner that may set nothing, and put nothing back."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.held: list[str] = []

    def acquire(self, owner: str) -> list[str]:
        self.held.append(owner)
        self.failed = ["cpu0 governor: permission denied"]
        return []

    def release(self, owner: str) -> list[str]:
        self.held.remove(owner)
        return ["turbo: not put back, permission denied"]


async def test_what_could_not_be_set_or_put_back_is_noted(harness: Harness, steady: Path) -> None:
    tuner = Refusing()
    result = await harness.execute(steady, tuner=tuner, tune=True)
    told = [warning for warning in result.warnings if warning.code == "not_tuned"]
    assert [warning.severity for warning in told] == [result_pb2.SEVERITY_NOTE] * 2
    assert "cpu0 governor: permission denied" in told[0].message
    assert told[1].message.startswith("turbo: not put back, permission denied")
    assert tuner.held == []


async def test_board_is_put_back_though_the_worker_crashes(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    tuner = Refusing()
    result = await harness.execute(fake_model(create=[{"signal": "SIGSEGV"}]), tuner=tuner, tune=True)
    assert result.error.code == "worker_killed"
    assert tuner.held == []


# --- failures


async def test_out_of_memory_tells_how_memory_went(
    harness: Harness, worker_program: Callable[[str], str], until: Callable[..., Any], tmp_path: Path
) -> None:
    """The tree plays the kernel; the worker waits until each figure has been sampled."""
    mib = 1024
    harness.write("proc/vmstat", "oom_kill 3\n")
    harness.write("proc/meminfo", f"MemTotal: {1000 * mib} kB\nMemAvailable: {412 * mib} kB\n")
    end = tmp_path / "end"
    body = f"""
        stage("IMPORT")
        stage("CREATE")
        while not os.path.exists({str(end)!r}):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    """
    attempt = harness.attempt(interpreter=worker_program(body))
    running = asyncio.create_task(attempt.execute())

    def latest(quantity: str) -> float | None:
        around = attempt._surroundings
        values = around._sampler.latest(quantity).values() if around is not None else ()
        return next(iter(values), None)

    await until(lambda: attempt.stage == result_pb2.STAGE_CREATE, "the model is loaded")
    harness.write(f"proc/{attempt.pid}/status", f"VmRSS:\t {398 * mib} kB\nVmSwap:\t 0 kB\n")
    harness.write("proc/meminfo", f"MemTotal: {1000 * mib} kB\nMemAvailable: {9 * mib} kB\n")
    await until(lambda: latest("resident_bytes"), "the worker's memory is sampled")
    await until(lambda: latest("memory_available_bytes") == 9 * mib * 1024, "the board's memory is sampled")
    harness.write("proc/vmstat", "oom_kill 4\n")
    end.touch()
    result = await running
    assert result.error.code == "out_of_memory"
    assert "available fell from 412 to 9 MiB in " in result.error.message
    assert "; the worker held 398 MiB" in result.error.message
    assert series(result, "memory_available_bytes", "board")[-1] == 9 * mib * 1024
    assert result.memory.available_drop_bytes == 403 * mib * 1024
    assert result.environment.memory_available_least_bytes == 9 * mib * 1024


async def test_memory_that_the_engine_did_not_get_is_told_in_the_same_way(
    harness: Harness, fake_model: Callable[..., Path]
) -> None:
    result = await harness.execute(fake_model(create=[{"memory_error": True}]))
    assert result.error.code == "out_of_memory"
    assert "; 7168 MiB were available at all times" in result.error.message
    assert result.HasField("telemetry")


@pytest.mark.parametrize(("fault", "kept"), [({"exit_code": 3}, True), ({"reject": "not this one"}, False)])
async def test_failed_run_keeps_its_telemetry_where_it_says_something(
    harness: Harness, fake_model: Callable[..., Path], fault: dict[str, Any], kept: bool
) -> None:
    result = await harness.execute(fake_model(create=[fault]))
    assert result.status == result_pb2.RUN_STATUS_FAILED
    assert result.HasField("telemetry") == kept
    assert result.environment.HasField("load_average_after")
