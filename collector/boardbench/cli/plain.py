"""Text from boards, models and files, made safe for a terminal."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from google.protobuf.message import Message

_Message = TypeVar("_Message", bound="Message")

# Fields whose text may have several lines; in any other a newline could forge a line of ours.
_LINES = frozenset(("detail", "message", "output_tail", "reason"))


def printable(text: str, *, keep_lines: bool = False) -> str:
    """``text`` without anything that a terminal would obey.

    Names of ops, host names and the output of a worker come from files and machines that nobody
    checked. Control characters become visible escapes; so do the marks that turn the direction of
    writing. ``keep_lines`` keeps newlines and tabs (tabs as spaces).
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character, keep_lines) for character in text)


def _shown(character: str, keep_lines: bool) -> str:
    if keep_lines and character == "\n":
        return character
    if keep_lines and character == "\t":
        return "    "
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


def cleaned(message: _Message) -> _Message:
    """A copy of ``message`` with every text in it :func:`printable`."""
    copy = type(message)()
    copy.CopyFrom(message)
    _clean(copy)
    return copy


def _clean(message: Message) -> None:
    for field, value in message.ListFields():
        if field.message_type is not None:
            _clean_messages(value)
        elif isinstance(value, str):
            setattr(message, field.name, printable(value, keep_lines=field.name in _LINES))
        elif field.type == field.TYPE_STRING:
            value[:] = [printable(item) for item in value]


def _copied(item: Any) -> Any:
    if not hasattr(item, "ListFields"):
        return item
    copy = type(item)()
    copy.CopyFrom(item)
    return copy


def _clean_messages(value: Any) -> None:
    """Cleans what a field of messages holds: one, several, or a map (its entries are messages, too)."""
    if not hasattr(value, "items"):
        for item in [value] if hasattr(value, "ListFields") else value:
            _clean(item)
        return
    entries = {key: _copied(item) for key, item in value.items()}
    value.clear()
    for key, item in entries.items():
        name = printable(key) if isinstance(key, str) else key
        if hasattr(item, "ListFields"):
            _clean(item)
            value[name].CopyFrom(item)
        else:
            value[name] = printable(item) if isinstance(item, str) else item
