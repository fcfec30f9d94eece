"""Lines in columns: folded between words, as wide as the terminal, and as Rich sets the same table."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from boardbench.cli.grid import Column, Line, folded, grid, line, room, width_of, write
from boardbench.cli.styles import DOUBTFUL, QUIET


def _plain(content: Line) -> str:
    return "".join(text for text, _ in content)


_words = st.text(st.sampled_from("abé-,日本 "), max_size=60)


@given(_words, st.integers(2, 40))
def test_folded_lines_fit_and_lose_nothing_but_blanks(text: str, width: int) -> None:
    lines = [_plain(each) for each in folded(line(text), width)]
    assert all(width_of(each.rstrip()) <= width for each in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


@given(st.lists(st.tuples(_words, st.sampled_from(["", QUIET])), max_size=4), st.integers(2, 30))
def test_pieces_keep_their_styles(pieces: list[tuple[str, str]], width: int) -> None:
    before = "".join(
        style * (letter != " ") or "-" for text, style in pieces for letter in text if letter != " "
    )
    after = "".join(
        style * (letter != " ") or "-"
        for each in folded(pieces, width)
        for text, style in each
        for letter in text
        if letter != " "
    )
    assert before == after


@given(_words)
def test_width_is_that_of_a_terminal(text: str) -> None:
    assert width_of(text) == cell_len(text)


_cells = st.text(st.sampled_from("ab c"), min_size=1, max_size=12).map(str.strip).filter(bool)


@given(
    st.lists(
        st.tuples(_cells, _cells, st.text(st.sampled_from("abc "), max_size=120)), min_size=1, max_size=4
    ),
    st.integers(60, 90),
)
def test_a_grid_is_what_rich_makes_of_it(rows: list[tuple[str, str, str]], width: int) -> None:
    rows = [(first, second, " ".join(third.split())) for first, second, third in rows]
    columns = [Column(right=True), Column(), Column(folded=True)]
    found = [_plain(each).rstrip() for each in grid(columns, [list(map(line, row)) for row in rows], width)]
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(table)
    assert found == [each.rstrip() for each in file.getvalue().splitlines()]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    content = [[("a", DOUBTFUL), ("  ", ""), ("b  ", "")], [("  ", QUIET)]]

    def written(file: io.StringIO) -> str:
        write(content, file)
        return file.getvalue()

    assert written(io.StringIO()) == "a  b\n\n"
    assert written(_Terminal()) == "\x1b[1;33ma\x1b[0m  b\n\n"
    monkeypatch.setenv("TERM", "dumb")
    assert written(_Terminal()) == "a  b\n\n"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert written(_Terminal()) == "a  b\n\n"


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert room(io.StringIO()) == 100
    monkeypatch.setenv("COLUMNS", "140")
    assert room(io.StringIO()) == 140
    assert room(_Terminal()) == 140
    monkeypatch.setenv("COLUMNS", "20")
    assert room(_Terminal()) == 72
