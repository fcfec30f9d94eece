"""Names and field numbers of TensorFlow Lite's file format.

Source: tensorflow/tensorflow ``tensorflow/compiler/mlir/lite/schema/schema.fbs`` (version 3).
"""

from __future__ import annotations

import struct
from typing import Dict, Mapping, Tuple

from boardbench.inspect.flatbuffer import I8, I32, U8

IDENTIFIER = b"TFL3"
# What the Edge TPU compiler leaves where operations were (google-coral/libedgetpu, tflite/custom_op.h).
EDGETPU_OP = "edgetpu-custom-op"
CUSTOM = 32

# BuiltinOperator, in the order of its numbers.
OPERATORS: Tuple[str, ...] = (
    "ADD",
    "AVERAGE_POOL_2D",
    "CONCATENATION",
    "CONV_2D",
    "DEPTHWISE_CONV_2D",
    "DEPTH_TO_SPACE",
    "DEQUANTIZE",
    "EMBEDDING_LOOKUP",
    "FLOOR",
    "FULLY_CONNECTED",
    "HASHTABLE_LOOKUP",
    "L2_NORMALIZATION",
    "L2_POOL_2D",
    "LOCAL_RESPONSE_NORMALIZATION",
    "LOGISTIC",
    "LSH_PROJECTION",
    "LSTM",
    "MAX_POOL_2D",
    "MUL",
    "RELU",
    "RELU_N1_TO_1",
    "RELU6",
    "RESHAPE",
    "RESIZE_BILINEAR",
    "RNN",
    "SOFTMAX",
    "SPACE_TO_DEPTH",
    "SVDF",
    "TANH",
    "CONCAT_EMBEDDINGS",
    "SKIP_GRAM",
    "CALL",
    "CUSTOM",
    "EMBEDDING_LOOKUP_SPARSE",
    "PAD",
    "UNIDIRECTIONAL_SEQUENCE_RNN",
    "GATHER",
    "BATCH_TO_SPACE_ND",
    "SPACE_TO_BATCH_ND",
    "TRANSPOSE",
    "MEAN",
    "SUB",
    "DIV",
    "SQUEEZE",
    "UNIDIRECTIONAL_SEQUENCE_LSTM",
    "STRIDED_SLICE",
    "BIDIRECTIONAL_SEQUENCE_RNN",
    "EXP",
    "TOPK_V2",
    "SPLIT",
    "LOG_SOFTMAX",
    "DELEGATE",
    "BIDIRECTIONAL_SEQUENCE_LSTM",
    "CAST",
    "PRELU",
    "MAXIMUM",
    "ARG_MAX",
    "MINIMUM",
    "LESS",
    "NEG",
    "PADV2",
    "GREATER",
    "GREATER_EQUAL",
    "LESS_EQUAL",
    "SELECT",
    "SLICE",
    "SIN",
    "TRANSPOSE_CONV",
    "SPARSE_TO_DENSE",
    "TILE",
    "EXPAND_DIMS",
    "EQUAL",
    "NOT_EQUAL",
    "LOG",
    "SUM",
    "SQRT",
    "RSQRT",
    "SHAPE",
    "POW",
    "ARG_MIN",
    "FAKE_QUANT",
    "REDUCE_PROD",
    "REDUCE_MAX",
    "PACK",
    "LOGICAL_OR",
    "ONE_HOT",
    "LOGICAL_AND",
    "LOGICAL_NOT",
    "UNPACK",
    "REDUCE_MIN",
    "FLOOR_DIV",
    "REDUCE_ANY",
    "SQUARE",
    "ZEROS_LIKE",
    "FILL",
    "FLOOR_MOD",
    "RANGE",
    "RESIZE_NEAREST_NEIGHBOR",
    "LEAKY_RELU",
    "SQUARED_DIFFERENCE",
    "MIRROR_PAD",
    "ABS",
    "SPLIT_V",
    "UNIQUE",
    "CEIL",
    "REVERSE_V2",
    "ADD_N",
    "GATHER_ND",
    "COS",
    "WHERE",
    "RANK",
    "ELU",
    "REVERSE_SEQUENCE",
    "MATRIX_DIAG",
    "QUANTIZE",
    "MATRIX_SET_DIAG",
    "ROUND",
    "HARD_SWISH",
    "IF",
    "WHILE",
    "NON_MAX_SUPPRESSION_V4",
    "NON_MAX_SUPPRESSION_V5",
    "SCATTER_ND",
    "SELECT_V2",
    "DENSIFY",
    "SEGMENT_SUM",
    "BATCH_MATMUL",
    "PLACEHOLDER_FOR_GREATER_OP_CODES",
    "CUMSUM",
    "CALL_ONCE",
    "BROADCAST_TO",
    "RFFT2D",
    "CONV_3D",
    "IMAG",
    "REAL",
    "COMPLEX_ABS",
    "HASHTABLE",
    "HASHTABLE_FIND",
    "HASHTABLE_IMPORT",
    "HASHTABLE_SIZE",
    "REDUCE_ALL",
    "CONV_3D_TRANSPOSE",
    "VAR_HANDLE",
    "READ_VARIABLE",
    "ASSIGN_VARIABLE",
    "BROADCAST_ARGS",
    "RANDOM_STANDARD_NORMAL",
    "BUCKETIZE",
    "RANDOM_UNIFORM",
    "MULTINOMIAL",
    "GELU",
    "DYNAMIC_UPDATE_SLICE",
    "RELU_0_TO_1",
    "UNSORTED_SEGMENT_PROD",
    "UNSORTED_SEGMENT_MAX",
    "UNSORTED_SEGMENT_SUM",
    "ATAN2",
    "UNSORTED_SEGMENT_MIN",
    "SIGN",
    "BITCAST",
    "BITWISE_XOR",
    "RIGHT_SHIFT",
    "STABLEHLO_LOGISTIC",
    "STABLEHLO_ADD",
    "STABLEHLO_DIVIDE",
    "STABLEHLO_MULTIPLY",
    "STABLEHLO_MAXIMUM",
    "STABLEHLO_RESHAPE",
    "STABLEHLO_CLAMP",
    "STABLEHLO_CONCATENATE",
    "STABLEHLO_BROADCAST_IN_DIM",
    "STABLEHLO_CONVOLUTION",
    "STABLEHLO_SLICE",
    "STABLEHLO_CUSTOM_CALL",
    "STABLEHLO_REDUCE",
    "STABLEHLO_ABS",
    "STABLEHLO_AND",
    "STABLEHLO_COSINE",
    "STABLEHLO_EXPONENTIAL",
    "STABLEHLO_FLOOR",
    "STABLEHLO_LOG",
    "STABLEHLO_MINIMUM",
    "STABLEHLO_NEGATE",
    "STABLEHLO_OR",
    "STABLEHLO_POWER",
    "STABLEHLO_REMAINDER",
    "STABLEHLO_RSQRT",
    "STABLEHLO_SELECT",
    "STABLEHLO_SUBTRACT",
    "STABLEHLO_TANH",
    "STABLEHLO_SCATTER",
    "STABLEHLO_COMPARE",
    "STABLEHLO_CONVERT",
    "STABLEHLO_DYNAMIC_SLICE",
    "STABLEHLO_DYNAMIC_UPDATE_SLICE",
    "STABLEHLO_PAD",
    "STABLEHLO_IOTA",
    "STABLEHLO_DOT_GENERAL",
    "STABLEHLO_REDUCE_WINDOW",
    "STABLEHLO_SORT",
    "STABLEHLO_WHILE",
    "STABLEHLO_GATHER",
    "STABLEHLO_TRANSPOSE",
    "DILATE",
    "STABLEHLO_RNG_BIT_GENERATOR",
    "REDUCE_WINDOW",
    "STABLEHLO_COMPOSITE",
    "STABLEHLO_SHIFT_LEFT",
    "STABLEHLO_CBRT",
    "STABLEHLO_CASE",
)

