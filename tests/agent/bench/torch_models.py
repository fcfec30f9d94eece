"""Small models for PyTorch and ExecuTorch. As a program: torch_models.py KIND FILE, under a Python with them.

Both emit warnings of their own while they export, which are of no interest here.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest


def _torch() -> Any:
    return pytest.importorskip("torch")


def affine() -> Any:
    """relu(x) + x."""
    torch = _torch()

    class Affine(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x):
            return torch.relu(x) + x

    return Affine().eval()


def between() -> Any:
    """A convolution, a cumulative sum that no XNNPACK takes, and a convolution."""
    torch = _torch()

    class Between(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 3)
            self.second = torch.nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.second(torch.cumsum(torch.relu(self.first(x)), 1))

    torch.manual_seed(0)
    return Between().eval()


def several() -> Any:
    """Tensors and numbers in; a tuple and a dictionary out; a loop."""
    torch = _torch()

    class Several(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor, mask: torch.Tensor, rate: int, scale: float = 0.5):  # type: ignore[name-defined]
            for _ in range(rate):
                x = torch.relu(x) * scale
            return x, {"masked": x * mask, "twice": x + x}

    return Several().eval()


def reaching(path: str, how: str) -> Any:
    """A program that writes a file (``save``; ``setstate``: while it is loaded), or maps one."""
    torch = _torch()

    class Save(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x):
            torch.save(x, self.path)
            return x

    class FromFile(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x):
            return x + torch.from_file(self.path, True, 4)

    class SetState(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self):
            super().__init__()
            self.kept = torch.zeros(4)
            self.path = ""

        @torch.jit.export
        def __getstate__(self):
            return self.kept, self.path, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, str, bool]):  # type: ignore[name-defined]
            self.kept = state[0]
            self.path = state[1]
            self.training = state[2]
            torch.save(self.kept, self.path)

        def forward(self, x):
            return x + self.kept

    kinds = {"save": Save, "from_file": FromFile, "setstate": SetState}
    made = kinds[how]().eval()
    made.path = path
    return made


EXAMPLES = {"affine": (1, 4), "between": (1, 3, 32, 32)}


def script(model: Any, *, lite: bool, bundled: tuple[int, ...] | None = None, flat: bool = False) -> bytes:
    """TorchScript, for the full interpreter or the lite one; ``bundled`` is the shape of a bundled input."""
    torch = _torch()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        program = torch.jit.script(model)
        if bundled is not None:
            from torch.utils.bundled_inputs import bundle_inputs

            program = bundle_inputs(program, [(torch.zeros(bundled),)])
        path = Path(folder) / "model"
        if lite:
            program._save_for_lite_interpreter(str(path), _use_flatbuffer=flat)
        else:
            torch.jit.save(program, str(path))
        return path.read_bytes()


def exported(model: Any, shape: tuple[int, ...], *, xnnpack: bool, most: int | None = None) -> bytes:
    """An ExecuTorch program; ``most`` leaves the first dimension open up to it."""
    torch = _torch()
    pytest.importorskip("executorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.exir import to_edge_transform_and_lower

        partitioners = []
        if xnnpack:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

            partitioners.append(XnnpackPartitioner())
        sizes = {"x": {0: torch.export.Dim("n", max=most)}} if most else None
        example = (torch.randn(2 if most else shape[0], *shape[1:]),)
        program = torch.export.export(model, example, dynamic_shapes=sizes)
        return bytes(to_edge_transform_and_lower(program, partitioner=partitioners).to_executorch().buffer)


def ptl_affine() -> bytes:
    """The lite interpreter's, with a bundled input of [1, 4]."""
    return script(affine(), lite=True, bundled=(1, 4))


def pte_affine() -> bytes:
    """[1, 4], nothing delegated."""
    return exported(affine(), (1, 4), xnnpack=False)


KINDS = {
    "ptl": ptl_affine,
    "pte": pte_affine,
    "ptl_between": lambda: script(between(), lite=True),
    "pte_between": lambda: exported(between(), EXAMPLES["between"], xnnpack=True),
}

if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(KINDS[sys.argv[1]]())
