"""boardbench-agent: serve | probe | run | doctor | enroll | verify-board.

By argparse, since click would stay in a board's memory.

Exit codes: 0 done, 1 the run failed or the agent could not go on, 2 wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from boardbench.agent.config import AgentConfig
    from boardbench.v1 import result_pb2

PROGRAM = "boardbench-agent"

_DONE, _FAILED, _USAGE = 0, 1, 2
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}

# What boardbench[agent] brings, by the name that it is imported as.
_EXTRA = ("grpc_health", "grpc_reflection", "psutil", "tomli")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and ends the process with its exit code."""
    # gRPC reads both when it is imported. Its own resolver knows neither mDNS (lab.local) nor what else the
    # system takes names from; and what it writes about broken connections is for its developers.
    os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        return _obey(options)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        from boardbench.agent.bench import wheels

        fix = wheels.REINSTALL if wheels.here().brought is not None else "pip install 'boardbench[agent]'"
        return _complain(
            f"{options.command} needs the agent's part of boardbench ({error.name} is missing): {fix}",
            _FAILED,
        )


def _obey(options: argparse.Namespace) -> int:
    if options.command == "serve":
        _leave_ssl_out()
    from boardbench.agent.config import load
    from boardbench.agent.errors import AgentError, ConfigurationError, InvalidRequest

    try:
        config = load(options.config, flags=_flags(options))
        command: Callable[[argparse.Namespace, AgentConfig], int] = options.run
        return command(options, config)
    except (ConfigurationError, InvalidRequest) as error:
        return _complain(str(error), _USAGE)
    except AgentError as error:
        return _complain(str(error), _FAILED)
    except BrokenPipeError:
        # Nobody reads any more (a pager was closed): nothing is left to be said.
        sys.stderr.close()
        return _FAILED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Runs models on this board and measures them.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="serve | probe | run | doctor | enroll | verify-board"
    )

    serve = _command(commands.add_parser, "serve", _serve, "take models and runs over the network")
    serve.add_argument(
        "--listen", metavar="HOST:PORT", help="where to listen (127.0.0.1:7341); port 0: any; empty: nowhere"
    )
    serve.add_argument(
        "--collector",
        metavar="HOST:PORT",
        help="where to report results; tls://HOST:PORT where that has a certificate",
    )
    _add_ca(serve.add_argument)
    serve.add_argument("--address", metavar="HOST:PORT", help="where others reach this agent")
    serve.add_argument(
        "--port-file", type=Path, metavar="FILE", help="the port is written there as JSON while it is open"
    )

    probe = _command(commands.add_parser, "probe", _probe, "say what this board is and what it can run")
    probe.add_argument("--format", choices=("text", "json"), default="text", help="json: a DescribeResponse")
    probe.add_argument(
        "--record",
        type=Path,
        metavar="FOLDER",
        help="copy the files that tell about this board, without what names it, into a new folder",
    )

    run = _command(commands.add_parser, "run", _run_here, "run one model here, without a server")
    run.add_argument("model", type=Path, metavar="MODEL", help="the model file")
    run.add_argument(
        "--format",
        choices=("text", "jsonl"),
        default="text",
        help="jsonl: a RunEvent a line, the last the result",
    )
    _add_spec(run)

    doctor = _command(commands.add_parser, "doctor", _doctor, "say whether this board is fit to measure on")
    doctor.add_argument("--fix", action="store_true", help="set what can be set, for as long as this runs")
    doctor.add_argument(
        "--for", dest="hold", metavar="TIME", help="how long --fix holds: 90s, 30m, 1h (an hour)"
    )
    doctor.add_argument(
        "--restore", action="store_true", help="put back what an agent had set that was killed"
    )
    doctor.add_argument("--format", choices=("text", "json"), default="text", help="json: an ExamineResponse")

    enroll = _command(commands.add_parser, "enroll", _enroll, "make this board one of a collector's")
    enroll.add_argument(
        "--collector", metavar="HOST:PORT", help="the collector; tls://HOST:PORT where it has a certificate"
    )
    _add_ca(enroll.add_argument)
    enroll.add_argument(
        "--token",
        required=True,
        metavar="TOKEN",
        help="what `boardbench-collector token create` printed; - reads it from the standard input",
    )

    verify = _command(
        commands.add_parser, "verify-board", _verify, "run models with every engine and give the evidence"
    )
    verify.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="a model file; repeat")
    verify.add_argument(
        "--out", type=Path, metavar="FILE", help="the whole evidence as JSON, results included"
    )
    return top


class _Version(argparse.Action):
    """Prints the version and ends; looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_ignored: object) -> NoReturn:
        from boardbench.agent.version import version

        _say(f"{PROGRAM} {version() or 'of an unknown version: it runs from a folder and is not installed'}")
        parser.exit()


class _Help(argparse.HelpFormatter):
    """Help of a fixed width: argparse asks shutil for the terminal's, for half a megabyte of memory."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)


