"""Bad input through the real client: the right exit code, words that help, and an agent that goes on."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

QUICK = ("--duration", "0.1", "--min-runs", "3", "--warm-up", "0")

# A byte that is repeated in the weights below, so that a hand on the wire finds them in the stream.
FILL = 0xA5


@pytest.fixture(name="house")
def house_that_lives_on(house: Any, demo_onnx: Path) -> Iterator[Any]:
    """The module's collector and agent; after every bad input a good model still runs on them."""
    yield house
    house.push(demo_onnx, *QUICK)


@pytest.fixture
def large_model(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a valid model of so many bytes, filled with one byte."""

    def make(size_bytes: int) -> Path:
        from boardbench.cli.tflite_build import ModelBuilder, Options

        model = ModelBuilder()
        graph = model.subgraph()
        count = size_bytes - 2048
        data = graph.tensor("data", [1, count], scale=0.1)
        weights = graph.tensor("weights", [1, count], scale=0.1, data=bytes([FILL]) * count)
        total = graph.tensor("total", [1, count], scale=0.2)
        graph.operator("ADD", [data, weights], [total], Options("AddOptions"), version=2)
        graph.inputs(data)
        graph.outputs(total)
        path = tmp_path / f"large-{size_bytes}.tflite"
        path.write_bytes(model.finish())
        return path

    return make


def test_truncated(house: Any, demo_tflite: Path, tmp_path: Path) -> None:
    whole = demo_tflite.read_bytes()
    path = tmp_path / "truncated.tflite"
    path.write_bytes(whole[: len(whole) // 2])
    answer = house.push(path, code=None)
    assert answer.code in (1, 2), answer
    assert "truncated.tflite" in answer.err + answer.out
    assert not answer.err.startswith("Traceback")


def test_truncated_onnx(house: Any, demo_onnx: Path, tmp_path: Path) -> None:
    whole = demo_onnx.read_bytes()
    path = tmp_path / "truncated.onnx"
    path.write_bytes(whole[: len(whole) // 2])
    answer = house.push(path, code=None)
    assert answer.code in (1, 2), answer
    assert "truncated.onnx" in answer.err + answer.out


def test_empty(house: Any, tmp_path: Path) -> None:
    path = tmp_path / "empty.tflite"
    path.touch()
    answer = house.push(path, code=2)
    assert "empty.tflite" in answer.err and "empty" in answer.err


def test_missing(house: Any, tmp_path: Path) -> None:
    answer = house.push(tmp_path / "nothing.tflite", code=2)
    assert "nothing.tflite" in answer.err


def test_mislabelled(house: Any, demo_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "really-onnx.tflite"
    shutil.copy(demo_onnx, path)
    answer = house.push(path, code=None)
    assert answer.code in (1, 2), answer
    assert "onnx" in answer.err + answer.out and "tflite" in answer.err + answer.out


def test_no_model_at_all(house: Any, tmp_path: Path) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0" + os.urandom(5000))
    answer = house.push(path, code=None)
    assert answer.code in (1, 2), answer
    assert "holiday.jpg" in answer.err + answer.out


def test_digest_mismatch(programs: Any, demo_tflite: Path) -> None:
    """The digest is changed on the way: what arrives is not what was promised."""
    agent = programs.agent()
    wire = programs.wire(agent.address)
    digest = hashlib.sha256(demo_tflite.read_bytes()).hexdigest().encode()
    other = hashlib.sha256(b"something else").hexdigest().encode()
    changed = []

    def change(block: bytes) -> bytes:
        if digest in block:
            changed.append(True)
        return block.replace(digest, other)

    wire.change = change
    answer = programs.client("push", demo_tflite, "--to", wire.address, code=1)
    assert changed, "the digest was not seen on the wire"
    assert "sha256" in answer.err.lower() or "sha-256" in answer.err.lower(), answer
    wire.change = None
    programs.client("push", demo_tflite, "--to", wire.address, *QUICK)
    assert not list(agent.data_dir.rglob("*.part"))


def test_a_corrupt_chunk_is_sent_again(programs: Any, large_model: Callable[[int], Path]) -> None:
    """One damaged byte: the chunk's CRC tells, the client sends it again, the run succeeds."""
    agent = programs.agent()
    wire = programs.wire(agent.address)
    damaged = []

    def change(block: bytes) -> bytes:
        place = block.find(bytes([FILL]) * 64)
        if damaged or place < 0:
            return block
        damaged.append(place)
        return block[: place + 32] + b"\0" + block[place + 33 :]

    wire.change = change
    model = large_model(6_000_000)
    answer = programs.client("push", model, "--to", wire.address, "--format", "json", *QUICK)
    assert damaged
    assert hashlib.sha256(model.read_bytes()).hexdigest() in answer.out


def test_a_wire_that_always_corrupts(programs: Any, large_model: Callable[[int], Path]) -> None:
    agent = programs.agent()
    wire = programs.wire(agent.address)

    def change(block: bytes) -> bytes:
        place = block.find(bytes([FILL]) * 64)
        return block if place < 0 else block[: place + 32] + b"\0" + block[place + 33 :]

    wire.change = change
    answer = programs.client("push", large_model(3_000_000), "--to", wire.address, *QUICK, code=1)
    assert "crc" in answer.err.lower(), answer
    assert "network" in answer.err.lower(), answer


def test_over_quota(programs: Any, demo_onnx: Path, large_model: Callable[[int], Path]) -> None:
    agent = programs.agent(environment={"BOARDBENCH_AGENT_STORE_LIMIT_BYTES": "1000000"})
    model = large_model(3_000_000)
    answer = programs.client("push", model, "--to", agent.address, *QUICK, code=1)
    assert model.name in answer.err, answer
    assert "limit" in answer.err.lower() or "at most" in answer.err.lower() or "hold" in answer.err.lower(), (
        answer
    )
    programs.client("push", demo_onnx, "--to", agent.address, *QUICK)


def test_the_least_recently_used_makes_room(programs: Any, large_model: Callable[[int], Path]) -> None:
    agent = programs.agent(environment={"BOARDBENCH_AGENT_STORE_LIMIT_BYTES": "5000000"})
    models = [large_model(size) for size in (2_000_000, 2_100_000, 2_200_000)]
    for model in models:
        programs.client("push", model, "--to", agent.address, *QUICK)
    kept = programs.client("models", "--to", agent.address, "--format", "json", code=None)
    assert models[2].name in kept.out and models[1].name in kept.out, kept
    assert models[0].name not in kept.out, kept


def test_disk_full(
    programs: Any, small_disk: Callable[[int], Path], demo_onnx: Path, large_model: Callable[[int], Path]
) -> None:
    disk = small_disk(8_000_000)
    agent = programs.agent(
        data_dir=disk / "agent", environment={"BOARDBENCH_AGENT_STORE_FREE_FLOOR_BYTES": "0"}
    )
    model = large_model(12_000_000)
    answer = programs.client("push", model, "--to", agent.address, *QUICK, code=1)
    assert model.name in answer.err, answer
    assert "disk" in answer.err.lower() or "free" in answer.err.lower(), answer
    programs.client("push", demo_onnx, "--to", agent.address, *QUICK)


def test_a_disk_that_others_fill_meanwhile(
    programs: Any,
    small_disk: Callable[[int], Path],
    small_disks: ModuleType,
    demo_onnx: Path,
    large_model: Callable[[int], Path],
) -> None:
    """The room was there when the transfer began, and is gone in the middle of it."""
    disk = small_disk(12_000_000)
    agent = programs.agent(
        data_dir=disk / "agent", environment={"BOARDBENCH_AGENT_STORE_FREE_FLOOR_BYTES": "0"}
    )
    wire = programs.wire(agent.address)
    wire.hold_after = 3_000_000
    model = large_model(8_000_000)
    client = programs.client.begin("push", model, "--to", wire.address, *QUICK)
    assert wire.held.wait(30)
    filler = disk / "filler"
    small_disks.fill(filler)
    wire.release()
    assert client.process.wait(90) == 1, client.log()
    assert model.name in client.log() and ("disk" in client.log() or "room" in client.log()), client.log()
    filler.unlink()
    programs.client("push", demo_onnx, "--to", agent.address, *QUICK)


def test_unknown_runtime(house: Any, demo_tflite: Path) -> None:
    answer = house.push(demo_tflite, "--runtime", "abacus", code=None)
    assert answer.code in (1, 2), answer
    assert "abacus" in answer.err + answer.out
    assert "tflite" in answer.err + answer.out, "it says which there are"


def test_a_runtime_that_does_not_take_the_format(house: Any, demo_tflite: Path) -> None:
    answer = house.push(demo_tflite, "--runtime", "onnxruntime", code=1)
    assert "tflite" in answer.err + answer.out and "onnx" in answer.err + answer.out


def test_unknown_device(house: Any, demo_tflite: Path) -> None:
    answer = house.push(demo_tflite, "--device", "quantum", code=1)
    assert "quantum" in answer.err + answer.out and "cpu" in answer.err + answer.out


def test_unknown_option(house: Any, demo_tflite: Path) -> None:
    answer = house.push(demo_tflite, "--option", "warp=9", code=1)
    assert "warp" in answer.err + answer.out


def test_an_operation_that_the_engine_lacks(house: Any, shared_models: Path) -> None:
    answer = house.push(shared_models / "model_invoking_error.tflite", "--format", "json", code=1)
    result = answer.json
    assert result["status"] == "RUN_STATUS_FAILED"
    assert result["error"]["code"] == "model_rejected"
    assert result["error"]["stage"] == "STAGE_CREATE"
    assert "fake-op-double" in result["error"]["message"]


def test_a_compiled_model_without_its_accelerator(house: Any, shared_models: Path) -> None:
    answer = house.push(shared_models / "mobilenet_v1_0.25_128_quant_edgetpu.tflite", code=1)
    assert "edgetpu-custom-op" in answer.out + answer.err


def test_wrong_shape_in_npz(house: Any, demo_onnx: Path, tmp_path: Path) -> None:
    np: Any = pytest.importorskip("numpy")
    path = tmp_path / "wrong.npz"
    np.savez(path, image=np.zeros((1, 3, 17, 160), np.float32))
    answer = house.push(demo_onnx, "--inputs", path, code=1)
    text = answer.out + answer.err
    assert "image" in text and "17" in text and "160" in text


def test_wrong_dtype_in_npz(house: Any, demo_tflite: Path, tmp_path: Path) -> None:
    np: Any = pytest.importorskip("numpy")
    path = tmp_path / "wrong.npz"
    np.savez(path, **{"serving_default_image:0": np.zeros((1, 192, 192, 3), np.float64)})
    answer = house.push(demo_tflite, "--inputs", path, code=1)
    text = answer.out + answer.err
    assert "float64" in text and "int8" in text


def test_wrong_name_in_npz(house: Any, demo_onnx: Path, tmp_path: Path) -> None:
    np: Any = pytest.importorskip("numpy")
    path = tmp_path / "wrong.npz"
    np.savez(path, picture=np.zeros((1, 3, 160, 160), np.float32))
    answer = house.push(demo_onnx, "--inputs", path, code=1)
    assert "picture" in answer.out + answer.err and "image" in answer.out + answer.err


def test_a_model_as_inputs(house: Any, demo_onnx: Path) -> None:
    answer = house.push(demo_onnx, "--inputs", demo_onnx, code=None)
    assert answer.code in (1, 2), answer
    assert "npz" in (answer.out + answer.err)


def test_python_objects_in_npz_are_not_unpickled(house: Any, demo_onnx: Path, tmp_path: Path) -> None:
    np: Any = pytest.importorskip("numpy")
    trace = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (trace,))

    path = tmp_path / "hostile.npz"
    np.savez(path, image=np.array([Hostile()], dtype=object))
    answer = house.push(demo_onnx, "--inputs", path, code=1)
    assert "object" in answer.out + answer.err
    assert not trace.exists()


