"""Which boards are meant by which words."""

from __future__ import annotations

import pytest

from boardbench.collector.errors import InvalidRequest
from boardbench.collector.terms import _TESTS, BOARDS, MEANINGS, chosen, complaint, labels_of, parse
from boardbench.v1 import board_pb2, collector_pb2

# As the kernels' device trees have them: arch/arm64/boot/dts and arch/arm/boot/dts, property "model".
MODELS = {
    "pi3": "Raspberry Pi 3 Model B Plus Rev 1.3",
    "pi4": "Raspberry Pi 4 Model B Rev 1.5",
    "pi5": "Raspberry Pi 5 Model B Rev 1.0",
    "pi400": "Raspberry Pi 400 Rev 1.0",
    "cm4": "Raspberry Pi Compute Module 4 Rev 1.1",
    "zero": "Raspberry Pi Zero W Rev 1.1",
    "zero2": "Raspberry Pi Zero 2 W Rev 1.0",
    "nano": "NVIDIA Jetson Nano Developer Kit",
    "orin-nano": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    "orin-nx": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
    "agx-orin": "NVIDIA Jetson AGX Orin Developer Kit",
    "xavier": "NVIDIA Jetson AGX Xavier Developer Kit",
    "xavier-nx": "NVIDIA Jetson Xavier NX Developer Kit",
    "coral": "Freescale i.MX8MQ Phanbell",
    "rock5b": "Radxa ROCK 5B",
}


def device(
    model: str = MODELS["pi5"],
    *,
    labels: dict[str, str] | None = None,
    operator: dict[str, str] | None = None,
    up: bool = True,
) -> collector_pb2.Device:
    """A board as the collector knows it."""
    made = collector_pb2.Device(
        board=board_pb2.Board(
            device_id="shelf-3",
            hostname="pi.lab",
            model=model,
            soc="bcm2712",
            architecture="aarch64",
            os="Debian GNU/Linux 12 (bookworm)",
            kernel="6.6.31+rpt-rpi-2712",
            memory_bytes=8_455_000_000,
            labels=labels or {},
        ),
        agent_version="0.3.1",
        labels=operator or {},
        up=up,
        sensors=["thermal", "hwmon"],
    )
    made.board.accelerators.add(kind="tpu", name="Google Coral USB Accelerator")
    made.runtimes.add(name="tflite", available=True)
    made.runtimes.add(name="onnxruntime", available=False)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_short_name_finds_its_boards_and_no_others(name: str) -> None:
    found = {other for other, model in MODELS.items() if chosen([device(model)], parse([f"board={name}"]))}
    assert found == {name} | {"pi4": {"pi400", "cm4"}}.get(name, set())


def test_families_have_short_names() -> None:
    for family, members in {
        "pi": {"pi3", "pi4", "pi5", "pi400", "cm4", "zero", "zero2"},
        "jetson": {"nano", "orin-nano", "orin-nx", "agx-orin", "xavier", "xavier-nx"},
    }.items():
        found = {
            name for name, model in MODELS.items() if chosen([device(model)], parse([f"board={family}"]))
        }
        assert found == members


@pytest.mark.parametrize(
    "term",
    [
        "board=pi5",
        "board=PI5",
        "board=rpi5",
        "board=pi-5",
        "board=Raspberry Pi 5",
        "board=raspberry pi 5 model b",
        "board=Raspberry Pi 5 Model B Rev 1.0",
        "board=raspberry*",
        "board=pi*",
        "BOARD = pi5 ",
        "board!=pi4",
        "soc=bcm2712",
        "soc=bcm*",
        "architecture=arm64",
        "architecture=aarch64",
        "os=debian",
        "os=debian*",
        "os=bookworm",
        "kernel=6.6*",
        "accelerator=tpu",
        "accelerator=coral",
        "accelerator=*usb*",
        "accelerator!=none",
        "runtime=tflite",
        "runtime=TFL*",
        "runtime!=onnxruntime",
        "device_id=shelf-*",
        "hostname=pi.lab",
        "up=true",
        "up!=no",
        "lab=zurich",
        "lab=Z*h",
        "lab!=bern",
        "rack!=3",
        "sensor=hwmon",
        "agent_version=0.3.*",
        "memory=8GB",
        "memory=8",
        "memory!=4 GiB",
        "problem=none",
    ],
)
def test_what_a_board_meets(term: str) -> None:
    assert chosen([device(labels={"lab": "zurich"})], parse([term]))


