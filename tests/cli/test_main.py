"""The list of commands, the exit codes, and what a user sees when something goes wrong."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from boardbench.cli import errors, main

HEAVY = ("grpc", "rich", "numpy", "google.protobuf", "boardbench.v1", "importlib.metadata")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["push", "--help"], ["show", "--help"], ["nonsense"]]
)
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys; from boardbench.cli.main import main; code = main(sys.argv[1:]); "
        f"print('LOADED', sorted(set({HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("LOADED []\n"), done.stdout


def test_the_list_of_help_lines_is_that_of_the_commands():
    context = click.Context(main.boardbench)
    names = main.boardbench.list_commands(context)
    assert {"push", "run", "results", "show", "devices", "models", "runs", "watch", "cancel", "demo"} <= set(
        names
    )
    for name in names:
        command = main.boardbench.get_command(context, name)
        assert command.name == name
        assert command.get_short_help_str(1000) == main.COMMANDS[name].help, name


def test_every_command_says_what_it_does_and_so_does_every_option():
    def check(command, path):
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{path} {parameter.opts}"
        for name in command.list_commands(context) if isinstance(command, click.Group) else []:
            check(command.get_command(context, name), f"{path} {name}")

    context = click.Context(main.boardbench)
    check(main.boardbench, "boardbench")


def test_a_module_that_is_not_there_is_not_listed(monkeypatch):
    monkeypatch.setitem(
        main.COMMANDS, "compare", main.Command("boardbench.cli.no_such_module", "compare", "…")
    )
    assert "compare" not in main.boardbench.list_commands(click.Context(main.boardbench))
    assert main.boardbench.get_command(click.Context(main.boardbench), "compare") is None


def test_the_exit_codes_are_in_the_help_and_never_change():
    text = CliRunner().invoke(main.boardbench, ["--help"]).output
    for code, meaning in errors.EXIT_CODES.items():
        assert f"{code.value}  {meaning}" in text
    assert set(errors.EXIT_CODES) == set(errors.ExitCode)
    assert {code.name: code.value for code in errors.ExitCode} == {
        "DONE": 0,
        "FAILED": 1,
        "USAGE": 2,
        "UNREACHABLE": 3,
        "DEFECT": 70,
        "INTERRUPTED": 130,
        "BROKEN_PIPE": 141,
    }


def test_the_worst_of_several_codes_counts():
    code = errors.ExitCode
    assert errors.worst([]) == code.DONE
    assert errors.worst([code.DONE, code.FAILED]) == code.FAILED
    assert errors.worst([code.FAILED, code.UNREACHABLE, code.DONE]) == code.UNREACHABLE
    assert errors.worst([code.UNREACHABLE, code.INTERRUPTED]) == code.INTERRUPTED


def test_the_version(boardbench):
    done = boardbench("--version")
    assert done.code == 0
    assert done.out.startswith("boardbench 0.")


def test_a_misspelt_command_is_told_with_the_likely_one(boardbench):
    done = boardbench("psh")
    assert done.code == 2
    assert "No such command 'psh'" in done.err
    assert "'push'" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["push"], "Missing argument 'MODEL...'"),
        (["push", "{model}"], "Give --to HOST, or --via COLLECTOR"),
        (["push", "no-such-file", "--to", "x"], "does not exist"),
        (["push", "{model}", "--to", "a:b"], "'b' in 'a:b' is not a port"),
        (["push", "{model}", "--to", "http://pi:80"], "leave out the scheme"),
        (["push", "{model}", "--to", "x", "--threads", "0"], "0 is not from 1 to 1024"),
        (["push", "{model}", "--to", "x", "--duration", "nan"], "not a length of time"),
        (["push", "{model}", "--to", "x", "--timeout", "0"], "not a length of time"),
        (["push", "{model}", "--to", "x", "--shape", "a"], "NAME=SIZE"),
        (["push", "{model}", "--to", "x", "--shape", "a=0"], "with sizes from 1 on"),
        (["push", "{model}", "--to", "x", "--shape", "a=1", "--shape", "a=2"], "given twice"),
        (["push", "{model}", "--to", "x", "--option", "k"], "is not NAME=VALUE"),
        (["push", "{model}", "--to", "x", "--min-runs", "9", "--max-runs", "8"], "--min-runs 9 is more than"),
        (["push", "{model}", "--to", "x", "--detach", "--no-run"], "exclude one another"),
        (["push", "{model}", "--to", "x", "--no-run", "--threads", "2"], "leave out the options of the run"),
        (["push", "{empty}", "--to", "127.0.0.1:1"], "is empty (0 bytes)"),
        (["push", "/dev/null", "--to", "x"], "is not a regular file"),
        (["results", "--since", "yesterday"], "is not a time"),
        (["results", "--limit", "0"], "0 is not from 1 to 100000"),
        (["models"], "Missing option '--to'"),
        (["models", "rm", "abc"], "Missing option '--to'"),
        (["cancel", "abc"], "Missing option '--to'"),
    ],
)
def test_a_wrong_command_line_is_told_and_exits_with_2(boardbench, model_file, tmp_path, arguments, words):
    empty = tmp_path / "empty.tflite"
    empty.touch()
    done = boardbench(*(argument.format(model=model_file, empty=empty) for argument in arguments))
    assert done.code == 2, done.err
    assert words in done.err.replace("\n", " ")
    assert "Traceback" not in done.err
    assert done.out == ""


def test_the_board_may_be_named_in_the_environment(board, boardbench, model_file):
    done = boardbench("push", model_file, BOARDBENCH_AGENT=f"127.0.0.1:{board.port}")
    assert done.code == 0, done.err
    done = boardbench("runs", BOARDBENCH_AGENT=f"127.0.0.1:{board.port}")
    assert done.code == 0, done.err


def test_a_board_that_can_not_be_reached_exits_with_3(boardbench, model_file, closed_port):
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{closed_port}")
    assert done.code == 3
    assert done.err == (
        f"boardbench: no agent listens on 127.0.0.1:{closed_port} (connection refused): "
        "start it with `boardbench-agent serve`\n"
    )


def told(monkeypatch, capsys, error, **environment):
    def fail(**_):
        raise error

    monkeypatch.setattr(main.boardbench, "main", fail)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = main.main([])
    return code, capsys.readouterr().err


def test_a_defect_is_owned_up_to_without_a_traceback(monkeypatch, capsys):
    code, err = told(monkeypatch, capsys, RuntimeError("boom"))
    assert code == 70
    assert err.startswith("boardbench: a defect in boardbench: RuntimeError: boom\n")
    assert "BOARDBENCH_DEBUG=1" in err
    assert "Traceback" not in err


def test_the_traceback_is_there_for_who_wants_it(monkeypatch, capsys):
    code, err = told(monkeypatch, capsys, errors.Refused("no"), BOARDBENCH_DEBUG="1")
    assert code == 1
    assert "Traceback" in err
    assert "boardbench: no" in err


def test_words_of_a_board_do_not_steer_the_terminal(monkeypatch, capsys):
    _, err = told(monkeypatch, capsys, errors.Refused("bad \x1b[2J board"))
    assert "\x1b" not in err
    assert "bad \\x1b[2J board" in err


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    code, err = told(monkeypatch, capsys, KeyboardInterrupt())
    assert code == 130
    assert err == "boardbench: interrupted\n"


def test_a_missing_part_of_the_installation_is_named(monkeypatch, capsys):
    code, err = told(monkeypatch, capsys, ModuleNotFoundError("No module named 'rich'", name="rich"))
    assert code == 70
    assert "the module 'rich' is missing" in err


def test_a_reader_that_goes_away_is_no_defect(board, boardbench, start):
    running = start("devices", "--to", f"127.0.0.1:{board.port}")
    running.process.stdout.close()
    running.process.stdout = None
    done = running.finished()
    assert done.code == 141
    assert done.err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_that_of_the_shell(boardbench, shell):
    done = boardbench("completion", shell)
    assert done.code == 0
    assert "_BOARDBENCH_COMPLETE" in done.out


def test_completion_knows_commands_and_options(start):
    environment = {"_BOARDBENCH_COMPLETE": "bash_complete", "COMP_WORDS": "boardbench pu", "COMP_CWORD": "1"}
    assert start(**environment).finished().out == "plain,push\n"
    environment |= {"COMP_WORDS": "boardbench push --thr", "COMP_CWORD": "2"}
    assert start(**environment).finished().out == "plain,--threads\n"


def test_the_script_works_in_a_real_bash(boardbench, tmp_path):
    bash = "/bin/bash"
    if subprocess.run([bash, "-c", "((BASH_VERSINFO[0] >= 4))"], check=False).returncode:
        pytest.skip("no bash 4 or newer here")
    script = tmp_path / "boardbench.bash"
    script.write_text(boardbench("completion", "bash").out)
    wrapper = tmp_path / "boardbench"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m boardbench.cli "$@"\n')
    wrapper.chmod(0o755)
    asked = (
        f'PATH="{tmp_path}:$PATH"; source "{script}"; COMP_WORDS=(boardbench wat); COMP_CWORD=1; '
        '_boardbench_completion boardbench; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run([bash, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "watch\n", done.stderr


def test_every_module_of_the_cli_can_be_imported():
    package = importlib.util.find_spec("boardbench.cli")
    for name in ("answer", "board", "client", "collected", "placement", "progress", "report", "tables"):
        assert importlib.import_module(f"{package.name}.{name}").__doc__
