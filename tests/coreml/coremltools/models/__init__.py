"""MLModel, and the modules beside it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from boardbench.inspect.analyse import inspect
from coremltools import ComputeUnit
from coremltools.libcoremlpython import _MLModelProxy

from . import compute_device, compute_plan  # noqa: F401


class MLModel:
    def __init__(
        self,
        model: str,
        is_temp_package: bool = False,
        mil_program: Any = None,
        skip_model_load: bool = False,
        compute_units: ComputeUnit = ComputeUnit.ALL,
        weights_dir: str | None = None,
        function_name: str | None = None,
        optimization_hints: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(compute_units, ComputeUnit):
            raise TypeError('"compute_units" parameter must be of type: coremltools.ComputeUnit')
        if not isinstance(model, str) or not model.endswith((".mlmodel", ".mlpackage")):
            raise TypeError("Expected model to be a .mlmodel file, .mlpackage file or a Model_pb2 object")
        if Path(model).is_dir() != model.endswith(".mlpackage"):
            raise Exception("Unable to load model")
        if function_name not in (None, "main"):
            raise ValueError('function_name must be "main" for non multifunction model')
        if set(optimization_hints or {}) - {"allowLowPrecisionAccumulationOnGPU", "reshapeFrequency"}:
            raise ValueError("Unrecognized optimization hint")
        self.hints = optimization_hints
        self.__proxy__: Any = None
        version = int(re.findall(r"\d+", inspect(Path(model)).format_version)[0])
        if version > _MLModelProxy.maximum_supported_specification_version():
            return
        try:
            self.__proxy__ = _MLModelProxy(model, compute_units.name, function_name or "", {}, None)
        except RuntimeError as error:
            warnings.warn(
                "You will not be able to run predict() on this Core ML model."
                f" Underlying exception message was: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def get_compiled_model_path(self) -> str:
        if self.__proxy__ is None:
            raise Exception("This model was not loaded or compiled with the Core ML Framework.")
        return self.__proxy__.get_compiled_model_path()

    def predict(self, data: Any, state: Any = None) -> Any:
        if type(data) not in (list, dict):
            raise TypeError('"data" parameter must be either a dict or list of dict')
        return self.__proxy__.predict(data, state)
