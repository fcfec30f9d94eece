from __future__ import annotations

import pytest

from boardbench.agent.bench import shapes
from boardbench.agent.bench.runtime import InputsRejected
from boardbench.agent.domain import TensorInfo

IMAGE = TensorInfo("image", "float32", (-1, 3, -1, -1))
MASK = TensorInfo("mask", "int64", (-1,))
FIXED = TensorInfo("fixed", "uint8", (1, 4))


def settle(*inputs: TensorInfo, available: int = 1 << 40, **given: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tensor.shape for tensor in shapes.settle(inputs, given, available_bytes=available)]


def test_closed_inputs_need_nothing() -> None:
    assert settle(FIXED) == [(1, 4)]


def test_open_sizes_are_settled_by_name_or_position() -> None:
    assert settle(IMAGE, MASK, image=(2, 3, 8, 8), mask=(5,)) == [(2, 3, 8, 8), (5,)]
    assert settle(IMAGE, MASK, image=(2, 3, 8, 8), arr_1=(5,)) == [(2, 3, 8, 8), (5,)]


def test_a_name_wins_over_a_position_of_the_same_spelling() -> None:
    first, second = TensorInfo("arr_1", "int64", (-1,)), TensorInfo("b", "int64", (-1,))
    assert settle(first, second, arr_1=(2,), b=(3,)) == [(2,), (3,)]


def test_all_that_is_missing_is_listed_with_the_exact_options() -> None:
    with pytest.raises(InputsRejected) as caught:
        settle(IMAGE, MASK, FIXED)
    assert str(caught.value) == (
        "the model leaves sizes open in image float32 [?, 3, ?, ?], mask int64 [?]; give them, for example "
        "--shape 'image=1,3,224,224' --shape 'mask=1'"
    )


def test_a_shape_may_repeat_what_is_closed_but_not_contradict_it() -> None:
    assert settle(FIXED, fixed=(1, 4)) == [(1, 4)]
    with pytest.raises(InputsRejected, match=r"fixed is uint8 \[1, 4\] in the model; \[2, 4\] does not fit"):
        settle(FIXED, fixed=(2, 4))


@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 4, 8, 8), (0, 3, 8, 8), (-1, 3, 8, 8), (-2, 3, 8, 8), ()])
def test_a_shape_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputsRejected, match="does not fit it"):
        settle(IMAGE, image=shape)


def test_an_unknown_name_is_refused_with_the_inputs_that_there_are() -> None:
    with pytest.raises(
        InputsRejected, match=r"no input 'img'; its inputs are image float32 \[\?, 3, \?, \?\]"
    ):
        settle(IMAGE, img=(1, 3, 8, 8))


def test_an_input_named_twice_is_refused() -> None:
    with pytest.raises(InputsRejected, match="given twice"):
        settle(MASK, mask=(1,), arr_0=(2,))


def test_data_that_do_not_fit_twice_into_memory_are_refused() -> None:
    assert settle(FIXED, available=8) == [(1, 4)]
    with pytest.raises(InputsRejected, match=r"need 8 bytes.* 7 bytes of memory are available"):
        settle(FIXED, available=7)
    with pytest.raises(InputsRejected, match="bytes of memory are available"):
        settle(IMAGE, image=(2**20, 3, 2**20, 2**20))


def test_a_size_beyond_32_bits_is_refused() -> None:
    with pytest.raises(InputsRejected, match="is above 2147483647"):
        settle(MASK, mask=(2**31,), available=1 << 62)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("bool", 1), ("int8", 1), ("uint16", 2), ("float16", 2), ("float32", 4), ("int64", 8), ("complex64", 8),
     ("complex128", 16), ("bfloat16", 2), ("int4", 1)],
)  # fmt: skip
def test_element_sizes(dtype: str, size: int) -> None:
    assert shapes.item_bytes(dtype) == size


def test_a_batch_is_the_first_size_of_every_input() -> None:
    batch = {shapes.EVERY: (8,)}
    open_batch = TensorInfo("x", "float32", (-1, 3))
    assert settle(open_batch, MASK, **batch) == [(8, 3), (8,)]
    assert settle(TensorInfo("x", "float32", (8, 3)), **batch) == [(8, 3)]
    # Other sizes that are open are given as always.
    assert settle(IMAGE, image=(8, 3, 4, 4), **batch) == [(8, 3, 4, 4)]
    with pytest.raises(InputsRejected, match=r"open in image float32 \[8, 3, \?, \?\]"):
        settle(IMAGE, **batch)


@pytest.mark.parametrize("shape", [(1, 3), ()])
def test_a_batch_that_the_model_has_not_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputsRejected, match=r"a batch of 8 does not fit input x.*export"):
        settle(TensorInfo("x", "float32", shape), **{shapes.EVERY: (8,)})


def test_a_batch_that_contradicts_the_data_is_refused() -> None:
    with pytest.raises(InputsRejected, match=r"x is given as \[4, 3\] and the batch as 8"):
        settle(TensorInfo("x", "float32", (-1, 3)), x=(4, 3), **{shapes.EVERY: (8,)})
