"""Formats choose engines: what a board can run a model by, and all of them side by side."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from boardbench.cli import engines
from boardbench.cli.address import Address
from boardbench.cli.progress import Unwatched
from boardbench.cli.push import Order, push_all
from boardbench.cli.source import Source
from boardbench.cli.spec import Spec
from boardbench.cli.terminal import Output
from boardbench.v1 import board_pb2, result_pb2

from .conftest import sample_result

SETTINGS = ["threads", "cpu_affinity"]
ONNX = board_pb2.RuntimeStatus(
    name="onnxruntime",
    available=True,
    version="onnxruntime 1.32.0",
    formats=["onnx"],
    devices=["cpu"],
    default_formats=["onnx"],
    settings=SETTINGS,
    options={
        "arena": "whether memory is kept",
        "provider.": "an option of the provider",
        "provider_library": "path of a library with an execution provider",
    },
)
OPENVINO = board_pb2.RuntimeStatus(
    name="openvino",
    available=True,
    version="openvino 2026.4.1",
    formats=["openvino", "onnx"],
    devices=["cpu", "gpu"],
    default_formats=["openvino"],
    settings=[*SETTINGS, "compute_precision", "cache"],
)
TENSORRT = board_pb2.RuntimeStatus(
    name="tensorrt", reason="no TensorRT here: apt install python3-libnvinfer", formats=["tensorrt", "onnx"]
)
TFLITE = board_pb2.RuntimeStatus(name="tflite", available=True, formats=["tflite"], devices=["cpu"])
ALL = [TFLITE, ONNX, OPENVINO, TENSORRT]


def refusals(spec: Spec) -> dict[str, str]:
    return {choice.name: choice.refusal for choice in engines.choices(ALL, "onnx", spec)}


def test_engines_are_those_that_take_the_format_in_the_boards_order() -> None:
    found = engines.choices(ALL, "onnx", Spec())
    assert [(choice.name, choice.default, bool(choice.refusal)) for choice in found] == [
        ("onnxruntime", True, False),
        ("openvino", False, False),
        ("tensorrt", False, True),
    ]
    assert engines.default_line(found, "m.onnx") == (
        "m.onnx: onnxruntime, this board's default for it; openvino can run it, too "
        "(--runtime NAME, or --runtime all)"
    )
    assert engines.default_line(found[:1], "m.onnx") == "", "nothing to choose from"


def test_what_an_engine_would_refuse_is_known_before() -> None:
    assert refusals(Spec(compute="float16"))["onnxruntime"] == "it takes no compute_precision"
    assert refusals(Spec(compute="float16"))["openvino"] == ""
    assert refusals(Spec(cache="keep", threads=2))["onnxruntime"] == "it takes no cache"
    assert refusals(Spec(cache="none"))["onnxruntime"] == ""
    assert refusals(Spec(device="gpu")) == {
        "onnxruntime": "it has no device gpu here; it has cpu",
        "openvino": "",
        "tensorrt": "no TensorRT here: apt install python3-libnvinfer",
    }
    assert refusals(Spec(options={"arena": "off", "provider.x": "1"}))["onnxruntime"] == ""
    assert refusals(Spec(options={"hint": "none"}))["onnxruntime"] == "it has no option hint"
    brought = Spec(device="ggml", options={"provider_library": "/opt/libggml.so"})
    assert refusals(brought)["onnxruntime"] == "", "the device comes with the library"
    assert refusals(replace(brought, options={}))["onnxruntime"] == "it has no device ggml here; it has cpu"


def measured(board, run) -> None:
    """Each engine its own figures and outputs; a third of the greatest apart."""
    spec = run.request.spec
    run.tell(stage={"stage": result_pb2.STAGE_CREATE})
    result = sample_result()
    result.model.CopyFrom(board.stored[run.request.model_sha256].model)
    result.board.CopyFrom(board.board)
    result.spec.CopyFrom(spec)
    result.runtime.name, result.runtime.version = spec.runtime, f"{spec.runtime} 1"
    other = spec.runtime == "openvino"
    result.create_seconds = 0.8 if other else 0.02
    result.input_data.source, result.input_data.seed, result.input_data.sha256 = "seeded", 0, "same"
    del result.outputs[:], result.output_values[:]
    result.output_sha256.clear()
    result.outputs.add(name="y", dtype="float32", shape=[1, 2])
    result.output_sha256["y"] = spec.runtime
    result.output_values.add(name="y", dtype="float32", count=2, step=1, values=[3.0, 2.0 if other else 1.0])
    if other:
        result.caches.add(name="compiled blobs", warm=True)
        result.placement.ops.add(index=0, type="Conv", precision="bfloat16")
    run.finish(result)


@pytest.fixture
def onnx_board(board, tmp_path):
    board.runtimes = ALL
    board.script = measured
    path = tmp_path / "model.onnx"
    path.write_bytes(b"a model that nobody reads")
    return board, path, ("--to", f"127.0.0.1:{board.port}")


def test_every_engine_that_can_runs_the_model_and_is_compared(onnx_board, boardbench) -> None:
    board, path, to = onnx_board
    done = boardbench("push", path, *to, "--runtime", "all", "--quiet")
    assert done.code == 0, done.err
    specs = [run.request.spec for run in board.runs.values()]
    assert [spec.runtime for spec in specs] == ["onnxruntime", "openvino"]
    assert all(spec.output_values == engines.OUTPUT_VALUES for spec in specs)
    table = done.out[done.out.rindex("\nmodel.onnx\n") :].splitlines()[2:]
    assert table[0].split()[:6] == ["engine", "create", "first", "p50", "p90", "memory"]
    assert table[1].startswith("onnxruntime") and "compared with" in table[1]
    assert "800.0 ms (cached)" in table[2]
    assert "bfloat16" in table[2]
    assert "DIFFERS max |Δ| 1.0 (0.33 of the greatest)" in table[2]
    assert table[3].startswith("tensorrt") and "FAILED not_runnable" in table[3]
    assert table[4].strip() == "tensorrt  no TensorRT here: apt install python3-libnvinfer"


def test_engines_take_turns_as_one_group(onnx_board, boardbench) -> None:
    board, path, to = onnx_board
    done = boardbench("push", path, *to, "--runtime", "all", "--interleave", "--format", "json")
    assert done.code == 0, done.err
    groups = [run.request.spec.group for run in board.runs.values()]
    assert [(group.size, group.mode) for group in groups] == [(2, result_pb2.GROUP_MODE_INTERLEAVED)] * 2
    assert groups[0].id == groups[1].id
    document = json.loads(done.out)
    assert [row["runtime"] for row in document["engines"]] == ["onnxruntime", "openvino", "tensorrt"]
    first, second, third = document["engines"]
    assert "difference" not in first
    assert second["difference"]["from"] == "onnxruntime"
    assert second["difference"]["verdict"] == "DIFFERS"
    assert second["difference"]["greatest"] == 1.0
    assert second["computed_in"] == "bfloat16"
    assert third["reason"].startswith("no TensorRT here")
    assert [result["runtime"]["name"] for result in document["results"]] == ["onnxruntime", "openvino"]


def test_one_engine_that_fails_is_a_row_and_not_the_end(onnx_board, boardbench) -> None:
    board, path, to = onnx_board

    def script(board, run):
        if run.request.spec.runtime == "onnxruntime":
            result = sample_result("failed_sigsegv")
            result.runtime.name = "onnxruntime"
            run.finish(result)
        else:
            measured(board, run)

    board.script = script
    done = boardbench("push", path, *to, "--runtime", "all", "--format", "json")
    assert done.code == 0, done.err
    first, second, _ = json.loads(done.out)["engines"]
    assert first["status"] == "RUN_STATUS_FAILED"
    assert first["reason"]
    assert second["status"] == "RUN_STATUS_SUCCEEDED"
    assert "difference" not in second, "the first that measured is what others are compared with"


def test_no_engine_that_can_is_a_failure(onnx_board, boardbench) -> None:
    board, path, to = onnx_board
    board.runtimes = [TENSORRT]
    done = boardbench("push", path, *to, "--runtime", "all", "--format", "json")
    assert done.code == 1
    assert not board.runs
    (row,) = json.loads(done.out)["engines"]
    assert row["runtime"] == "tensorrt"
    board.runtimes = [TFLITE]
    done = boardbench("push", path, *to, "--runtime", "all")
    assert done.code == 1
    assert "knows no engine for model.onnx (onnx)" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concurrent"], "--runtime all compares engines"),
        (["--no-run"], "--no-run sends files only"),
    ],
)
def test_all_engines_at_the_same_time_are_no_comparison(onnx_board, boardbench, arguments, words) -> None:
    _, path, to = onnx_board
    done = boardbench("push", path, *to, "--runtime", "all", *arguments)
    assert done.code == 2
    assert words in done.err


def test_settings_are_in_the_spec(board, boardbench, model_file) -> None:
    done = boardbench(
        *(
            "push",
            model_file,
            "--to",
            f"127.0.0.1:{board.port}",
            "--affinity",
            "0,2-3",
            "--compute",
            "float16",
        ),
        *("--power-mode", "MAXN", "--cache", "renew"),
    )
    assert done.code == 0, done.err
    (run,) = board.runs.values()
    spec = run.request.spec
    assert list(spec.cpu_affinity) == [0, 2, 3]
    assert (spec.compute_precision, spec.power_mode) == ("float16", "MAXN")
    assert spec.cache == result_pb2.CACHE_USE_RENEW


@pytest.mark.parametrize("text", ["", "x", "3-1", "1,1", "-1", "0-99999"])
def test_processors_that_are_none_are_a_usage_error(boardbench, model_file, text) -> None:
    done = boardbench("push", model_file, "--to", "127.0.0.1:1", f"--affinity={text}")
    assert done.code == 2
    assert "--affinity" in done.err


# --- boardbench runtimes


@pytest.fixture
def onnx_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 4])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 4])],
    )
    path = tmp_path / "small.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


def test_engines_for_a_model_are_listed_with_the_default_and_the_reasons(
    board, boardbench, onnx_file
) -> None:
    board.runtimes = ALL
    to = ("--to", f"127.0.0.1:{board.port}")
    done = boardbench("runtimes", onnx_file, *to)
    assert done.code == 0, done.err
    assert "small.onnx (onnx) on 127.0.0.1" in done.out
    assert (
        "✓  onnxruntime  onnxruntime 1.32.0  the default: the first of this list that can run it" in done.out
    )
    assert "✓  openvino" in done.out and "cpu, gpu" in done.out
    assert "✗  tensorrt     no TensorRT here: apt install python3-libnvinfer" in done.out
    assert "tflite" not in done.out
    assert not board.stored, "nothing is sent"
    listed = json.loads(boardbench("runtimes", onnx_file, *to, "--format", "json").out)
    assert [(entry["name"], entry["can_run"], entry["default"]) for entry in listed] == [
        ("onnxruntime", True, True),
        ("openvino", True, False),
        ("tensorrt", False, False),
    ]
    board.runtimes = [TENSORRT]
    assert boardbench("runtimes", onnx_file, *to).code == 1


def test_without_a_model_every_engine_is_listed_with_its_settings_and_options(board, boardbench) -> None:
    board.runtimes = ALL
    done = boardbench("runtimes", "--to", f"127.0.0.1:{board.port}")
    assert done.code == 0, done.err
    assert "cpu · onnx, the default for onnx" in done.out
    assert "settings: threads, cpu_affinity, compute_precision, cache" in done.out
    assert "arena  whether memory is kept" in done.out
    assert "provider.KEY  an option of the provider" in done.out


def test_a_file_of_no_known_format_is_told(board, boardbench, tmp_path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("dear all")
    done = boardbench("runtimes", path, "--to", f"127.0.0.1:{board.port}")
    assert done.code == 1
    assert "letter.txt is of no format that is known here" in done.err


@pytest.mark.parametrize("chosen", [True, False])
def test_the_default_is_said_in_a_line_where_there_is_a_choice(onnx_board, chosen) -> None:
    board, path, _ = onnx_board
    told: list[str] = []

    class Listening(Unwatched):
        def note(self, text: str) -> None:
            told.append(text)

    with Source(path) as source:
        order = Order([source], None, Spec(), detach=False, no_run=False, retry_seconds=1.0, chosen=chosen)
        outcomes = push_all(
            order, [Address("127.0.0.1", board.port)], Listening(), Output(json=True, quiet=True)
        )
    assert [outcome.result.status for outcome in outcomes] == [result_pb2.RUN_STATUS_SUCCEEDED]
    (run,) = board.runs.values()
    assert run.request.spec.runtime == "", "the board chooses, and says in the result what it took"
    expected = [
        "model.onnx: onnxruntime, this board's default for it; openvino can run it, too "
        "(--runtime NAME, or --runtime all)"
    ]
    assert told == (expected if chosen else [])
