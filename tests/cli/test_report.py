"""Results as pages, compared with golden text: no colour, 100 columns.

After a wanted change: BOARDBENCH_WRITE_GOLDEN=1, run, read the difference, commit it.
"""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from google.protobuf import json_format
from rich.console import Console

from boardbench.cli.answer import exit_code
from boardbench.cli.report import result_page
from boardbench.cli.tables import comparison_table, results_table
from boardbench.v1 import board_pb2, placement_pb2, result_pb2

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = sorted(path.stem for path in GOLDEN.glob("*.json"))


@pytest.fixture(autouse=True)
def _in_utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def text_of(*parts, width=100, color=False):
    console = Console(
        file=io.StringIO(), width=width, color_system="standard" if color else None, force_terminal=color,
        markup=False, highlight=False, emoji=False, legacy_windows=False,
    )  # fmt: skip
    for part in parts:
        console.print(part)
    return "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())


def compare(name, text):
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("BOARDBENCH_WRITE_GOLDEN"):
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")


@pytest.mark.parametrize("name", SAMPLES)
def test_a_page(name, sample):
    compare(name, text_of(result_page(sample(name), more="--full shows all")))


@pytest.mark.parametrize(
    "name", ["success", "partly_placed", "failed_sigsegv", "sustained_invalid", "precise_valid"]
)
def test_a_whole_page(name, sample):
    compare(f"{name}_whole", text_of(result_page(sample(name), whole=True)))


def test_a_list_of_results(sample):
    compare("results", text_of(results_table([sample(name) for name in SAMPLES]), width=140))


def test_boards_of_one_host_name_are_told_apart(sample):
    one, same, other, another = (sample("success") for _ in range(4))
    for result, hostname, device_id in (
        (one, "raspberrypi", "pi-one"),
        (same, "raspberrypi", "pi-one"),
        (other, "raspberrypi", "pi-two"),
        (another, "jetson", "jetson-one"),
    ):
        result.board.hostname, result.board.device_id = hostname, device_id
    for table in (comparison_table, results_table):
        text = text_of(table([one, other, another]), width=160)
        assert "raspberrypi (pi-one)" in text
        assert "raspberrypi (pi-two)" in text
        assert "jetson" in text and "jetson-one" not in text
        assert "pi-one" not in text_of(table([one, same, another])), "one board with two results"


def test_a_comparison(sample):
    compare("comparison", text_of(comparison_table([sample(name) for name in SAMPLES])))


@pytest.mark.parametrize("name", SAMPLES)
def test_only_a_run_that_succeeded_exits_with_0(name, sample):
    result = sample(name)
    assert exit_code(result) == (0 if result.status == result_pb2.RUN_STATUS_SUCCEEDED else 1)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("width", [70, 79])
def test_a_narrow_terminal_loses_nothing(name, width, sample):
    wide = text_of(result_page(sample(name), whole=True), width=400)
    narrow = text_of(result_page(sample(name), whole=True), width=width)
    assert sorted("".join(wide.split())) == sorted("".join(narrow.split()))


def test_a_board_that_says_nothing_gets_a_page():
    text = text_of(result_page(result_pb2.RunResult()))
    assert "it is not known how it ended" in text


def test_success_without_placement_is_called_unknown(sample):
    result = sample("success")
    result.ClearField("placement")
    assert "unknown: the run tells nothing about it" in text_of(result_page(result))
    assert "unknown" in text_of(results_table([result]), width=140)


def test_a_prediction_is_never_shown_as_known(sample):
    result = sample("partly_placed")
    result.placement.evidence = placement_pb2.EVIDENCE_PREDICTION
    text = " ".join(text_of(result_page(result)).split())
    assert "UNKNOWN: nothing proves where the ops ran" in text
    assert "nothing of it was seen running" in text


def test_an_op_of_which_no_time_is_left_does_not_take_none(sample):
    result = sample("partly_placed")
    left = [op for op in result.placement.ops if op.unit == placement_pb2.UNIT_CPU]
    left[0].seconds, left[1].seconds = 2e-6, 0.0
    text = " ".join(text_of(result_page(result)).split())
    assert "too short" in text and "2.000 µs" in text
    assert " 0 s" not in text


def test_contradicting_evidence_is_loud(sample):
    result = sample("partly_placed")
    result.placement.verdict = placement_pb2.PLACEMENT_VERDICT_CONTRADICTED
    assert "CONTRADICTED" in text_of(result_page(result))


def test_an_enum_of_a_newer_board_does_not_break_the_page(sample):
    result = sample("partly_placed")
    for op in result.placement.ops:
        op.unit = 99
    for entry in result.placement.units:
        entry.unit = 99
    result.placement.evidence = 99
    result.memory.phases[0].phase = 99
    result.status = 99
    text = " ".join(text_of(result_page(result, whole=True), comparison_table([result])).split())
    assert "known in a way that this version does not know" in text


