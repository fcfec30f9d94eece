"""The stand-in for the Edge TPU, loaded by real interpreters in processes of their own."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent

COMPILED = (
    "deeplabv3_mnv2_dm05_pascal_quant",
    "keras_lstm_mnist_ptq",
    "mobilenet_v1_0.25_128_quant",
    "mobilenet_v1_0.5_160_quant",
    "movenet_single_pose_lightning_ptq",
    "split_concat",
)
COMPILED_ALONE = (
    "mobilenet_v1_0.25_128_quant_cocompiled_with_3quant_edgetpu",
    "ssd_mobilenet_v1_coco_quant_postprocess_segment_0_of_2_edgetpu",
    "ssd_mobilenet_v1_coco_quant_postprocess_segment_1_of_2_edgetpu",
)
UNCOMPILED = (*COMPILED, "mobilenet_quant_v1_224_head_layers", "tf2_mobilenet_v2_1.0_224_ptq")
SMALL = "mobilenet_v1_0.25_128_quant"
OWNED_BY_TPU = "edgetpu-custom-op"


def _python_with(module: str, variable: str) -> str:
    if importlib.util.find_spec(module):
        return sys.executable
    other = os.environ.get(variable)
    if not other:
        pytest.skip(f"{module} is not installed here: set {variable} to a Python that has it")
    return other


@pytest.fixture(params=["ai_edge_litert", "tflite_runtime"])
def python(request: pytest.FixtureRequest) -> str:
    """A Python with one of the two interpreters."""
    return _python_with(request.param, f"BOARDBENCH_{request.param.upper()}_PYTHON")


@pytest.fixture
def litert() -> str:
    return _python_with("ai_edge_litert", "BOARDBENCH_AI_EDGE_LITERT_PYTHON")


class Drive:
    """Runs cases through an interpreter with the stand-in."""

    def __init__(self, library: Path, models: Path, log: Path) -> None:
        self.library, self.models, self.log = library, models, log

    def open(self, python: str, cases: list[dict[str, Any]]) -> subprocess.Popen[str]:
        """The process, with its job given."""
        for case in cases:
            case["model"] = os.fspath(self.models / f"{case['model']}.tflite")
        process = subprocess.Popen(
            [python, os.fspath(HERE / "drive.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"library": os.fspath(self.library), "cases": cases}))
        process.stdin.close()
        process.stdin = None
        return process

    def end(self, python: str, cases: list[dict[str, Any]]) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        process = self.open(python, cases)
        stdout, stderr = process.communicate(timeout=150)
        return process.returncode, stdout, stderr

    def __call__(self, python: str, *cases: dict[str, Any]) -> list[dict[str, Any]]:
        code, stdout, stderr = self.end(python, list(cases))
        assert code == 0, stderr
        answers: list[dict[str, Any]] = json.loads(stdout)["cases"]
        return answers

    def events(self, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [event for event in found if event["event"] == name]


@pytest.fixture
def drive(edgetpu_standin: Path, shared_models: Path, tmp_path: Path) -> Drive:
    return Drive(edgetpu_standin, shared_models, tmp_path / "log.jsonl")


# Compiled models


def test_compiled_nodes_are_taken_and_the_rest_is_left(drive: Drive, python: str) -> None:
    names = [f"{name}_edgetpu" for name in COMPILED]
    cases = [{"model": name, "options": {}} for name in (*names, *COMPILED_ALONE)]
    originals = [{"model": name, "options": None} for name in COMPILED]
    answers = drive(python, *cases, *originals)
    for case, answer in zip(cases, answers, strict=False):
        assert "error" not in answer, (case["model"], answer["error"])
        custom = [i for i, name in enumerate(answer["operators"]) if name == OWNED_BY_TPU]
        assert len(custom) == 1
        assert answer["delegates"] == [custom], case["model"]
        assert answer["finite"]
    for compiled, original in zip(answers, answers[len(cases) :], strict=False):
        assert compiled["shapes"] == original["shapes"]
    operators = {case["model"]: answer["operators"] for case, answer in zip(cases, answers, strict=False)}
    left = {Path(model).stem: len(names) - 1 for model, names in operators.items()}
    assert left["deeplabv3_mnv2_dm05_pascal_quant_edgetpu"] == 8
    assert left["movenet_single_pose_lightning_ptq_edgetpu"] == 59


def test_the_pattern_depends_on_the_inputs_only(drive: Drive, python: str) -> None:
    model = f"{SMALL}_edgetpu"
    first, again, other = drive(
        python,
        {"model": model, "options": {}, "seed": 1},
        {"model": model, "options": {}, "seed": 1, "invokes": 3},
        {"model": model, "options": {}, "seed": 2},
    )
    assert first["outputs"] == again["outputs"] != other["outputs"]


def test_without_it_a_compiled_model_does_not_load(drive: Drive, python: str) -> None:
    none, idle = drive(
        python,
        {"model": f"{SMALL}_edgetpu", "options": None},
        {"model": f"{SMALL}_edgetpu", "options": {"claim": "none"}},
    )
    for answer in (none, idle):
        assert answer["stage"] == "allocate"
        assert f"unresolved custom op: {OWNED_BY_TPU}" in answer["error"]["message"]


def test_custom_operators_of_others_are_not_its_business(drive: Drive, python: str) -> None:
    [answer] = drive(
        python, {"model": "posenet_mobilenet_v1_075_353_481_16_quant_decoder_edgetpu", "options": {}}
    )
    assert "unresolved custom op: PosenetDecoderOp" in answer["error"]["message"]
    assert OWNED_BY_TPU not in answer["error"]["message"]


def test_a_model_that_needs_a_newer_runtime_is_refused_in_google_s_words(drive: Drive, python: str) -> None:
    old, enough = drive(
        python,
        {"model": "split_concat_edgetpu", "options": {"runtime_version": "12"}},
        {"model": "split_concat_edgetpu", "options": {"runtime_version": "13"}},
    )
    words = "Package requires runtime version (13), which is newer than this runtime version (12)"
    assert old["stage"] == "allocate"
    assert words in old["error"]["message"]
    assert "error" not in enough


# Real nodes

CLAIMS: tuple[dict[str, str], ...] = (
    {},
    {"max_tensor_bytes": "40000"},
    {"max_tensor_elements": "20000"},
    {"max_constant_bytes": "5000"},
    {"claim_types": "CONV_2D,DEPTHWISE_CONV_2D,FULLY_CONNECTED,CONCATENATION"},
    {"leave_types": "RESHAPE,AVERAGE_POOL_2D,ADD,SPLIT"},
    {"data_types": "int8,uint8"},
    {"nodes": "1-2,5,8-20"},
    {"claim": "both", "max_partitions": "1", "leave_types": "ADD,AVERAGE_POOL_2D"},
)


@pytest.mark.parametrize("model", UNCOMPILED)
def test_taken_nodes_give_the_same_bits_and_are_those_that_it_says(
    drive: Drive, python: str, model: str
) -> None:
    logged = [{"claim": "ops", "log": os.fspath(drive.log), **claim} for claim in CLAIMS]
    cases = [{"model": model, "options": options, "invokes": 2} for options in logged]
    plain, *answers = drive(python, {"model": model, "options": None, "invokes": 2}, *cases)
    assert "error" not in plain
    partitions, claims = drive.events("partition"), drive.events("claim")
    assert len(claims) == len(CLAIMS)
    at = 0
    for claim, said, answer in zip(CLAIMS, claims, answers, strict=True):
        assert "error" not in answer, (claim, answer["error"])
        assert answer["outputs"] == plain["outputs"], claim
        mine = partitions[at : at + len(answer["delegates"])]
        at += len(mine)
        assert answer["delegates"] == [sorted(partition["nodes"]) for partition in mine], claim
        taken = {node["node"]: node["type"] for node in said["taken"]}
        left = {node["node"]: node["type"] for node in said["left"]}
        assert sorted(taken) == sorted(node for part in answer["delegates"] for node in part)
        assert answer["operators"] == [{**taken, **left}[i] for i in range(len(answer["operators"]))]
    assert at == len(partitions)


@pytest.mark.parametrize("limit", [10_000, 20_000, 40_000])
def test_a_node_is_left_because_of_its_tensor_size(drive: Drive, python: str, limit: int) -> None:
    options = {"claim": "ops", "max_tensor_bytes": str(limit), "log": os.fspath(drive.log)}
    [answer] = drive(python, {"model": SMALL, "options": options})
    [claim] = drive.events("claim")
    small = [i for i, largest in enumerate(answer["largest_bytes"]) if largest <= limit]
    assert 0 < len(small) < len(answer["operators"])
    assert sorted(node for part in answer["delegates"] for node in part) == small
    assert {node["why"] for node in claim["left"]} == {"tensor bytes"}


def test_one_partition_leaves_the_rest_as_collateral(drive: Drive, litert: str) -> None:
    options = {"claim": "ops", "leave_types": "ADD", "log": os.fspath(drive.log)}
    model = "tf2_mobilenet_v2_1.0_224_ptq"
    every, one = drive(
        litert,
        {"model": model, "options": options},
        {"model": model, "options": {**options, "max_partitions": "1"}},
    )
    assert len(every["delegates"]) > 2
    assert one["delegates"] == every["delegates"][:1]
    whys = {node["why"]: node["type"] for node in drive.events("claim")[1]["left"]}
    assert whys.keys() == {"type", "more than one subgraph"}
    assert whys["type"] == "ADD"


def test_xnnpack_comes_after_it_and_takes_only_what_is_left(drive: Drive, litert: str) -> None:
    options = {"claim": "ops", "claim_types": "CONV_2D", "log": os.fspath(drive.log)}
    [answer] = drive(litert, {"model": SMALL, "options": options, "xnnpack": True})
    mine = len(drive.events("partition"))
    assert answer["delegates_before_allocation"] == mine < len(answer["delegates"])
    first, rest = answer["delegates"][:mine], answer["delegates"][mine:]
    assert {answer["operators"][node] for part in first for node in part} == {"CONV_2D"}
    assert "CONV_2D" not in {answer["operators"][node] for part in rest for node in part}


# Time


def test_it_waits_at_least_as_long_as_told(drive: Drive, python: str) -> None:
    options = {"claim": "ops", "log": os.fspath(drive.log), "device": "usb:0", "max_partitions": "1"}
    [answer] = drive(
        python,
        {
            "model": SMALL,
            "invokes": 3,
            "options": {**options, "delay_us": "3000", "op_delay_us": "500", "first_delay_us": "40000"},
        },
    )
    [partition] = drive.events("partition")
    steady = 0.003 + 0.0005 * len(partition["nodes"])
    assert answer["seconds"][0] >= steady + 0.040
    assert min(answer["seconds"][1:]) >= steady
    [end] = drive.events("destroy")
    assert end["invokes"] == 3
    assert 3 * steady + 0.040 <= end["injected_nanoseconds"] / 1e9 <= sum(answer["seconds"])
    assert sum(run["waited_nanoseconds"] for run in end["runs"]) == end["injected_nanoseconds"]
    for run, seconds in zip(end["runs"], answer["seconds"], strict=True):
        assert run["waited_nanoseconds"] <= run["taken_nanoseconds"] <= seconds * 1e9


def test_bytes_that_cross_and_a_low_clock_cost_time(drive: Drive, litert: str) -> None:
    model, log = f"{SMALL}_edgetpu", os.fspath(drive.log)
    crossing = 128 * 128 * 3 + 1001
    slow = {"device": "usb:0", "Performance": "Low", "log": log, "delay_us": "2000"}
    not_by_index = {"device": "usb", "Performance": "Low", "log": log, "delay_us": "2000"}
    per_byte, low, full = drive(
        litert,
        {"model": model, "options": {"byte_delay_ns": "400", "log": log}},
        {"model": model, "options": slow},
        {"model": model, "options": not_by_index},
    )
    assert per_byte["seconds"][0] >= crossing * 400e-9
    assert low["seconds"][0] >= 0.016
    assert [event["clock_divider"] for event in drive.events("create")] == [1, 8, 1]
    assert "error" not in full


def test_waiting_can_look_like_work(drive: Drive, litert: str) -> None:
    model = f"{SMALL}_edgetpu"
    sleeping, spinning = drive(
        litert,
        {"model": model, "options": {"delay_us": "150000"}},
        {"model": model, "options": {"delay_us": "150000", "wait": "spin"}},
    )
    assert sleeping["cpu_seconds"] < spinning["cpu_seconds"] / 2


# Failure


@pytest.mark.parametrize(
    ("options", "stage", "error", "words"),
    [
        ({"fail_at": "create", "fail_text": "no firmware"}, "load_delegate", "ValueError", "no firmware"),
        ({"fail_at": "claim", "fail_text": "lost it"}, "create", "RuntimeError", "lost it"),
        ({"fail_at": "prepare", "fail_text": "no room"}, "allocate", "RuntimeError", "no room"),
        ({"fail_at": "invoke", "fail_text": "link down"}, "invoke", "RuntimeError", "link down"),
        ({"fail_at": "invoke", "fail_as": "silent"}, "invoke", "RuntimeError", "failed to invoke"),
        ({"no_such": "1"}, "load_delegate", "ValueError", "no option no_such"),
        ({"delay_us": "soon"}, "load_delegate", "ValueError", "delay_us=soon is not a number"),
        ({"delay_us": "-1"}, "load_delegate", "ValueError", "delay_us=-1 is not a number"),
        ({"claim": "all"}, "load_delegate", "ValueError", "claim=all is not known"),
        ({"claim_types": "CONV2D"}, "load_delegate", "ValueError", "no operator CONV2D"),
        ({"data_types": "int7"}, "load_delegate", "ValueError", "no type int7"),
        ({"nodes": "1-2x"}, "load_delegate", "ValueError", "nodes=1-2x"),
    ],
)
def test_failures_come_where_and_as_told(
    drive: Drive, python: str, options: dict[str, str], stage: str, error: str, words: str
) -> None:
    [answer] = drive(python, {"model": f"{SMALL}_edgetpu", "options": options})
    assert (answer["stage"], answer["error"]["type"]) == (stage, error)
    assert words in answer["error"]["message"]


def test_it_can_fail_later(drive: Drive, python: str) -> None:
    [answer] = drive(
        python,
        {"model": f"{SMALL}_edgetpu", "options": {"fail_at": "invoke", "fail_after": "2"}, "invokes": 5},
    )
    assert len(answer["seconds"]) == 2
    assert answer["error"]["message"].startswith("stand-in: told to fail")


def test_google_s_way_to_fail_is_without_a_word(drive: Drive, python: str) -> None:
    options = {"fail_at": "create", "fail_as": "silent"}
    [answer] = drive(python, {"model": f"{SMALL}_edgetpu", "options": options})
    assert answer["error"] == {
        "type": "ValueError",
        "message": f"Failed to load delegate from {drive.library}\n",
    }


@pytest.mark.parametrize(("way", "signal"), [("abort", 6), ("segfault", 11)])
@pytest.mark.parametrize("step", ["create", "claim", "prepare", "invoke"])
def test_it_can_take_the_process_down(drive: Drive, litert: str, step: str, way: str, signal: int) -> None:
    options = {"fail_at": step, "fail_as": way}
    code, _, _ = drive.end(litert, [{"model": f"{SMALL}_edgetpu", "options": options}])
    assert code == -signal


def test_it_can_hang(drive: Drive, litert: str) -> None:
    log = os.fspath(drive.log)
    case = {"model": f"{SMALL}_edgetpu", "options": {"fail_at": "prepare", "fail_as": "hang", "log": log}}
    process = drive.open(litert, [case])
    try:
        deadline = time.monotonic() + 60
        while not (drive.log.exists() and drive.events("partition")):
            assert time.monotonic() < deadline, "it never came to preparing"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
    finally:
        process.kill()
        process.communicate()


def test_an_output_of_open_size_is_refused_with_the_way_out(
    drive: Drive, litert: str, tmp_path: Path
) -> None:
    """WHERE's output has as many rows as the input has true values."""
    if not importlib.util.find_spec("flatbuffers"):
        pytest.skip("flatbuffers is not installed: needed to build a model with WHERE")
    (tmp_path / "where.tflite").write_bytes(_where_model())
    drive.models = tmp_path
    taken, left = drive(
        litert,
        {"model": "where", "options": {"claim": "ops"}},
        {"model": "where", "options": {"claim": "ops", "leave_types": "WHERE"}},
    )
    assert "node 0 (WHERE)" in taken["error"]["message"]
    assert "leave_types" in taken["error"]["message"]
    assert "error" not in left