def _command(
    add: Callable[..., argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace, AgentConfig], int],
    summary: str,
) -> argparse.ArgumentParser:
    command = add(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="agent.toml (/etc/boardbench/agent.toml)"
    )
    command.add_argument("--data-dir", metavar="FOLDER", help="models, results and the journal of runs")
    command.add_argument("--device-id", metavar="ID", help="identity of the board (made from the machine id)")
    command.add_argument(
        "--sys-root", metavar="FOLDER", help="folder with proc, sys and etc of the board (/)"
    )
    command.add_argument(
        "--label", action="append", default=[], metavar="NAME=VALUE", help="a label of the board; repeat"
    )
    return command


def _add_spec(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--runtime", default="", metavar="NAME", help="runtime to use (the default for the format)")
    add("--device", default="", metavar="NAME", help="device of the runtime (cpu)")
    add("--threads", type=int, metavar="N", help="threads that the engine may use")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an engine option; repeat")
    add("--shape", action="append", default=[], metavar="NAME=1,2,3", help="sizes of an open input; repeat")
    add("--inputs", type=Path, metavar="FILE.npz", help="input data by name (made from the seed)")
    add("--seed", type=int, metavar="N", help="seed of the generated inputs (0)")
    add("--duration", type=float, metavar="SECONDS", help="counted inferences last at least this long")
    add("--min-runs", type=int, metavar="N", help="at least this many counted inferences")
    add("--max-runs", type=int, metavar="N", help="at most this many counted inferences")
    add("--warm-up", type=float, metavar="SECONDS", help="warm-up inferences last at least this long")
    add("--warm-up-runs", type=int, metavar="N", help="at least this many warm-up inferences")
    add("--timeout", type=float, metavar="SECONDS", help="the whole run must end within this time")
    add("--strict", action="store_true", help="fail when any operation runs on the CPU")
    add(
        "--allow-fallback",
        action="store_true",
        help="run on what there is when the device is not there, with a warning",
    )
    add(
        "--profile-runs",
        type=int,
        metavar="N",
        help="inferences of the profiling pass (the engine's default)",
    )
    add(
        "--no-profile",
        action="store_const",
        const=0,
        dest="profile_runs",
        help="the same as --profile-runs 0",
    )
    add(
        "--spec",
        metavar="JSON",
        help='a BenchmarkSpec as JSON, for everything else ({"processes": 5}); the other options win',
    )


def _add_ca(add: Callable[..., object]) -> None:
    add(
        "--collector-ca",
        metavar="FILE",
        help="certificate (PEM) of the authority that the collector's must be of; implies tls://",
    )


def _flags(options: argparse.Namespace) -> dict[str, object]:
    """What the command line sets of the configuration."""
    names = ("listen", "collector", "collector_ca", "address", "data_dir", "device_id", "sys_root")
    flags = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if options.label:
        flags["labels"] = _pairs("--label", options.label)
    return flags


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """Names and values of repeated NAME=VALUE. Raises InvalidRequest."""
    from boardbench.agent.errors import InvalidRequest

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InvalidRequest(f"{flag}: {text!r} is not NAME=VALUE")
        if name.strip() in found:
            raise InvalidRequest(f"{flag}: {name.strip()!r} is there twice")
        found[name.strip()] = value
    return found


def _leave_ssl_out() -> None:
    """Keeps Python's ssl from being loaded.

    asyncio brings it along for transports that nothing here uses (gRPC has a TLS of its own), and it is
    4 MB of memory on a board that waits to measure something else.
    """
    if "asyncio" not in sys.modules:
        sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]  # documented: import then fails


def _serve(options: argparse.Namespace, config: AgentConfig) -> int:
    import asyncio
    import logging

    from boardbench.agent.notify import notify
    from boardbench.agent.serve import serve

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")

    def ready(address: str) -> None:
        notify("READY=1")
        _say(f"listening on {address}" if address else f"working for {config.collector} alone")

    asyncio.run(serve(config, port_file=options.port_file, ready=ready))
    return _DONE


def _probe(options: argparse.Namespace, config: AgentConfig) -> int:
    import asyncio

    from boardbench.agent import here, wire

    described = asyncio.run(here.describe(config))
    if options.format == "json":
        _say(wire.to_json(described))
    else:
        from boardbench.agent import explain

        _say(here.description(described))
        _say("\n" + explain.page(config, described))
    if options.record is not None:
        from boardbench.agent.record import record

        copied = record(config.sys_root, options.record, described)
        sys.stderr.write(
            f"{len(copied)} files are in {options.record}: look through them before you share them\n"
        )
    return _DONE


