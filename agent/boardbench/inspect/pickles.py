"""Pickles, read without running anything: what a pickle would call is told, and never called.

The format: CPython's ``Lib/pickletools.py``. Only the binary operations are known here; those that hold
numbers as text are refused, because nothing that is read here writes them, and they cost too much time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

from boardbench.inspect.budget import Budget
from boardbench.inspect.errors import Malformed

_LONGEST_NAME = 512
_STEPS_PER_OPERATION = 2
# Beside the operation itself: of an object that is made, of a name of two lines, of a single item.
_STEPS_PER_CALL, _STEPS_PER_GLOBAL, _STEPS_PER_ITEM = 3, 4, 2


@dataclass(frozen=True)
class Global:
    """A class or function by its name: what the pickle would import."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Module and name with a dot between them."""
        return f"{self.module}.{self.name}"


@dataclass
class Call:
    """An object that the pickle would make: callee, arguments, and the state that it would be given."""

    callee: Any
    arguments: Any
    state: Any = None


@dataclass(frozen=True)
class Persistent:
    """A reference to something beside the pickle."""

    key: Any


@dataclass(frozen=True)
class Pickle:
    """What a pickle says: its value, and every call on the way to it."""

    value: Any
    calls: Tuple[Call, ...]


_MARK = object()


def read_pickle(data: bytes, budget: Optional[Budget] = None) -> Pickle:
    """The content of the pickle; raises Malformed. Values may share parts and even contain themselves."""
    machine = _Machine(data, Budget(len(data)) if budget is None else budget)
    try:
        return machine.run()
    except (IndexError, struct.error) as error:
        raise Malformed(
            f"a pickle in the file is truncated or damaged (byte {machine.at}); copy it again"
        ) from error


