from __future__ import annotations

import hashlib
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from boardbench.agent.bench import inputs, memory
from boardbench.agent.bench.runtime import InputsRejected
from boardbench.agent.domain import Quantization, TensorInfo

ALL_TYPES = (*inputs.WHOLE_RANGE, *inputs.SMALL_INTEGERS, *inputs.FLOATS, "bool", "str")


def tensor(dtype: str, *shape: int, name: str = "x") -> TensorInfo:
    return TensorInfo(name, dtype, shape)


def seeded(dtype: str, *shape: int, seed: int = 0) -> Any:
    return inputs.seeded([tensor(dtype, *shape)], seed)["x"]


@pytest.mark.parametrize("dtype", ALL_TYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 7), (0,), (2, 0)])
def test_shape_and_type_are_those_asked_for(dtype: str, shape: tuple[int, ...]) -> None:
    made = seeded(dtype, *shape)
    assert made.shape == shape
    assert made.flags.c_contiguous
    assert made.dtype == (np.dtype(object) if dtype == "str" else np.dtype(dtype))
    assert dtype != "str" or all(isinstance(word, str) and len(word) == 8 for word in made.ravel())


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_eight_bits_use_the_whole_range(dtype: str) -> None:
    limits = np.iinfo(dtype)
    made = seeded(dtype, 100_000)
    assert (made.min(), made.max()) == (limits.min, limits.max)
    counts = np.bincount(made.astype(np.int64) - limits.min, minlength=256)
    assert counts.min() > 250  # of 390 on average: none is left out or favoured
    assert counts.max() < 550


@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_sixteen_bits_use_the_whole_range(dtype: str) -> None:
    limits = np.iinfo(dtype)
    made = seeded(dtype, 100_000)
    assert made.min() < limits.min + 100
    assert made.max() > limits.max - 100


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_lie_in_zero_to_one_without_reaching_it(dtype: str) -> None:
    made = seeded(dtype, 100_000)
    assert made.min() >= 0
    assert made.max() < 1
    assert made.astype(np.float64).mean() == pytest.approx(0.5, abs=0.01)
    assert len(np.unique(made)) > (1500 if dtype == "float16" else 90_000)


def test_complex_numbers_have_two_random_parts() -> None:
    made = seeded("complex64", 1000)
    assert abs(np.corrcoef(made.real, made.imag)[0, 1]) < 0.2
    assert 0 <= made.imag.min() <= made.imag.max() < 1


@pytest.mark.parametrize("dtype", inputs.SMALL_INTEGERS)
def test_indices_are_zero_or_one(dtype: str) -> None:
    assert set(np.unique(seeded(dtype, 1000))) == {0, 1}


def test_seeded_data_are_the_same_on_every_machine_and_version() -> None:
    # Fixed once: results of different boards and years are compared by this digest.
    every = [tensor(dtype, 3, 5, name=dtype) for dtype in ALL_TYPES]
    assert inputs.digest(inputs.seeded(every, 7)) == (
        "986a30c922615de71bf1f26915de2e09a7c099b6e42b364ea93f274a5adc477a"
    )


@given(st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=20)
def test_equal_seeds_give_equal_data_and_others_do_not(seed: int) -> None:
    assert np.array_equal(seeded("float32", 16, seed=seed), seeded("float32", 16, seed=seed))
    assert not np.array_equal(
        seeded("float32", 16, seed=seed), seeded("float32", 16, seed=(seed + 1) % 2**64)
    )


def test_inputs_differ_from_each_other_and_do_not_depend_on_their_neighbours() -> None:
    first, second = tensor("uint8", 64, name="a"), tensor("uint8", 64, name="b")
    both = inputs.seeded([first, second], 0)
    assert not np.array_equal(both["a"], both["b"])
    assert np.array_equal(inputs.seeded([tensor("uint8", 8, name="a"), second], 0)["b"], both["b"])


def test_large_inputs_are_made_in_parts_without_a_seam() -> None:
    words = inputs._WORDS
    made = seeded("float64", 2 * words + 3)
    alone = np.random.PCG64(np.random.SeedSequence(entropy=0, spawn_key=(0,))).random_raw(2 * words + 3)
    assert np.array_equal(made, (alone >> np.uint64(11)) * 2.0**-53)
    assert np.array_equal(seeded("uint8", 8 * words + 5), alone.astype("<u8").view(np.uint8)[: 8 * words + 5])


def test_a_type_without_data_is_refused() -> None:
    with pytest.raises(InputsRejected, match="x is of type bfloat16, for which no data can be made"):
        seeded("bfloat16", 1)


