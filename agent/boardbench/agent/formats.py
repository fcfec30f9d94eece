"""Formats that engines from elsewhere bring: how their files begin, or how they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEAD_BYTES = 64
"""As much of a file as a magic can be."""


@dataclass(frozen=True)
class Mark:
    """How files of a format are known. Without a magic they are known by their names alone."""

    format: str
    runtime: str
    # Name and version of the distribution that says so.
    plugin: str
    magic: bytes = b""
    suffixes: tuple[str, ...] = ()

    def is_name(self, name: str) -> bool:
        """Whether a file of that name is called like one."""
        return name.lower().endswith(self.suffixes) if self.suffixes else False


def marked(head: bytes, name: str, marks: Sequence[Mark]) -> Mark | None:
    """Whose a file is that begins like this and is called so; the longest magic wins, then the first."""
    by_magic = [mark for mark in marks if mark.magic and head.startswith(mark.magic)]
    if by_magic:
        return max(by_magic, key=lambda mark: (len(mark.magic), mark.is_name(name)))
    return next((mark for mark in marks if not mark.magic and mark.is_name(name)), None)


def claimed(name: str, marks: Sequence[Mark]) -> Mark | None:
    """Whose format a file's name promises, whatever its bytes are."""
    return next((mark for mark in marks if mark.is_name(name)), None)
