"""doctor against a board on a real port: the page, its marks and widths, JSON, exit codes."""

from __future__ import annotations

import datetime
import json
import re

import pytest

from boardbench.v1 import agent_pb2

OK, DOUBTFUL, INVALID, ABSENT, UNKNOWN = (
    agent_pb2.FINDING_STATE_OK,
    agent_pb2.FINDING_STATE_DOUBTFUL,
    agent_pb2.FINDING_STATE_INVALID,
    agent_pb2.FINDING_STATE_ABSENT,
    agent_pb2.FINDING_STATE_UNSPECIFIED,
)
TEE = "echo performance | sudo tee /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"


def finding(code, state, message, fix="", fixable=False):
    return agent_pb2.Finding(code=code, state=state, message=message, fix=fix, fixable=fixable)


def unfit(**more):
    """A Raspberry Pi with a weak supply."""
    return agent_pb2.ExamineResponse(
        findings=[
            finding("machine", OK, "no emulator and no virtual machine"),
            finding(
                "governor",
                DOUBTFUL,
                "ondemand between 600 MHz and 1800 MHz on cpu0-3: the clock follows the load, and comes late",
                TEE,
                fixable=True,
            ),
            finding("turbo", ABSENT, "the processors have no turbo that can be switched"),
            finding(
                "supply",
                INVALID,
                "under-voltage now: the firmware holds the processor back",
                "use a better one",
            ),
            finding("heat", UNKNOWN, "no temperature can be read: /sys/x: Permission denied"),
            finding("time", OK, "no time service keeps the clock right", "sudo timedatectl set-ntp true"),
            finding("usb", ABSENT, "no accelerator on USB"),
        ],
        **more,
    )


def fit():
    return agent_pb2.ExamineResponse(
        findings=[
            finding("governor", OK, "performance at 2400 MHz on cpu0-3"),
            finding("usb", ABSENT, "none"),
        ]
    )


@pytest.fixture
def to(board):
    return ("--to", f"127.0.0.1:{board.port}")


def test_a_page_at_80_columns(board, boardbench, to):
    board.examination = unfit()
    done = boardbench("doctor", *to, COLUMNS="80")
    assert done.code == 1 and done.err == ""
    head, more, *lines = done.out.splitlines()
    assert f"{head} {more}" == (
        f"127.0.0.1:{board.port}: not fit to measure on: 1 check would make figures invalid, 1 doubtful"
    )
    assert len(head) <= 80
    assert lines == [
        "",
        "  ✗ supply    under-voltage now: the firmware holds the processor back",
        "              → use a better one",
        "  ! governor  ondemand between 600 MHz and 1800 MHz on cpu0-3: the clock follows",
        "              the load, and comes late",
        f"              → {TEE}",
        "  ? heat      no temperature can be read: /sys/x: Permission denied",
        "  ✓ machine   no emulator and no virtual machine",
        "  ✓ time      no time service keeps the clock right",
        "              → sudo timedatectl set-ntp true",
        "  – not on this board: turbo, usb",
        "",
        "--fix sets governor for an hour and puts it back.",
    ]
    assert [len(line) for line in lines if len(line) > 80] == [len(TEE) + 16], "only what is to be pasted"


def test_a_page_at_120_columns_and_whole(board, boardbench, to):
    board.examination = unfit()
    lines = boardbench("doctor", *to, "--full", COLUMNS="120").out.splitlines()
    (governor,) = (line for line in lines if line.startswith("  ! governor "))
    assert governor.endswith("the clock follows the load, and comes late")
    assert "  – turbo     the processors have no turbo that can be switched" in lines
    assert "  – usb       no accelerator on USB" in lines


def test_a_pipe_gets_no_colours_and_a_terminal_does(board, boardbench, to):
    board.examination = unfit()
    assert "\x1b" not in boardbench("doctor", *to).out
    assert re.search(
        r"\x1b\[[\d;]*31m✗", boardbench("doctor", *to, FORCE_COLOR="1", TERM="xterm-256color").out
    )


def test_a_fit_board(board, boardbench, to):
    board.examination = fit()
    done = boardbench("doctor", *to)
    assert done.code == 0
    assert done.out.splitlines() == [
        f"127.0.0.1:{board.port}: fit to measure on",
        "",
        "  ✓ governor  performance at 2400 MHz on cpu0-3",
        "  – not on this board: usb",
    ]
    (request,) = board.examined
    assert not request.fix and not request.restore and not request.HasField("hold_seconds")