def test_quantisation_does_not_narrow_the_range() -> None:
    quantised = TensorInfo("x", "uint8", (1000,), Quantization(0.5, 128))
    assert np.array_equal(inputs.seeded([quantised], 0)["x"], seeded("uint8", 1000))


# -- the user's file --------------------------------------------------------------------------------

IMAGE, IDS = TensorInfo("image", "float32", (1, 2, 2)), TensorInfo("ids", "int64", (3,))
GOOD = {"image": np.arange(4, dtype=np.float32).reshape(1, 2, 2), "ids": np.array([7, 8, 9])}


def saved(folder: Path, *positional: Any, **named: Any) -> Path:
    path = folder / "inputs.npz"
    np.savez(path, *positional, **named)
    return path


def refused(path: Path, *model: TensorInfo) -> str:
    with pytest.raises(InputsRejected) as caught:
        inputs.from_file(model or (IMAGE, IDS), path)
    return str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_by_name(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "inputs.npz", **GOOD)
    feeds = inputs.from_file((IMAGE, IDS), tmp_path / "inputs.npz")
    assert list(feeds) == ["image", "ids"]
    assert all(np.array_equal(feeds[name], GOOD[name]) for name in GOOD)


def test_arrays_come_by_position(tmp_path: Path) -> None:
    feeds = inputs.from_file((IMAGE, IDS), saved(tmp_path, GOOD["image"], GOOD["ids"]))
    assert np.array_equal(feeds["ids"], GOOD["ids"])


def test_names_with_slashes_and_colons_work(tmp_path: Path) -> None:
    name = "serving_default/x:0"
    feeds = inputs.from_file([TensorInfo(name, "int64", (3,))], saved(tmp_path, **{name: GOOD["ids"]}))
    assert np.array_equal(feeds[name], GOOD["ids"])


def test_other_orders_and_byte_orders_become_ours(tmp_path: Path) -> None:
    swapped = np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))
    (array,) = inputs.from_file([TensorInfo("x", "float32", (2, 3))], saved(tmp_path, x=swapped)).values()
    assert array.flags.c_contiguous
    assert array.dtype == np.dtype(np.float32)
    assert np.array_equal(array, swapped)


def test_scalars_work(tmp_path: Path) -> None:
    (array,) = inputs.from_file([TensorInfo("x", "float32", ())], saved(tmp_path, x=np.float32(3))).values()
    assert array.shape == ()
    assert array == 3


@pytest.mark.parametrize("stored", [np.array(["ä", "bc"]), np.array(["ä".encode(), b"bc"])])
def test_text_comes_as_str(tmp_path: Path, stored: Any) -> None:
    (array,) = inputs.from_file([TensorInfo("t", "str", (2,))], saved(tmp_path, t=stored)).values()
    assert array.tolist() == ["ä", "bc"]


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, t=np.array([b"\xff"]))
    assert "not UTF-8" in refused(path, TensorInfo("t", "str", (1,)))


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"image": GOOD["image"]}, "ids"),
        ({**GOOD, "ids": np.array([1, 2])}, "ids"),
        ({**GOOD, "ids": np.array([1.0, 2.0, 3.0])}, "ids"),
        ({**GOOD, "image": GOOD["image"].astype(np.float64)}, "image"),
        ({**GOOD, "image": GOOD["image"][0]}, "image"),
        ({}, "image, ids"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides(
    tmp_path: Path, arrays: dict[str, Any], fault: str
) -> None:
    said = refused(saved(tmp_path, **arrays))
    assert "expected image float32 [1, 2, 2], ids int64 [3]; found" in said
    assert said.endswith(f"at fault: {fault}")
    for name, array in arrays.items():
        assert f"{name} {array.dtype.name} {list(array.shape)}" in said


def test_an_array_that_no_input_takes_is_refused(tmp_path: Path) -> None:
    assert "no input 'extra'" in refused(saved(tmp_path, **GOOD, extra=np.zeros(1)))


def test_shapes_are_told_without_reading(tmp_path: Path) -> None:
    assert inputs.shapes_in_file(saved(tmp_path, **GOOD)) == {"image": (1, 2, 2), "ids": (3,)}


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "unpickled",))

    path = saved(tmp_path, x=np.array([Trap()], dtype=object))
    assert "never unpickled" in refused(path, TensorInfo("x", "float32", (1,)))
    assert not (tmp_path / "unpickled").exists()


