"""Addresses and default folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from boardbench.collector.config import Address, CollectorConfig, default_data_dir


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("127.0.0.1", Address("127.0.0.1", 7342), "127.0.0.1:7342"),
        ("127.0.0.1:0", Address("127.0.0.1", 0), "127.0.0.1:0"),
        ("board.lab:80", Address("board.lab", 80), "board.lab:80"),
        (":9000", Address("0.0.0.0", 9000), "0.0.0.0:9000"),
        ("[::1]", Address("::1", 7342), "[::1]:7342"),
        ("[::]:5", Address("::", 5), "[::]:5"),
    ],
)
def test_addresses(text: str, address: Address, shown: str) -> None:
    assert Address.parse(text, 7342) == address
    assert str(address) == shown
    assert Address.parse(shown, 1) == address


@pytest.mark.parametrize("text", ["", ":", "a:b", "a:70000", "a:-1", "::1", "[::1", "[::1]7", "a:1:2", "a:٣"])
def test_what_is_no_address_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"write|names no host"):
        Address.parse(text, 7342)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("a.b", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert Address(host, 1).is_loopback is loopback


def test_only_this_machine_reaches_it_unless_told_otherwise() -> None:
    config = CollectorConfig()
    assert config.listen.is_loopback
    assert config.http.is_loopback


def test_the_store_lives_where_the_system_wants_it() -> None:
    assert default_data_dir({}, user_id=0) == Path("/var/lib/boardbench-collector")
    state = {"XDG_STATE_HOME": "/x/state"}
    assert default_data_dir(state, user_id=1000) == Path("/x/state/boardbench-collector")
    assert default_data_dir({}, user_id=1000) == Path.home() / ".local/state/boardbench-collector"
