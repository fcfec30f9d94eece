"""Text from boards, models and files, made safe for a terminal."""

from __future__ import annotations

import unicodedata


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
