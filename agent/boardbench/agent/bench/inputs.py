"""Input data: made from a seed, or read from the user's .npz.

Seeded data come from the raw 64-bit words of PCG64, whose stream NumPy guarantees, one stream an
input: equal seed, names, types and shapes give equal bytes on any machine and NumPy version.

- uint8, int8, int16, uint16: the whole range of the type. They are quantised values, pixels or
  sound, and every stored value stands for one.
- float16 ... float64 and complex: uniform in [0, 1). The range of a normalised picture; positive, so
  that logarithm and square root are defined; not zero, which would let engines skip work.
- other integers: 0 or 1. They are indices, lengths, masks or token ids, and those are valid in any
  table of two rows.
- bool: either. str: eight lower-case letters.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Dict, Mapping, Optional, Sequence, Tuple

from boardbench.agent.bench import memory, shapes
from boardbench.agent.bench.runtime import InputsRejected
from boardbench.agent.domain import InputData, OutputValues, TensorInfo

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

WHOLE_RANGE = ("uint8", "int8", "uint16", "int16")
SMALL_INTEGERS = ("int32", "int64", "uint32", "uint64")
FLOATS = ("float16", "float32", "float64", "complex64", "complex128")

MOST_ENTRIES = 1024
"""Arrays in an .npz; no model comes near, and a list of millions takes memory before any is read."""

_WORDS = 1 << 17
"""64-bit words made at a time: 1 MiB, so that a large input does not need twice its size."""


def seeded(inputs: Sequence[TensorInfo], seed: int) -> Dict[str, Array]:
    """Data for every input by name. Raises InputsRejected for a type that can't be made."""
    return {tensor.name: _seeded(tensor, seed, position) for position, tensor in enumerate(inputs)}