def _verify(options: argparse.Namespace, config: AgentConfig) -> int:
    import asyncio

    from boardbench.agent.verify import verify

    rows, good = asyncio.run(verify(config, options.models, options.out))
    _say(rows)
    return _DONE if good else _FAILED


def _run_here(options: argparse.Namespace, config: AgentConfig) -> int:
    import asyncio

    from boardbench.agent import here
    from boardbench.v1 import result_pb2

    show = here.show_json if options.format == "jsonl" else here.show_text
    result = asyncio.run(here.run(config, options.model, options.inputs, _spec(options), show))
    return _DONE if result.status == result_pb2.RUN_STATUS_SUCCEEDED else _FAILED


def _doctor(options: argparse.Namespace, config: AgentConfig) -> int:
    import asyncio

    from boardbench.agent import doctor, wire
    from boardbench.agent.errors import InvalidRequest
    from boardbench.v1 import agent_pb2

    if options.hold is not None and not options.fix:
        raise InvalidRequest("--for says how long --fix holds: give that too")
    seconds = None if options.hold is None else _seconds("--for", options.hold)
    request = agent_pb2.ExamineRequest(fix=options.fix, restore=options.restore, hold_seconds=seconds)
    told = wire.to_json if options.format == "json" else doctor.page
    fit = asyncio.run(doctor.doctor(config, request, lambda examined: _say(told(examined))))
    return _DONE if fit else _FAILED


def _enroll(options: argparse.Namespace, config: AgentConfig) -> int:
    import asyncio

    from boardbench.agent import here
    from boardbench.agent.errors import InvalidRequest

    if not config.collector:
        raise InvalidRequest("which collector? give --collector HOST:PORT, or set it in agent.toml")
    token = sys.stdin.readline().strip() if options.token == "-" else options.token.strip()
    if not token:
        raise InvalidRequest("--token: it is empty")
    device_id = asyncio.run(here.enroll(config, token))
    _say(f"board {device_id} is enrolled at {config.collector}")
    return _DONE


def _seconds(flag: str, text: str) -> float:
    """Seconds of "90s", "30m" or "1h"; a number alone is in seconds. Raises InvalidRequest."""
    from boardbench.agent.errors import InvalidRequest

    number = text.strip().lower().rstrip("smh")
    unit = text.strip().lower()[len(number) :]
    if unit not in _UNITS or not number.replace(".", "", 1).isdecimal():
        raise InvalidRequest(f"{flag}: {text!r} is not a length of time: give 90s, 30m or 1h")
    return float(number) * _UNITS[unit]


def _spec(options: argparse.Namespace) -> result_pb2.BenchmarkSpec:
    """The spec that the command line asks for. Raises InvalidRequest."""
    from boardbench.agent.errors import InvalidRequest
    from boardbench.v1 import model_pb2, result_pb2

    shapes = {name: _sizes(name, text) for name, text in _pairs("--shape", options.shape).items()}
    numbers = {
        "threads": options.threads,
        "seed": options.seed,
        "duration_seconds": options.duration,
        "min_runs": options.min_runs,
        "max_runs": options.max_runs,
        "warm_up_seconds": options.warm_up,
        "warm_up_runs": options.warm_up_runs,
        "timeout_seconds": options.timeout,
        "profile_runs": options.profile_runs,
    }
    try:
        told = result_pb2.BenchmarkSpec(
            runtime=options.runtime,
            device=options.device,
            options=_pairs("--option", options.option),
            shapes={name: model_pb2.Shape(dimensions=sizes) for name, sizes in shapes.items()},
            strict=options.strict,
            allow_fallback=options.allow_fallback,
            **numbers,
        )
    except ValueError as error:
        raise InvalidRequest(f"a number is out of range: {error}") from None
    spec = _spec_in_json(options.spec) if options.spec else result_pb2.BenchmarkSpec()
    spec.MergeFrom(told)
    return spec


def _spec_in_json(text: str) -> result_pb2.BenchmarkSpec:
    import json

    from google.protobuf import json_format

    from boardbench.agent.errors import InvalidRequest
    from boardbench.v1 import result_pb2

    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        return json_format.ParseDict(content, result_pb2.BenchmarkSpec())
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"--spec: no BenchmarkSpec in JSON: {error}") from None


def _sizes(name: str, text: str) -> list[int]:
    from boardbench.agent.errors import InvalidRequest

    try:
        return [int(size) for size in text.split(",") if size.strip()]
    except ValueError:
        raise InvalidRequest(f"--shape: {name}={text} is not NAME=SIZE,SIZE,…") from None


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _complain(text: str, code: int) -> int:
    sys.stderr.write(f"{PROGRAM}: {text}\n")
    return code
