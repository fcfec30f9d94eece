"""What of a TorchScript program is not run unasked: code that writes or maps files of the board.

A program is text (``code/*.py``) or bytecode (``bytecode.pkl``, a FlatBuffer), and has operators for files:
``aten::save`` writes one wherever the agent may, ``aten::from_file`` maps one, for writing too.
``__setstate__`` runs while a program is loaded, so all is looked at before PyTorch sees it: whatever it could
take for code. Names of entries are compared without regard to case, as PyTorch's reader does.

Refused is what *could* name such an operator, in whatever way the language allows: ``torch.save``,
``ops.aten.save``, ``x.save``, ``getattr(torch, "sa" "ve")``, an alias. This is no sandbox: it keeps a model
from reaching the disk by the means of its language, and not by an error in PyTorch.
Sources: pytorch/pytorch ``torch/csrc/jit/runtime/register_special_ops.cpp`` (aten::save),
``aten/src/ATen/native/native_functions.yaml`` (from_file), ``torch/csrc/jit/frontend/lexer.h`` and
``ir_emitter.cpp`` (the language), ``torch/csrc/jit/serialization/import_legacy.cpp`` (``model.json``).
"""

from __future__ import annotations

import re
from typing import Iterable, Iterator, List, Match, Optional, Tuple

from boardbench.inspect.archive import Readable, read_archive, read_entry
from boardbench.inspect.budget import Budget

FILES = ("save", "from_file", "load_tensor")
"""Operators that reach files, by the name without its namespace."""

CLASSES = ("quantized", "sparse", "xnnpack", "rnn", "mkldnn", "vulkan", "metal")
"""Namespaces of classes in C++ that only hold packed weights; others are stores, processes, backends."""

_LARGEST_CODE_BYTES = 64 << 20
_LEGACY = "model.json"
_PICKLES = (".pkl",)
_IN_BYTECODE = re.compile(rb"aten::save|aten::from_file|debugprims::load_tensor")
# A pickle tells module and name of a class on a line each, cut wherever its writer likes.
_CLASS_IN_PICKLE = re.compile(rb"[.\n]classes[.\n]([A-Za-z0-9_]+)")
# Comments, strings with their escapes (three quotes first), names, and every other mark and digit by itself.
_TOKEN = re.compile(
    r"(?P<comment>\#[^\n]*)"
    r"|(?P<string>\"\"\"(?:[^\\]|\\.)*?\"\"\"|'''(?:[^\\]|\\.)*?'''|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*')"
    r"|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<other>\\\s*\n|\S)",
    re.DOTALL | re.ASCII,
)
_ESCAPE = re.compile(r"\\([0-7]{1,3}|.)", re.DOTALL)


def fault_of_archive(data: Readable) -> str:
    """Why an archive is not run unasked, in a few words; empty where nothing speaks against it.

    Raises InspectError where it can't be read: then it is not known what is in it.
    """
    budget = Budget(len(data))
    for entry in read_archive(data, budget).entries:
        name = entry.name.lower()
        if name.rpartition("/")[2] == _LEGACY:
            return "it is in the form of PyTorch 1.0, in which code can be anywhere: export it anew"
        if name.endswith(".py"):
            text = read_entry(data, entry, _LARGEST_CODE_BYTES, budget).decode("utf-8", "replace")
            fault = fault_of_text(text)
            if fault:
                return f"{entry.name} {fault}"
        elif name.endswith(_PICKLES):
            fault = fault_of_bytes(read_entry(data, entry, _LARGEST_CODE_BYTES, budget))
            if fault:
                return f"{entry.name} {fault}"
    return ""


def fault_of_bytes(content: Readable) -> str:
    """What a pickle, or a FlatBuffer of the lite interpreter, names that reaches beyond tensors."""
    found = _IN_BYTECODE.search(content)
    if found:
        return f"runs {found.group().decode('ascii')}, which reaches files of the board"
    return _fault_of_classes(each.decode("ascii") for each in _CLASS_IN_PICKLE.findall(content))


def fault_of_text(text: str) -> str:
    """What the code of a program names that reaches beyond tensors."""
    tokens = list(_tokens(text))
    looks_up = any(kind == "name" and value == "getattr" for kind, value in tokens)
    classes: List[str] = []
    for at, (kind, value) in enumerate(tokens):
        if value in FILES and (kind == "name" or looks_up):
            return f"uses {value!r}, an operator that reaches files of the board"
        if value == "classes" and (kind == "name" or looks_up):
            classes.append(_after_dot(tokens, at) or "unnamed ones")
    return _fault_of_classes(classes)


def _fault_of_classes(namespaces: Iterable[str]) -> str:
    for each in namespaces:
        if each not in CLASSES:
            return f"uses classes of PyTorch's own in C++ ({each}), which may do anything"
    return ""


def _after_dot(tokens: List[Tuple[str, str]], at: int) -> Optional[str]:
    following = tokens[at + 1 : at + 3]
    if len(following) == 2 and following[0][1] == "." and following[1][0] == "name":
        return following[1][1]
    return None


def _tokens(text: str) -> Iterator[Tuple[str, str]]:
    """Kind and value of every token; strings that follow one another are one, escapes resolved."""
    pending: Optional[str] = None
    for found in _TOKEN.finditer(text):
        kind, value = str(found.lastgroup), found.group()
        if kind == "string":
            pending = (pending or "") + _content(value)
            continue
        if kind == "comment" or value.startswith("\\"):
            continue
        if pending is not None:
            yield "string", pending
            pending = None
        yield kind, value
    if pending is not None:
        yield "string", pending


def _content(literal: str) -> str:
    marks = 3 if literal[:3] in ('"""', "'''") else 1
    return _ESCAPE.sub(_resolved, literal[marks:-marks])


def _resolved(found: Match[str]) -> str:
    code = found.group(1)
    return chr(int(code, 8)) if code[0] in "01234567" else code