# TensorType, in the order of its numbers: NumPy's name (or the nearest there is) and bits an element.
# Zero bits: elements of no fixed size.
TYPES: Tuple[Tuple[str, int], ...] = (
    ("float32", 32),
    ("float16", 16),
    ("int32", 32),
    ("uint8", 8),
    ("int64", 64),
    ("str", 0),
    ("bool", 8),
    ("int16", 16),
    ("complex64", 64),
    ("int8", 8),
    ("float64", 64),
    ("complex128", 128),
    ("uint64", 64),
    ("resource", 0),
    ("variant", 0),
    ("uint32", 32),
    ("uint16", 16),
    ("int4", 4),
    ("bfloat16", 16),
    ("int2", 2),
    ("uint4", 4),
    ("float8_e4m3fn", 8),
    ("float8_e5m2", 8),
)

# Elements of QuantizationParameters.details and of sparsity indices, by the union's number.
INDEX_WIDTHS: Mapping[int, Tuple[str, int]] = {1: ("i", 4), 2: ("H", 2), 3: ("B", 1)}

Field = Tuple[int, struct.Struct, int]
_BOOL = U8

# Options that are asked for by name: number of the options' table → name → (field, kind, default).
OPTIONS: Dict[int, Dict[str, Field]] = {
    1: {  # Conv2DOptions
        "padding": (0, I8, 0),
        "stride_w": (1, I32, 0),
        "stride_h": (2, I32, 0),
        "fused_activation": (3, I8, 0),
        "dilation_w": (4, I32, 1),
        "dilation_h": (5, I32, 1),
    },
    2: {  # DepthwiseConv2DOptions
        "padding": (0, I8, 0),
        "stride_w": (1, I32, 0),
        "stride_h": (2, I32, 0),
        "depth_multiplier": (3, I32, 0),
        "fused_activation": (4, I8, 0),
        "dilation_w": (5, I32, 1),
        "dilation_h": (6, I32, 1),
    },
    5: {  # Pool2DOptions
        "padding": (0, I8, 0),
        "stride_w": (1, I32, 0),
        "stride_h": (2, I32, 0),
        "filter_width": (3, I32, 0),
        "filter_height": (4, I32, 0),
        "fused_activation": (5, I8, 0),
    },
    6: {"rank": (0, I32, 0), "fused_activation": (1, I8, 0)},  # SVDFOptions
    7: {"fused_activation": (0, I8, 0)},  # RNNOptions
    8: {  # FullyConnectedOptions
        "fused_activation": (0, I8, 0),
        "weights_format": (1, I8, 0),
        "keep_num_dims": (2, _BOOL, 0),
    },
    10: {"axis": (0, I32, 0), "fused_activation": (1, I8, 0)},  # ConcatenationOptions
    11: {"fused_activation": (0, I8, 0)},  # AddOptions
    12: {"fused_activation": (0, I8, 0)},  # L2NormOptions
    14: {"fused_activation": (0, I8, 0), "kernel_type": (3, I8, 0)},  # LSTMOptions
    15: {"align_corners": (2, _BOOL, 0), "half_pixel_centers": (3, _BOOL, 0)},  # ResizeBilinearOptions
    16: {"subgraph": (0, I32, 0)},  # CallOptions
    19: {"block_size": (0, I32, 0)},  # SpaceToDepthOptions
    21: {"fused_activation": (0, I8, 0)},  # MulOptions
    23: {"axis": (0, I32, 0), "batch_dims": (1, I32, 0)},  # GatherOptions
    27: {"keep_dims": (0, _BOOL, 0)},  # ReducerOptions
    28: {"fused_activation": (0, I8, 0)},  # SubOptions
    29: {"fused_activation": (0, I8, 0)},  # DivOptions
    31: {"time_major": (0, _BOOL, 0), "fused_activation": (1, I8, 0)},  # SequenceRNNOptions
    32: {  # StridedSliceOptions
        "begin_mask": (0, I32, 0),
        "end_mask": (1, I32, 0),
        "ellipsis_mask": (2, I32, 0),
        "new_axis_mask": (3, I32, 0),
        "shrink_axis_mask": (4, I32, 0),
    },
    35: {"num_splits": (0, I32, 0)},  # SplitOptions
    49: {  # TransposeConvOptions
        "padding": (0, I8, 0),
        "stride_w": (1, I32, 0),
        "stride_h": (2, I32, 0),
        "fused_activation": (3, I8, 0),
    },
    59: {"values_count": (0, I32, 0), "axis": (1, I32, 0)},  # PackOptions
    64: {"num": (0, I32, 0), "axis": (1, I32, 0)},  # UnpackOptions
    71: {  # UnidirectionalSequenceLSTMOptions
        "fused_activation": (0, I8, 0),
        "time_major": (3, _BOOL, 0),
    },
    74: {"align_corners": (0, _BOOL, 0), "half_pixel_centers": (1, _BOOL, 0)},  # ResizeNearestNeighborOptions
    92: {"then_subgraph": (0, I32, 0), "else_subgraph": (1, I32, 0)},  # IfOptions
    93: {"cond_subgraph": (0, I32, 0), "body_subgraph": (1, I32, 0)},  # WhileOptions
    94: {"block_size": (0, I32, 0)},  # DepthToSpaceOptions
    101: {"adj_x": (0, _BOOL, 0), "adj_y": (1, _BOOL, 0)},  # BatchMatMulOptions
    103: {"init_subgraph": (0, I32, 0)},  # CallOnceOptions
    106: {  # Conv3DOptions
        "padding": (0, I8, 0),
        "stride_d": (1, I32, 0),
        "stride_w": (2, I32, 0),
        "stride_h": (3, I32, 0),
        "fused_activation": (4, I8, 0),
    },
}

