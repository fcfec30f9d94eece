"""What GPUs and NPUs say of their work before and after a run, on trees whose counters move and don't."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from boardbench.agent.bench import gpu_counters, placement
from boardbench.agent.bench.gpu_counters import Busy, Meaning, busy
from boardbench.agent.bench.gpu_watch import GpuWatch
from boardbench.agent.bench.runtime import Outcome
from boardbench.agent.bench.runtimes import onnx
from boardbench.agent.domain import Evidence, EvidenceReport, OpPlacement, Placement, Unit, Verdict

BOARDS = Path(__file__).resolve().parents[2] / "boards"

I915 = """pos:\t0
flags:\t02100002
drm-driver:\ti915
drm-client-id:\t7
drm-pdev:\t0000:00:02.0
drm-engine-render:\t{render} ns
drm-engine-capacity-video:\t2
drm-engine-video:\t0 ns
drm-engine-compute:\t{compute} ns
"""
XE = """drm-driver:\txe
drm-client-id:\t3
drm-pdev:\t0000:03:00.0
drm-cycles-ccs:\t{cycles}
drm-total-cycles-ccs:\t{total}
"""


def copied(tree: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(BOARDS / tree, tmp_path / tree, symlinks=True))


def fdinfo(root: Path, content: str, descriptor: int = 9) -> None:
    folder = root / "proc/self/fdinfo"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(descriptor)).write_text(content)


def claim(unit: Unit = Unit.GPU, *others: Unit) -> Placement:
    ops = [OpPlacement(index=at, type="Conv", unit=each) for at, each in enumerate((unit, *others))]
    return placement.known(ops, evidence=Evidence.PARTITION, detail="as the provider says")


def outcome(
    watch: GpuWatch, change: Callable[[], object], cpu_seconds: float = 1.0, said: Placement | None = None
) -> Outcome:
    watch.begin()
    change()
    watch.end()
    return watch.outcome(
        said or claim(), runs=100, cpu_seconds=cpu_seconds, wall_seconds=1.0, queued_seconds=None
    )


def counters(found: Outcome) -> EvidenceReport | None:
    reports = [r for r in found.placement.evidence_reports if r.evidence is Evidence.COUNTERS]
    assert len(reports) <= 1
    return reports[0] if reports else None


# --- reading


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ("raspberry_pi_5", {("v3d", "gpu", Meaning.WORK)}),
        ("laptop_intel", {("intel_vpu", "npu", Meaning.WORK), ("i915", "gpu", Meaning.SLEEP)}),
        ("laptop_amd", {("amdgpu", "gpu", Meaning.LOAD)}),
        ("mini_pc_usb_meter", {("xe", "gpu", Meaning.SLEEP)}),
        ("rock_5b", {("rknpu", "npu", Meaning.LOAD), ("devfreq", "gpu", Meaning.LOAD)}),
        ("jetson_nano", {("tegra", "gpu", Meaning.LOAD)}),
        ("jetson_orin_nano", {("tegra", "gpu", Meaning.LOAD)}),
        ("kvm_guest", set()),
    ],
)
def test_a_board_says_what_it_has(tree: str, expected: set[tuple[str, str, Meaning]]) -> None:
    found = busy(BOARDS / tree)
    assert {(each.family, each.kind, each.meaning) for each in found} == expected
    assert len({each.name for each in found}) == len(found)
    for each in found:
        assert each.name.startswith("/sys/")
        assert each.place.startswith("/sys/") or each.family == "rknpu"


def test_queues_have_their_own_clock() -> None:
    found = {each.name: each for each in busy(BOARDS / "raspberry_pi_5")}
    render = found["/sys/class/drm/card0/device/gpu_stats render (ns)"]
    assert (render.value, render.of, render.seconds) == (27284814161, 239043069420, 1e-9)


def test_engines_of_this_process_are_counted_once_a_client(tmp_path: Path) -> None:
    fdinfo(tmp_path, I915.format(render=5, compute=7), 3)
    fdinfo(tmp_path, I915.format(render=5, compute=7), 4)  # the same client by another descriptor
    fdinfo(tmp_path, I915.format(render=100, compute=200).replace("client-id:\t7", "client-id:\t8"), 5)
    fdinfo(tmp_path, "pos:\t0\nflags:\t0100000\nmnt_id:\t9\n", 6)
    found = {each.name: each.value for each in busy(tmp_path)}
    assert found == {
        "/proc/self/fdinfo i915 0000:00:02.0 render (ns)": 105,
        "/proc/self/fdinfo i915 0000:00:02.0 compute (ns)": 207,
        "/proc/self/fdinfo i915 0000:00:02.0 video (ns)": 0,
    }
    assert all(each.own and each.complete for each in busy(tmp_path))


def test_cycles_have_the_clock_of_their_engine(tmp_path: Path) -> None:
    fdinfo(tmp_path, XE.format(cycles=30, total=400))
    [found] = busy(tmp_path)
    assert (found.value, found.of, found.seconds, found.family) == (30, 400, 0.0, "xe")
    # Another client of this process adds its work, and sees the same clock a moment later.
    fdinfo(tmp_path, XE.format(cycles=50, total=420).replace("client-id:\t3", "client-id:\t4"), 10)
    [found] = busy(tmp_path)
    assert (found.value, found.of) == (80, 420)


@pytest.mark.parametrize("content", ["", "hot", "-1", "9" * 400, "12.5", "\0\0", "inf", "1_0"])
@pytest.mark.parametrize("tree", sorted(path.name for path in BOARDS.iterdir() if path.is_dir()))
def test_whatever_is_in_the_files_it_never_raises(tree: str, content: str, tmp_path: Path) -> None:
    root = copied(tree, tmp_path)
    for path in root.rglob("*"):
        if path.is_file() and "sys" in path.relative_to(root).parts:
            path.write_text(content)
    fdinfo(root, content)
    for each in busy(root):
        assert isinstance(each, Busy)
        assert each.value >= 0


# --- moving and not


def pi(tmp_path: Path) -> tuple[Path, Callable[[int], Callable[[], object]]]:
    """The tree, and what makes its compute queue work for so many milliseconds of a second."""
    root = copied("raspberry_pi_5", tmp_path)
    stats = root / "sys/class/drm/card0/device/gpu_stats"
    line = "queue\ttimestamp\tjobs\truntime\ncsd\t{}\t1\t{}\n"
    stats.write_text(line.format(10**9, 5 * 10**8))

    def work(milliseconds: int) -> Callable[[], object]:
        return lambda: stats.write_text(line.format(2 * 10**9, 5 * 10**8 + milliseconds * 10**6))

    return root, work


@pytest.mark.parametrize(
    ("milliseconds", "cpu_seconds", "evidence", "verdict"),
    [
        (800, 1.0, Verdict.ACCELERATED, Verdict.ACCELERATED),
        (800, 0.1, Verdict.ACCELERATED, Verdict.ACCELERATED),
        (5, 1.0, Verdict.UNSPECIFIED, Verdict.ACCELERATED),
        (0, 1.0, Verdict.NOT_ACCELERATED, Verdict.CONTRADICTED),
        (0, 0.1, Verdict.NOT_ACCELERATED, Verdict.ACCELERATED),
    ],
)
def test_a_queue_that_stands_still_while_the_processor_is_busy_contradicts(
    tmp_path: Path, milliseconds: int, cpu_seconds: float, evidence: Verdict, verdict: Verdict
) -> None:
    root, work = pi(tmp_path)
    watch = GpuWatch("WebGpuExecutionProvider", Unit.GPU, sys_root=root)
    found = outcome(watch, work(milliseconds), cpu_seconds)
    report = counters(found)
    assert report is not None
    assert (report.verdict, found.placement.verdict) == (evidence, verdict)
    assert f"went up by {milliseconds * 10**6}, {milliseconds / 10:.1f}% of the time" in report.detail
    assert report.detail.endswith("in 100 inferences")
    [reading] = report.counters
    assert reading.after - reading.before == milliseconds * 10**6
    contradicted = verdict is Verdict.CONTRADICTED
    assert [warning.code for warning in found.warnings] == ["placement_contradicted"] * contradicted
    assert ("WebGpuExecutionProvider had nothing done" in found.placement.detail) == contradicted
    assert (found.accelerator.kind, found.accelerator.path) == ("gpu", "/sys/class/drm/card0")


def test_a_claim_that_nothing_is_accelerated_is_not_contradicted(tmp_path: Path) -> None:
    root, work = pi(tmp_path)
    watch = GpuWatch("WebGpuExecutionProvider", Unit.GPU, sys_root=root)
    assert outcome(watch, work(0), said=claim(Unit.CPU)).placement.verdict is Verdict.NOT_ACCELERATED


@pytest.mark.parametrize(
    ("compute", "evidence", "verdict"),
    [
        (1, Verdict.ACCELERATED, Verdict.ACCELERATED),
        (0, Verdict.NOT_ACCELERATED, Verdict.CONTRADICTED),
    ],
)
def test_engine_time_of_this_process_settles_it(
    tmp_path: Path, compute: int, evidence: Verdict, verdict: Verdict
) -> None:
    """Whatever a desktop does with the same GPU meanwhile."""
    root = copied("laptop_intel", tmp_path)
    fdinfo(root, I915.format(render=1000, compute=5))
    watch = GpuWatch("OpenVINOExecutionProvider", Unit.GPU, ("i915", "xe", "intel_vpu"), sys_root=root)
    found = outcome(watch, lambda: fdinfo(root, I915.format(render=1000, compute=5 + compute)))
    report = counters(found)
    assert report is not None
    assert (report.verdict, found.placement.verdict) == (evidence, verdict)
    assert all(reading.name.startswith("/proc/self/fdinfo i915") for reading in report.counters)


@pytest.mark.parametrize(("moved", "said"), [(0, None), (10**8, Verdict.ACCELERATED)])
def test_a_driver_that_work_goes_past_says_nothing_by_standing_still(
    tmp_path: Path, moved: int, said: Verdict | None
) -> None:
    """With amdgpu compute may go through queues of its own, which fdinfo does not count."""
    amdgpu = I915.replace("i915", "amdgpu")
    fdinfo(tmp_path, amdgpu.format(render=0, compute=0))
    watch = GpuWatch("MIGraphXExecutionProvider", Unit.GPU, ("amdgpu",), sys_root=tmp_path)
    found = outcome(watch, lambda: fdinfo(tmp_path, amdgpu.format(render=0, compute=moved)))
    report = counters(found)
    assert (report.verdict if report is not None else None) == said
    assert found.placement.verdict is Verdict.ACCELERATED
    assert not any(each.complete for each in busy(tmp_path))


def test_a_device_that_was_opened_meanwhile_began_at_nothing(tmp_path: Path) -> None:
    watch = GpuWatch("OpenVINOExecutionProvider", Unit.GPU, ("xe",), sys_root=tmp_path)
    report = counters(outcome(watch, lambda: fdinfo(tmp_path, XE.format(cycles=30, total=400))))
    assert report is not None
    assert report.verdict is Verdict.ACCELERATED
    assert [(each.before, each.after) for each in report.counters] == [(0, 30)]


@pytest.mark.parametrize(("slept", "evidence"), [(995, Verdict.NOT_ACCELERATED), (300, Verdict.UNSPECIFIED)])
def test_what_slept_did_not_work_and_what_was_awake_may_have(
    tmp_path: Path, slept: int, evidence: Verdict
) -> None:
    root = copied("mini_pc_usb_meter", tmp_path)
    residency = root / "sys/class/drm/card0/device/tile0/gt0/gtidle/idle_residency_ms"
    watch = GpuWatch("OpenVINOExecutionProvider", Unit.GPU, ("i915", "xe", "intel_vpu"), sys_root=root)
    report = counters(outcome(watch, lambda: residency.write_text(f"{9123441 + slept}\n")))
    assert report is not None
    assert report.verdict is evidence
    assert f"slept for {slept / 10:.1f}% of the time" in report.detail


def test_an_npu_is_not_asked_about_a_gpu(tmp_path: Path) -> None:
    root = copied("laptop_intel", tmp_path)
    npu = root / "sys/class/accel/accel0/device/npu_busy_time_us"
    families = ("i915", "xe", "intel_vpu")
    watch = GpuWatch("OpenVINOExecutionProvider", Unit.NPU, families, sys_root=root)
    found = outcome(watch, lambda: npu.write_text("6023900\n"), said=claim(Unit.NPU))
    report = counters(found)
    assert report is not None
    assert report.verdict is Verdict.ACCELERATED
    assert [each.name for each in report.counters] == ["/sys/class/accel/accel0/device/npu_busy_time_us"]
    assert (found.accelerator.kind, found.accelerator.path) == ("npu", "/sys/class/accel/accel0")
    still = GpuWatch("OpenVINOExecutionProvider", Unit.NPU, families, sys_root=root)
    assert outcome(still, lambda: None, said=claim(Unit.NPU)).placement.verdict is Verdict.CONTRADICTED


@pytest.mark.parametrize(
    ("before", "after", "cpu_seconds", "evidence", "verdict"),
    [
        (0, 640, 1.0, Verdict.ACCELERATED, Verdict.ACCELERATED),
        (700, 0, 1.0, Verdict.ACCELERATED, Verdict.ACCELERATED),
        (0, 30, 1.0, Verdict.UNSPECIFIED, Verdict.ACCELERATED),
        (0, 0, 1.0, Verdict.NOT_ACCELERATED, Verdict.CONTRADICTED),
        # Between two looks it may have worked: only against a busy processor it speaks.
        (0, 0, 0.1, Verdict.UNSPECIFIED, Verdict.ACCELERATED),
    ],
)
def test_a_load_of_the_moment_is_weak(
    tmp_path: Path, before: int, after: int, cpu_seconds: float, evidence: Verdict, verdict: Verdict
) -> None:
    root = copied("jetson_orin_nano", tmp_path)
    for load in (root / "sys").rglob("load"):
        load.write_text(f"{before}\n")
    watch = GpuWatch("CUDAExecutionProvider", Unit.GPU, ("nvidia", "tegra"), sys_root=root)
    found = outcome(
        watch, lambda: [load.write_text(f"{after}\n") for load in (root / "sys").rglob("load")], cpu_seconds
    )
    report = counters(found)
    assert report is not None
    assert (report.verdict, found.placement.verdict) == (evidence, verdict)
    assert report.counters == (), "it is no counter"
    assert "was at" in report.detail


def test_counters_of_another_gpu_say_nothing(tmp_path: Path) -> None:
    root, _ = pi(tmp_path)
    found = outcome(
        GpuWatch("CUDAExecutionProvider", Unit.GPU, ("nvidia", "tegra"), sys_root=root), lambda: None
    )
    assert counters(found) is None
    assert found.placement.verdict is Verdict.ACCELERATED


def test_a_driver_that_began_anew_says_nothing(tmp_path: Path) -> None:
    root, _ = pi(tmp_path)
    stats = root / "sys/class/drm/card0/device/gpu_stats"
    watch = GpuWatch("WebGpuExecutionProvider", Unit.GPU, sys_root=root)
    found = outcome(
        watch, lambda: stats.write_text("queue\ttimestamp\tjobs\truntime\ncsd\t3000000000\t0\t0\n")
    )
    assert counters(found) is None


def test_too_short_a_run_says_nothing(tmp_path: Path) -> None:
    root, work = pi(tmp_path)
    watch = GpuWatch("WebGpuExecutionProvider", Unit.GPU, sys_root=root)
    watch.begin()
    work(0)()
    watch.end()
    found = watch.outcome(claim(), runs=1, cpu_seconds=0.01, wall_seconds=0.01, queued_seconds=None)
    assert [report.evidence for report in found.placement.evidence_reports] == [Evidence.PARTITION]
    assert found.placement.verdict is Verdict.ACCELERATED


@pytest.mark.parametrize(
    ("cpu_seconds", "queued_seconds", "verdict", "words"),
    [
        (0.3, None, Verdict.ACCELERATED, "mostly waited for a device"),
        (0.75, None, Verdict.UNSPECIFIED, "which says nothing"),
        (0.99, None, Verdict.UNSPECIFIED, "or waited for a device in a loop"),
        (0.3, 0.68, Verdict.UNSPECIFIED, "0.680 s of which were spent in the queue"),
    ],
)
def test_a_busy_processor_alone_contradicts_no_gpu(
    tmp_path: Path, cpu_seconds: float, queued_seconds: float | None, verdict: Verdict, words: str
) -> None:
    watch = GpuWatch("CUDAExecutionProvider", Unit.GPU, ("nvidia",), sys_root=tmp_path)
    found = watch.outcome(
        claim(), runs=10, cpu_seconds=cpu_seconds, wall_seconds=1.0, queued_seconds=queued_seconds
    )
    [host] = [r for r in found.placement.evidence_reports if r.evidence is Evidence.HOST_CPU]
    assert host.verdict is verdict
    assert words in host.detail
    assert found.placement.verdict is Verdict.ACCELERATED


def test_it_doubts_nothing_before_the_run(tmp_path: Path) -> None:
    assert tuple(GpuWatch("X", Unit.GPU, sys_root=tmp_path).doubts()) == ()


# --- behind ONNX Runtime's providers


@pytest.mark.parametrize(
    ("provider", "options", "unit", "family"),
    [
        ("CUDAExecutionProvider", {}, Unit.GPU, "tegra"),
        ("TensorrtExecutionProvider", {}, Unit.GPU, "nvidia"),
        ("ROCMExecutionProvider", {}, Unit.GPU, "amdgpu"),
        ("OpenVINOExecutionProvider", {"device_type": "GPU"}, Unit.GPU, "xe"),
        ("OpenVINOExecutionProvider", {"device_type": "NPU"}, Unit.NPU, "intel_vpu"),
        ("OpenVINOExecutionProvider", {"device_type": "AUTO:GPU,CPU"}, Unit.DELEGATE, "i915"),
        ("QNNExecutionProvider", {"backend_type": "htp"}, Unit.NPU, "any"),
    ],
)
def test_a_provider_with_hardware_has_a_watch(
    provider: str, options: dict[str, str], unit: Unit, family: str
) -> None:
    watch = onnx.watch_of(provider, [(provider, options), (onnx.CPU, {})], Path("/nowhere"))
    assert watch is not None
    assert watch._unit is unit
    assert watch._may_be(family)
    assert watch._may_be("amdgpu") == (provider in ("ROCMExecutionProvider", "QNNExecutionProvider"))


@pytest.mark.parametrize(
    ("provider", "options"),
    [("OpenVINOExecutionProvider", {"device_type": "CPU"}), ("XnnpackExecutionProvider", {}), (onnx.CPU, {})],
)
def test_a_provider_on_the_processor_has_none(provider: str, options: dict[str, str]) -> None:
    assert onnx.watch_of(provider, [(provider, options)], Path("/nowhere")) is None


def test_every_driver_of_a_provider_is_one_that_is_read() -> None:
    source = Path(gpu_counters.__file__).read_text(encoding="utf-8")
    for drivers in onnx.DRIVERS.values():
        for driver in drivers:
            assert f'"{driver}"' in source, driver
