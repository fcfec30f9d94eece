"""Utilisation that NVIDIA's driver keeps, through a stand-in for its library: what a watch makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from boardbench.agent.bench import placement
from boardbench.agent.bench.gpu_counters import Nvml, busy
from boardbench.agent.bench.gpu_watch import GpuWatch
from boardbench.agent.domain import Evidence, OpPlacement, Unit, Verdict


@pytest.fixture
def library(nvml_standin: Callable[..., Path]) -> str:
    return str(nvml_standin() / "libnvidia-ml.so.1")


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the samples that the driver keeps: (microseconds, percent)."""
    path = tmp_path / "samples"
    monkeypatch.setenv("NVML_STANDIN_SAMPLES", str(path))

    def write(*each: tuple[int, int]) -> None:
        path.write_text("".join(f"{micros} {percent}\n" for micros, percent in each))

    return write


def test_busy_time_is_added_up_from_the_first_look_on(library: str, samples: Callable[..., None]) -> None:
    old = [(1_000_000 + 100_000 * at, 99) for at in range(5)]
    samples(*old)
    nvml = Nvml.open(library)
    assert nvml is not None
    [first] = nvml.busy()
    assert (first.name, first.value, first.of) == ("NVML GPU 0 utilisation samples (us)", 0, 0)
    samples(*old, (1_500_000, 50), (1_600_000, 100), (1_700_000, 0))
    [second] = nvml.busy()
    assert (second.value, second.of) == (150_000, 300_000)
    [third] = nvml.busy()
    assert (third.value, third.of) == (150_000, 300_000), "nothing new"
    nvml.close()
    nvml.close()
    assert list(nvml.busy()) == []


def test_a_gap_is_not_work(library: str, samples: Callable[..., None]) -> None:
    samples((1_000_000, 10))
    nvml = Nvml.open(library)
    assert nvml is not None
    list(nvml.busy())
    samples((1_000_000, 10), (9_000_000, 100), (9_100_000, 100))
    [found] = nvml.busy()
    assert (found.value, found.of) == (100_000, 100_000)


def test_a_card_that_keeps_none_is_left_out(library: str, samples: Callable[..., None]) -> None:
    samples((1_000_000, 10))
    nvml = Nvml.open(library)
    assert nvml is not None
    assert [each.place for each in busy(Path("/nowhere"), nvml)] == ["NVML GPU 0"]


def test_no_library_is_quiet(tmp_path: Path) -> None:
    assert Nvml.open(str(tmp_path / "nowhere.so")) is None
    assert Nvml.open("libm.so.6") is None, "a library of another kind"


def test_no_driver_is_quiet(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STANDIN_INIT", "9")
    assert Nvml.open(library) is None


@pytest.mark.parametrize(
    ("percent", "evidence", "verdict"),
    [
        (85, Verdict.ACCELERATED, Verdict.ACCELERATED),
        (1, Verdict.UNSPECIFIED, Verdict.ACCELERATED),
        (0, Verdict.NOT_ACCELERATED, Verdict.CONTRADICTED),
    ],
)
def test_a_card_that_had_nothing_to_do_contradicts(
    library: str, samples: Callable[..., None], percent: int, evidence: Verdict, verdict: Verdict
) -> None:
    """CUDA keeps the processor busy also while the GPU works: only the card tells them apart."""
    watch = GpuWatch("CUDAExecutionProvider", Unit.GPU, ("nvidia",), nvml_library=library)
    samples((1_000_000, 50))
    watch.begin()
    samples((1_000_000, 50), *((1_000_000 + 166_667 * at, percent) for at in range(1, 7)))
    watch.end()
    ops = [OpPlacement(index=0, type="Conv", unit=Unit.GPU)]
    found = watch.outcome(
        placement.known(ops, evidence=Evidence.PARTITION, detail="as the provider says"),
        runs=100, cpu_seconds=1.0, wall_seconds=1.0, queued_seconds=None,
    )  # fmt: skip
    [report] = [r for r in found.placement.evidence_reports if r.evidence is Evidence.COUNTERS]
    assert (report.verdict, found.placement.verdict) == (evidence, verdict)
    assert f"{percent:.1f}% of the time" in report.detail
    assert found.accelerator.path == "NVML GPU 0"


def test_a_run_that_no_sample_covers_says_nothing(library: str, samples: Callable[..., None]) -> None:
    watch = GpuWatch("CUDAExecutionProvider", Unit.GPU, ("nvidia",), nvml_library=library)
    samples((1_000_000, 50))
    watch.begin()
    watch.end()
    ops = [OpPlacement(index=0, type="Conv", unit=Unit.GPU)]
    found = watch.outcome(
        placement.known(ops, evidence=Evidence.PARTITION, detail=""),
        runs=1, cpu_seconds=0.1, wall_seconds=0.1, queued_seconds=None,
    )  # fmt: skip
    assert Evidence.COUNTERS not in [report.evidence for report in found.placement.evidence_reports]
