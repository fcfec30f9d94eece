"""What the Edge TPU compiler accepts, as tables: a prediction, never evidence of what it did.

Sources: Google's "TensorFlow models on the Edge TPU" (coral.ai/docs/edgetpu/models-intro) and Axis'
"Supported ops" for the same chip (developer.axis.com, ARTPEC-7) for the limits; the statuses as
``edgetpu_compiler`` prints them, with causes and remedies from the threads of google-coral/edgetpu whose
numbers stand beside them. The compiler itself is closed, and its "unspecified limitation" remains one:
where a limit is only known from what people saw, the entry says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, FrozenSet, List, Mapping, Optional, Tuple

from boardbench.inspect.tflite import Model, Operator, Subgraph, Tensor

# The statuses, word for word.
NOT_SUPPORTED = "Operation not supported"
DATA_TYPE = "Operation is working on an unsupported data type"
VERSION = "Operation version not supported"
RANK = "Tensor has unsupported rank (up to 3 innermost dimensions mapped)"
LIMITATION = "Operation is otherwise supported, but not mapped due to some unspecified limitation"
ONE_SUBGRAPH = "More than one subgraph is not supported"
NOT_CONSTANT = "Filter, bias, or other param is not constant at compile-time"
TWO_DIMENSIONS = "For example, a fully-connected or softmax layer with 2D output"
# Printed for the whole model; nothing of it is compiled then.
DYNAMIC = (
    "Attempting to use a delegate that only supports static-sized tensors with a graph that has "
    "dynamic-sized tensors"
)

# Of a name in a sentence.
_LONGEST_TOLD = 120
EIGHT_BITS: FrozenSet[str] = frozenset(("int8", "uint8"))
# 16 tiles of 196,608 bytes of narrow memory (libedgetpu, beagle_chip_structures.h): what activations share.
ACTIVATION_MEMORY_BYTES = 16 * 196_608
LARGEST_SOFTMAX = 16_000
# Seen, not documented: 64→128 was mapped and 256→512 refused (#31), 128→256 refused where 64→128 was
# mapped (#187), 6→12, 12→24 and 24→48 are mapped in Google's MoveNet, 1→33 is refused in their DeepLab.
LARGEST_RESIZED_SIDE = 128
LARGEST_RESIZE_FACTOR = 8


@dataclass(frozen=True)
class Reason:
    """Why the compiler leaves an operation on the CPU: its words, what they mean here, what to change.

    ``whole_model``: nothing at all is compiled then. ``observed``: the limit is known from what people saw,
    and not from the documents, so that a reason in another operation is the better explanation.
    """

    status: str
    detail: str
    remedy: str
    whole_model: bool = False
    observed: bool = False

    @property
    def cause(self) -> str:
        """The status and what it means here, in one line."""
        return f"{self.status}: {self.detail}" if self.detail else self.status


@dataclass(frozen=True)
class Context:
    """The graph that an operation is judged in."""

    model: Model
    graph: Subgraph

    def tensor(self, index: int) -> Tensor:
        """A tensor by its number."""
        return self.graph.tensors[index]

    def inputs(self, operator: Operator) -> List[Tensor]:
        """The inputs that are there."""
        return [self.graph.tensors[index] for index in operator.inputs if index >= 0]

    def outputs(self, operator: Operator) -> List[Tensor]:
        """The outputs."""
        return [self.graph.tensors[index] for index in operator.outputs if index >= 0]

    def activations(self, operator: Operator) -> List[Tensor]:
        """Inputs and outputs that are computed: no constants, and no state kept between inferences."""
        return [
            tensor
            for tensor in (*self.inputs(operator), *self.outputs(operator))
            if not tensor.constant and not tensor.variable
        ]

    def integers(self, operator: Operator, position: int) -> Optional[Tuple[int, ...]]:
        """Values of a constant int32 or int64 input; None when it is absent, computed or too long."""
        tensor = self.input(operator, position)
        if tensor is None or tensor.data is None or tensor.dtype not in ("int32", "int64"):
            return None
        width = 4 if tensor.dtype == "int32" else 8
        start, stop = tensor.data
        if stop - start > 64 * width:
            return None
        raw = bytes(self.model.data[start:stop])
        return tuple(
            int.from_bytes(raw[at : at + width], "little", signed=True) for at in range(0, len(raw), width)
        )

    def input(self, operator: Operator, position: int) -> Optional[Tensor]:
        """The input at a position; None when it is left out."""
        if position >= len(operator.inputs) or operator.inputs[position] < 0:
            return None
        return self.graph.tensors[operator.inputs[position]]


Check = Callable[[Context, Operator], Optional[Reason]]


def why_not(context: Context, operator: Operator) -> Optional[Reason]:
    """The first reason in the operation itself to stay on the CPU; None when the rules see none."""
    if operator.type == "edgetpu-custom-op":
        return None
    for check in _GENERAL:
        reason = check(context, operator)
        if reason is not None:
            return reason
    for check in SUPPORTED.get(operator.type, ()):
        reason = check(context, operator)
        if reason is not None:
            return reason
    return None


# ---- what holds for every operation ----------------------------------------------------------------------


def _static_sizes(context: Context, operator: Operator) -> Optional[Reason]:
    for tensor in context.activations(operator):
        if any(size < 0 for size in tensor.shape):
            return Reason(
                DYNAMIC,
                f"tensor {_name(tensor)} has an open size {_shape(tensor)}",
                "fix every size before conversion, the batch to 1: model.input.set_shape((1,) + "
                "model.input.shape[1:]), or from_concrete_functions with a full shape (#829, #831)",
                whole_model=True,
            )
    return None


def _data_types(context: Context, operator: Operator) -> Optional[Reason]:
    parameters = PARAMETERS.get(operator.type, {})
    skipped = {
        operator.inputs[position]
        for position in parameters
        if position < len(operator.inputs) and operator.inputs[position] >= 0
    }
    for tensor in context.activations(operator):
        if tensor.index in skipped or tensor.dtype in EIGHT_BITS:
            continue
        detail = f"tensor {_name(tensor)} is {tensor.dtype}"
        if operator.type == "QUANTIZE":
            detail += f' (the compiler words this one as "{LIMITATION}")'
        return Reason(DATA_TYPE, detail, _type_remedy(operator, tensor))
    weights = context.input(operator, 1) if operator.type in _WEIGHTED else None
    if weights is not None and weights.constant and weights.dtype not in EIGHT_BITS:
        return Reason(
            DATA_TYPE,
            f"weights {_name(weights)} are {weights.dtype}",
            "quantise the weights to 8 bits too (full-integer post-training quantisation)",
        )
    return None


_WEIGHTED = frozenset(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"))


def _type_remedy(operator: Operator, tensor: Tensor) -> str:
    if operator.type == "QUANTIZE" and tensor.index in operator.inputs:
        return (
            "convert with inference_input_type = tf.uint8 or tf.int8, so that the input is quantised already"
        )
    if operator.type == "DEQUANTIZE":
        return (
            "convert with inference_output_type = tf.uint8 or tf.int8, and scale the result on the host; a "
            "DEQUANTIZE at the end costs little where it is"
        )
    if operator.type in TYPE_REMEDIES:
        return TYPE_REMEDIES[operator.type]
    if operator.custom:
        return "leave it as the last operation of the model, where the CPU loses nothing else by it"
    if tensor.dtype.startswith("float"):
        return (
            "quantise the whole model to 8 bits: representative_dataset with supported_ops = "
            "[TFLITE_BUILTINS_INT8] (#65, #708)"
        )
    return "compute it outside the model, or after the last operation that has to be on the Edge TPU"


def _supported_type(_context: Context, operator: Operator) -> Optional[Reason]:
    if operator.type in SUPPORTED and not operator.custom:
        return None
    remedy = TYPE_REMEDIES.get(operator.type, "")
    if not remedy:
        remedy = (
            "leave custom operations at the end of the model"
            if operator.custom
            else "replace it by operations of the supported list, or move it behind the part for the Edge TPU"
        )
    return Reason(NOT_SUPPORTED, f"{operator.type} is not among the Edge TPU's operations", remedy)


def _version(_context: Context, operator: Operator) -> Optional[Reason]:
    highest = VERSIONS.get(operator.type)
    if highest is None or operator.version <= highest:
        return None
    return Reason(
        VERSION,
        f"version {operator.version}; compiler 16 knows {operator.type} up to {highest}",
        "convert with an older TensorFlow (2.5 or before), or keep to features that those had (#187, #396, "
        "#420)",
    )


def _rank(context: Context, operator: Operator) -> Optional[Reason]:
    for tensor in context.activations(operator):
        if any(size != 1 for size in tensor.fixed_shape[:-3]):
            return Reason(
                RANK,
                f"tensor {_name(tensor)} is {_shape(tensor)}",
                "use batch 1, and no more than three dimensions larger than 1, the innermost ones (#30, "
                "#75, #274)",
            )
    return None


def _constant_parameters(context: Context, operator: Operator) -> Optional[Reason]:
    for position, name in PARAMETERS.get(operator.type, {}).items():
        tensor = context.input(operator, position)
        if tensor is None or tensor.constant or tensor.variable:
            continue
        shapes = name in _SHAPING
        return Reason(
            DYNAMIC if shapes else NOT_CONSTANT,
            f"the {name} {_name(tensor)} is computed by the model",
            "make it a constant: fix the input sizes, so that the converter folds it (#829, #831)"
            if shapes
            else "use constant weights, or move the operation off the Edge TPU's part (#25)",
            whole_model=shapes,
        )
    return None


# Whatever a parameter of these names says decides on the size of the result.
_SHAPING = frozenset(("new shape", "size", "paddings", "begin", "end", "strides", "output shape"))

_GENERAL: Tuple[Check, ...] = (
    _static_sizes,
    _data_types,
    _supported_type,
    _version,
    _rank,
    _constant_parameters,
)


# ---- limits of single operations -------------------------------------------------------------------------


def _no_fused_activation(_context: Context, operator: Operator) -> Optional[Reason]:
    if operator.option("fused_activation") == 0:
        return None
    return Reason(
        LIMITATION,
        "it has a fused activation",
        "use no activation in this layer; put a separate one behind it",
    )


def _concatenated_constants(context: Context, operator: Operator) -> Optional[Reason]:
    constants = [tensor for tensor in context.inputs(operator) if tensor.constant]
    if not constants:
        return None
    if len(operator.inputs) == 2 and all(_is_all_zero(context, tensor) for tensor in constants):
        return None
    return Reason(
        LIMITATION,
        f"input {_name(constants[0])} is constant; that is accepted only as one of two inputs, and all zero",
        "replace it by PAD, or add the constant part on the host",
    )


def _is_all_zero(context: Context, tensor: Tensor) -> bool:
    if tensor.data is None:
        return False
    zero = tensor.zero_point & 0xFF
    start, stop = tensor.data
    context.model.budget.look(stop - start, "the TensorFlow Lite model")
    return bytes(context.model.data[start:stop]).count(zero) == stop - start


def _same_dilation(_context: Context, operator: Operator) -> Optional[Reason]:
    width, height = operator.option("dilation_w", 1), operator.option("dilation_h", 1)
    if width == height:
        return None
    return Reason(
        LIMITATION,
        f"the dilation is {height} vertically and {width} horizontally",
        "use the same dilation in both directions",
    )


def _one_dimensional_output(context: Context, operator: Operator) -> Optional[Reason]:
    for tensor in context.outputs(operator):
        if any(size != 1 for size in tensor.fixed_shape[:-1]):
            return Reason(
                TWO_DIMENSIONS,
                f"the result {_name(tensor)} is {_shape(tensor)}",
                "flatten, so that only the last dimension is larger than 1; a 1x1 CONV_2D does the same for "
                "every position (#27)",
            )
    return None


def _default_weights(_context: Context, operator: Operator) -> Optional[Reason]:
    if operator.option("weights_format") == 0:
        return None
    return Reason(LIMITATION, "its weights are shuffled", "convert with the default weights format")


def _small_softmax(context: Context, operator: Operator) -> Optional[Reason]:
    for tensor in context.outputs(operator):
        if tensor.fixed_shape and tensor.fixed_shape[-1] > LARGEST_SOFTMAX:
            return Reason(
                LIMITATION,
                f"{tensor.fixed_shape[-1]} elements; at most {LARGEST_SOFTMAX} are supported",
                "take the softmax on the host",
            )
    return None


def _axes(context: Context, operator: Operator, position: int, rank: int) -> Tuple[int, ...]:
    return tuple(axis % rank if rank else 0 for axis in context.integers(operator, position) or ())


def _batch_axis(tensor: Tensor) -> Optional[int]:
    """0 where the first dimension is the batch: of four or more, or of fewer that begin with 1."""
    rank = len(tensor.fixed_shape)
    return 0 if rank >= 4 or (rank >= 2 and tensor.fixed_shape[0] == 1) else None


def _no_batch_reduction(context: Context, operator: Operator) -> Optional[Reason]:
    tensor = context.input(operator, 0)
    if tensor is None:
        return None
    if _batch_axis(tensor) in _axes(context, operator, 1, len(tensor.fixed_shape)):
        return Reason(
            LIMITATION, "it reduces the batch dimension", "reduce over height, width and channels only"
        )
    return None


def _channel_mean(context: Context, operator: Operator) -> Optional[Reason]:
    tensor = context.input(operator, 0)
    if tensor is None or not tensor.fixed_shape:
        return None
    rank = len(tensor.fixed_shape)
    if rank - 1 in _axes(context, operator, 1, rank) and tensor.fixed_shape[-1] % 4:
        return Reason(
            LIMITATION,
            f"it reduces {tensor.fixed_shape[-1]} channels, which is no multiple of 4",
            "make the number of channels a multiple of 4",
        )
    return None


def _no_batch_axis_option(context: Context, operator: Operator) -> Optional[Reason]:
    tensors = context.outputs(operator)
    rank = len(tensors[0].fixed_shape) if tensors else 0
    if rank >= 2 and operator.option("axis") % rank == 0:
        return Reason(LIMITATION, "it packs along the batch dimension", "pack along another dimension")
    return None


def _no_batch_split(context: Context, operator: Operator) -> Optional[Reason]:
    tensor = context.input(operator, 1)
    if tensor is None:
        return None
    if _batch_axis(tensor) in _axes(context, operator, 0, len(tensor.fixed_shape)):
        return Reason(LIMITATION, "it splits the batch dimension", "split along another dimension")
    return None


def _no_batch_padding(context: Context, operator: Operator) -> Optional[Reason]:
    tensor, paddings = context.input(operator, 0), context.integers(operator, 1)
    if tensor is None or paddings is None or _batch_axis(tensor) is None:
        return None
    if any(paddings[:2]):
        return Reason(LIMITATION, "it pads the batch dimension", "pad height, width or channels only")
    return None


def _channel_alpha(context: Context, operator: Operator) -> Optional[Reason]:
    alpha = context.input(operator, 1)
    if alpha is None or all(size == 1 for size in alpha.fixed_shape[:-1]):
        return None
    return Reason(
        LIMITATION,
        f"its alpha is {_shape(alpha)}; only the innermost dimension may be larger than 1",
        "build the PReLU with shared_axes=[1, 2]",
    )


def _fits_activation_memory(context: Context, operator: Operator) -> Optional[Reason]:
    for tensor in context.activations(operator):
        size = _elements(tensor)
        if size > ACTIVATION_MEMORY_BYTES:
            return Reason(
                LIMITATION,
                f"tensor {_name(tensor)} has {size} bytes, more than the {ACTIVATION_MEMORY_BYTES} on the "
                "chip",
                "make the input smaller, or split the tensor (#512)",
                observed=True,
            )
    return None


def _resize_precision(context: Context, operator: Operator) -> Optional[Reason]:
    before, after = context.input(operator, 0), context.outputs(operator)
    if before is None or not after or len(before.fixed_shape) < 3 or len(after[0].fixed_shape) < 3:
        return None
    old, new = before.fixed_shape[-3:-1], after[0].fixed_shape[-3:-1]
    factor = max(new[axis] / old[axis] if old[axis] else 0.0 for axis in (0, 1))
    if max(new) <= LARGEST_RESIZED_SIDE and factor <= LARGEST_RESIZE_FACTOR:
        return None
    return Reason(
        LIMITATION,
        f"from {old[0]}x{old[1]} to {new[0]}x{new[1]}: refused by size, to avoid a loss of precision",
        "resize in smaller steps and to less (64 to 128 was accepted, 256 to 512 was not), resize the "
        "result on the host, or broadcast a 1x1 input instead (#31)",
        observed=True,
    )


def _leading_ones(context: Context, operator: Operator) -> Optional[Reason]:
    before, after = context.input(operator, 0), context.outputs(operator)
    if before is None or not after:
        return None
    if _without_leading_ones(before.fixed_shape) == _without_leading_ones(after[0].fixed_shape):
        return None
    return Reason(
        LIMITATION,
        f"from {_shape(before)} to {_shape(after[0])}: only leading dimensions of 1 may go",
        "use RESHAPE, or leave the dimension in",
    )


def _without_leading_ones(shape: Tuple[int, ...]) -> Tuple[int, ...]:
    for position, size in enumerate(shape):
        if size != 1:
            return shape[position:]
    return ()


def _plain_strides(context: Context, operator: Operator) -> Optional[Reason]:
    strides = context.integers(operator, 3)
    if strides is not None and any(stride != 1 for stride in strides):
        return Reason(LIMITATION, f"strides {list(strides)}; only 1 is supported", "slice with stride 1")
    for option, name in (("ellipsis_mask", "an ellipsis"), ("new_axis_mask", "a new axis")):
        if operator.option(option):
            return Reason(
                LIMITATION, f"the slice has {name}", "write the slice out, with one range a dimension"
            )
    return None


def _keeps_channels(context: Context, operator: Operator) -> Optional[Reason]:
    order = context.integers(operator, 1)
    if order is None or not order or order[-1] % len(order) == len(order) - 1:
        return None
    tensor = context.input(operator, 0)
    if tensor is not None and sum(size != 1 for size in tensor.fixed_shape) <= 1:
        return None
    return Reason(
        LIMITATION,
        f"order {list(order)} moves the channels",
        "keep channels innermost (NHWC) throughout the model (#433, #512)",
        observed=True,
    )


def _name(tensor: Tensor) -> str:
    # Fused layers carry the names of everything that went into them.
    first = tensor.name.split(";", 1)[0]
    if len(first) > _LONGEST_TOLD:
        first = first[:_LONGEST_TOLD] + "…"
    return repr(first) if first else f"#{tensor.index}"


def _shape(tensor: Tensor) -> str:
    return "x".join("?" if size < 0 else str(size) for size in tensor.shape) or "a scalar"


def _elements(tensor: Tensor) -> int:
    count = 1
    for size in tensor.fixed_shape:
        count *= max(size, 0)
    return count


# ---- tables ----------------------------------------------------------------------------------------------

# Operations that the compiler maps, with the limits of each.
SUPPORTED: Mapping[str, Tuple[Check, ...]] = {
    "ADD": (),
    "AVERAGE_POOL_2D": (_no_fused_activation,),
    "CONCATENATION": (_no_fused_activation, _concatenated_constants),
    "CONV_2D": (_same_dilation,),
    "DEPTHWISE_CONV_2D": (_same_dilation,),
    "EXPAND_DIMS": (),
    "FULLY_CONNECTED": (_default_weights, _one_dimensional_output),
    "L2_NORMALIZATION": (),
    "LOGISTIC": (),
    "MAXIMUM": (),
    "MAX_POOL_2D": (_no_fused_activation,),
    "MEAN": (_no_batch_reduction, _channel_mean),
    "MINIMUM": (),
    "MUL": (),
    "PACK": (_no_batch_axis_option,),
    "PAD": (_no_batch_padding,),
    "PRELU": (_channel_alpha,),
    "QUANTIZE": (),
    "REDUCE_MAX": (_no_batch_reduction,),
    "REDUCE_MIN": (_no_batch_reduction,),
    "RELU": (),
    "RELU6": (),
    "RELU_N1_TO_1": (),
    "RESHAPE": (_fits_activation_memory,),
    "RESIZE_BILINEAR": (_resize_precision,),
    "RESIZE_NEAREST_NEIGHBOR": (_resize_precision,),
    "RSQRT": (),
    "SLICE": (),
    "SOFTMAX": (_one_dimensional_output, _small_softmax),
    "SPACE_TO_DEPTH": (),
    "SPLIT": (_no_batch_split,),
    "SQUARED_DIFFERENCE": (),
    "SQUEEZE": (_leading_ones,),
    "STRIDED_SLICE": (_plain_strides,),
    "SUB": (),
    "SUM": (_no_batch_reduction,),
    "TANH": (),
    # On no published list, and inside a compiled subgraph all the same: google-coral/test_data,
    # deeplab_mobilenet_edgetpu_slim_cityscapes_quant_edgetpu.tflite.
    "TILE": (),
    "TRANSPOSE": (_keeps_channels,),
    "TRANSPOSE_CONV": (),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": (),
}

# Inputs that must be constant: position → what it is.
PARAMETERS: Mapping[str, Mapping[int, str]] = {
    "CONV_2D": {1: "filter", 2: "bias"},
    "DEPTHWISE_CONV_2D": {1: "filter", 2: "bias"},
    "EXPAND_DIMS": {1: "axis"},
    "FULLY_CONNECTED": {1: "filter", 2: "bias"},
    "MEAN": {1: "axis"},
    "PAD": {1: "paddings"},
    "PRELU": {1: "alpha"},
    "REDUCE_MAX": {1: "axis"},
    "REDUCE_MIN": {1: "axis"},
    "RESHAPE": {1: "new shape"},
    "RESIZE_BILINEAR": {1: "size"},
    "RESIZE_NEAREST_NEIGHBOR": {1: "size"},
    "SLICE": {1: "begin", 2: "size"},
    "SPLIT": {0: "axis"},
    "STRIDED_SLICE": {1: "begin", 2: "end", 3: "strides"},
    "SUM": {1: "axis"},
    "TILE": {1: "multiples"},
    "TRANSPOSE": {1: "order"},
    "TRANSPOSE_CONV": {0: "output shape", 1: "filter", 3: "bias"},
    "UNIDIRECTIONAL_SEQUENCE_LSTM": {
        **dict.fromkeys(range(1, 9), "weights"),
        **dict.fromkeys(range(12, 16), "bias"),
    },
}

# Highest version of each operation that compiler 16.0 (July 2021) can read: those that TensorFlow Lite of
# that time registered (tensorflow/lite/kernels/register.cc). It refuses a model with a higher one.
VERSIONS: Dict[str, int] = {
    "ADD": 4,
    "AVERAGE_POOL_2D": 3,
    "CONCATENATION": 3,
    "CONV_2D": 5,
    "DEPTHWISE_CONV_2D": 6,
    "EXPAND_DIMS": 1,
    "FULLY_CONNECTED": 9,
    "L2_NORMALIZATION": 2,
    "LOGISTIC": 3,
    "MAXIMUM": 4,
    "MAX_POOL_2D": 3,
    "MEAN": 3,
    "MINIMUM": 4,
    "MUL": 5,
    "PACK": 3,
    "PAD": 4,
    "PRELU": 1,
    "QUANTIZE": 2,
    "REDUCE_MAX": 3,
    "REDUCE_MIN": 3,
    "RELU": 3,
    "RELU6": 3,
    "RELU_N1_TO_1": 1,
    "RESHAPE": 1,
    "RESIZE_BILINEAR": 4,
    "RESIZE_NEAREST_NEIGHBOR": 4,
    "RSQRT": 2,
    "SLICE": 5,
    "SOFTMAX": 3,
    "SPACE_TO_DEPTH": 2,
    "SPLIT": 4,
    "SQUARED_DIFFERENCE": 2,
    "SQUEEZE": 2,
    "STRIDED_SLICE": 5,
    "SUB": 5,
    "SUM": 2,
    "TANH": 3,
    "TILE": 2,
    "TRANSPOSE": 5,
    "TRANSPOSE_CONV": 3,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": 3,
}

# What to do about operations that people run into, where there is something better than "replace it".
TYPE_REMEDIES: Mapping[str, str] = {
    "ARG_MAX": "take the arg-max on the host, from the last result of the Edge TPU",
    "ARG_MIN": "take the arg-min on the host, from the last result of the Edge TPU",
    "BATCH_MATMUL": "use FULLY_CONNECTED or a 1x1 CONV_2D with constant weights",
    "CAST": "feed and return the quantised type, so that nothing has to be cast",
    "DEPTH_TO_SPACE": "use TRANSPOSE_CONV, or RESIZE_NEAREST_NEIGHBOR and CONV_2D (#386)",
    "DIV": "multiply by the reciprocal, as a constant",
    "ELU": "use RELU or PRELU",
    "GATHER": "use SLICE or STRIDED_SLICE with constant ranges, or gather on the host (#147)",
    "GATHER_ND": "gather on the host, from the last result of the Edge TPU",
    "GELU": "use RELU6 or LOGISTIC times the input",
    "HARD_SWISH": "use RELU6, or LOGISTIC times the input (#272)",
    "LEAKY_RELU": "use PRELU with one alpha a channel, or MAXIMUM(x, alpha * x) (#147, #165)",
    "LOG_SOFTMAX": "use SOFTMAX, and take the logarithm on the host",
    "LSTM": "use UNIDIRECTIONAL_SEQUENCE_LSTM (a Keras LSTM, converted by TensorFlow 2)",
    "NON_MAX_SUPPRESSION_V4": "suppress on the host",
    "NON_MAX_SUPPRESSION_V5": "suppress on the host",
    "POW": "multiply the value by itself",
    "SQUARE": "multiply the value by itself",
    "TFLite_Detection_PostProcess": "leave it last: it is meant for the CPU (#515)",
    "TOPK_V2": "sort on the host",
    "UNPACK": "use SPLIT or SLICE, and keep the dimension",
}
