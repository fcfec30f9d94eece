from __future__ import annotations

import pytest

from boardbench.agent.bench.options import OptionReader
from boardbench.agent.bench.runtime import OptionRejected


def read(options: dict[str, str]) -> tuple[dict[str, str], tuple[object, ...]]:
    reader = OptionReader("engine", options)
    values = (
        reader.switch("xnnpack", default=True),
        reader.choice("level", ("all", "off"), default="all"),
        reader.number("threads", least=1, most=8),
        reader.text("library", "a path"),
        reader.prefixed("library.", "an option of it"),
    )
    return reader.finish(), values


def test_defaults_are_in_force() -> None:
    assert read({}) == ({"xnnpack": "on", "level": "all"}, (True, "all", None, None, {}))


def test_what_is_given_is_in_force() -> None:
    given = {"xnnpack": "off", "level": "off", "threads": "8", "library": "/x", "library.device": "usb:0"}
    assert read(given) == (given, (False, "off", 8, "/x", {"device": "usb:0"}))


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionRejected) as caught:
        read({"xnnpak": "on"})
    assert str(caught.value) == (
        "engine has no option xnnpak; it takes level=all|off, library.KEY=an option of it, library=a path, "
        "threads=1..8, xnnpack=on|off"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"xnnpack": "yes"},
        {"level": ""},
        {"threads": "0"},
        {"threads": "9"},
        {"threads": "1_0"},
        {"threads": "+1"},
        {"threads": "٣"},
        {"threads": ""},
        {"library": ""},
        {"library": "a\0b"},
        {"library.": "x"},
        {"library.key": "\0"},
    ],
)
def test_a_value_that_is_not_taken_is_refused_by_name(options: dict[str, str]) -> None:
    with pytest.raises(OptionRejected, match=next(iter(options))):
        read(options)