def _where_model() -> bytes:
    """A TFLite file with one WHERE over a vector of floats."""
    import flatbuffers

    build = flatbuffers.Builder(256)

    def vector(offsets: list[int]) -> int:
        build.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            build.PrependUOffsetTRelative(offset)
        return build.EndVector()

    def numbers(values: list[int]) -> int:
        build.StartVector(4, len(values), 4)
        for value in reversed(values):
            build.PrependInt32(value)
        return build.EndVector()

    def table(fields: int, *, offsets: dict[int, int], i8: dict[int, int], i32: dict[int, int]) -> int:
        build.StartObject(fields)
        for slot, offset in offsets.items():
            build.PrependUOffsetTRelativeSlot(slot, offset, 0)
        for slot, value in i32.items():
            build.PrependInt32Slot(slot, value, 0)
        for slot, value in i8.items():
            build.PrependInt8Slot(slot, value, 0)
        return build.EndObject()

    buffer = table(1, offsets={}, i8={}, i32={})
    tensors = []
    for name, shape, dtype in (("condition", [4], 0), ("where", [4, 1], 4)):
        parts = {0: numbers(shape), 3: build.CreateString(name)}
        tensors.append(table(4, offsets=parts, i8={1: dtype}, i32={}))
    operator = table(3, offsets={1: numbers([0]), 2: numbers([1])}, i8={}, i32={})
    lists = {0: vector(tensors), 1: numbers([0]), 2: numbers([1]), 3: vector([operator])}
    graph = table(4, offsets=lists, i8={}, i32={})
    code = table(4, offsets={}, i8={0: 109}, i32={3: 109})
    parts = {1: vector([code]), 2: vector([graph]), 4: vector([buffer])}
    model = table(5, offsets=parts, i8={}, i32={0: 3})
    build.Finish(model, b"TFL3")
    return bytes(build.Output())


