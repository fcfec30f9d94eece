"""The row that is evidence of a board: what stood in for it is never called real."""

from __future__ import annotations

from pathlib import Path

import pytest

from boardbench.agent.verify import _row
from boardbench.v1 import agent_pb2, board_pb2, result_pb2


@pytest.mark.parametrize(
    ("emulator", "standins", "how"),
    [
        ("", [], "real: "),
        ("kvm", [], "virtual machine (kvm): "),
        ("qemu", ["qemu"], "emulated (qemu): "),
        ("", ["standin-edgetpu"], "stand-in (standin-edgetpu): "),
        ("kvm", ["recorded-sensors"], "stand-in (recorded-sensors): "),
    ],
)
def test_what_stood_in_is_named(emulator: str, standins: list[str], how: str) -> None:
    described = agent_pb2.DescribeResponse(board=board_pb2.Board(model="Pi", emulator=emulator))
    result = result_pb2.RunResult(status=result_pb2.RUN_STATUS_SUCCEEDED, standins=standins)
    row = _row(described, board_pb2.RuntimeStatus(name="tflite"), "cpu", Path("m.tflite"), result, None)
    assert f"| {how}m.tflite" in row
