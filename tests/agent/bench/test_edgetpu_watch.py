"""What is read of an Edge TPU and how it is joined, without an interpreter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from boardbench.agent.bench import measure, placement
from boardbench.agent.bench.runtimes import edgetpu
from boardbench.agent.domain import Evidence, OpPlacement, Placement, Unit, Verdict

BOARDS = Path(__file__).resolve().parents[2] / "boards"
STICK = "sys/bus/usb/devices/2-1"


def _driver(*devices: str) -> edgetpu.Driver:
    return edgetpu.Driver(
        library="libedgetpu.so.1", version="", runtime_version=14, standin="", devices=devices
    )


def _placement(*units: Unit) -> Placement:
    ops = [OpPlacement(index=at, type="ADD", unit=unit) for at, unit in enumerate(units)]
    return placement.known(ops, evidence=Evidence.PARTITION, detail="as the test says")


def _watch(root: Path, *devices: str, option: str = "") -> edgetpu.EdgeTpuWatch:
    return edgetpu.EdgeTpuWatch(
        _driver(*devices),
        {"device": option} if option else {},
        Path("/nowhere/model.tflite"),
        took_nothing=False,
        sys_root=root,
    )


@pytest.mark.parametrize(
    ("tree", "kind", "path", "count", "celsius", "megabits"),
    [
        ("tpu_pcie", "pci", "/dev/apex_0", 4247, 46.3, None),
        ("tpu_usb3", "usb", "/sys/bus/usb/devices/2-1", 5310, None, 5000),
        ("tpu_usb2", "usb", "/sys/bus/usb/devices/1-1", 5310, None, 480),
        ("tpu_usb_fresh", "usb", "/sys/bus/usb/devices/1-1", 12, None, 480),
    ],
)
def test_a_tree_is_read(
    tree: str, kind: str, path: str, count: int, celsius: float | None, megabits: int | None
) -> None:
    [tpu] = edgetpu.find(BOARDS / tree)
    assert (tpu.kind, tpu.path, tpu.count()) == (kind, path, count)
    assert (tpu.temperature_celsius(), tpu.megabits_per_second()) == (celsius, megabits)
    assert tpu.throttling_celsius() == (84.8 if kind == "pci" else None)
    assert tpu.node == ("/dev/apex_0" if kind == "pci" else f"/dev/bus/usb/00{path[-3]}/007")


def test_there_is_none_where_there_is_none(tmp_path: Path) -> None:
    assert edgetpu.find(tmp_path) == ()
    assert edgetpu.find(BOARDS / "tpu_pcie_no_driver") == ()


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BOARDS / "tpu_usb3", tmp_path / "board", symlinks=True))


@pytest.mark.parametrize(
    ("moved", "evidence", "verdict"),
    [
        (0, Verdict.NOT_ACCELERATED, Verdict.CONTRADICTED),
        (9, Verdict.UNSPECIFIED, Verdict.ACCELERATED),
        (10, Verdict.ACCELERATED, Verdict.ACCELERATED),
        (400, Verdict.ACCELERATED, Verdict.ACCELERATED),
    ],
)
def test_counters_speak_by_how_far_they_moved(
    stick: Path, moved: int, evidence: Verdict, verdict: Verdict
) -> None:
    watch = _watch(stick)
    watch.begin()
    (stick / STICK / "urbnum").write_text(f"{5310 + moved}\n")
    watch.end()
    outcome = watch.outcome(
        _placement(Unit.TPU), runs=10, cpu_seconds=0.01, wall_seconds=1.0, queued_seconds=None
    )
    [report] = [r for r in outcome.placement.evidence_reports if r.evidence is Evidence.COUNTERS]
    assert (report.verdict, outcome.placement.verdict) == (evidence, verdict)
    assert f"went up by {moved} in 10 inferences" in report.detail
    assert [warning.code for warning in outcome.warnings] == ["placement_contradicted"] * (moved == 0)


@pytest.mark.parametrize(
    ("units", "cpu_seconds", "verdict"),
    [
        ((Unit.TPU,), 0.99, Verdict.CONTRADICTED),
        ((Unit.TPU,), 0.75, Verdict.ACCELERATED),
        ((Unit.TPU,), 0.10, Verdict.ACCELERATED),
        ((Unit.TPU, Unit.CPU), 0.99, Verdict.PARTLY),
        ((Unit.CPU,), 0.10, Verdict.NOT_ACCELERATED),
    ],
)
def test_processor_time_speaks_only_against_a_model_wholly_on_the_tpu(
    tmp_path: Path, units: tuple[Unit, ...], cpu_seconds: float, verdict: Verdict
) -> None:
    watch = _watch(tmp_path)
    watch.begin()
    watch.end()
    outcome = watch.outcome(
        _placement(*units), runs=10, cpu_seconds=cpu_seconds, wall_seconds=1.0, queued_seconds=None
    )
    assert outcome.placement.verdict is verdict


def test_counters_outweigh_processor_time(stick: Path) -> None:
    watch = _watch(stick)
    watch.begin()
    (stick / STICK / "urbnum").write_text("6000\n")
    watch.end()
    outcome = watch.outcome(
        _placement(Unit.TPU), runs=10, cpu_seconds=1.0, wall_seconds=1.0, queued_seconds=None
    )
    assert outcome.placement.verdict is Verdict.ACCELERATED


@pytest.mark.parametrize(
    ("cpu_seconds", "verdict"), [(0.29, Verdict.CONTRADICTED), (0.01, Verdict.ACCELERATED)]
)
def test_the_queue_for_a_processor_is_left_out(tmp_path: Path, cpu_seconds: float, verdict: Verdict) -> None:
    watch = _watch(tmp_path)
    outcome = watch.outcome(
        _placement(Unit.TPU), runs=10, cpu_seconds=cpu_seconds, wall_seconds=1.0, queued_seconds=0.7
    )
    assert outcome.placement.verdict is verdict
    [host] = [r for r in outcome.placement.evidence_reports if r.evidence is Evidence.HOST_CPU]
    assert " s of processor time in 1.000 s, 0.700 s of which were spent in the queue" in host.detail


def test_too_short_a_look_says_nothing(tmp_path: Path) -> None:
    watch = _watch(tmp_path)
    outcome = watch.outcome(
        _placement(Unit.TPU), runs=2, cpu_seconds=0.009, wall_seconds=0.3, queued_seconds=0.291
    )
    assert outcome.placement.verdict is Verdict.ACCELERATED
    assert [r.evidence for r in outcome.placement.evidence_reports] == [Evidence.PARTITION]


def _two(tmp_path: Path) -> Path:
    """A machine with both kinds."""
    root = Path(shutil.copytree(BOARDS / "tpu_usb3", tmp_path / "two", symlinks=True))
    shutil.copytree(BOARDS / "tpu_pcie", root, symlinks=True, dirs_exist_ok=True)
    return root


@pytest.mark.parametrize(
    ("option", "moves", "path"),
    [
        ("", True, "/sys/bus/usb/devices/2-1"),
        ("", False, ""),
        ("pci", False, "/dev/apex_0"),
        ("usb:0", False, "/sys/bus/usb/devices/2-1"),
    ],
)
def test_of_several_the_one_that_moved_or_was_meant_is_named(
    tmp_path: Path, option: str, moves: bool, path: str
) -> None:
    root = _two(tmp_path)
    watch = _watch(root, "/dev/apex_0", "/sys/bus/usb/devices/2-1", option=option)
    watch.begin()
    if moves:
        (root / STICK / "urbnum").write_text("9000\n")
    watch.end()
    outcome = watch.outcome(
        _placement(Unit.TPU), runs=1, cpu_seconds=0.0, wall_seconds=1.0, queued_seconds=None
    )
    assert outcome.accelerator.path == path


def test_a_file_that_can_t_be_read_leaves_the_static_evidence_out(tmp_path: Path) -> None:
    assert edgetpu.read_file(tmp_path / "none.tflite") is None
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"\x1c\0\0\0TFL3" + bytes(64))
    assert edgetpu.read_file(broken) is None
    (tmp_path / "empty.tflite").write_bytes(b"")
    assert edgetpu.read_file(tmp_path / "empty.tflite") is None


@pytest.mark.parametrize(
    ("name", "nodes", "left", "cached", "streamed", "version"),
    [
        ("mobilenet_v1_0.25_128_quant_edgetpu", 1, 0, 566912, 0, 12),
        ("keras_lstm_mnist_ptq_edgetpu", 1, 0, 43968, 576, 12),
        ("movenet_single_pose_lightning_ptq_edgetpu", 1, 59, 2862656, 2368, 12),
        ("split_concat_edgetpu", 1, 0, 192, 0, 13),
        ("mobilenet_v1_0.25_128_quant", 0, 31, None, None, None),
    ],
)
def test_a_file_says_what_the_compiler_did(
    shared_models: Path,
    name: str,
    nodes: int,
    left: int,
    cached: int | None,
    streamed: int | None,
    version: int | None,
) -> None:
    found = edgetpu.read_file(shared_models / f"{name}.tflite")
    assert found == edgetpu.CompiledFile(nodes, left, cached, streamed, version)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "Failed to prepare for TPU. Failed precondition: Package requires runtime version (14), which is "
            "newer than this runtime version (13).Node number 1 failed",
            "--min_runtime_version 13",
        ),
        ("Internal: Unsupported data type in custom op handler: 0", "belongs to this interpreter"),
        (
            "Attempting to use a delegate that only supports static-sized tensors with a graph",
            "fix the batch",
        ),
        ("something else", None),
    ],
)
def test_refusals_that_come_from_the_library_are_explained(said: str, words: str | None) -> None:
    explained = edgetpu.explain(said)
    assert explained is None if words is None else words in (explained or "")


def test_a_talkative_log_is_condensed_to_what_was_said() -> None:
    log = (
        "I driver/usb/local_usb_device.cc:184] ~LocalUsbDevice\n"
        "I driver/usb/usb_driver.cc:97] Opening device expecting application mode\n"
        "I driver/usb/usb_driver.cc:97] Opening device expecting application mode\n"
        "E driver/usb/usb_driver.cc:120] USB transfer error 2 [LibUsbDataOut]\n"
        "libusb: error [_get_usbfs_fd] libusb couldn't open USB device\n"
    )
    assert edgetpu._condensed(log) == (
        "Opening device expecting application mode; USB transfer error 2 [LibUsbDataOut]; "
        "libusb: error [_get_usbfs_fd] libusb couldn't open USB device"
    )
    assert edgetpu._condensed("") == ""


def test_the_library_can_be_named_by_the_environment() -> None:
    assert edgetpu.library_name({}).startswith("libedgetpu.")
    assert edgetpu.library_name({"BOARDBENCH_EDGETPU_LIBRARY": "/opt/x.so"}) == "/opt/x.so"


def test_what_is_captured_reaches_stderr_after_all(capfd: pytest.CaptureFixture[str]) -> None:
    with edgetpu._captured_stderr() as captured:
        os.write(2, b"from native code\n")
    assert captured == ["from native code\n"]
    assert capfd.readouterr().err == "from native code\n"


def test_the_queue_is_read_from_the_kernel_s_three_numbers(tmp_path: Path) -> None:
    schedstat = tmp_path / "schedstat"
    schedstat.write_text("1000 2700000000 9\n")
    assert measure.queued_seconds(schedstat) == 2.7
    schedstat.write_text("none\n")
    assert measure.queued_seconds(schedstat) is None
    assert measure.queued_seconds(tmp_path / "nowhere") is None
