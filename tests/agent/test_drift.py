"""Placement drift: what counts as one, what is kept across restarts and damage, and how a run tells it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boardbench.agent.drift import Placements
from boardbench.v1 import agent_pb2, agent_pb2_grpc, placement_pb2, result_pb2

CPU, DELEGATED, TPU, OTHER = (
    placement_pb2.UNIT_CPU,
    placement_pb2.UNIT_CPU_DELEGATE,
    placement_pb2.UNIT_TPU,
    placement_pb2.UNIT_DELEGATE,
)


def ran(*ops: tuple[str, str, int], run_id: str = "r1", version: str = "litert 2.3.0", **spec: Any) -> Any:
    """A finished run whose ops (type, name, unit) ran there."""
    result = result_pb2.RunResult(run_id=run_id, status=result_pb2.RUN_STATUS_SUCCEEDED)
    result.model.sha256 = "5ba0" * 16
    result.runtime.name, result.runtime.version, result.runtime.device = "tflite", version, "edgetpu"
    result.spec.MergeFrom(result_pb2.BenchmarkSpec(device="edgetpu", **spec))
    result.finished_at.FromJsonString("2026-11-22T14:00:58Z")
    placement = result.placement
    placement.evidence = placement_pb2.EVIDENCE_PARTITION
    units: dict[int, int] = {}
    for index, (kind, name, unit) in enumerate(ops):
        placement.ops.add(index=index, type=kind, name=name, unit=unit)
        units[unit] = units.get(unit, 0) + 1
    for unit, count in units.items():
        placement.units.add(unit=unit, ops=count)
    away = {CPU, DELEGATED} & set(units)
    placement.verdict = (
        placement_pb2.PLACEMENT_VERDICT_UNSPECIFIED
        if 0 in units
        else placement_pb2.PLACEMENT_VERDICT_ACCELERATED
        if not away
        else placement_pb2.PLACEMENT_VERDICT_NOT_ACCELERATED
        if set(units) <= away
        else placement_pb2.PLACEMENT_VERDICT_PARTLY
    )
    return result


BEFORE = (("CONV_2D", "conv1", TPU), ("ADD", "add", TPU), ("SOFTMAX", "prob", CPU))
AFTER = (("CONV_2D", "conv1", CPU), ("ADD", "add", CPU), ("SOFTMAX", "prob", DELEGATED))


@pytest.fixture
def placements(tmp_path: Path) -> Placements:
    return Placements(tmp_path / "placements")


def drift(first: Any, second: Any, placements: Placements) -> str:
    """What the second run says about the first; empty when nothing."""
    assert placements.compare(first) is None
    placements.remember(first)
    found = placements.compare(second)
    return "" if found is None else found.message


# What is a drift


def test_the_same_placement_is_none(placements: Placements) -> None:
    assert not drift(ran(*BEFORE), ran(*BEFORE, version="litert 9"), placements)


def test_moved_ops_are_named_with_from_where_to_where(placements: Placements) -> None:
    message = drift(ran(*BEFORE, run_id="first"), ran(*AFTER), placements)
    assert message == (
        "3 of 3 ops run elsewhere, 2 from the TPU to the CPU (CONV_2D conv1, ADD add); 1 from the CPU to a "
        "CPU delegate (SOFTMAX prob), than in run first of the same model with the same settings, which "
        "ended 2026-11-22 14:00 UTC (litert 2.3.0 both times): look what changed on the board in between"
    )


def test_the_version_is_no_part_of_the_key_and_is_told(placements: Placements) -> None:
    first, second = ran(*BEFORE, version="litert 2.2.0"), ran(*AFTER, version="litert 2.3.0")
    first.accelerator.library_version, second.accelerator.library_version = "libedgetpu 1", "libedgetpu 2"
    message = drift(first, second, placements)
    assert "litert 2.2.0, libedgetpu 1 then, litert 2.3.0, libedgetpu 2 now" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.spec.options.update(xnnpack="off"),
        lambda result: setattr(result.spec, "threads", 1),
        lambda result: setattr(result.spec, "device", "cpu"),
        lambda result: setattr(result.runtime, "name", "onnxruntime"),
        lambda result: setattr(result.model, "sha256", "0" * 64),
        lambda result: result.spec.shapes["x"].dimensions.append(2),
        lambda result: setattr(result.spec, "inputs_sha256", "1" * 64),
    ],
)
def test_what_was_asked_for_is_the_key(placements: Placements, change: Callable[[Any], None]) -> None:
    other = ran(*AFTER)
    change(other)
    assert not drift(ran(*BEFORE), other, placements)


def test_how_long_was_measured_is_not(placements: Placements) -> None:
    assert drift(ran(*BEFORE), ran(*AFTER, duration_seconds=9, profile_runs=0, seed=4), placements)


def test_a_device_that_was_replaced_by_the_cpu_is_a_drift(placements: Placements) -> None:
    second = ran(*[(kind, name, CPU) for kind, name, _ in BEFORE], allow_fallback=True)
    second.runtime.device = second.effective_spec.device = "cpu"
    assert "2 from the TPU to the CPU" in drift(ran(*BEFORE), second, placements)


@pytest.mark.parametrize(
    "change",
    [
        lambda result: setattr(result, "status", result_pb2.RUN_STATUS_FAILED),
        lambda result: setattr(result.placement, "evidence", placement_pb2.EVIDENCE_UNSPECIFIED),
        lambda result: setattr(result.placement, "evidence", placement_pb2.EVIDENCE_PREDICTION),
        lambda result: setattr(result.placement, "evidence", placement_pb2.EVIDENCE_STATIC),
        lambda result: setattr(result.placement, "verdict", placement_pb2.PLACEMENT_VERDICT_CONTRADICTED),
        lambda result: result.ClearField("placement"),
    ],
)
def test_what_is_not_known_is_neither_compared_nor_remembered(
    placements: Placements, change: Callable[[Any], None]
) -> None:
    unknown = ran(*AFTER)
    change(unknown)
    assert not drift(ran(*BEFORE), unknown, placements)
    placements.remember(unknown)
    assert placements.compare(ran(*BEFORE)) is None
    assert placements.compare(ran(*AFTER)) is not None


def test_an_op_of_no_known_unit_has_not_moved_and_is_remembered_where_it_was(placements: Placements) -> None:
    half = ran(("CONV_2D", "conv1", 0), *BEFORE[1:])
    assert not drift(ran(*BEFORE), half, placements)
    placements.remember(half)
    assert placements.compare(ran(*BEFORE)) is None
    moved = placements.compare(ran(("CONV_2D", "conv1", CPU), *BEFORE[1:]))
    assert moved is not None
    assert "1 from the TPU to the CPU (CONV_2D conv1)" in moved.message


def test_ops_that_an_engine_fuses_otherwise_are_no_drift_unless_the_verdict_is(
    placements: Placements,
) -> None:
    fused = ran(("FUSED_CONV_ADD", "conv1", TPU), ("SOFTMAX", "prob", CPU))
    assert not drift(ran(*BEFORE), fused, placements)
    gone = placements.compare(ran(("FUSED_ALL", "conv1", CPU)))
    assert gone is not None
    assert "1 on the CPU; before 2 on the TPU, 1 on the CPU" in gone.message


def test_without_a_list_of_ops_their_numbers_are_compared(placements: Placements) -> None:
    first, same, other = ran(*BEFORE), ran(*BEFORE), ran(*AFTER)
    for result in (first, same, other):
        del result.placement.ops[:]
    assert not drift(first, same, placements)
    found = placements.compare(other)
    assert found is not None
    assert "before 2 on the TPU, 1 on the CPU" in found.message


def test_foreign_delegates_are_told_apart_by_name(placements: Placements) -> None:
    results = []
    for delegate in ("VxDelegate", "EthosDelegate"):
        result = ran(("CONV_2D", "conv1", OTHER))
        result.placement.ops[0].delegate = delegate
        results.append(result)
    assert "from the delegate VxDelegate to the delegate EthosDelegate" in drift(*results, placements)


def test_ops_of_the_same_type_and_name_are_told_apart_by_their_order(placements: Placements) -> None:
    first = ran(("CONV_2D", "", TPU), ("CONV_2D", "", TPU), ("CONV_2D", "", CPU))
    second = ran(("CONV_2D", "", TPU), ("CONV_2D", "", CPU), ("CONV_2D", "", CPU))
    assert "1 of 3 ops run elsewhere, 1 from the TPU to the CPU (CONV_2D)" in drift(first, second, placements)


def test_the_message_stays_readable_however_much_moved(placements: Placements) -> None:
    names = [f"block{number}/" + "x" * 500 for number in range(3000)]
    message = drift(
        ran(*[("CONV_2D", name, TPU) for name in names]),
        ran(*[("CONV_2D", name, CPU) for name in names]),
        placements,
    )
    assert "3000 from the TPU to the CPU" in message
    assert "and 2994 more" in message
    assert len(message) < 1000


@given(st.lists(st.tuples(st.sampled_from("ABC"), st.sampled_from("xy"), st.sampled_from([1, 2, 4, 6]))))
def test_a_placement_has_never_drifted_from_itself(tmp_path_factory: Any, ops: list[Any]) -> None:
    placements = Placements(tmp_path_factory.mktemp("placements"))
    placements.remember(ran(*ops))
    assert placements.compare(ran(*ops)) is None


# What is kept


def test_it_outlives_the_process_and_is_compared_with_the_latest(tmp_path: Path) -> None:
    Placements(tmp_path / "p").remember(ran(*BEFORE))
    Placements(tmp_path / "p").remember(ran(*AFTER, run_id="second"))
    assert Placements(tmp_path / "p").compare(ran(*AFTER)) is None
    found = Placements(tmp_path / "p").compare(ran(*BEFORE))
    assert found is not None
    assert "run second" in found.message


@pytest.mark.parametrize("damage", [b"", b"\n", b"{}\nxx", b"[1]\n", b"\xff\xfe", b'{"run_id": "x"}\n'])
def test_what_is_damaged_is_forgotten(
    tmp_path: Path, damage: bytes, placements: Placements, caplog: pytest.LogCaptureFixture
) -> None:
    placements.remember(ran(*BEFORE))
    (file,) = (tmp_path / "placements").iterdir()
    file.write_bytes(damage)
    assert placements.compare(ran(*AFTER)) is None
    assert "not readable" in caplog.text
    placements.remember(ran(*AFTER))
    assert placements.compare(ran(*BEFORE)) is not None


def test_another_key_with_the_same_name_of_its_file_is_another(
    tmp_path: Path, placements: Placements
) -> None:
    placements.remember(ran(*BEFORE))
    (file,) = (tmp_path / "placements").iterdir()
    head, _, rest = file.read_bytes().partition(b"\n")
    about = json.loads(head)
    about["key"][3] = [["xnnpack", "off"]]
    file.write_bytes(json.dumps(about).encode() + b"\n" + rest)
    assert placements.compare(ran(*AFTER)) is None


def test_every_prefix_of_a_file_is_read_or_forgotten(tmp_path: Path, placements: Placements) -> None:
    placements.remember(ran(*BEFORE))
    (file,) = (tmp_path / "placements").iterdir()
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert placements.compare(ran(*AFTER)) is None
        assert not file.exists()


def test_the_longest_unused_make_room(tmp_path: Path) -> None:
    placements = Placements(tmp_path / "p", kept=3)
    results = []
    for number in range(5):
        result = ran(*BEFORE)
        result.model.sha256 = f"{number}" * 64
        results.append(result)
        placements.remember(result)
        newest = max((tmp_path / "p").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, ns=(number * 10**9, number * 10**9))
    (tmp_path / "p" / "torn.placement.tmp").write_bytes(b"x")
    placements.remember(results[4])
    assert len(list((tmp_path / "p").iterdir())) == 3
    known = [placements.compare(_moved(result)) is not None for result in results]
    assert known == [False, False, True, True, True]


def _moved(result: Any) -> Any:
    other = ran(*AFTER)
    other.model.sha256 = result.model.sha256
    return other


def test_bytes_are_bounded_too_and_a_giant_keeps_its_counts(tmp_path: Path) -> None:
    placements = Placements(tmp_path / "p", kept_bytes=5_000)
    for number in range(40):
        result = ran(*[("CONV_2D", os.urandom(16).hex(), TPU) for _ in range(20)])
        result.model.sha256 = f"{number:064d}"
        placements.remember(result)
    assert sum(path.stat().st_size for path in (tmp_path / "p").iterdir()) <= 5_000
    giant = ran(*[("CONV_2D", os.urandom(16).hex(), TPU) for _ in range(40_000)])
    placements.remember(giant)
    assert max(path.stat().st_size for path in (tmp_path / "p").iterdir()) < 5_000
    other = ran(*AFTER)
    other.model.sha256 = giant.model.sha256
    found = placements.compare(other)
    assert found is not None
    assert "before 40000 on the TPU" in found.message


def test_a_folder_that_can_not_be_written_costs_only_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    placements = Placements(tmp_path / "file")
    placements.remember(ran(*BEFORE))
    assert "can't be kept" in caplog.text
    assert placements.compare(ran(*AFTER)) is None


# Through an agent

QUICK = result_pb2.BenchmarkSpec(duration_seconds=0.0, min_runs=3)


class Agent:
    """An agent process whose one engine is a program: it places ops as a file says."""

    def __init__(self, folder: Path, interpreter: str) -> None:
        self.data_dir = folder / "data"
        port_file = folder / "port"
        port_file.unlink(missing_ok=True)
        self.log_path = folder / "log"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-W", "error", "-m", "boardbench.agent", "serve", "--listen",
                    "127.0.0.1:0", "--data-dir", str(self.data_dir), "--device-id", "it",
                    "--port-file", str(port_file), "--config", str(self._config(folder, interpreter)),
                ],
                stdout=log,
                stderr=log,
                env=os.environ | {"BOARDBENCH_FAKE_RUNTIME": "1"},
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not port_file.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log_path.read_text()
            time.sleep(0.02)
        address = f"127.0.0.1:{json.loads(port_file.read_text())['grpc']}"
        self.channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = agent_pb2_grpc.AgentServiceStub(self.channel)

    @staticmethod
    def _config(folder: Path, interpreter: str) -> Path:
        path = folder / "agent.toml"
        path.write_text(f'[store]\nfree_floor_bytes = 0\n[runtimes.fake]\npython = "{interpreter}"\n')
        return path

    def model(self) -> str:
        data = b"boardbench-fake/1\n{}"
        sha256 = hashlib.sha256(data).hexdigest()
        header = agent_pb2.PushHeader(sha256=sha256, name="m.fake", size_bytes=len(data))
        chunk = agent_pb2.PushChunk(data=data, crc32=zlib.crc32(data))
        requests = [agent_pb2.PushModelRequest(header=header), agent_pb2.PushModelRequest(chunk=chunk)]
        return str(list(self.stub.PushModel(iter(requests), timeout=60))[-1].done.model.sha256)

    def run(self, run_id: str = "") -> list[agent_pb2.RunEvent]:
        request = agent_pb2.RunBenchmarkRequest(model_sha256=self.model(), spec=QUICK, run_id=run_id)
        return [answer.event for answer in self.stub.RunBenchmark(request, timeout=60)]

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(60)
        self.channel.close()


@pytest.fixture
def start(tmp_path: Path, worker_program: Callable[[str], str]) -> Iterator[Callable[[], Agent]]:
    place = tmp_path / "place"
    place.write_text("UNIT_TPU")
    interpreter = worker_program(
        f"""
        if job["kind"] == "probe":
            status = {{"name": "fake", "available": True, "formats": ["fake"], "devices": ["cpu"]}}
            say({{"event": "probe", "runtimes": [status]}})
            sys.exit()
        unit = open({str(place)!r}).read()
        ops = [{{"index": 0, "type": "CONV_2D", "name": "conv1", "unit": unit}}]
        RESULT["placement"] = {{"evidence": "EVIDENCE_PARTITION", "ops": ops,
                               "units": [{{"unit": unit, "ops": 1}}]}}
        RESULT["runtime"] = {{"name": "fake", "version": "fake 1"}}
        say({{"event": "result", "result": RESULT}})
        """
    )
    started: list[Agent] = []

    def begin() -> Agent:
        started.append(Agent(tmp_path, interpreter))
        return started[-1]

    yield begin
    for agent in started:
        agent.process.kill()
        agent.process.wait()
        with contextlib.suppress(AttributeError):
            agent.channel.close()


def codes(events: list[agent_pb2.RunEvent]) -> tuple[list[str], list[str]]:
    """Codes of the warnings that were told while it ran, and of those in the result."""
    return (
        [event.warning.code for event in events if event.HasField("warning")],
        [warning.code for warning in events[-1].result.warnings],
    )


def test_a_run_that_is_placed_otherwise_says_so_after_kill_too(
    start: Callable[[], Agent], tmp_path: Path
) -> None:
    agent = start()
    assert "placement_drifted" not in codes(agent.run("first"))[1]
    assert "placement_drifted" not in codes(agent.run("second"))[1]
    agent.end(signal.SIGKILL)
    (tmp_path / "place").write_text("UNIT_CPU")
    agent = start()
    events = agent.run("third")
    told, kept = codes(events)
    assert "placement_drifted" in told, "it comes before the result"
    assert kept.count("placement_drifted") == 1
    (warning,) = (warning for warning in events[-1].result.warnings if warning.code == "placement_drifted")
    assert "1 from the TPU to the CPU (CONV_2D conv1), than in run" in warning.message
    assert "fake 1 both times" in warning.message
    assert "placement_drifted" not in codes(agent.run("fourth"))[1], "it is told once"
    agent.end(signal.SIGTERM)
    assert "Traceback" not in agent.log_path.read_text()


def test_the_warning_is_in_the_spool_with_the_result(start: Callable[[], Agent], tmp_path: Path) -> None:
    from boardbench.agent.spool import Spool

    agent = start()
    agent.run("first")
    (tmp_path / "place").write_text("UNIT_CPU")
    events = agent.run("second")
    agent.end(signal.SIGTERM)
    spool = Spool(agent.data_dir / "spool", 1 << 20, 1.0)
    try:
        record = spool.find("second")
        assert record is not None
        assert result_pb2.RunResult.FromString(record.payload) == events[-1].result
    finally:
        spool.close()


def test_compare_is_quick_for_the_largest_models(tmp_path: Path) -> None:
    """Off the event loop, but on the board's only core: seconds would be felt."""
    ops = [("CONV_2D", f"layer{number}/conv", TPU) for number in range(10_000)]
    placements = Placements(tmp_path / "p")

    async def both() -> None:
        await asyncio.to_thread(placements.remember, ran(*ops))
        assert await asyncio.to_thread(placements.compare, ran(*ops)) is None

    asyncio.run(asyncio.wait_for(both(), 30))