def test_what_can_not_be_told_is_no_doubt(board, boardbench, to):
    board.examination = agent_pb2.ExamineResponse(findings=[finding("heat", UNKNOWN, "it can't be told")])
    assert boardbench("doctor", *to).code == 0


def test_a_fix_with_its_time(board, boardbench, to):
    board.examination = fit()
    board.examination.changed.append("cpu0-3 governor: ondemand → performance")
    board.examination.restored_at.FromDatetime(
        datetime.datetime(2026, 11, 22, 18, 30, tzinfo=datetime.timezone.utc)
    )
    done = boardbench("doctor", *to, "--fix", "--for", "30m")
    assert done.code == 0
    assert done.out.splitlines()[-2:] == [
        "Set until 2026-11-22 18:30, or --restore:",
        "  cpu0-3 governor: ondemand → performance",
    ]
    (request,) = board.examined
    assert request.fix and request.hold_seconds == 1800


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("2 min", 120)])
def test_lengths_of_time(board, boardbench, to, text, seconds):
    board.examination = fit()
    assert boardbench("doctor", *to, "--fix", "--for", text).code == 0
    assert board.examined[0].hold_seconds == seconds


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--fix", "--for", "soon"), "'soon' is not a length of time: give 90s, 30m or 1h"),
        (("--fix", "--for", "0"), "less than a second"),
        (("--for", "1h"), "--for says how long --fix holds"),
        (("--fix", "--restore"), "--fix and --restore exclude each other"),
    ],
)
def test_wrong_use_asks_no_board(board, boardbench, to, arguments, told):
    done = boardbench("doctor", *to, *arguments)
    assert (done.code, board.calls) == (2, [])
    assert told in " ".join(done.err.split())


def test_a_board_has_to_be_named(boardbench):
    assert boardbench("doctor").code == 2


def test_what_could_not_be_put_back_is_told_and_fails(board, boardbench, to):
    board.examination = fit()
    line = "cpu0-3 governor: not put back, not allowed for the agent's user (uid 1000): " + TEE
    board.examination.failed.append(line)
    done = boardbench("doctor", *to, "--restore", COLUMNS="80")
    assert done.code == 1
    assert done.out.splitlines()[-2:] == ["Could not be set or put back:", f"  {line}"]
    assert board.examined[0].restore


def test_json_is_the_response(board, boardbench, to):
    board.examination = unfit()
    done = boardbench("doctor", *to, "--format", "json")
    assert done.code == 1
    document = json.loads(done.out)
    assert document["findings"][1]["state"] == "FINDING_STATE_DOUBTFUL"
    assert document["findings"][1]["fixable"] is True
    assert "state" not in document["findings"][4], "what is not known is left out, as everywhere"


def test_several_boards(board, another_board, boardbench, to, closed_port):
    board.examination, another_board.examination = fit(), unfit()
    boards = (*to, "--to", f"127.0.0.1:{another_board.port}", *to)
    done = boardbench("doctor", *boards)
    assert done.code == 1, "one of them is not fit"
    assert [line.rpartition(": ")[0] != "" for line in done.out.splitlines() if "fit to measure" in line] == [
        True, True,
    ]  # fmt: skip
    assert len(board.examined) == 1, "named twice, asked once"
    documents = json.loads(boardbench("doctor", *boards, "--format", "json").out)
    assert [len(each["findings"]) for each in documents] == [2, 7]
    done = boardbench("doctor", *boards, "--to", f"127.0.0.1:{closed_port}")
    assert done.code == 3 and "no agent listens" in done.err
    assert done.out.count("fit to measure on") == 2, "the others are told all the same"


def test_an_agent_that_can_not_be_examined(board, boardbench, to):
    done = boardbench("doctor", *to)
    assert done.code == 3 and "look at the address, and at the versions on both sides" in done.err


def test_what_a_board_says_is_not_obeyed_by_the_terminal(board, boardbench, to):
    board.examination = agent_pb2.ExamineResponse(
        findings=[finding("gov\x1b[2Jernor", DOUBTFUL, "a\x1b]0;title\x07b [bold]c[/bold]", "echo \x9b31m")],
        changed=["x\x1b[1m"],
        failed=["y\x07"],
    )
    out = boardbench("doctor", *to).out
    assert not {"\x1b", "\x07", "\x9b"} & set(out)
    assert "[bold]c[/bold]" in out


def test_a_state_of_a_newer_agent_is_shown_as_unknown(board, boardbench, to):
    board.examination = agent_pb2.ExamineResponse()
    board.examination.findings.add(code="new").MergeFromString(b"\x10\x63")
    done = boardbench("doctor", *to)
    assert done.code == 0 and "  ? new" in done.out