def _seeded(tensor: TensorInfo, seed: int, position: int) -> Array:
    import numpy as np

    source = np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=(position,)))
    count = math.prod(tensor.shape)
    if tensor.dtype == "str":
        letters = source.random_raw(count)
        text = ["".join(chr(97 + (int(word) >> 8 * at & 0xFF) % 26) for at in range(8)) for word in letters]
        return np.array(text, dtype=object).reshape(tensor.shape)
    if tensor.dtype not in WHOLE_RANGE + SMALL_INTEGERS + FLOATS + ("bool",):
        raise InputsRejected(
            f"input {tensor.name} is of type {tensor.dtype}, for which no data can be made: "
            "export the model with inputs of an ordinary type"
        )
    dtype = np.dtype(tensor.dtype)
    values: Array = np.empty(count, dtype=dtype)
    # Complex numbers are filled as twice as many real ones.
    flat = values.view(f"float{dtype.itemsize * 4}") if dtype.kind == "c" else values
    in_a_word = 8 // flat.itemsize if tensor.dtype in WHOLE_RANGE else 1
    for start in range(0, flat.size, _WORDS * in_a_word):
        part = flat[start : start + _WORDS * in_a_word]
        words = source.random_raw(-(-part.size // in_a_word)).astype("<u8", copy=False)
        if tensor.dtype in WHOLE_RANGE:
            part[:] = words.view(flat.dtype.newbyteorder("<"))[: part.size]
        elif flat.dtype.kind == "f":
            # As many bits as the type's fraction holds, so that rounding never reaches 1.
            bits = np.finfo(flat.dtype).nmant + 1
            part[:] = (words >> np.uint64(64 - bits)).astype(np.float64) * 2.0**-bits
        else:
            part[:] = words >> np.uint64(63)
    return values.reshape(tensor.shape)


def values_of(names: Sequence[str], outputs: Mapping[str, Array], most: int) -> Tuple[OutputValues, ...]:
    """At most so many elements of these outputs, an even share of each, spread over the whole of it.

    One that holds text, complex numbers or what is not finite is left out.
    """
    import numpy as np

    if not most:
        return ()
    kept = [name for name in names if name in outputs and outputs[name].dtype.kind in "fiub"]
    found = []
    for name in kept:
        flat = outputs[name].reshape(-1)
        step = max(1, -(-flat.size * len(kept) // most))
        values = flat[::step].astype(np.float64)
        if np.isfinite(values).all():
            found.append(OutputValues(name, flat.dtype.name, int(flat.size), step, tuple(values.tolist())))
    return tuple(found)


def shapes_in_file(path: Path) -> Dict[str, Tuple[int, ...]]:
    """Shapes of the arrays in an .npz, by their names there; no array is read. Raises InputsRejected."""
    with _Archive(path) as archive:
        return {name: archive.header(name)[0] for name in archive.names}


def from_file(inputs: Sequence[TensorInfo], path: Path) -> Dict[str, Array]:
    """Data for every input by name from an .npz, whose names are inputs' or arr_0, arr_1, ….

    Raises InputsRejected, listing what was expected and what was found.
    """
    import numpy as np

    with _Archive(path) as archive:
        headers = {name: archive.header(name) for name in archive.names}
        names = {target: name for name, target in shapes.by_name(inputs, headers).items()}
        wrong = [tensor for tensor in inputs if not _matches(tensor, headers.get(names.get(tensor.name, "")))]
        if wrong:
            found = ", ".join(
                f"{name} {dtype.name} {list(shape)}" for name, (shape, dtype) in headers.items()
            )
            raise InputsRejected(
                f"the .npz does not fit the model's inputs: expected {shapes.describe(inputs)}; "
                f"found {found or 'no array'}; at fault: {', '.join(tensor.name for tensor in wrong)}"
            )
        feeds = {}
        for tensor in inputs:
            array = archive.read(names[tensor.name])
            if tensor.dtype == "str":
                array = _text(tensor, array)
            else:
                array = np.ascontiguousarray(array, dtype=np.dtype(tensor.dtype)).reshape(tensor.shape)
            feeds[tensor.name] = array
        return feeds


def _matches(tensor: TensorInfo, header: Optional[Tuple[Tuple[int, ...], np.dtype[Any]]]) -> bool:
    if header is None:
        return False
    shape, dtype = header
    same_type = dtype.kind in "SU" if tensor.dtype == "str" else dtype.name == tensor.dtype
    return same_type and tuple(shape) == tensor.shape


def _text(tensor: TensorInfo, array: Array) -> Array:
    import numpy as np

    try:
        words = [
            word.decode("utf-8") if isinstance(word, bytes) else str(word) for word in array.ravel().tolist()
        ]
    except UnicodeDecodeError as error:
        raise InputsRejected(f"input {tensor.name} in the .npz is text that is not UTF-8: {error}") from error
    text: Array = np.array(words, dtype=object).reshape(array.shape)
    return text


class _Archive:
    """An .npz that is not trusted: nothing is unpacked before its size is known and fits.

    numpy.load would allocate whatever a header asks for.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        # NotImplementedError: zipfile meets a compression that it does not know.
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise InputsRejected(
                f"the inputs are not an .npz file ({error}): write them with numpy.savez(file, name=array)"
            ) from error
        members = [member for member in self._zip.infolist() if not member.filename.endswith("/")]
        if len(members) > MOST_ENTRIES:
            self._zip.close()
            raise InputsRejected(f"the .npz holds {len(members)} arrays; at most {MOST_ENTRIES} are read")
        self._members = {
            member.filename[:-4] if member.filename.endswith(".npy") else member.filename: member
            for member in members
        }
        self.names = tuple(self._members)
        needed, available = 2 * sum(member.file_size for member in members), memory.available_bytes()
        if available is not None and needed > available:
            self._zip.close()
            raise InputsRejected(
                f"the .npz unpacks to {needed // 2} bytes, needed once for the data and once in the engine; "
                f"{available} bytes of memory are available"
            )

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def header(self, name: str) -> Tuple[Tuple[int, ...], np.dtype[Any]]:
        """Shape and type of an array; checked against the size of the member."""
        member = self._members[name]
        try:
            with self._zip.open(member) as stream:
                shape, dtype, header_bytes = _read_header(stream)  # type: ignore[arg-type]
        except MemoryError:
            raise
        except Exception as error:  # whatever zipfile, its decompressors and NumPy raise for a damaged member
            raise InputsRejected(f"array {name} of the .npz can't be read: {error}") from error
        if dtype.hasobject:
            raise InputsRejected(
                f"array {name} of the .npz holds Python objects, which are never unpickled: store numbers, "
                "or text as a NumPy string array"
            )
        if math.prod(shape) * dtype.itemsize + header_bytes != member.file_size:
            raise InputsRejected(
                f"array {name} of the .npz is damaged: {member.file_size} bytes do not hold "
                f"{dtype.name} {list(shape)}"
            )
        return shape, dtype

    def read(self, name: str) -> Array:
        """The array, whose header was checked before."""
        import numpy as np

        try:
            with self._zip.open(self._members[name]) as stream:
                array: Array = np.lib.format.read_array(stream, allow_pickle=False)
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise InputsRejected(f"array {name} of the .npz can't be read: {error}") from error
        return array


def _read_header(stream: BinaryIO) -> Tuple[Tuple[int, ...], np.dtype[Any], int]:
    import numpy as np

    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"format version {version} is for records, which no model takes")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"its shape is {shape}")
    return tuple(shape), dtype, stream.tell()


def digest(feeds: Mapping[str, Array]) -> str:
    """SHA-256 over names, types, shapes and bytes, by name: equal data have equal digests."""
    whole = hashlib.sha256()
    for name in sorted(feeds):
        array = feeds[name]
        dtype = "str" if array.dtype.kind in "OSU" else array.dtype.name
        # Lengths in front, so that no two sets of inputs run together to the same bytes.
        for part in (name, dtype, ",".join(str(size) for size in array.shape)):
            encoded = part.encode("utf-8", "surrogatepass")
            whole.update(struct.pack("<Q", len(encoded)) + encoded)
        whole.update(content(array))
    return whole.hexdigest()


def content(array: Array) -> bytes:
    """The elements in C order, little-endian; text as UTF-8 with its length in front."""
    if array.dtype.kind in "OSU":
        encoded = []
        for word in array.ravel().tolist():
            raw = word if isinstance(word, bytes) else str(word).encode("utf-8", "surrogatepass")
            encoded.append(struct.pack("<Q", len(raw)) + raw)
        return b"".join(encoded)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return little.tobytes()


def described(feeds: Mapping[str, Array], *, seed: Optional[int]) -> InputData:
    """What a result says about its inputs; ``seed`` is None when they came from a file."""
    return InputData(source="file" if seed is None else "seeded", sha256=digest(feeds), seed=seed)
