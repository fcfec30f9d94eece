"""Lines of text in columns, folded to a width: as much of a table as a page needs that is there at once.

Rich does this and much more, and takes longer to import than a model to read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

from boardbench.cli.styles import BAD, DOUBTFUL, GOOD, QUIET, STRONG

# A line is a sequence of pieces, each of one style; "" is none.
Line = Sequence[tuple[str, str]]

PIPE_WIDTH = 100  # fits a wide log, a mail and a README without being folded again
LEAST_WIDTH = 72  # in less, figures would be cut off: a narrower terminal folds lines, and nothing is lost
_LEAST_FOLDED = 16
_GAP = "  "
# ECMA-48, "Select graphic rendition".
_CODES = {GOOD: "32", BAD: "1;31", DOUBTFUL: "1;33", QUIET: "2", STRONG: "1"}


class Column(NamedTuple):
    """How the cells of a column are set. One column is folded; the others are as wide as they need."""

    style: str = ""
    right: bool = False
    folded: bool = False
    width: int = 0
    """At least so wide."""


def line(text: str, style: str = "") -> Line:
    """A line of one style."""
    return ((text, style),)


def width_of(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def grid(columns: Sequence[Column], rows: Iterable[Sequence[Line]], width: int) -> Iterator[Line]:
    """The rows as lines; the folded column takes what the others leave of the width."""
    kept = [list(row) for row in rows]
    widths = [
        max([column.width, *(_length(row[place]) for row in kept)]) for place, column in enumerate(columns)
    ]
    for place, column in enumerate(columns):
        if column.folded:
            others = sum(widths) - widths[place] + len(_GAP) * (len(columns) - 1)
            widths[place] = min(widths[place], max(_LEAST_FOLDED, width - others))
    for row in kept:
        cells = [
            folded(cell, widths[place]) if columns[place].folded else [cell] for place, cell in enumerate(row)
        ]
        for number in range(max(map(len, cells))):
            pieces: list[tuple[str, str]] = []
            for place, column in enumerate(columns):
                cell = cells[place][number] if number < len(cells[place]) else ()
                missing = " " * (widths[place] - _length(cell))
                styled = [(text, style or column.style) for text, style in cell]
                pieces += [(missing, ""), *styled] if column.right else [*styled, (missing, "")]
                pieces.append((_GAP, ""))
            yield pieces


def folded(content: Line, width: int) -> list[Line]:
    """The line in lines of at most that width, broken between words, or inside one that is longer."""
    if _length(content) <= width:
        return [content]
    plain = "".join(text for text, _ in content)
    lines: list[Line] = []
    begin = end = used = at = 0
    while at < len(plain):
        # A word, and the blanks behind it, which are nowhere to be seen at the end of a line.
        word_end = plain.find(" ", at)
        word_end = len(plain) if word_end < 0 else word_end
        next_word = word_end
        while next_word < len(plain) and plain[next_word] == " ":
            next_word += 1
        size = width_of(plain[at:word_end])
        if used + size > width and used:
            lines.append(_cut(content, begin, end))
            begin, used = at, 0
        while size > width:
            fits = at + _fitting(plain[at:word_end], width)
            lines.append(_cut(content, begin, fits))
            begin = at = fits
            size = width_of(plain[at:word_end])
        used += size + next_word - word_end
        at, end = next_word, word_end
    lines.append(_cut(content, begin, end))
    return lines


def _fitting(word: str, width: int) -> int:
    """How many letters of the word fit, but one at least."""
    used = 0
    for place, letter in enumerate(word):
        used += width_of(letter)
        if used > width:
            return max(1, place)
    return len(word)


def _cut(content: Line, begin: int, end: int) -> Line:
    """The letters from ``begin`` to ``end``, in their styles."""
    pieces: list[tuple[str, str]] = []
    start = 0
    for text, style in content:
        if start < end and start + len(text) > begin:
            pieces.append((text[max(0, begin - start) : end - start], style))
        start += len(text)
    return pieces


def _length(content: Line) -> int:
    return sum(width_of(text) for text, _ in content)


def write(lines: Iterable[Line], file: TextIO) -> None:
    """Writes the lines, with colours where a terminal shows them, and without blanks at their ends."""
    coloured = _has_colours(file)
    written = []
    for content in lines:
        pieces = list(content)
        while pieces and not pieces[-1][0].rstrip():
            pieces.pop()
        if pieces:
            pieces[-1] = (pieces[-1][0].rstrip(), pieces[-1][1])
        written.append(
            "".join(
                f"\x1b[{_CODES[style]}m{text}\x1b[0m" if coloured and style and text else text
                for text, style in pieces
            )
        )
    file.write("\n".join(written) + "\n")
    file.flush()


def room(file: TextIO) -> int:
    """How many columns there are to write in."""
    if not file.isatty() and not os.environ.get("COLUMNS"):
        return PIPE_WIDTH
    return max(LEAST_WIDTH, shutil.get_terminal_size((PIPE_WIDTH, 25)).columns)


def _has_colours(file: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return file.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
