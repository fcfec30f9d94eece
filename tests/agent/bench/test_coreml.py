"""Core ML, through a fake of coremltools as it is on macOS: see tests/coreml. No Mac has run this."""

from __future__ import annotations

import io
import os
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import runtimes
from boardbench.agent.bench.runtime import ModelRejected, OptionRejected, RuntimeUnavailable
from boardbench.agent.bench.runtimes import coreml
from boardbench.agent.domain import Evidence, Severity, Unit, Verdict

from . import models, standins

FEED = np.array([[-2.0, -1.0, 0.5, 3.0]], np.float32)
FILES = standins.TESTS / "inspect" / "files"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    standins.coremltools(monkeypatch)
    opened = []

    def begin(content: bytes | None = None, **changes: Any) -> Any:
        path = tmp_path / "pushed"
        path.write_bytes(models.coreml_affine() if content is None else content)
        arguments = {"device": "cpu", "threads": None, "options": {}, "shapes": {}, **changes}
        opened.append(coreml.CoreMlRuntime().load(path, **arguments))
        return opened[-1]

    yield begin
    for model in opened:
        model.close()


def small() -> bytes:
    """conv, relu, reshape, linear, softmax: a real file of coremltools."""
    return models.zipped(FILES / "small.mlpackage")


@pytest.mark.skipif(sys.platform == "darwin", reason="here it may well be available")
def test_elsewhere_than_on_macos_it_says_so() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"Core ML needs macOS, and this is .*`boardbench inspect`"):
        runtimes.create("coreml").version()


def test_a_wheel_that_is_not_for_macos_does_not_run_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "coremltools").mkdir()
    (tmp_path / "coremltools" / "__init__.py").write_text("__version__ = '9.0'\n")
    standins.coremltools(monkeypatch)
    monkeypatch.syspath_prepend(os.fspath(tmp_path))
    with pytest.raises(RuntimeUnavailable, match="Core ML needs macOS"):
        coreml.CoreMlRuntime().version()


def test_a_broken_installation_says_what_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "coremltools").mkdir()
    (tmp_path / "coremltools" / "__init__.py").write_text("raise OSError('no symbol')\n")
    standins.coremltools(monkeypatch)
    monkeypatch.syspath_prepend(os.fspath(tmp_path))
    with pytest.raises(RuntimeUnavailable, match=r"is broken \(OSError: no symbol\)"):
        coreml.CoreMlRuntime().version()


@pytest.mark.parametrize(
    ("names", "devices"),
    [("cpu,gpu,npu", ("cpu", "gpu", "npu", "all")), ("cpu", ("cpu", "all"))],
)
def test_devices_are_those_of_the_mac(
    load: Any, monkeypatch: pytest.MonkeyPatch, names: str, devices: tuple[str, ...]
) -> None:
    monkeypatch.setenv("STANDIN_COREML_DEVICES", names)
    assert coreml.CoreMlRuntime().devices() == devices


def test_a_device_that_the_mac_lacks_can_be_allowed(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_COREML_DEVICES", "cpu")
    with pytest.raises(OptionRejected, match="no device 'npu'; it has cpu, all"):
        load(device="npu")
    model = load(device="npu", allow_fallback=True)
    assert model.device_fallback == "all runs on the CPU: this Mac has no neural engine"
    assert model.placement().verdict is Verdict.NOT_ACCELERATED


def repacked(**changes: Any) -> bytes:
    """The small model in an archive with one more file."""
    packed = io.BytesIO(models.coreml_affine())
    with zipfile.ZipFile(packed, "a") as archive:
        entry = zipfile.ZipInfo(changes["name"])
        entry.external_attr = changes.get("mode", 0) << 16
        archive.writestr(entry, b"/etc/passwd")
    return packed.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../outside"},
        {"name": "Data/../../outside"},
        {"name": "/outside"},
        {"name": "Data\\..\\outside"},
        {"name": "C:outside"},
        {"name": "Data/link", "mode": stat.S_IFLNK | 0o777},
    ],
    ids=lambda changes: changes["name"],
)
def test_nothing_of_an_archive_gets_outside(load: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelRejected, match=r"has no place in an \.mlpackage"):
        load(repacked(**changes))
    assert not [path for path in tmp_path.rglob("*") if path.name == "outside"]


