"""The Edge TPU in the real worker, with the stand-in for libedgetpu and trees of machines."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.bench.runtimes import edgetpu

BOARDS = Path(__file__).resolve().parents[2] / "boards"
SMALL = "mobilenet_v1_0.25_128_quant"
APEX = "sys/class/apex/apex_0"
STICK = "sys/bus/usb/devices/2-1"

Run = Callable[..., Any]


@pytest.fixture
def litert() -> str:
    if not importlib.util.find_spec("ai_edge_litert"):
        pytest.skip("ai-edge-litert is not installed here")
    return sys.executable


@pytest.fixture
def run(worker: Any, edgetpu_standin: Path, shared_models: Path, tmp_path: Path) -> Run:
    """Runs a model on device edgetpu; ``delegate`` holds options without their prefix."""

    def start(
        python: str,
        model: str,
        *,
        library: Path | str = edgetpu_standin,
        machine: Path = tmp_path,
        **more: Any,
    ) -> Any:
        environ = {"BOARDBENCH_EDGETPU_LIBRARY": os.fspath(library), **more.pop("environ", {})}
        options = {f"delegate.{key}": value for key, value in more.pop("delegate", {}).items()}
        job = {
            "kind": "run",
            "runtime": "tflite",
            "format": "tflite",
            "model_path": os.fspath(shared_models / f"{model}.tflite"),
            "device": "edgetpu",
            "duration_seconds": 0.0,
            "min_runs": 8,
            "warm_up_seconds": 0.0,
            "profile_runs": 0,
            "sys_root": os.fspath(machine),
            **more,
            "options": {**options, **more.get("options", {})},
        }
        return worker.run(job, python=python, environ=environ)

    return start


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a machine's tree, which may be written."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(BOARDS / name, tmp_path / name, symlinks=True))

    return copy


@pytest.fixture(scope="session")
def build() -> Any:
    path = BOARDS.parent / "standin" / "build.py"
    spec = importlib.util.spec_from_file_location("standin_build_for_edgetpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def unmarked(build: Any, edgetpu_standin: Path) -> Path:
    """The stand-in without the symbol that tells it: what boardbench takes for the real library."""
    library: Path = build.build(edgetpu_standin.parent, extra_flags=("-Dboardbench_standin=hidden",))
    return library


@pytest.fixture(scope="session")
def stranger(build: Any, edgetpu_standin: Path) -> Path:
    """A delegate that drives no Edge TPU."""
    flags = ("-Dboardbench_standin=hidden", "-Dedgetpu_version=other_version")
    library: Path = build.build(edgetpu_standin.parent, extra_flags=flags)
    return library


def _warnings(outcome: Any) -> list[str]:
    return [event["warning"]["code"] for event in outcome.of("warning")]


def _evidence(outcome: Any) -> dict[str, dict[str, Any]]:
    reports = outcome.result["placement"]["evidence_reports"]
    return {report["evidence"].removeprefix("EVIDENCE_"): report for report in reports}


def _verdict(holder: dict[str, Any]) -> str:
    verdict: str = holder["verdict"]
    return verdict.removeprefix("PLACEMENT_VERDICT_")


# What runs where


def test_a_compiled_model_runs_on_it_and_says_standin(run: Run, python: str) -> None:
    outcome = run(python, f"{SMALL}_edgetpu", delegate={"delay_us": "20000"})
    result = outcome.result
    placement = result["placement"]
    assert _verdict(placement) == "ACCELERATED"
    assert [(op["type"], op["unit"]) for op in placement["ops"]] == [("edgetpu-custom-op", "UNIT_TPU")]
    assert placement["standin"] is True
    assert "standin" in _warnings(outcome)
    assert result["accelerator"] == {
        "kind": "tpu",
        "path": "",
        "library": result["accelerator"]["library"],
        "library_version": "BuildLabel(standin), RuntimeVersion(14), max",
        "runtime_version": 14,
        "model_min_runtime_version": 12,
        "parameters_cached_bytes": 566912,
        "parameters_streamed_bytes": 0,
        "standin": True,
    }
    evidence = _evidence(outcome)
    assert evidence.keys() == {"STATIC", "PARTITION", "HOST_CPU"}
    assert (_verdict(evidence["STATIC"]), evidence["STATIC"]["cpu_ops"]) == ("ACCELERATED", 0)
    assert "accelerated_ops" not in evidence["STATIC"]
    assert min(result["latency"]["samples_nanoseconds"]) >= 20_000_000


def test_what_the_compiler_left_is_on_the_cpu(run: Run, python: str) -> None:
    outcome = run(python, "deeplabv3_mnv2_dm05_pascal_quant_edgetpu", min_runs=1, options={"xnnpack": "off"})
    placement = outcome.result["placement"]
    units = [op["unit"] for op in placement["ops"]]
    assert (units.count("UNIT_TPU"), units.count("UNIT_CPU")) == (1, 8)
    assert _verdict(placement) == "PARTLY"
    assert _evidence(outcome)["STATIC"]["cpu_ops"] == 8


def test_an_uncompiled_model_is_called_out_before_it_runs(run: Run, python: str) -> None:
    outcome = run(python, SMALL)
    loud = [
        event for event in outcome.of("warning") if event["warning"]["code"] == "not_compiled_for_edgetpu"
    ]
    assert len(loud) == 1
    assert f"{SMALL}.tflite IS NOT COMPILED for the Edge TPU" in loud[0]["warning"]["message"]
    stages = [event.get("stage") for event in outcome.events]
    assert outcome.events.index(loud[0]) < stages.index("STAGE_INPUTS")
    assert _verdict(outcome.result["placement"]) == "NOT_ACCELERATED"
    assert "UNIT_TPU" not in {op["unit"] for op in outcome.result["placement"]["ops"]}


def test_a_node_falls_back_because_of_its_tensor_size(run: Run, python: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    options = {"claim": "ops", "max_tensor_bytes": "40000", "log": os.fspath(log)}
    outcome = run(python, SMALL, delegate=options)
    [claim] = [e for e in map(json.loads, log.read_text().splitlines()) if e["event"] == "claim"]
    placement = outcome.result["placement"]
    on_tpu = [op["index"] for op in placement["ops"] if op["unit"] == "UNIT_TPU"]
    assert on_tpu == [node["node"] for node in claim["taken"]]
    assert {node["why"] for node in claim["left"]} == {"tensor bytes"}
    assert _verdict(placement) == "PARTLY"
    assert "not_compiled_for_edgetpu" not in _warnings(outcome)


def test_streamed_parameters_are_told(run: Run, litert: str) -> None:
    outcome = run(litert, "mobilenet_v1_0.25_128_quant_cocompiled_with_3quant_edgetpu")
    use = outcome.result["accelerator"]
    assert (use["parameters_cached_bytes"], use["parameters_streamed_bytes"]) == (315840, 251072)
    assert "edgetpu_parameters_streamed" in _warnings(outcome)
    few = run(litert, "movenet_single_pose_lightning_ptq_edgetpu", min_runs=1)
    assert few.result["accelerator"]["parameters_streamed_bytes"] == 2368
    assert "edgetpu_parameters_streamed" not in _warnings(few)


def test_other_delegates_are_no_tpu(run: Run, litert: str, stranger: Path) -> None:
    outcome = run(
        litert,
        SMALL,
        device="cpu",
        options={"delegate": os.fspath(stranger), "xnnpack": "off"},
        delegate={"claim": "ops", "claim_types": "CONV_2D"},
    )
    units = {op["type"]: op["unit"] for op in outcome.result["placement"]["ops"]}
    assert units["CONV_2D"] == "UNIT_DELEGATE"
    assert units["SOFTMAX"] == "UNIT_CPU"
    assert "accelerator" not in outcome.result
    refused = run(litert, SMALL, library=stranger)
    assert refused.error["code"] == "option_rejected"
    assert "drives no Edge TPU" in refused.error["message"]


def test_a_library_given_by_option_is_watched_as_well(run: Run, litert: str, edgetpu_standin: Path) -> None:
    options = {"delegate": os.fspath(edgetpu_standin)}
    outcome = run(litert, f"{SMALL}_edgetpu", library=Path("/nowhere.so"), options=options)
    assert outcome.result["accelerator"]["library"] == os.fspath(edgetpu_standin)
    assert outcome.result["placement"]["standin"] is True


def test_the_probe_offers_it_where_its_library_loads(worker: Any, litert: str, edgetpu_standin: Path) -> None:
    job = {"kind": "probe", "runtime": "tflite"}
    for library, devices in ((os.fspath(edgetpu_standin), ["cpu", "edgetpu"]), ("/nowhere.so", ["cpu"])):
        outcome = worker.run(job, python=litert, environ={"BOARDBENCH_EDGETPU_LIBRARY": library})
        [event] = outcome.of("probe")
        assert event["runtimes"][0]["devices"] == devices


# What the hardware says


def test_interrupts_that_move_confirm_it(run: Run, python: str, machine: Callable[[str], Path]) -> None:
    root = machine("tpu_pcie")
    counts = root / APEX / "interrupt_counts"
    devices = {"devices": "pci:/dev/apex_0", "interrupt_counts": os.fspath(counts), "delay_us": "2000"}
    outcome = run(python, f"{SMALL}_edgetpu", machine=root, delegate=devices)
    counters = _evidence(outcome)["COUNTERS"]
    assert _verdict(counters) == "ACCELERATED"
    [reading] = counters["counters"]
    assert reading["name"] == "/sys/class/apex/apex_0/interrupt_counts"
    assert reading["after"] - reading["before"] == outcome.result["latency"]["count"] == 8
    assert _verdict(outcome.result["placement"]) == "ACCELERATED"
    use = outcome.result["accelerator"]
    assert use["path"] == "/dev/apex_0"
    assert (use["temperature_before_celsius"], use["temperature_after_celsius"]) == (46.3, 46.3)
    assert "usb_megabits_per_second" not in use
    assert "edgetpu_hot" not in _warnings(outcome)


def test_transfers_that_move_confirm_it(run: Run, litert: str, machine: Callable[[str], Path]) -> None:
    root = machine("tpu_usb3")
    options = {"urbnum": os.fspath(root / STICK / "urbnum"), "urbs_per_invoke": "3"}
    outcome = run(litert, f"{SMALL}_edgetpu", machine=root, delegate=options)
    [reading] = _evidence(outcome)["COUNTERS"]["counters"]
    assert reading["name"] == "/sys/bus/usb/devices/2-1/urbnum"
    assert reading["after"] - reading["before"] == 24
    use = outcome.result["accelerator"]
    assert (use["path"], use["usb_megabits_per_second"]) == ("/sys/bus/usb/devices/2-1", 5000)
    assert "temperature_before_celsius" not in use
    assert "edgetpu_slow_usb" not in _warnings(outcome)


@pytest.mark.parametrize("model", [f"{SMALL}_edgetpu", "deeplabv3_mnv2_dm05_pascal_quant_edgetpu"])
def test_counters_that_stand_still_contradict_it(
    run: Run, litert: str, machine: Callable[[str], Path], model: str
) -> None:
    outcome = run(
        litert, model, machine=machine("tpu_pcie"), delegate={"devices": "pci:/dev/apex_0"}, min_runs=2
    )
    assert _verdict(_evidence(outcome)["COUNTERS"]) == "NOT_ACCELERATED"
    assert _verdict(outcome.result["placement"]) == "CONTRADICTED"
    assert "the Edge TPU did not run" in outcome.result["placement"]["detail"]
    assert "placement_contradicted" in _warnings(outcome)


def test_counters_that_can_t_be_read_are_left_out(
    run: Run, litert: str, machine: Callable[[str], Path]
) -> None:
    root = machine("tpu_usb3")
    (root / STICK / "urbnum").write_text("no number\n")
    outcome = run(litert, f"{SMALL}_edgetpu", machine=root, delegate={"delay_us": "60000"})
    assert "COUNTERS" not in _evidence(outcome)
    assert _verdict(outcome.result["placement"]) == "ACCELERATED"


def test_a_busy_processor_contradicts_it_where_nothing_counts(run: Run, litert: str) -> None:
    if not Path("/proc/thread-self/schedstat").exists():
        pytest.skip("this kernel does not tell how long a thread has waited for a processor")
    spinning = run(litert, f"{SMALL}_edgetpu", delegate={"delay_us": "30000", "wait": "spin"})
    assert _verdict(_evidence(spinning)["HOST_CPU"]) == "NOT_ACCELERATED"
    assert _verdict(spinning.result["placement"]) == "CONTRADICTED"
    assert "the processor did the work" in spinning.result["placement"]["detail"]
    assert "placement_contradicted" in _warnings(spinning)


def test_a_waiting_process_confirms_it(run: Run, litert: str) -> None:
    waiting = run(litert, f"{SMALL}_edgetpu", delegate={"delay_us": "60000"})
    assert _verdict(_evidence(waiting)["HOST_CPU"]) == "ACCELERATED"
    assert _verdict(waiting.result["placement"]) == "ACCELERATED"
    assert "placement_contradicted" not in _warnings(waiting)


def test_a_slow_port_and_a_hot_chip_are_told(run: Run, litert: str, machine: Callable[[str], Path]) -> None:
    slow = run(
        litert,
        f"{SMALL}_edgetpu",
        machine=machine("tpu_usb2"),
        delegate={"devices": "usb:/sys/bus/usb/devices/1-1"},
    )
    assert "edgetpu_slow_usb" in _warnings(slow)
    assert slow.result["accelerator"]["usb_megabits_per_second"] == 480
    root = machine("tpu_pcie")
    (root / APEX / "temp").write_text("91300\n")
    hot = run(litert, f"{SMALL}_edgetpu", machine=root, delegate={"devices": "pci:/dev/apex_0"})
    assert "edgetpu_hot" in _warnings(hot)
    assert hot.result["accelerator"]["temperature_after_celsius"] == 91.3


# What fails


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"fail_at": "create", "fail_text": "no firmware"}, "runtime_unavailable", "(no firmware)"),
        (
            {"fail_at": "create", "fail_as": "silent", "fail_text": "device is in DFU mode"},
            "runtime_unavailable",
            "(device is in DFU mode)",
        ),
        ({"devices": ""}, "runtime_unavailable", "No device of type Apex (USB) is available."),
        ({"device": "pci"}, "runtime_unavailable", "No device of type Apex (PCIe) is available."),
        ({"fail_at": "prepare", "fail_text": "out of DMA"}, "model_rejected", "out of DMA"),
        (
            {"runtime_version": "11"},
            "model_rejected",
            "is compiled for Edge TPU runtime 12 and libedgetpu here is 11",
        ),
        ({"fail_at": "invoke", "fail_after": "5", "fail_text": "link lost"}, "inference_failed", "link lost"),
        ({"nonsense": "1"}, "runtime_unavailable", "no option nonsense"),
    ],
)
def test_failures_say_why(run: Run, python: str, options: dict[str, str], code: str, words: str) -> None:
    outcome = run(python, f"{SMALL}_edgetpu", delegate=options)
    assert outcome.error["code"] == code
    assert words in outcome.error["message"]
    assert outcome.exit_code == 1


def test_what_the_library_wrote_is_in_the_output_too(run: Run, litert: str) -> None:
    options = {"fail_at": "create", "fail_as": "silent", "fail_text": "device is in DFU mode"}
    assert "device is in DFU mode" in run(litert, f"{SMALL}_edgetpu", delegate=options).output


def test_a_missing_library_says_what_to_install(run: Run, litert: str) -> None:
    outcome = run(litert, f"{SMALL}_edgetpu", library=Path("/nowhere/libedgetpu.so.1"))
    assert outcome.error["code"] == "runtime_unavailable"
    assert "/nowhere/libedgetpu.so.1 can't be loaded" in outcome.error["message"]
    assert "libedgetpu1-std" in outcome.error["message"]


@pytest.mark.parametrize(
    ("tree", "change", "words"),
    [
        ("", None, "no Edge TPU is seen on this board"),
        ("tpu_pcie_no_driver", None, "without its driver: install the gasket and apex"),
        ("tpu_pcie", ("status", "DEAD"), "the driver of /dev/apex_0 says DEAD"),
        ("tpu_pcie", None, "/dev/apex_0 is there: end whatever else uses it"),
        ("tpu_usb_fresh", None, "/sys/bus/usb/devices/1-1 is there"),
    ],
)
def test_a_library_without_a_word_is_helped_out_by_what_is_seen(
    run: Run,
    litert: str,
    unmarked: Path,
    machine: Callable[[str], Path],
    tmp_path: Path,
    tree: str,
    change: tuple[str, str] | None,
    words: str,
    worker: Any,
    shared_models: Path,
) -> None:
    root = machine(tree) if tree else tmp_path
    if change:
        (root / APEX / change[0]).write_text(f"{change[1]}\n")
    job = {
        "kind": "run",
        "runtime": "tflite",
        "format": "tflite",
        "model_path": os.fspath(shared_models / f"{SMALL}_edgetpu.tflite"),
        "device": "edgetpu",
        "sys_root": os.fspath(root),
    }
    environ = {"BOARDBENCH_EDGETPU_LIBRARY": os.fspath(unmarked), "BOARDBENCH_STANDIN_DEVICES": ""}
    outcome = worker.run(job, python=litert, environ=environ)
    assert outcome.error["code"] == "runtime_unavailable"
    assert "No device of type Apex (USB) is available." in outcome.error["message"]
    assert words in outcome.error["message"]


@pytest.mark.parametrize(
    ("tree", "node", "group"),
    [("tpu_pcie", "dev/apex_0", "apex"), ("tpu_usb3", "dev/bus/usb/002/007", "plugdev")],
)
def test_a_device_that_may_not_be_opened_is_told(
    unmarked: Path, machine: Callable[[str], Path], tree: str, node: str, group: str
) -> None:
    root = machine(tree)
    (root / node).parent.mkdir(parents=True)
    (root / node).write_text("")
    said = edgetpu._diagnosis(os.fspath(unmarked), root, access=lambda path, mode: False)
    assert said.startswith(f"this user may not open /{node}: add it to the group {group}")
    may = edgetpu._diagnosis(os.fspath(unmarked), root, access=lambda path, mode: True)
    assert "end whatever else uses it" in may


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "usb0"}, "option delegate.device of libedgetpu is empty, :N, usb"),
        ({"Performance": "high"}, "is Low, Medium, High or Max, not 'high'"),
        ({"Usb.AlwaysDfu": "yes"}, "is True or False"),
        ({"threads": "2"}, "libedgetpu has no option threads; it takes Performance"),
    ],
)
def test_options_that_the_library_would_ignore_are_refused(
    run: Run, litert: str, unmarked: Path, options: dict[str, str], words: str
) -> None:
    outcome = run(litert, f"{SMALL}_edgetpu", library=unmarked, delegate=options)
    assert outcome.error["code"] == "option_rejected"
    assert words in outcome.error["message"]


def test_a_clock_without_an_index_is_told_to_have_no_effect(run: Run, litert: str, unmarked: Path) -> None:
    outcome = run(litert, f"{SMALL}_edgetpu", library=unmarked, delegate={"Performance": "Low"})
    assert "edgetpu_option_ignored" in _warnings(outcome)
    by_index = {"Performance": "Low", "device": "usb:0"}
    outcome = run(litert, f"{SMALL}_edgetpu", library=unmarked, delegate=by_index)
    assert "edgetpu_option_ignored" not in _warnings(outcome)
    # Nothing marks it, so nothing says stand-in: what a run on the real library looks like.
    assert "standin" not in _warnings(outcome)
    assert outcome.result["placement"]["standin"] is False
    assert outcome.result["accelerator"]["standin"] is False
    assert outcome.result["runtime"]["options"]["delegate.Performance"] == "Low"


def test_delegate_options_need_a_delegate(run: Run, litert: str) -> None:
    outcome = run(litert, SMALL, device="cpu", delegate={"device": "usb"})
    assert outcome.error["code"] == "option_rejected"
    assert "delegate.KEY options belong to a delegate" in outcome.error["message"]


def test_the_build_that_holds_the_clock_down_is_told(
    run: Run, litert: str, build: Any, edgetpu_standin: Path
) -> None:
    throttled = build.build(edgetpu_standin.parent, throttled=True)
    outcome = run(litert, f"{SMALL}_edgetpu", library=throttled)
    assert outcome.result["accelerator"]["library_version"].endswith("RuntimeVersion(14), std")


def test_a_library_that_the_loader_finds_by_its_name_is_told_as_well(
    run: Run, litert: str, build: Any, edgetpu_standin: Path, tmp_path: Path
) -> None:
    throttled = build.build(edgetpu_standin.parent, throttled=True)
    # As Debian's package has it.
    installed = tmp_path / "lib" / "libedgetpu.so.1.0"
    installed.parent.mkdir()
    shutil.copy(throttled, installed)
    installed.with_name("libedgetpu.so.1").symlink_to(installed.name)
    environ = {"LD_LIBRARY_PATH": os.fspath(installed.parent)}
    outcome = run(litert, f"{SMALL}_edgetpu", library="libedgetpu.so.1", environ=environ)
    assert outcome.result["accelerator"]["library_version"].endswith("RuntimeVersion(14), std")
