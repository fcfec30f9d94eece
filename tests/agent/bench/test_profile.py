"""The profiling pass as a process: what it adds to a result, and that nothing in it can harm one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.bench import cost, placement, profiling
from boardbench.agent.bench.events import to_json
from boardbench.agent.bench.runtime import Cause, NoProfile, Profile
from boardbench.agent.domain import Crossings, Evidence, OpPlacement, Placement, Unit, Verdict

FakeJob = Callable[..., dict[str, Any]]

OPS = [
    {"type": "CONV_2D", "unit": "UNIT_TPU"},
    {"type": "ADD", "unit": "UNIT_TPU"},
    {"type": "ARG_MAX", "unit": "UNIT_CPU"},
    {"type": "CAST", "unit": "UNIT_CPU"},
]


def job(fake_job: FakeJob, profile: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return fake_job(
        job={"device": "faketpu", "profile_runs": 10, **changes},
        ops=OPS,
        profile=profile,
        inference=[{"sleep_seconds": 0.001}],
    )


def reason(outcome: Any) -> str:
    (event,) = outcome.of("profile")
    (report,) = [r for r in event["placement"]["evidence_reports"] if r["evidence"] == "EVIDENCE_PROFILED"]
    assert report["verdict"] == "PLACEMENT_VERDICT_UNSPECIFIED"
    assert "fallback_cost" not in event["placement"]
    assert "seconds" not in str(event["placement"]["ops"])
    detail: str = report["detail"]
    assert detail.startswith("there is no profile: ")
    return detail


def test_the_profile_comes_after_the_result_and_adds_to_its_placement(worker: Any, fake_job: FakeJob) -> None:
    outcome = worker.run(job(fake_job, []))
    assert outcome.exit_code == 0
    told = [event["event"] for event in outcome.events if event["event"] != "warning"]
    assert told[-3:] == ["result", "profiling", "profile"]
    assert outcome.events[-1]["event"] == "profile"
    before, after = outcome.result["placement"], outcome.of("profile")[0]["placement"]
    assert [op["seconds"] for op in after["ops"]] == [0.001] * 4
    found = after["fallback_cost"]
    assert 0 < found["share_low"] <= found["share"] == 0.5 <= found["share_high"] <= 1
    assert found["method"].startswith("fake profiler, 10 inferences")
    # Everything else is as it was.
    for op in after["ops"]:
        del op["seconds"]
    profiled = after["evidence_reports"].pop()
    del after["fallback_cost"]
    assert after == before
    assert (profiled["evidence"], profiled["verdict"]) == ("EVIDENCE_PROFILED", "PLACEMENT_VERDICT_PARTLY")
    assert (profiled["accelerated_ops"], profiled["cpu_ops"]) == (2, 2)


def test_how_many_inferences_is_recorded(worker: Any, fake_job: FakeJob) -> None:
    assert worker.run(job(fake_job, [])).result["effective_spec"]["profile_runs"] == 10
    default = worker.run(job(fake_job, [], profile_runs=None))
    assert default.result["effective_spec"]["profile_runs"] == profiling.DEFAULT_RUNS
    assert "50 inferences" in default.of("profile")[0]["placement"]["fallback_cost"]["method"]


@pytest.mark.parametrize("content", [{"profile": []}, {}])
def test_there_is_none_when_nobody_wants_it_or_nothing_can_make_it(
    worker: Any, fake_job: FakeJob, content: dict[str, Any]
) -> None:
    runs = 0 if content else 10
    outcome = worker.run(fake_job(job={"profile_runs": runs}, ops=OPS, **content))
    assert [event["event"] for event in outcome.events[-1:]] == ["result"]
    assert outcome.result["effective_spec"]["profile_runs"] == 0


@pytest.mark.parametrize("fault", [{"signal": "SIGSEGV"}, {"signal": "SIGABRT"}, {"exit_code": 3}])
def test_a_way_that_ends_the_process_is_left_out_in_a_second_attempt(
    worker: Any, fake_job: FakeJob, fault: dict[str, Any]
) -> None:
    outcome = worker.run(job(fake_job, [fault]))
    assert outcome.exit_code == 0
    assert outcome.of("profile")[0]["placement"]["fallback_cost"]["share"] == 0.5


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"reject": "no such thing"}, "no such thing"),
        ({"raise": "a bug"}, "RuntimeError: a bug"),
        ({"memory_error": True}, "memory ran out"),
    ],
)
def test_a_failure_leaves_the_result_and_its_reason(
    worker: Any, fake_job: FakeJob, fault: dict[str, Any], said: str
) -> None:
    outcome = worker.run(job(fake_job, [fault]))
    assert outcome.exit_code == 0
    assert outcome.result["latency"]["count"] == 20
    assert said in reason(outcome)


def test_an_engine_that_does_not_close_loses_the_profile_and_not_the_result(
    worker: Any, fake_job: FakeJob
) -> None:
    made = fake_job(job={"profile_runs": 10}, ops=OPS, profile=[], close=[{"signal": "SIGKILL"}])
    outcome = worker.run(made)
    assert outcome.events[-1]["event"] == "result"
    assert outcome.exit_code == -9


def line(fake_job: FakeJob, profile: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {**job(fake_job, profile), "kind": "profile", **changes}


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOARDBENCH_FAKE_RUNTIME", "1")


@pytest.mark.usefixtures("fake_engine")
def test_a_process_that_hangs_is_ended(fake_job: FakeJob, tmp_path: Path) -> None:
    tried: list[str] = []
    mark = tmp_path / "model.fake"
    with pytest.raises(profiling._Died, match="took too long during actions and was ended"):
        profiling._in_child(line(fake_job, [{"hang": True}]), 5.0, tried, sys.executable)
    assert tried == ["actions"]
    assert not any(str(mark) in _command_line(pid) for pid in Path("/proc").glob("[0-9]*"))


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.usefixtures("fake_engine")
def test_hanging_uses_up_the_time_of_both_attempts(fake_job: FakeJob) -> None:
    began = time.monotonic()
    found = placement.known([], evidence=Evidence.PARTITION, detail="")
    told = profiling.profiled(
        line(fake_job, [{"hang": True}]),
        found,
        wanted="",
        runs=0,
        counted=cost.Counted([0]),
        create_seconds=(3.0 - profiling._START_SECONDS) / 4.0,  # 3 seconds in all
    )
    assert "took too long" in told.evidence_reports[-1].detail
    assert time.monotonic() - began < 60.0


def test_a_python_that_is_not_there_is_a_reason(fake_job: FakeJob) -> None:
    with pytest.raises(NoProfile, match="can't be started"):
        profiling._in_child(line(fake_job, []), 5.0, [], "/nowhere/python")


@pytest.mark.parametrize("program", ["print", "import os; os.write(int(sys.argv[-1]), b'garbage\\n')"])
def test_what_is_no_answer_is_a_reason(
    fake_job: FakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(f"import sys\nsys.stdin.readline()\n{program}\n")
    monkeypatch.setattr(profiling, "_WORKER", script)
    with pytest.raises((NoProfile, profiling._Died), match=r"exited with 0|answers what is no answer"):
        profiling._in_child(line(fake_job, []), 20.0, [], sys.executable)


def test_its_process_ends_with_the_worker(worker: Any, fake_job: FakeJob) -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("processes are looked up in /proc")
    child = worker.start(job(fake_job, [{"hang": True}]))
    child.wait_for(lambda events: any(event["event"] == "profiling" for event in events))
    path = Path(f"/proc/{child.process.pid}/task/{child.process.pid}/children")
    deadline = time.monotonic() + 60.0
    while not (children := path.read_text().split()):
        assert time.monotonic() < deadline
        os.sched_yield()
    child.process.kill()
    child.outcome()
    while _alive(int(children[0])):
        assert time.monotonic() < deadline
        os.sched_yield()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# Joining

COUNTED = cost.Counted([10_000_000] * 20)
"""They took as long as the profiled ones."""


def known(*units: Unit) -> Placement:
    ops = [
        OpPlacement(index=at, type=f"OP{at}", unit=unit, delegate="tpu.so") for at, unit in enumerate(units)
    ]
    return placement.known(ops, evidence=Evidence.PARTITION, detail="as loaded", wanted="tpu.so")


def profile_of(*units: Unit, **more: Any) -> Profile:
    return Profile(
        method="a profiler",
        detail="as seen",
        units=units,
        whole_seconds=(0.01,) * 10,
        fallback_seconds=(0.002,) * 10,
        op_seconds={0: 0.008},
        **more,
    )


def test_a_profile_of_other_places_is_told_and_its_times_are_not() -> None:
    profile = profile_of(Unit.TPU, Unit.CPU)
    found = profiling.merged(known(Unit.TPU, Unit.TPU), profile, wanted="tpu.so", counted=COUNTED)
    assert found.fallback_cost is None
    assert [op.seconds for op in found.ops] == [None, None]
    partition, profiled = found.evidence_reports
    assert (partition.evidence, partition.verdict) == (Evidence.PARTITION, Verdict.ACCELERATED)
    assert (profiled.evidence, profiled.verdict) == (Evidence.PROFILED, Verdict.UNSPECIFIED)
    assert "ran elsewhere" in profiled.detail


def test_causes_are_added_where_none_is_known() -> None:
    units = (Unit.TPU, Unit.CPU, Unit.CPU)
    before = known(*units)
    ops = (*before.ops[:2], OpPlacement(2, "OP2", unit=Unit.CPU, cause="known before"))
    causes = {1: Cause("refused", True, "replace it"), 2: Cause("overwritten")}
    placed = placement.known(ops, evidence=Evidence.PARTITION, detail="", wanted="tpu.so")
    profile = profile_of(*units, causes=causes)
    found = profiling.merged(placed, profile, wanted="tpu.so", counted=COUNTED)
    assert [(op.cause, op.root_cause) for op in found.ops] == [
        ("", None),
        ("refused", True),
        ("known before", None),
    ]
    assert found.fallback_cost is not None
    assert found.fallback_cost.share == pytest.approx(0.2)


def test_crossings_of_the_placement_stand_before_those_of_the_profile() -> None:
    profile = profile_of(Unit.TPU, crossings=Crossings(3, 7))
    found = profiling.merged(known(Unit.TPU), profile, wanted="tpu.so", counted=COUNTED)
    assert found.crossings == Crossings(3, 7)


def partly(**profile: Any) -> Placement:
    """Of two operations one fell back, and takes a fifth of the time."""
    ops = [OpPlacement(0, "OP0", unit=Unit.TPU, delegate="tpu.so"), OpPlacement(1, "OP1", unit=Unit.CPU)]
    placed = placement.known(ops, evidence=Evidence.PARTITION, detail="", wanted="tpu.so")
    found = profile_of(Unit.TPU, Unit.CPU, accelerator_apart=True, **profile)
    return profiling.merged(placed, found, wanted="tpu.so", counted=COUNTED)


DISTURBED = {"whole_queued_seconds": (0.001,) * 10, "fallback_queued_seconds": (0.0,) * 10}


def test_what_other_work_took_in_the_profile_is_no_cost() -> None:
    """Of ten milliseconds the accelerator took eight, and its result waited one for a processor."""
    alone, disturbed = partly(), partly(**DISTURBED)
    assert alone.fallback_cost is not None
    assert disturbed.fallback_cost is not None
    assert alone.fallback_cost.seconds == pytest.approx(0.002)
    # The counted ones took as long, so they waited as long.
    assert disturbed.fallback_cost.seconds == pytest.approx(0.002)
    assert disturbed.fallback_cost.seconds_high == pytest.approx(0.003)


def test_a_cost_that_says_little_is_doubted_with_its_bounds() -> None:
    certain = partly()
    assert list(profiling.doubts_of(certain)) == []
    assert list(profiling.doubts_of(known(Unit.TPU))) == []
    uncertain = partly(**DISTURBED)
    (doubt,) = profiling.doubts_of(uncertain)
    assert doubt.code == "cost_uncertain"
    assert doubt.message.startswith("fallback costs 20 % of the time, by its bounds 20 to 30 %: ")
    assert doubt.evidence == pytest.approx({"share": 0.2, "share_low": 0.2, "share_high": 0.3})


def test_a_profile_survives_the_way_between_the_processes() -> None:
    profile = profile_of(
        Unit.TPU,
        Unit.UNSPECIFIED,
        causes={1: Cause("why", False, "what to do")},
        crossings=Crossings(1),
        whole_queued_seconds=(0.001,) * 10,
        fallback_queued_seconds=(0.0005,) * 10,
        whole_cpu_seconds=(0.003,) * 10,
    )
    import json

    assert profiling._parsed(json.loads(json.dumps(to_json(profile)))) == profile


# How many


def turns(asked: int | None, seconds_each: float) -> int:
    now = 0.0
    count = 0

    def clock() -> float:
        return now

    for _ in profiling.turns(asked, clock):
        count += 1
        now += seconds_each
    return count


@pytest.mark.parametrize(
    ("asked", "seconds_each", "runs"),
    [
        (7, 1000.0, 7),
        (0, 0.0, 0),
        (None, 0.001, profiling.DEFAULT_RUNS),
        (None, 0.1, 30),  # three seconds
        (None, 1.0, profiling.LEAST_RUNS),
        (None, 5.0, 6),  # thirty seconds
        (None, 100.0, 1),
    ],
)
def test_what_was_asked_for_is_done_and_a_default_ends_in_time(
    asked: int | None, seconds_each: float, runs: int
) -> None:
    assert turns(asked, seconds_each) == runs


def test_a_model_that_takes_minutes_to_load_is_profiled_on_request_only() -> None:
    assert profiling.wanted_runs(None, profiles=True, create_seconds=100.0) == 0
    assert profiling.wanted_runs(5, profiles=True, create_seconds=100.0) == 5
    assert profiling.wanted_runs(5, profiles=False, create_seconds=0.0) == 0
