"""Devices of a Mac with a neural engine; ``STANDIN_COREML_DEVICES`` names others."""

from __future__ import annotations

import os


class MLComputeDevice:
    @classmethod
    def get_all_compute_devices(cls) -> list[MLComputeDevice]:
        kinds = {"cpu": MLCPUComputeDevice, "gpu": MLGPUComputeDevice, "npu": MLNeuralEngineComputeDevice}
        return [kinds[name]() for name in os.environ.get("STANDIN_COREML_DEVICES", "cpu,gpu,npu").split(",")]


class MLCPUComputeDevice(MLComputeDevice):
    pass


class MLGPUComputeDevice(MLComputeDevice):
    pass


class MLNeuralEngineComputeDevice(MLComputeDevice):
    pass