@pytest.mark.parametrize(
    "term",
    [
        "board=pi",
        "board=pi4",
        "board=pi 50",
        "board=5",
        "board=nano",
        "board!=raspberry*",
        "soc=bcm",
        "architecture=x64",
        "os=ubuntu",
        "os=book",
        "accelerator=gpu",
        "accelerator=none",
        "runtime=onnxruntime",
        "runtime=tf",
        "device_id=shelf",
        "device_id!=shelf-3",
        "up=false",
        "lab=zur",
        "lab!=zurich",
        "rack=*",
        "memory=4GB",
        "problem=*",
        "problem!=none",
        "up!=true",
    ],
)
def test_what_a_board_does_not_meet(term: str) -> None:
    # "pi" and a lone "5" are in its name, too.
    met = {"board=pi", "board=5"}
    found = bool(chosen([device(labels={"lab": "zurich"})], parse([term])))
    assert found is (term in met)


def test_every_term_must_hold() -> None:
    boards = [device(), device(MODELS["pi4"]), device(up=False)]
    assert chosen(boards, parse(["board=pi5", "up=true"])) == (boards[0],)
    assert chosen(boards, ()) == tuple(boards)


def test_the_operators_labels_go_before_the_agents() -> None:
    board = device(labels={"lab": "zurich", "rack": "3"}, operator={"lab": "bern"})
    assert labels_of(board) == {"lab": "bern", "rack": "3"}
    assert chosen([board], parse(["lab=bern", "rack=3"]))
    assert not chosen([board], parse(["lab=zurich"]))


@pytest.mark.parametrize(
    "text", ["", "pi5", "=pi5", "board", "board=", "board= ", "bo ard=x", "lab\n=", "!=x"]
)
def test_what_is_no_term(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no term; write NAME=VALUE"):
        parse([text])


def test_up_is_true_or_false() -> None:
    with pytest.raises(InvalidRequest, match="up=true or up=false"):
        parse(["up=maybe"])


def test_memory_is_a_size() -> None:
    with pytest.raises(InvalidRequest, match="as memory=8GB"):
        parse(["memory=much"])


def test_boards_are_found_by_their_problems() -> None:
    board = device()
    board.problems.append("its clock is 60 min ahead: set it")
    assert chosen([board], parse(["problem=clock", "problem!=none", "problem=*ahead*"]))
    assert not chosen([board], parse(["problem=spool"]))


def test_terms_are_bounded() -> None:
    with pytest.raises(InvalidRequest, match="at most 64"):
        parse(["a=b"] * 65)


def test_patterns_can_not_be_regular_expressions() -> None:
    assert not chosen([device(labels={"lab": "zurich"})], parse(["lab=.+"]))
    assert chosen([device(labels={"lab": "a.b"})], parse(["lab=a.b"]))


def test_it_is_told_why_no_board_is_meant() -> None:
    boards = [device(labels={"lab": "zurich", "Board": "jetson"}), device(MODELS["pi4"])]
    for terms, reason in (
        (["baord=pi5"], "no board has a label 'baord'"),
        (["board=orin-nx", "up=true"], "none of 2 boards meets board=orin-nx"),
        (["board=pi4", "lab=zurich"], "none of 2 boards meets board=pi4 and lab=zurich"),
        (
            ["board=jetson"],
            "none of 2 boards meets board=jetson; 1 has it as a label, which is not looked at",
        ),
    ):
        parsed = parse(terms)
        assert not chosen(boards, parsed)
        assert reason in complaint(boards, parsed)
    assert "no board has ever reported" in complaint([], ())


def test_short_names_are_there_once() -> None:
    names = [name for name, _, _ in BOARDS]
    assert len(names) == len(set(names))


def test_every_name_is_explained() -> None:
    assert MEANINGS.keys() == _TESTS.keys()
