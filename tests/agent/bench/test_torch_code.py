"""What TorchScript may not say: looked at as text and bytes, by which no PyTorch is needed."""

from __future__ import annotations

import io
import zipfile

import pytest

from boardbench.agent.bench.runtimes import torch_code
from boardbench.inspect.errors import InspectError

# As PyTorch writes a module whose layers have numbers for names, with packed weights.
HARMLESS = """class Net(Module):
  __parameters__ = []
  __buffers__ = []
  packed : __torch__.torch.classes.quantized.Conv2dPackedParamsBase
  def forward(self: __torch__.Net,
    x: Tensor) -> Tensor:
    _0 = getattr(self, "0")
    _1 = ops.quantized.conv2d_relu((self).packed, (_0).forward(x, ), 0.1, 3)
    # save it, some say
    saved = torch.add(_1, _1, alpha=1)
    message = "to save, or from_file"
    return torch.relu(saved)
"""


def test_what_pytorch_writes_is_let_through() -> None:
    assert torch_code.fault_of_text(HARMLESS) == ""


@pytest.mark.parametrize(
    "line",
    [
        'torch.save(x, "/tmp/a")',
        'ops.aten.save(x, "/tmp/a")',
        'torch.from_file("/tmp/a", True, 4)',
        'x.save("/tmp/a")',
        '1..save("/tmp/a")',
        "torch . \\\n save(x, '/tmp/a')",
        "f = torch.save",
        'getattr(torch, "save")(x, "/tmp/a")',
        "getattr(torch, 'sa' 've')(x, '/tmp/a')",
        'getattr(torch, "sa" # in two parts\n "ve")(x, "/tmp/a")',
        'getattr(torch, "\\163ave")(x, "/tmp/a")',
        'getattr(torch, """save""")(x, "/tmp/a")',
        'y = "a string that # is no comment"; torch.save(x, "/tmp/a")',
        "y = 'it\\'s'; torch.save(x, '/tmp/a')",
        "y = '''it's''' ; torch.save(x, '/tmp/a')",
        'ésave(x); torch.é\nsave(x, "/tmp/a")',
        "torch.classes.dist_c10d.Store(x)",
        "c = __torch__.torch.classes\ny = c.dist_c10d",
        'getattr(__torch__.torch, "classes").dist_c10d',
        "x: __torch__.torch.classes._nnapi.Compilation",
    ],
)
def test_whatever_way_it_is_said(line: str) -> None:
    assert torch_code.fault_of_text(HARMLESS + "    " + line + "\n")


def test_bytecode_that_names_an_operator_of_files() -> None:
    assert torch_code.fault_of_bytes(b"X\x0a\x00\x00\x00aten::relu\x71\x01") == ""
    assert "aten::save" in torch_code.fault_of_bytes(b"X\x0a\x00\x00\x00aten::save\x71\x01")
    assert "aten::from_file" in torch_code.fault_of_bytes(memoryview(b"....aten::from_file\0"))
    assert torch_code.fault_of_bytes(b"c__torch__.torch.classes.quantized\nLinear\n") == ""
    for module, name in (
        ("__torch__.torch.classes.c10d", "Store"),
        ("__torch__.torch", "classes.c10d.Store"),
    ):
        assert "(c10d)" in torch_code.fault_of_bytes(f"c{module}\n{name}\n".encode())


def archive(**files: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return packed.getvalue()


def test_every_file_of_code_is_looked_at_whatever_its_case() -> None:
    harmless = {"net/code/__torch__.py": HARMLESS, "net/version": "3"}
    assert torch_code.fault_of_archive(archive(**harmless)) == ""
    found = torch_code.fault_of_archive(archive(**harmless, **{"net/CODE/Deep/Down.PY": "torch.save(x, y)"}))
    assert found == "net/CODE/Deep/Down.PY uses 'save', an operator that reaches files of the board"
    found = torch_code.fault_of_archive(archive(**harmless, **{"net/bytecode.pkl": "aten::save."}))
    assert found.startswith("net/bytecode.pkl runs aten::save")
    assert "PyTorch 1.0" in torch_code.fault_of_archive(archive(**harmless, **{"net/model.json": "{}"}))


def test_what_can_not_be_read_is_no_answer() -> None:
    with pytest.raises(InspectError):
        torch_code.fault_of_archive(archive(**{"net/code/__torch__.py": HARMLESS})[:-30])
