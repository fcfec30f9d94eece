from __future__ import annotations

import pytest

from boardbench.agent.bench.crossings import Part, between, in_order
from boardbench.agent.domain import Crossings

SIZE = {"a": 1, "b": 10, "c": 100, "d": 1000, "e": 10000}


def part(at: int, accelerated: bool, inputs: str, outputs: str) -> Part:
    return Part((at,), accelerated, tuple(inputs), tuple(outputs))


def test_what_goes_in_and_comes_out_of_the_model_is_no_crossing() -> None:
    assert between([part(0, True, "a", "b")], SIZE.get) == Crossings(0, 0)
    assert between([], SIZE.get) == Crossings(0, 0)


def test_there_and_back_again() -> None:
    parts = [part(0, False, "a", "b"), part(1, True, "b", "c"), part(2, False, "c", "d")]
    assert between(parts, SIZE.get) == Crossings(2, 110)


def test_a_tensor_leaves_once_and_enters_for_each_that_reads_it() -> None:
    leaves = [part(0, True, "a", "b"), part(1, False, "b", "c"), part(2, False, "bc", "d")]
    assert between(leaves, SIZE.get) == Crossings(1, 10)
    enters = [part(0, False, "a", "b"), part(1, True, "b", "c"), part(2, True, "bbc", "d")]
    assert between(enters, SIZE.get) == Crossings(1, 20)


def test_neighbours_on_one_side_do_not_cross() -> None:
    assert between([part(0, True, "a", "b"), part(1, True, "b", "c")], SIZE.get) == Crossings(0, 0)


def test_a_size_that_is_not_known_leaves_the_count() -> None:
    parts = [part(0, True, "a", "?"), part(1, False, "?", "b")]
    assert between(parts, SIZE.get) == Crossings(1, None)


def test_parts_run_turn_by_turn_of_one_kind() -> None:
    # Two branches, each with a part on either side: the interpreter takes all of one kind before it changes.
    parts = [
        part(0, True, "a", "b"),
        part(1, False, "b", "c"),
        part(2, True, "a", "d"),
        part(3, False, "d", "e"),
    ]
    assert [each.ops[0] for each in in_order(parts)] == [0, 2, 1, 3]
    assert between(in_order(parts), SIZE.get).count == 1


def test_the_kind_of_the_first_that_is_ready_begins() -> None:
    parts = [part(0, False, "a", "b"), part(1, True, "a", "c"), part(2, True, "bc", "d")]
    assert [each.ops[0] for each in in_order(parts)] == [0, 1, 2]


def test_parts_that_wait_for_each_other_are_no_graph() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        in_order([part(0, True, "a", "b"), part(1, True, "b", "a")])
