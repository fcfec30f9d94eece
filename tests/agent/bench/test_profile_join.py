"""Which operation a row of a profile stands for."""

from __future__ import annotations

import pytest

from boardbench.agent.bench.runtimes import xnnpack_names
from boardbench.agent.bench.runtimes.litert_profiler import Event, NoProfiler
from boardbench.agent.bench.runtimes.tflite_profile import joined_places

CONV, DWCONV, GEMM = (
    "Convolution (NHWC, QU8) IGEMM",
    "Convolution (NHWC, QU8) DWConv",
    "Fully Connected (NC, QU8) GEMM",
)


def test_lists_that_fit_are_joined_one_by_one() -> None:
    types = ["CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D", "ADD", "RESHAPE"]
    names = [CONV, DWCONV, GEMM, "Add (ND)", "Static Reshape (NC)"]
    assert xnnpack_names.side_by_side(types, names) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}


def test_what_was_computed_with_what_is_before_it_has_no_time_of_its_own() -> None:
    types = ["CONV_2D", "RELU", "DEPTHWISE_CONV_2D"]
    assert xnnpack_names.side_by_side(types, [CONV, DWCONV]) == {0: 0, 2: 1}


def test_what_was_added_belongs_to_nobody() -> None:
    types = ["CONV_2D", "ADD"]
    names = [CONV, "Transpose (ND, X8)", "Add (ND)"]
    assert xnnpack_names.side_by_side(types, names) == {0: 0, 1: 2}


def test_two_in_one_under_a_name_that_says_nothing_are_both_left_out() -> None:
    """As movenet's MUL and SUB, which become a table."""
    types = ["MUL", "SUB", "CONV_2D", "DEPTHWISE_CONV_2D"]
    names = ["Invalid Unary Op", CONV, DWCONV]
    assert xnnpack_names.side_by_side(types, names) == {2: 1, 3: 2}


def test_a_name_that_says_nothing_is_taken_where_nothing_else_can_be_meant() -> None:
    assert xnnpack_names.side_by_side(["CONV_2D", "ADD"], [CONV, "Something New (ND)"]) == {0: 0, 1: 1}


def test_nothing_is_joined_where_nothing_fits() -> None:
    assert xnnpack_names.side_by_side(["SOFTMAX"], [CONV, "Add (ND)"]) == {}
    assert xnnpack_names.side_by_side([], [CONV]) == {}
    assert xnnpack_names.side_by_side(["SOFTMAX"], []) == {}


def test_a_list_too_long_to_lay_side_by_side_is_left_out() -> None:
    assert xnnpack_names.side_by_side(["ADD"] * 1500, ["Add (ND)"] * 1499) == {}
    assert len(xnnpack_names.side_by_side(["ADD"] * 1500, ["Add (ND)"] * 1500)) == 1500


def in_delegate(index: int, name: str) -> Event:
    return Event(name, index, True, 1e-6)


def plain(index: int, name: str) -> Event:
    return Event(name, index, False, 1e-6)


def test_pieces_of_the_delegate_begin_anew() -> None:
    events = [
        in_delegate(0, CONV),
        in_delegate(1, DWCONV),
        plain(2, "AVERAGE_POOL_2D"),
        in_delegate(0, GEMM),
        in_delegate(0, "Add (ND)"),  # the next piece, with nothing between
        plain(5, "SOFTMAX"),
    ]
    types = ["CONV_2D", "DEPTHWISE_CONV_2D", "AVERAGE_POOL_2D", "CONV_2D", "ADD", "SOFTMAX"]
    groups = [[0, 1], [3], [4]]
    assert joined_places(events, types, groups) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5}


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([in_delegate(0, CONV)], "other operations to plain kernels"),
        ([in_delegate(0, CONV), plain(0, "SOFTMAX")], "other operations to plain kernels"),
        ([in_delegate(0, CONV), plain(1, "ADD")], "other operations to plain kernels"),
        ([plain(1, "SOFTMAX")], "works in 0 pieces under it, and in 1"),
        ([in_delegate(0, CONV), plain(1, "SOFTMAX"), in_delegate(0, CONV)], "works in 2 pieces"),
    ],
)
def test_a_profile_of_something_else_is_refused(events: list[Event], said: str) -> None:
    with pytest.raises(NoProfiler, match=said):
        joined_places(events, ["CONV_2D", "SOFTMAX"], [[0]])