def test_a_contradiction_on_the_command_line(house: Any, demo_onnx: Path) -> None:
    answer = house.push(demo_onnx, "--min-runs", "10", "--max-runs", "5", code=2)
    assert "--min-runs" in answer.err


def test_an_open_shape_that_nobody_fills(house: Any, tmp_path: Path) -> None:
    onnx: Any = pytest.importorskip("onnx")
    helper = onnx.helper
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", ["data"], ["out"])],
            "open",
            [helper.make_tensor_value_info("data", onnx.TensorProto.FLOAT, ["batch", 8])],
            [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["batch", 8])],
        ),
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17)],
    )
    path = tmp_path / "open.onnx"
    path.write_bytes(model.SerializeToString())
    answer = house.push(path, *QUICK, code=1)
    assert "--shape" in answer.out + answer.err and "data" in answer.out + answer.err
    house.push(path, "--shape", "data=4,8", *QUICK)


def test_nobody_there(programs: Any, demo_onnx: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    answer = programs.client("push", demo_onnx, "--to", f"127.0.0.1:{port}", code=3)
    assert f"127.0.0.1:{port}" in answer.err and "boardbench-agent serve" in answer.err


def test_somebody_else_there(house: Any, demo_onnx: Path) -> None:
    """The collector's port instead of the agent's."""
    answer = house.client("push", demo_onnx, "--to", house.collector.address, code=3)
    assert house.collector.address in answer.err
    answer = house.client("push", demo_onnx, "--to", house.collector.http, code=3)
    assert house.collector.http in answer.err


def test_a_name_that_is_a_weapon(
    programs: Any, prometheus: dict[str, str], demo_onnx: Path, tmp_path: Path, eventually: Any
) -> None:
    """Quotes, line ends, escape sequences, right-to-left marks: none reaches a terminal or a label raw."""
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    path = tmp_path / 'a"b\\c\n\x1b[31m{x="y"} 1\u202e.onnx'
    shutil.copy(demo_onnx, path)
    answer = programs.client("push", path, "--to", agent.address, *QUICK)
    assert "\x1b" not in answer.out + answer.err
    assert "\u202e" not in answer.out + answer.err
    eventually("the result is there", collector.results)
    exposition = collector.get("/metrics")
    assert "\x1b" not in exposition
    done = subprocess.run(
        [prometheus["promtool"], "check", "metrics"],
        input=exposition,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    listed = programs.client("results", "--collector", collector.address)
    assert "\x1b" not in listed.out + listed.err
    page = collector.get("/")
    assert "\x1b" not in page and 'a"b' not in page
