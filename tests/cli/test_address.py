"""Addresses as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boardbench.cli.address import Address, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("raspberrypi.local", "raspberrypi.local", 7341),
        ("pi:1234", "pi", 1234),
        (" pi ", "pi", 7341),
        ("192.168.1.7", "192.168.1.7", 7341),
        ("192.168.1.7:80", "192.168.1.7", 80),
        ("::1", "::1", 7341),
        ("[::1]", "::1", 7341),
        ("[::1]:80", "::1", 80),
        ("fe80::1%eth0", "fe80::1%eth0", 7341),
        ("[2001:DB8::0:1]:65535", "2001:db8::1", 65535),
        ("my_board", "my_board", 7341),
        ("bücher.example", "xn--bcher-kva.example", 7341),
        ("pi.", "pi.", 7341),
    ],
)
def test_what_is_taken(text, host, port):
    assert parse_address(text, 7341) == Address(host, port)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        (":7341", "names no host"),
        ("pi:", "is not a port"),
        ("pi:0", "is not a port"),
        ("pi:65536", "is not a port"),
        ("pi:７", "is not a port"),
        ("pi:-1", "is not a port"),
        ("pi:+1", "is not a port"),
        ("a b", "is not a host name"),
        ("-pi", "is not a host name"),
        ("http://pi", "leave out the scheme"),
        ("pi/path", "leave out the scheme"),
        ("user@pi", "needs no user name"),
        ("256.1.1.1", "is not an IP address"),
        ("1.2.3", "is not an IP address"),
        ("1:2:3", "is not an IPv6 address"),
        ("[::1", "is not an IPv6 address"),
        ("[::1]80", "is not an IPv6 address"),
        ("[1.2.3.4]:80", "is not an IPv6 address"),
        ("pi\x00", "is not a host name"),
        ("ü" * 80, "is not a host name"),
    ],
)
def test_what_is_not_taken_is_told(text, words):
    with pytest.raises(ValueError, match=words):
        parse_address(text, 7341)


@given(st.text())
def test_no_text_breaks_the_parser_and_what_it_takes_can_be_written_and_read_again(text):
    try:
        address = parse_address(text, 7341)
    except ValueError as error:
        assert str(error)
        return
    assert parse_address(str(address), 1) == address
    assert address.target.startswith("dns:///")


def test_a_zone_is_escaped_for_grpc():
    assert Address("fe80::1%eth0", 1).target == "dns:///[fe80::1%25eth0]:1"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.9", True), ("::1", True), ("pi", False), ("10.0.0.1", False)],
)
def test_loopback_is_known(host, expected):
    assert Address(host, 1).is_loopback is expected
