"""Files made to keep the readers busy: for each format the densest that we know how to build.

Every entry of DENSE makes a file of about the size that it is asked for. All of them are refused, or reported
on, within the budget of steps (boardbench/inspect/budget.py); what a step takes is measured by

    cd tests/inspect && python -m dense MEGABYTES [NAME…]        # the worst that files of that size take
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from . import coreml, edgetpu, executorch, onnx, openvino, tflite, torch_mobile, torchscript
from .protobuf import field

DENSE: dict[str, Callable[[int], bytes]] = {
    **tflite.DENSE,
    **edgetpu.DENSE,
    **onnx.DENSE,
    **coreml.DENSE,
    **openvino.DENSE,
    **torchscript.DENSE,
    **torch_mobile.DENSE,
    **executorch.DENSE,
}


def padded(data: bytes, size: int) -> bytes:
    """The file with something at its end that costs nothing, so that its size allows more steps."""
    missing = size - len(data)
    if missing <= 16:
        return data
    if data[4:8] in (b"TFL3", b"ET12", b"PTMF"):
        return data + bytes(missing)
    if data.startswith(b"<"):
        return data + b" " * missing
    if data.startswith(b"PK"):
        # In front of the directory lies what nobody lists.
        at = struct.unpack_from("<I", data, data.rindex(b"PK\x05\x06") + 16)[0]
        end = data.rindex(b"PK\x05\x06")
        return (
            data[:at]
            + bytes(missing)
            + data[at : end + 16]
            + struct.pack("<I", at + missing)
            + data[end + 20 :]
        )
    # The documentation of an ONNX model; Core ML has no such field.
    return data + field(6, bytes(missing))