def test_an_archive_may_be_of_the_folder_or_of_what_is_in_it(load: Any) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        folder = standins.TESTS / "coreml" / "affine.mlpackage"
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    for content in (packed.getvalue(), models.coreml_affine()):
        model = load(content)
        returned = model.bind({"x": FEED})()
        assert np.array_equal(model.fetch(returned)["y"], np.maximum(FEED, 0) + FEED)
        model.close()


def test_a_folder_is_taken_as_it_is(load: Any) -> None:
    model = coreml.CoreMlRuntime().load(
        FILES / "small.mlpackage", device="cpu", threads=None, options={}, shapes={}
    )
    assert [tensor.shape for tensor in model.inputs] == [(1, 3, 16, 16)]
    model.close()


def test_an_archive_of_more_than_there_is_room_for_is_refused(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = coreml.shutil.disk_usage("/")
    monkeypatch.setattr(coreml.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(ModelRejected, match=r"unpacks to \d+ bytes, and 1000 are free"):
        load()


def test_what_was_unpacked_is_gone_when_it_is_closed(load: Any) -> None:
    model = load()
    folder = Path(model._folder.name)
    assert folder.is_dir()
    model.close()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("device", "units", "verdict"),
    [
        ("cpu", [Unit.CPU] * 5, Verdict.NOT_ACCELERATED),
        ("gpu", [Unit.GPU] * 5, Verdict.ACCELERATED),
        ("npu", [Unit.NPU] * 4 + [Unit.CPU], Verdict.PARTLY),
        ("all", [Unit.NPU] * 4 + [Unit.GPU], Verdict.ACCELERATED),
    ],
)
def test_the_compute_plan_says_where_every_operation_is_to_run(
    load: Any, device: str, units: list[Unit], verdict: Verdict
) -> None:
    found = load(small(), device=device).placement()
    assert [op.type for op in found.ops] == ["conv", "relu", "reshape", "linear", "softmax"]
    assert [op.unit for op in found.ops] == units
    assert (found.evidence, found.verdict, found.standin) == (Evidence.PARTITION, verdict, True)
    assert "as Core ML's compute plan anticipates; standin-coreml takes the place of Core ML" in found.detail


def test_what_a_device_does_not_support_says_so(load: Any) -> None:
    found = load(small(), device="npu").placement()
    assert [op.cause for op in found.ops] == [""] * 4 + ["the neural engine does not support it"]


def test_a_neural_network_is_told_layer_by_layer(load: Any) -> None:
    found = load((FILES / "small.mlmodel").read_bytes(), device="gpu").placement()
    assert [op.type for op in found.ops][:2] == ["convolution", "activation"]
    assert {op.unit for op in found.ops} == {Unit.GPU}


def test_without_a_plan_the_placement_is_unknown(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_COREML_OLD", "1")
    found = load(device="gpu").placement()
    assert found.evidence is Evidence.UNSPECIFIED
    assert "takes macOS 14.4 and coremltools 8.1: ValueError" in found.detail


def test_a_model_for_a_newer_macos_is_refused(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    monkeypatch.setattr(sys.modules["coremltools.libcoremlpython"], "NEWEST_SPECIFICATION", 5)
    with pytest.raises(ModelRejected, match=r"\(specification 6, mlProgram\): is macOS new enough"):
        load()


def test_an_option_reaches_core_ml(load: Any) -> None:
    assert load().options == {"low_precision_accumulation": "off"}
    model = load(options={"low_precision_accumulation": "on", "function": "main"})
    assert model._loaded.hints == {"allowLowPrecisionAccumulationOnGPU": True}
    with pytest.raises(OptionRejected, match='function_name must be "main"'):
        load(options={"function": "other"})
    with pytest.raises(OptionRejected, match="leave --threads out"):
        load(threads=2)


def test_a_stand_in_makes_the_run_invalid(load: Any) -> None:
    watch = load().watch
    assert [(doubt.code, doubt.severity) for doubt in watch.doubts()] == [("standin", Severity.INVALID)]


def test_results_that_are_no_tensors_are_left_out(load: Any) -> None:
    returned = {"y": FEED, "classes": {"cat": 0.5}, "label": 3}
    found = load().fetch(returned)
    assert set(found) == {"y", "label"}
    assert found["y"] is not FEED
