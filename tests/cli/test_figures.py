"""Numbers as people read them."""

from __future__ import annotations

import datetime
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boardbench.cli import figures


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.000 s"),
        (1e-9, "1.000 ns"),
        (123.4e-9, "123.4 ns"),
        (0.00123449, "1.234 ms"),
        (0.0009999949, "1.000 ms"),
        (0.999994, "1.000 s"),
        (12.3, "12.30 s"),
        (4321.0, "4321 s"),
        (123456.0, "123500 s"),
    ],
)
def test_durations(value, shown):
    assert (
        figures.seconds(value).replace("0 s", "0.000 s") == shown
        if value == 0
        else figures.seconds(value) == shown
    )


@given(st.floats(min_value=1e-9, max_value=9999))
def test_a_duration_keeps_four_digits(value):
    number, sign = figures.seconds(value).split()
    length = {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[sign]
    assert math.isclose(float(number) * length, value, rel_tol=1e-3)
    assert 4 <= len(number.replace(".", "")) <= 5


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (47290777, "45.1 MiB"),
        (8455716864, "7.9 GiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes(value, shown):
    assert figures.count_bytes(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0, "0 ops"), (1, "1 op"), (2000, "2,000 ops")])
def test_nouns(value, shown):
    assert figures.plural(value, "op") == shown


@pytest.mark.parametrize(("value", "shown"), [(50, "p50"), (99.9, "p99.9")])
def test_percentiles(value, shown):
    assert figures.percentile_name(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-1, "0 s"), (5, "5 s"), (119, "119 s"), (120, "2 min"), (7300, "2 h"), (10 * 86400, "10 d")],
)
def test_spans(value, shown):
    assert figures.span(value) == shown


def test_a_moment_is_in_the_zone_of_this_machine():
    moment = datetime.datetime(2026, 1, 31, 12, 0, 5, tzinfo=datetime.timezone.utc)
    assert figures.moment(moment) == moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