# Lists inside options, by the number of the options' table: (field, bytes an element). They are only
# counted. 0 bytes an element: a string.
OPTION_LISTS: Mapping[int, Tuple[Tuple[int, int], ...]] = {
    3: ((1, 4), (2, 4)),  # ConcatEmbeddingsOptions
    8: ((5, 1),),  # FullyConnectedOptions.quant_spec
    17: ((0, 4),),  # ReshapeOptions.new_shape
    30: ((0, 4),),  # SqueezeOptions.squeeze_dims
    111: ((0, 0), (1, 0)),  # VarHandleOptions
    115: ((0, 4),),  # BucketizeOptions.boundaries
}
# The same for BuiltinOptions2.
OPTION2_LISTS: Mapping[int, Tuple[Tuple[int, int], ...]] = {
    2: ((0, 8),),  # StablehloBroadcastInDimOptions
    3: ((0, 8), (1, 8), (2, 8)),  # StablehloSliceOptions
    4: (
        (0, 8),
        (1, 8),
        (2, 8),
        (3, 8),
        (4, 1),
        (7, 8),
        (10, 8),
        (13, 8),
        (16, 4),
    ),  # StablehloConvolutionOptions
    5: ((0, 0), (2, 0), (4, 4), (5, 1)),  # StablehloCustomCallOptions
    6: ((0, 8),),  # StablehloReduceOptions
    7: ((1, 8), (2, 8), (3, 8)),  # StablehloScatterOptions
    9: ((0, 8),),  # StablehloDynamicSliceOptions
    10: ((0, 8), (1, 8), (2, 8)),  # StablehloPadOptions
    12: ((0, 8), (1, 8), (2, 8), (3, 8), (4, 4)),  # StablehloDotGeneralOptions
    13: ((0, 8), (1, 8), (2, 8), (3, 8), (4, 8)),  # StablehloReduceWindowOptions
    16: ((0, 8), (1, 8), (2, 8), (4, 8)),  # StablehloGatherOptions
    17: ((0, 8),),  # StablehloTransposeOptions
    21: ((0, 0), (2, 1)),  # StableHLOCompositeOptions
    23: ((0, 4),),  # StablehloCaseOptions
}

SAME, VALID = 0, 1