# The machine around it


class Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("path", ctypes.c_char_p))


@pytest.fixture
def c_api(edgetpu_standin: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(os.fspath(edgetpu_standin))
    library.edgetpu_list_devices.restype = ctypes.POINTER(Device)
    library.edgetpu_free_devices.argtypes = [ctypes.POINTER(Device)]
    library.edgetpu_version.restype = ctypes.c_char_p
    return library


def _devices(library: ctypes.CDLL) -> list[tuple[int, bytes]]:
    count = ctypes.c_size_t(99)
    devices = library.edgetpu_list_devices(ctypes.byref(count))
    found = [(devices[i].type, devices[i].path) for i in range(count.value)]
    library.edgetpu_free_devices(devices)
    return found


def test_it_lists_devices_and_version_as_libedgetpu_does(
    c_api: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _devices(c_api) == [(1, b"/sys/bus/usb/devices/2-1")]
    assert c_api.edgetpu_version() == b"BuildLabel(standin), RuntimeVersion(14)"
    monkeypatch.setenv("BOARDBENCH_STANDIN_DEVICES", "pci:/dev/apex_0,usb:/sys/bus/usb/devices/1-2,bad")
    monkeypatch.setenv("BOARDBENCH_STANDIN_RUNTIME_VERSION", "12")
    assert _devices(c_api) == [(0, b"/dev/apex_0"), (1, b"/sys/bus/usb/devices/1-2")]
    assert c_api.edgetpu_version() == b"BuildLabel(standin), RuntimeVersion(12)"
    monkeypatch.setenv("BOARDBENCH_STANDIN_DEVICES", "")
    assert _devices(c_api) == []


def test_it_is_told_by_its_symbol(c_api: ctypes.CDLL) -> None:
    name = (ctypes.c_char * 16).in_dll(c_api, "boardbench_standin").value
    assert name == b"standin-edgetpu"


@pytest.mark.parametrize(
    ("device", "there"),
    [
        ("", True),
        (":0", True),
        (":1", True),
        (":2", False),
        ("usb", True),
        ("usb:0", True),
        ("usb:1", False),
        ("pci", True),
        ("pci:0", True),
        ("pci:1", False),
        ("pci:-1", False),
        ("usb:x", False),
        ("apex", False),
    ],
)
def test_the_device_is_found_as_google_s_plugin_finds_it(
    c_api: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, device: str, there: bool
) -> None:
    monkeypatch.setenv("BOARDBENCH_STANDIN_DEVICES", "pci:/dev/apex_0,usb:/sys/bus/usb/devices/1-2")
    c_api.tflite_plugin_create_delegate.restype = ctypes.c_void_p
    c_api.tflite_plugin_create_delegate.argtypes = [
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    c_api.tflite_plugin_destroy_delegate.argtypes = [ctypes.c_void_p]
    one = ctypes.c_char_p * 1
    made = c_api.tflite_plugin_create_delegate(one(b"device"), one(device.encode()), 1, None)
    c_api.tflite_plugin_destroy_delegate(made)
    assert (made is not None) is there


def test_without_a_device_the_reason_is_on_stderr_when_asked_for(
    c_api: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BOARDBENCH_STANDIN_DEVICES", "")
    c_api.edgetpu_create_delegate.restype = ctypes.c_void_p
    assert c_api.edgetpu_create_delegate(0, None, None, ctypes.c_size_t(0)) is None
    assert capfd.readouterr().err == ""
    c_api.edgetpu_verbosity(10)
    assert c_api.edgetpu_create_delegate(0, None, None, ctypes.c_size_t(0)) is None
    c_api.edgetpu_verbosity(0)
    assert "No device of type Apex (PCIe) is available." in capfd.readouterr().err


def test_its_options_can_come_from_the_environment(
    drive: Drive, litert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOARDBENCH_STANDIN_FAIL_AT", "invoke")
    monkeypatch.setenv("BOARDBENCH_STANDIN_FAIL_TEXT", "from afar")
    environment, given = drive(
        litert,
        {"model": f"{SMALL}_edgetpu", "options": {}},
        {"model": f"{SMALL}_edgetpu", "options": {"fail_at": "never"}},
    )
    assert "from afar" in environment["error"]["message"]
    assert "error" not in given


def test_counters_of_a_tree_move_with_every_run(drive: Drive, python: str, tmp_path: Path) -> None:
    boards = HERE.parent / "boards"
    for name in ("tpu_pcie", "tpu_usb3"):
        shutil.copytree(boards / name, tmp_path / name, symlinks=True)
    interrupts = tmp_path / "tpu_pcie/sys/class/apex/apex_0/interrupt_counts"
    urbs = tmp_path / "tpu_usb3/sys/bus/usb/devices/2-1/urbnum"
    before = interrupts.read_text().splitlines()
    pcie = {"devices": "pci:/dev/apex_0", "interrupt_counts": os.fspath(interrupts)}
    usb = {"urbnum": os.fspath(urbs), "urbs_per_invoke": "7"}
    drive(
        python,
        {"model": f"{SMALL}_edgetpu", "options": pcie, "invokes": 5},
        {"model": f"{SMALL}_edgetpu", "options": usb, "invokes": 3},
        {"model": f"{SMALL}_edgetpu", "options": {}, "invokes": 3},
    )
    after = interrupts.read_text().splitlines()
    assert before[4] == "0x04: 603"
    assert after == [*before[:4], "0x04: 608", *before[5:]]
    assert urbs.read_text() == "5331\n"


# Building it


@pytest.fixture
def build() -> Any:
    spec = importlib.util.spec_from_file_location("standin_build_under_test", HERE / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_compiled_once_and_without_a_warning(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        build.compiler()
    except build.NoCompiler as error:
        pytest.skip(str(error))
    strict = ("-Werror", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wstrict-prototypes")
    library = build.build(tmp_path, extra_flags=strict)
    throttled = build.build(tmp_path, throttled=True)
    assert library != throttled
    assert b"PERFORMANCE=DIRECT" in library.read_bytes()
    assert b"PERFORMANCE=THROTTLED" in throttled.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert build.build(tmp_path, throttled=True) == throttled


def test_without_a_compiler_it_says_what_to_install(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.NoCompiler, match="install gcc"):
        build.build(tmp_path)
