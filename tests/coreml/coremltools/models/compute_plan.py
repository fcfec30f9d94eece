"""The plan that Core ML makes of a compiled model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boardbench.inspect.analyse import inspect
from coremltools import ComputeUnit

from .compute_device import MLCPUComputeDevice, MLGPUComputeDevice, MLNeuralEngineComputeDevice


@dataclass(frozen=True)
class MLModelStructureProgramNamedValueType:
    name: str
    type: Any


@dataclass(frozen=True)
class MLModelStructureProgramOperation:
    inputs: dict[str, Any]
    operator_name: str
    outputs: list[MLModelStructureProgramNamedValueType]
    blocks: list[Any]


@dataclass(frozen=True)
class MLModelStructureProgramBlock:
    inputs: list[Any]
    operations: list[MLModelStructureProgramOperation]
    output_names: list[str]


@dataclass(frozen=True)
class MLModelStructureProgramFunction:
    inputs: list[Any]
    block: MLModelStructureProgramBlock


@dataclass(frozen=True)
class MLModelStructureProgram:
    functions: dict[str, MLModelStructureProgramFunction]


@dataclass(frozen=True)
class MLModelStructureNeuralNetworkLayer:
    name: str
    type: str
    input_names: list[str]
    output_names: list[str]


@dataclass(frozen=True)
class MLModelStructureNeuralNetwork:
    layers: list[MLModelStructureNeuralNetworkLayer]


@dataclass(frozen=True)
class MLModelStructure:
    neuralnetwork: MLModelStructureNeuralNetwork | None
    program: MLModelStructureProgram | None
    pipeline: Any


@dataclass(frozen=True)
class MLComputePlanDeviceUsage:
    preferred_compute_device: Any
    supported_compute_devices: list[Any]


class MLComputePlan:
    def __init__(self, structure: MLModelStructure, units: ComputeUnit) -> None:
        self.model_structure = structure
        self._units = units

    @classmethod
    def load_from_path(cls, path: str, compute_units: ComputeUnit = ComputeUnit.ALL) -> MLComputePlan:
        if os.environ.get("STANDIN_COREML_OLD"):
            raise ValueError("MLComputePlan is not supported.")
        report = inspect(Path(path))
        if not report.format_version.endswith("mlProgram"):
            layers = [MLModelStructureNeuralNetworkLayer(op.name, op.type, [], []) for op in report.ops]
            return cls(MLModelStructure(MLModelStructureNeuralNetwork(layers), None, None), compute_units)
        constant = MLModelStructureProgramOperation({}, "const", [], [])
        operations = [
            MLModelStructureProgramOperation(
                {}, f"ios15.{op.type}", [MLModelStructureProgramNamedValueType(op.name, None)], []
            )
            for op in report.ops
        ]
        block = MLModelStructureProgramBlock([], [constant, *operations], [])
        program = MLModelStructureProgram({"main": MLModelStructureProgramFunction([], block)})
        return cls(MLModelStructure(None, program, None), compute_units)

    def get_compute_device_usage_for_mlprogram_operation(
        self, operation: MLModelStructureProgramOperation
    ) -> MLComputePlanDeviceUsage | None:
        if operation.operator_name == "const":
            return None
        return self._usage(operation.operator_name.rpartition(".")[2] != "softmax")

    def get_compute_device_usage_for_neuralnetwork_layer(
        self, layer: MLModelStructureNeuralNetworkLayer
    ) -> MLComputePlanDeviceUsage | None:
        return self._usage(False)

    def _usage(self, on_engine: bool) -> MLComputePlanDeviceUsage:
        supported: list[Any] = [MLCPUComputeDevice(), MLGPUComputeDevice()]
        if on_engine:
            supported.append(MLNeuralEngineComputeDevice())
        allowed = {
            ComputeUnit.CPU_ONLY: (MLCPUComputeDevice,),
            ComputeUnit.CPU_AND_GPU: (MLCPUComputeDevice, MLGPUComputeDevice),
            ComputeUnit.CPU_AND_NE: (MLCPUComputeDevice, MLNeuralEngineComputeDevice),
            ComputeUnit.ALL: (MLCPUComputeDevice, MLGPUComputeDevice, MLNeuralEngineComputeDevice),
        }[self._units]
        preferred = [each for each in supported if isinstance(each, allowed)][-1]
        return MLComputePlanDeviceUsage(preferred, supported)
