"""The warnings that a report can hold: each code, and when it is there. The documentation is made from it."""

from __future__ import annotations

from typing import Mapping

WARNINGS: Mapping[str, str] = {
    "cpu_fallback": "the Edge TPU compiler left operations to the CPU",
    "custom_operations": "operations are not the format's own; a runtime must be built with them",
    "estimates_disagree": "names and graph say different things about what was compiled; of those operations "
    "nothing is said",
    "external_data": "constants lie in other files, and the model does not run without them",
    "more_graphs": "a TensorFlow Lite file has graphs beside the main one, which are not counted",
    "more_methods": "an ExecuTorch program has several methods, and the report is about one",
    "nested_graphs": "operations hold graphs of their own, which are not counted",
    "not_compiled": "the Edge TPU was asked for, and the file is not compiled for it: it would run wholly on "
    "the CPU, without an error",
    "not_quantised": "the Edge TPU was asked for, and nothing that the model computes has 8 bits",
    "not_portable": "a TensorRT engine runs only on the kind of GPU and the version that it was built for",
    "open_shapes": "inputs have sizes that the file leaves open",
    "operations_from_source": "the operations of a TorchScript file are those that its source names",
    "parameters_streamed": "parameters do not stay in the Edge TPU's memory and are sent at every inference",
    "runtime_too_new": "the file needs a newer Edge TPU runtime than there is",
}
