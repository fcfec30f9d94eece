"""Which operation of TensorFlow Lite an operation in a profile of XNNPACK stands for.

XNNPACK names its operations otherwise (google/XNNPACK, ``src/xnnpack/operator-type-defs.inc``), computes some
of them together (a RELU with what is before it) and adds some (a conversion). Both lists are in the order of
the model, so they are laid side by side with the fewest gaps.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional, Sequence, Tuple

# The name up to the bracket → what it may stand for (tensorflow/lite/delegates/xnnpack/xnnpack_delegate.cc).
STANDS_FOR: Mapping[str, Tuple[str, ...]] = {
    "Abs": ("ABS",),
    "Add": ("ADD",),
    "ApproxGELU": ("GELU",),
    "Average Pooling": ("AVERAGE_POOL_2D",),
    "Bankders Rounding": ("ROUND",),  # as it is spelt there
    "Bankers Rounding": ("ROUND",),
    "Batch Matrix Multiply": ("BATCH_MATMUL",),
    "Ceiling": ("CEIL",),
    "Clamp": ("RELU", "RELU6", "RELU_N1_TO_1", "RELU_0_TO_1"),
    "Constant Pad": ("PAD", "PADV2"),
    "Convert": ("QUANTIZE", "DEQUANTIZE", "CAST"),
    "Convolution": ("CONV_2D", "DEPTHWISE_CONV_2D"),
    "Copy": ("RESHAPE", "SQUEEZE", "EXPAND_DIMS", "CONCATENATION", "SPLIT", "SLICE", "PACK"),
    "Cosine": ("COS",),
    "Deconvolution": ("TRANSPOSE_CONV",),
    "Depth To Space": ("DEPTH_TO_SPACE",),
    "Divide": ("DIV",),
    "Dynamic Fully Connected": ("FULLY_CONNECTED", "BATCH_MATMUL"),
    "ELU": ("ELU",),
    "Exp": ("EXP",),
    "Floor": ("FLOOR",),
    "Fully Connected": ("FULLY_CONNECTED", "CONV_2D", "BATCH_MATMUL"),
    "GELU": ("GELU",),
    "HardSwish": ("HARD_SWISH",),
    "LeakyReLU": ("LEAKY_RELU",),
    "Log": ("LOG",),
    "Max Pooling": ("MAX_POOL_2D",),
    "Maximum": ("MAXIMUM",),
    "Mean": ("MEAN", "AVERAGE_POOL_2D"),
    "Minimum": ("MINIMUM",),
    "Multiply": ("MUL",),
    "Negate": ("NEG",),
    "PReLU": ("PRELU",),
    "Power": ("POW",),
    "Reciprocal Square Root": ("RSQRT",),
    "Reduce Max": ("REDUCE_MAX",),
    "Reduce Min": ("REDUCE_MIN",),
    "Resize Bilinear": ("RESIZE_BILINEAR",),
    "Sigmoid": ("LOGISTIC",),
    "Sign": ("SIGN",),
    "Sine": ("SIN",),
    "Slice": ("SLICE", "STRIDED_SLICE", "SPLIT"),
    "Softmax": ("SOFTMAX",),
    "Space To Depth": ("SPACE_TO_DEPTH",),
    "Square": ("SQUARE", "MUL"),
    "Square Root": ("SQRT",),
    "Squared Difference": ("SQUARED_DIFFERENCE",),
    "Static Expand Dims": ("EXPAND_DIMS",),
    "Static Reshape": ("RESHAPE", "SQUEEZE", "EXPAND_DIMS"),
    "Subtract": ("SUB",),
    "Sum": ("SUM",),
    "TanH": ("TANH",),
    "Transpose": ("TRANSPOSE",),
}

_MATCH, _MAYBE, _GAP = 3, 0, -1
_MOST_CELLS = 1_000_000
"""A thousand operations: a second on a slow board, and no part of a real model is longer."""


def fits(name: str, op_type: str) -> Optional[bool]:
    """Whether a profile's name can stand for an operation of a type; None: it is a name that says nothing."""
    found = STANDS_FOR.get(name.partition(" (")[0])
    return None if found is None else op_type in found


def side_by_side(types: Sequence[str], names: Sequence[str]) -> Dict[int, int]:
    """Operation → its place in the profile, for all that have one of their own there.

    An operation that was computed together with another is left out, and so is the other unless its name says
    that it stands for it.
    """
    if len(types) == len(names) and all(fits(name, type_) is not False for type_, name in zip(types, names)):
        return {at: at for at in range(len(types))}
    if len(types) * len(names) > _MOST_CELLS:
        return {}
    pairs = _aligned(types, names)
    alone = set(range(len(types))) - {op for op, _ in pairs}
    return {
        op: at for op, at in pairs if fits(names[at], types[op]) or not (op - 1 in alone or op + 1 in alone)
    }


def _aligned(types: Sequence[str], names: Sequence[str]) -> List[Tuple[int, int]]:
    """The pairs of the alignment with the highest score (Needleman and Wunsch, 1970)."""
    width = len(names) + 1
    scores = [[_GAP * at for at in range(width)]]
    for op, type_ in enumerate(types, 1):
        before, row = scores[-1], [_GAP * op]
        for at, name in enumerate(names, 1):
            best = max(before[at], row[at - 1]) + _GAP
            match = fits(name, type_)
            if match is not False:
                best = max(best, before[at - 1] + (_MATCH if match else _MAYBE))
            row.append(best)
        scores.append(row)
    pairs: List[Tuple[int, int]] = []
    op, at = len(types), len(names)
    while op and at:
        match = fits(names[at - 1], types[op - 1])
        score = scores[op][at]
        if match is not False and score == scores[op - 1][at - 1] + (_MATCH if match else _MAYBE):
            pairs.append((op - 1, at - 1))
            op, at = op - 1, at - 1
        elif score == scores[op - 1][at] + _GAP:
            op -= 1
        else:
            at -= 1
    pairs.reverse()
    return pairs