def member(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue() + data


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def test_a_header_that_asks_for_more_than_there_is_is_refused_before_it_is_given(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.npz", x=member("<f4", (1 << 40,), b"\0" * 16))
    assert "do not hold float32 [1099511627776]" in refused(path, TensorInfo("x", "float32", (1 << 40,)))


def test_a_zip_bomb_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "bomb.npz", x=member("|u1", (10_000_000,), b"\0" * 10_000_000))
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(memory, "available_bytes", lambda: 15_000_000)
    assert "unpacks to 10000" in refused(path, TensorInfo("x", "uint8", (10_000_000,)))


def test_a_member_that_is_longer_than_it_says_is_refused(tmp_path: Path) -> None:
    content = member("|u1", (4,), b"\1" * 4)
    path = archive(tmp_path / "lies.npz", x=content)
    raw = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = raw.index(signature) + offset
        raw[at : at + 4] = struct.pack("<I", len(content) - 2)
    path.write_bytes(bytes(raw))
    assert "x of the .npz" in refused(path, TensorInfo("x", "uint8", (4,)))


def test_a_list_without_end_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "many.npz", **{f"a{number}": b"" for number in range(inputs.MOST_ENTRIES + 1)})
    assert "at most 1024 are read" in refused(path)


def test_records_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, x=np.zeros(2, dtype=[("size", "<f4")]))
    assert "at fault: x" in refused(path, TensorInfo("x", "float32", (2,)))


def test_an_unknown_version_of_the_format_is_refused(tmp_path: Path) -> None:
    content = bytearray(member("<f4", (2,), b"\0" * 8))
    content[6] = 9
    path = archive(tmp_path / "later.npz", x=bytes(content))
    assert "array x of the .npz can't be read" in refused(path, TensorInfo("x", "float32", (2,)))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\5\6" + b"\0" * 18 + b"x", b"\x93NUMPY\1\0v\0"])
def test_what_is_no_npz_is_refused_with_how_to_write_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "inputs.npz"
    path.write_bytes(content)
    said = refused(path)
    assert "numpy.savez" in said or "found no array" in said


@given(st.integers(0, 10**9), st.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_no_damaged_byte_is_more_than_a_refusal(position: int, value: int) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **GOOD)
    raw = bytearray(buffer.getvalue())
    raw[position % len(raw)] = value
    path = _scratch / f"{zlib.crc32(raw)}.npz"
    path.write_bytes(bytes(raw))
    try:
        feeds = inputs.from_file((IMAGE, IDS), path)
    except InputsRejected:
        pass
    else:
        assert {name: array.shape for name, array in feeds.items()} == {"image": (1, 2, 2), "ids": (3,)}
    finally:
        path.unlink()


def test_a_member_without_a_name_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "nameless.npz", x=member("|u1", (1,), b"\0"))
    path.write_bytes(path.read_bytes().replace(b"x.npy", b"\0.npy"))
    assert "no input ''" in refused(path)


_scratch = Path()


@pytest.fixture(autouse=True, scope="module")
def _scratch_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _scratch
    _scratch = tmp_path_factory.mktemp("npz")


# -- digests ----------------------------------------------------------------------------------------


def test_the_digest_is_over_names_types_shapes_and_bytes() -> None:
    base = inputs.digest({"a": np.zeros((2, 3), np.uint8)})
    others = [
        inputs.digest({"b": np.zeros((2, 3), np.uint8)}),
        inputs.digest({"a": np.zeros((2, 3), np.int8)}),
        inputs.digest({"a": np.zeros((3, 2), np.uint8)}),
        inputs.digest({"a": np.ones((2, 3), np.uint8)}),
        inputs.digest({"a": np.zeros((2, 3), np.uint8), "b": np.zeros(0, np.uint8)}),
    ]
    assert len({base, *others}) == 6


def test_the_digest_does_not_depend_on_order_in_memory() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = [
        {"a": array, "b": array},
        {"b": np.asfortranarray(array), "a": array.astype(">f4")},
    ]
    assert inputs.digest(same[0]) == inputs.digest(same[1])


@given(npst.arrays(st.sampled_from(["<f4", ">i8", "|u1"]), npst.array_shapes(min_dims=0)))
@settings(deadline=None)
def test_content_is_the_bytes_that_anyone_can_hash(array: Any) -> None:
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
    assert inputs.content(array) == plain


def test_text_has_content_too() -> None:
    words = np.array(["a", "bc"], dtype=object)
    assert inputs.content(words) == inputs.content(np.array([b"a", b"bc"], dtype=object))
    assert inputs.content(words) != inputs.content(np.array(["ab", "c"], dtype=object))
    assert hashlib.sha256(inputs.content(words)).hexdigest() != inputs.digest({"x": words})


def test_what_was_fed_is_described() -> None:
    feeds = {"x": np.zeros(1, np.float32)}
    assert inputs.described(feeds, seed=3).source == "seeded"
    assert inputs.described(feeds, seed=3).seed == 3
    file = inputs.described(feeds, seed=None)
    assert (file.source, file.seed, file.sha256) == ("file", None, inputs.digest(feeds))