def test_nothing_from_the_board_steers_the_terminal(sample):
    evil = "\x1b]0;owned\x07\x1b[2J[bold]\n"
    document = json_format.MessageToDict(sample("partly_placed"), preserving_proto_field_name=True)

    def poison(value):
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        if isinstance(value, str) and not value.isdigit() and value.isascii() and value.upper() != value:
            return value + evil if not value.startswith("20") else value
        return value

    document = poison(document)
    document["warnings"] = [{"code": evil, "message": evil}]
    document["error"] = {"code": evil, "message": evil, "signal": evil, "output_tail": evil * 3}
    document["standins"] = [evil]
    document["placement"]["cpu_op_types"] = {evil: 3}
    result = json_format.ParseDict(document, result_pb2.RunResult())
    result.board.emulator = evil
    text = text_of(result_page(result, whole=True), results_table([result]), comparison_table([result]))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\\x1b[2J[bold]" in "".join(text.split())


def test_colours_are_there_for_a_terminal(sample):
    assert "\x1b[" in text_of(result_page(sample("success")), color=True)


def test_a_virtual_machine_is_named_but_not_called_an_emulator(sample):
    result = sample("success")
    result.board.emulator = "kvm"
    text = text_of(result_page(result))
    assert "virtual machine (kvm)" in text
    assert "EMULATED" not in text


def test_the_output_of_a_worker_that_told_why_is_left_to_the_whole_page(sample):
    result = sample("failed_sigsegv")
    result.error.code = "model_rejected"
    result.error.signal = ""
    result.error.exit_code = 1
    assert "Fatal Python error" not in text_of(result_page(result))
    assert "Fatal Python error" in text_of(result_page(result, whole=True))


def test_the_names_of_emulators_are_those_that_boards_give():
    from boardbench.agent.board import identify as on_the_board
    from boardbench.cli.report import EMULATORS, RECORDED_SENSORS

    assert on_the_board.EMULATORS == EMULATORS
    assert on_the_board.RECORDED == RECORDED_SENSORS
    assert board_pb2.Board(emulator="qemu").emulator in EMULATORS


def test_copies_to_an_accelerator_are_told_beside_its_computing(sample):
    result = sample("success")
    result.transfers.CopyFrom(
        result_pb2.Transfers(
            to_device_seconds=12e-6, compute_seconds=8e-4, inferences=50, method="CUDA events"
        )
    )
    line = next(line for line in text_of(result_page(result, more="")).splitlines() if "Transfers" in line)
    assert "to the device 12.00 µs · computing 800.0 µs (medians of 50 more" in line
    assert "back" not in line, "what was not told"


def test_a_load_from_a_cache_is_told_as_one(sample):
    result = sample("success")
    result.create_seconds = 0.8
    result.caches.add(name="compiled blobs", warm=True, size_bytes=1 << 20, path="/data/caches/openvino/x")
    text = " ".join(text_of(result_page(result)).split())
    assert "create 800.0 ms from a warm cache (compiled blobs, 1.0 MiB) ·" in text
    result.caches[0].warm = False
    text = " ".join(text_of(result_page(result)).split())
    assert "create 800.0 ms, a first load (compiled blobs, 1.0 MiB kept for the next) ·" in text
    assert "new cache compiled blobs: /data/caches/openvino/x" in text_of(result_page(result, whole=True))


def test_settings_are_beside_the_engine(sample):
    result = sample("success")
    spec = result.effective_spec
    spec.cpu_affinity.extend([2, 3])
    spec.compute_precision, spec.power_mode = "bfloat16", "MAXN"
    assert "on CPUs 2, 3 · bfloat16 · MAXN" in " ".join(text_of(result_page(result)).split())


def test_the_precision_of_every_op_is_on_the_whole_page(sample):
    result = sample("partly_placed")
    assert "bfloat16" not in text_of(result_page(result, whole=True))
    result.placement.ops[0].precision = "bfloat16"
    (line,) = [line for line in text_of(result_page(result, whole=True)).splitlines() if "bfloat16" in line]
    assert line.lstrip().startswith(("#0", "Placement"))
    assert "bfloat16" not in text_of(result_page(result))


def test_a_line_says_that_its_board_was_emulated() -> None:
    result = result_pb2.RunResult(
        status=result_pb2.RUN_STATUS_SUCCEEDED, validity=result_pb2.VALIDITY_INVALID, standins=["qemu"]
    )
    result.warnings.add(code="emulated", severity=result_pb2.SEVERITY_INVALID)
    for table in (comparison_table, results_table):
        assert "EMULATED, INVALID (1 warning)" in text_of(table([result]), width=160)
    del result.standins[:]
    assert "EMULATED" not in text_of(results_table([result]), width=160)


def test_what_stood_in_is_told_and_sensors_of_a_folder_are_no_accelerator(sample) -> None:
    result = sample("success")
    result.standins[:] = ["recorded-sensors"]
    page = " ".join(text_of(result_page(result)).split())
    assert "RECORDED SENSORS: heat, clocks and power are those of a folder" in page
    assert "no accelerator had a part" not in page
    for table in (comparison_table, results_table):
        assert "STAND-IN, " in text_of(table([result]), width=200)
    result.standins.append("standin-edgetpu")
    page = " ".join(text_of(result_page(result)).split())
    assert "STAND-IN (standin-edgetpu): no accelerator had a part" in page
