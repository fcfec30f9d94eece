"""Nothing that comes from a file or a board steers the terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boardbench.cli.plain import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Größe µs 模型", "Größe µs 模型"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
    ],
)
def test_one_line(text, shown):
    assert printable(text) == shown


def test_several_lines_stay_lines():
    assert printable("a\n\tb\r", keep_lines=True) == "a\n    b\\r"


@given(st.text())
def test_what_comes_out_is_printable(text):
    assert printable(text).isprintable() or all(c.isprintable() or c.isspace() for c in printable(text))
    assert "\x1b" not in printable(text, keep_lines=True)