class _Machine:
    def __init__(self, data: bytes, budget: Budget) -> None:
        self.data = data
        self.budget = budget
        self.at = 0
        self.stack: List[Any] = []
        self.memo: Dict[int, Any] = {}
        self.calls: List[Call] = []

    def run(self) -> Pickle:
        data, budget = self.data, self.budget
        while True:
            budget.steps_left -= _STEPS_PER_OPERATION
            if budget.steps_left < 0:
                budget.exhausted("a pickle in the file")
            code = data[self.at]
            self.at += 1
            if code == 0x2E:
                return Pickle(self.pop(), tuple(self.calls))
            action = _ACTIONS.get(code)
            if action is None:
                raise Malformed(f"a pickle in the file has an operation that is not read here (0x{code:02x})")
            action(self)

    # ---- parts of the input

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise Malformed("a pickle in the file is truncated; copy it again")
        found = self.data[self.at : self.at + count]
        self.at += count
        return found

    def number(self, kind: struct.Struct) -> Any:
        return kind.unpack(self.take(kind.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _LONGEST_NAME)
        if end < 0:
            raise Malformed("a pickle in the file has a name without an end")
        return (self.take(end - self.at + 1)[:-1]).decode("utf-8", "replace")

    # ---- the stack

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Malformed("a pickle in the file is damaged: a mark where a value belongs")
        return value

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> List[Any]:
        found: List[Any] = []
        while True:
            value = self.stack.pop()
            if value is _MARK:
                found.reverse()
                return found
            found.append(value)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Malformed("a pickle in the file refers to something that it does not hold")
        self.push(self.memo[index])

    # ---- what the operations do

    def call(self, arguments: Any, callee: Any) -> None:
        self.budget.spend(_STEPS_PER_CALL, "a pickle in the file")
        made = Call(callee, arguments)
        self.calls.append(made)
        self.push(made)

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Call):
            target.state = state

    def set_items(self, items: List[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call):
            # An OrderedDict is made by a call and then filled.
            if not isinstance(target.state, dict):
                target.state = {}
            target = target.state
        if isinstance(target, dict):
            for at in range(0, len(items) - 1, 2):
                if isinstance(items[at], (str, int)):
                    target[items[at]] = items[at + 1]

    def append_items(self, items: List[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        # Anything else could be as deep, or as long to write out, as the file likes.
        if not isinstance(name, str) or not isinstance(module, str):
            raise Malformed("a pickle in the file is damaged: something else than a name where one belongs")
        self.push(Global(module[:_LONGEST_NAME], name[:_LONGEST_NAME]))

    def set_item(self) -> None:
        self.budget.spend(_STEPS_PER_ITEM, "a pickle in the file")
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def reduce(self) -> None:
        arguments, callee = self.pop(), self.pop()
        self.call(arguments, callee)


_U8, _U16, _U32, _U64 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")


def _text(kind: struct.Struct) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.take(machine.number(kind)).decode("utf-8", "replace"))


def _raw(kind: struct.Struct) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.take(machine.number(kind)))


def _tuple(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        stack = machine.stack
        found = tuple(stack[-count:])
        del stack[-count:]
        if len(found) < count:
            raise IndexError
        for each in found:
            # By identity: to compare what a pickle holds could take as long as it likes.
            if each is _MARK:
                raise Malformed("a pickle in the file is damaged: a mark where a value belongs")
        stack.append(found)

    return make


def _constant(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(make())


def _long(machine: _Machine) -> None:
    size = machine.number(_U8)
    machine.push(int.from_bytes(machine.take(size), "little", signed=True))


def _global(machine: _Machine) -> None:
    machine.budget.spend(_STEPS_PER_GLOBAL, "a pickle in the file")
    module = machine.line()
    machine.push(Global(module, machine.line()))


def _nothing() -> Optional[object]:
    return None


_ACTIONS: Dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda machine: machine.take(1),  # PROTO
    0x95: lambda machine: machine.take(8),  # FRAME
    0x28: lambda machine: machine.push(_MARK),  # MARK
    0x30: lambda machine: machine.stack.pop(),  # POP
    0x31: lambda machine: machine.pop_mark(),  # POP_MARK
    0x32: lambda machine: machine.push(machine.stack[-1]),  # DUP
    0x4E: _constant(_nothing),  # NONE
    0x88: _constant(lambda: True),  # NEWTRUE
    0x89: _constant(lambda: False),  # NEWFALSE
    0x4A: lambda machine: machine.push(machine.number(_I32)),  # BININT
    0x4B: lambda machine: machine.push(machine.number(_U8)),  # BININT1
    0x4D: lambda machine: machine.push(machine.number(_U16)),  # BININT2
    0x8A: _long,  # LONG1
    0x47: lambda machine: machine.push(machine.number(_F64)),  # BINFLOAT
    0x58: _text(_U32),  # BINUNICODE
    0x8C: _text(_U8),  # SHORT_BINUNICODE
    0x8D: _text(_U64),  # BINUNICODE8
    0x54: _raw(_I32),  # BINSTRING
    0x55: _raw(_U8),  # SHORT_BINSTRING
    0x42: _raw(_U32),  # BINBYTES
    0x43: _raw(_U8),  # SHORT_BINBYTES
    0x7D: _constant(dict),  # EMPTY_DICT
    0x5D: _constant(list),  # EMPTY_LIST
    0x29: _constant(tuple),  # EMPTY_TUPLE
    0x74: lambda machine: machine.push(tuple(machine.pop_mark())),  # TUPLE
    0x85: _tuple(1),  # TUPLE1
    0x86: _tuple(2),  # TUPLE2
    0x87: _tuple(3),  # TUPLE3
    0x61: lambda machine: machine.append_items([machine.pop()]),  # APPEND
    0x65: lambda machine: machine.append_items(machine.pop_mark()),  # APPENDS
    0x73: lambda machine: machine.set_item(),  # SETITEM
    0x75: lambda machine: machine.set_items(machine.pop_mark()),  # SETITEMS
    0x71: lambda machine: machine.remember(machine.number(_U8)),  # BINPUT
    0x72: lambda machine: machine.remember(machine.number(_U32)),  # LONG_BINPUT
    0x94: lambda machine: machine.remember(len(machine.memo)),  # MEMOIZE
    0x68: lambda machine: machine.recall(machine.number(_U8)),  # BINGET
    0x6A: lambda machine: machine.recall(machine.number(_U32)),  # LONG_BINGET
    0x63: _global,  # GLOBAL
    0x93: lambda machine: machine.stack_global(),  # STACK_GLOBAL
    0x52: lambda machine: machine.reduce(),  # REDUCE
    0x81: lambda machine: machine.reduce(),  # NEWOBJ
    0x62: lambda machine: machine.build(),  # BUILD
    0x51: lambda machine: machine.push(Persistent(machine.pop())),  # BINPERSID
}
