"""Makes the small model files in ``files/`` with the tools that own the formats.

They are committed, because those tools are large and live in environments of their own. To make them again:

    python make_files.py openvino      # with: openvino (2026.4)
    python make_files.py coreml        # with: coremltools (9.0)
    python make_files.py torch         # with: torch (2.13), executorch (1.5)
    python make_files.py mobile        # with: torch (2.15)

The figures that the tests expect (tests/inspect/test_formats.py) were read with the same tools.
"""

from __future__ import annotations

import sys
from pathlib import Path

FILES = Path(__file__).resolve().parent / "files"


def make_openvino() -> None:
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    rng = np.random.default_rng(7)
    x = ops.parameter([1, 3, 16, 16], ov.Type.f32, name="x")
    weights = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    weights[0] = 0
    conv = ops.convolution(x, ops.constant(weights), [2, 2], [1, 1], [1, 1], [1, 1])
    relu = ops.relu(conv)
    flat = ops.reshape(relu, ops.constant(np.array([1, 256], np.int64)), False)
    dense = ops.matmul(flat, ops.constant(rng.standard_normal((10, 256)).astype(np.float32)), False, True)
    result = ops.softmax(dense, 1)
    result.output(0).set_names({"scores"})
    ov.save_model(ov.Model([result], [x], "small"), FILES / "small.xml", compress_to_fp16=False)


def make_coreml() -> None:
    import coremltools as ct
    import numpy as np
    from coremltools.converters.mil import Builder as mb

    rng = np.random.default_rng(7)
    weights = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    dense = rng.standard_normal((10, 4 * 8 * 8)).astype(np.float32)

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 3, 16, 16))])
    def program(x):
        x = mb.conv(x=x, weight=weights, strides=[2, 2], pad_type="same", name="conv")
        x = mb.relu(x=x, name="relu")
        x = mb.reshape(x=x, shape=[1, 256], name="flat")
        x = mb.linear(x=x, weight=dense, name="dense")
        return mb.softmax(x=x, axis=-1, name="scores")

    ct.convert(program, convert_to="neuralnetwork").save(str(FILES / "small.mlmodel"))
    ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS15,
        compute_precision=ct.precision.FLOAT32,
    ).save(str(FILES / "small.mlpackage"))


def make_torch() -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.dense = torch.nn.Linear(256, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.conv(x))
            x = torch.cumsum(x, 1)
            return self.dense(x.flatten(1))

    torch.manual_seed(7)
    model = Small().eval()
    example = (torch.zeros(1, 3, 16, 16),)
    exported = torch.export.export(model, example)
    plain = to_edge_transform_and_lower(exported).to_executorch()
    (FILES / "portable.pte").write_bytes(plain.buffer)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    (FILES / "xnnpack.pte").write_bytes(lowered.buffer)
    scripted = torch.jit.trace(model, example)
    torch.jit.save(scripted, str(FILES / "small.pt"))
    torch.jit.script(model)._save_for_lite_interpreter(str(FILES / "small.ptl"))


def make_mobile() -> None:
    import torch

    class Mobile(torch.nn.Module):
        """One value of each kind that the lite interpreter's files hold."""

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(3, 3))
            self.names = ["a", "b"]
            self.k: dict[str, int] = {"x": 1}
            self.low = torch.nn.Parameter(torch.randn(4).half())
            self.register_buffer("i", torch.arange(5))
            self.t = (1, 2.5, True)
            values = torch.randn(2, 2)
            scales, points = torch.tensor([0.1, 0.2]), torch.tensor([0, 0])
            self.qt = torch.quantize_per_tensor(torch.randn(2, 2), 0.1, 0, torch.qint8)
            self.qc = torch.quantize_per_channel(values, scales, points, 0, torch.quint8)

        def forward(self, x: torch.Tensor, y: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
            if x.sum() > 0:
                x = x @ self.w
            for k in [1, 2, 3]:
                x = x * k + y["a"]
            more = self.qt.dequantize().sum() + self.qc.dequantize().sum()
            return x + self.low.sum() + self.i.sum() + more, [1, 2, self.k["x"]]

        @torch.jit.export
        def other(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(x)

    torch.manual_seed(7)
    scripted = torch.jit.script(Mobile().eval())
    scripted._save_for_lite_interpreter(str(FILES / "mobile.ptl"))
    scripted._save_for_lite_interpreter(str(FILES / "mobile_flatbuffer.ptl"), _use_flatbuffer=True)


if __name__ == "__main__":
    {"openvino": make_openvino, "coreml": make_coreml, "torch": make_torch, "mobile": make_mobile}[
        sys.argv[1]
    ]()
