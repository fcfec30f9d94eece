"""``boardbench run``: the same measurement on this machine, by the agent's own code in its own process."""

from __future__ import annotations

import collections
import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from boardbench.cli.errors import CliError, ExitCode, WrongUse, worst
from boardbench.cli.require import Requirement, all_hold, require_option
from boardbench.cli.spec import Spec, spec_from, spec_options
from boardbench.cli.terminal import Output, full_option, output_from, output_options

if TYPE_CHECKING:
    from boardbench.cli.progress import Watched
    from boardbench.v1 import agent_pb2, board_pb2, result_pb2

_LIBRARIES = ("delegate", "provider_library")
_STDERR_LINES = 40  # of a child that breaks: a traceback and what led to it
_AGENT_USAGE = 2  # exit code of boardbench-agent for a request that it can't even begin with
_END_SECONDS = 10.0  # from the last event to the end of the process; then it is killed
_KILL_SECONDS = 1.0  # as the board has it: a run ends within a second of being told to


_EXAMPLES = """\b
Examples:
  boardbench run model.tflite
  boardbench run model.onnx --threads 1 --duration 10
"""


@click.command(epilog=_EXAMPLES)
@click.argument(
    "paths",
    metavar="MODEL...",
    nargs=-1,
    required=True,
    # A folder may be an .mlpackage.
    type=click.Path(exists=True, readable=True, path_type=Path),
)
@spec_options
@require_option()
@full_option
@output_options
def run(paths: tuple[Path, ...], require: tuple[Requirement, ...], **values: Any) -> ExitCode:
    """Run models on this machine, without an agent.

    What is measured, and how, is the same as on a board. Needs the agent's part and an engine:
    pip install 'boardbench[agent,tflite,onnx]'. Ctrl-C cancels the run.

    With --format json, stdout holds one JSON document: the RunResult for one model, an array of them for
    several.
    """
    output = output_from(values)
    spec = spec_from(values)
    from boardbench.cli.answer import answer, exit_code
    from boardbench.cli.progress import progress_for
    from boardbench.cli.source import as_file
    from boardbench.cli.tables import comparison_table

    spec = _with_local_libraries(spec)
    results: list[result_pb2.RunResult] = []
    codes: list[ExitCode] = []
    if spec.runtime == "all":
        return _by_every_engine(paths, spec, output, require)
    with progress_for(output) as progress:
        for path in paths:
            local = LocalRun(path, spec)
            try:
                with as_file(path) as file:
                    local.file = file
                    result = _followed(local, progress)
            except CliError as error:
                if not local.interrupted:  # or it ended, as it was told to, before it had anything to tell
                    with progress.paused():
                        output.complain(str(error) if len(paths) == 1 else f"{path.name}: {error}")
                codes.append(error.exit_code)
            else:
                results.append(result)
                codes.append(exit_code(result))
                if not output.json:
                    with progress.paused():
                        answer(result, output, more="--full shows all")
            if local.interrupted:
                codes.append(ExitCode.INTERRUPTED)
                break
    _conclude(results, len(paths), output)
    if not output.json and len(results) > 1:
        output.show(comparison_table(results), table=True)
    if not all_hold(require, results, output):
        codes.append(ExitCode.FAILED)
    code = worst(codes)
    if code == ExitCode.INTERRUPTED:
        output.complain("interrupted")
    return code


def _with_local_libraries(spec: Spec) -> Spec:
    """A delegate or provider by its whole path where it is a file here: the worker is in a folder of its own.

    A name that is no file here is left to the system's loader, as ``libedgetpu.so.1``.
    """
    named = {name: Path(spec.options[name]) for name in _LIBRARIES if name in spec.options}
    whole = {name: str(path.absolute()) for name, path in named.items() if path.is_file()}
    return replace(spec, options={**spec.options, **whole}) if whole else spec


def _by_every_engine(
    paths: tuple[Path, ...], spec: Spec, output: Output, require: tuple[Requirement, ...]
) -> ExitCode:
    """Runs each model by every engine that takes it, and shows them side by side."""
    from boardbench.cli import engines
    from boardbench.cli.answer import answer
    from boardbench.cli.progress import progress_for
    from boardbench.inspect.sniff import sniff
    from boardbench.v1 import model_pb2, result_pb2

    statuses = _statuses()
    groups: list[list[result_pb2.RunResult]] = []
    codes: list[ExitCode] = []
    with progress_for(output) as progress:
        for path in paths:
            model = model_pb2.Model(name=path.name, format=sniff(path))
            found = engines.choices(statuses, model.format, spec)
            if not found:
                raise CliError(f"no engine here takes {path.name} ({model.format or 'of no known format'})")
            results: list[result_pb2.RunResult] = []
            groups.append(results)
            for choice in found:
                if choice.refusal:
                    results.append(engines.refused(choice, model, spec))
                    continue
                local = LocalRun(path, engines.spec_for(choice, spec))
                try:
                    result = _followed(local, progress)
                except CliError as error:
                    if local.interrupted:
                        codes.append(error.exit_code)
                    else:
                        results.append(engines.refused(replace(choice, refusal=str(error)), model, spec))
                else:
                    results.append(result)
                    if not output.json:
                        with progress.paused():
                            answer(result, output, more="--full shows all")
                if local.interrupted:
                    codes.append(ExitCode.INTERRUPTED)
                    break
            if codes:
                break
    codes.append(engines.conclude(groups, output))
    measured = [
        result for group in groups for result in group if result.status == result_pb2.RUN_STATUS_SUCCEEDED
    ]
    if not all_hold(require, measured, output):
        codes.append(ExitCode.FAILED)
    code = worst(codes)
    if code == ExitCode.INTERRUPTED:
        output.complain("interrupted")
    return code


def _statuses() -> list[board_pb2.RuntimeStatus]:
    """The engines of this machine, by the agent's own code. Raises CliError."""
    from google.protobuf import json_format

    from boardbench.v1 import agent_pb2

    done = subprocess.run(
        [sys.executable, "-m", "boardbench.agent", "probe", "--format", "json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        missing = re.search(r"No module named '([\w.]+)'", done.stderr)
        raise CliError(
            _needs_more(missing[1]) if missing else f"engines can't be found: {done.stderr.strip()}"
        )
    try:
        return list(json_format.Parse(done.stdout, agent_pb2.DescribeResponse()).runtimes)
    except json_format.ParseError as error:
        raise CliError(f"the agent's part printed something that is no description: {error}") from error


def _needs_more(module: str) -> str:
    return (
        f"running models here needs more of boardbench ({module} is missing): "
        "pip install 'boardbench[agent,tflite,onnx]'"
    )


def _conclude(results: list[result_pb2.RunResult], asked: int, output: Output) -> None:
    if not output.json:
        return
    if asked > 1:
        output.show_json(results)
    elif results:
        output.show_json(results[0])


def _followed(local: LocalRun, progress: Watched) -> result_pb2.RunResult:
    from boardbench.cli.interrupt import Interrupt

    with Interrupt(local.interrupt), contextlib.closing(local.events()) as events:
        try:
            for event in events:
                progress.happened(local.path.name, event)
                if event.HasField("result"):
                    return event.result
        finally:
            progress.ended(local.path.name)
    raise AssertionError("events() ends with a result or raises")


class LocalRun:
    """One run of ``python -m boardbench.agent run`` and its events."""

    def __init__(self, path: Path, spec: Spec) -> None:
        """Starts nothing yet."""
        self.path = path
        self.file = path
        """What is run: the model itself, or the archive that a folder is packed into."""
        self.interrupted = False
        self._told = False
        self._spec = spec
        self._process: subprocess.Popen[str] | None = None

    def events(self) -> Generator[agent_pb2.RunEvent, None, None]:
        """The events; the last one holds the result. Raises CliError when the process ends without one."""
        # A session of its own keeps Ctrl-C from hitting the child at the same time: it is told once, by us.
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "boardbench.agent", "run", "--format", "jsonl"),
                *self._spec.arguments(),
                *("--", str(self.file)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._process = process
        if self.interrupted:  # meanwhile
            process.terminate()
        assert process.stdout is not None
        assert process.stderr is not None
        said: collections.deque[str] = collections.deque(maxlen=_STDERR_LINES)
        reader = threading.Thread(target=_keep, args=(process.stderr, said), daemon=True)
        reader.start()
        try:
            for line in process.stdout:
                event = self._event(line)
                self._told = event.HasField("result")
                yield event
                if event.HasField("result"):
                    return
            code = process.wait()
            reader.join()
            raise self._broken(code, "".join(said))
        finally:
            self._end(process)
            reader.join()
            process.stdout.close()
            process.stderr.close()

    def interrupt(self) -> None:
        """Asks the run to end; its last event then says that it was cancelled."""
        self.interrupted = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    @staticmethod
    def _event(line: str) -> agent_pb2.RunEvent:
        from google.protobuf import json_format

        from boardbench.v1 import agent_pb2

        try:
            return json_format.Parse(line, agent_pb2.RunEvent(), ignore_unknown_fields=True)
        except json_format.ParseError as error:
            raise CliError(
                f"the agent's part printed something that is no event: {line.strip()[:200]!r} ({error}); "
                "are boardbench's parts of one version?"
            ) from error

    def _broken(self, code: int, said: str) -> CliError:
        missing = re.search(r"No module named '([\w.]+)'", said)
        if missing:
            return CliError(_needs_more(missing[1]))
        words = said.strip() or f"it ended with exit code {code} and said nothing"
        if code == _AGENT_USAGE:
            return WrongUse(_without_prefix(words))
        return CliError(f"{self.path.name} could not be run here: {_without_prefix(words)}")

    def _end(self, process: subprocess.Popen[str]) -> None:
        """Lets the child end after its result, and ends one that has none to tell or does not end."""
        if not self._told:
            process.terminate()
        try:
            process.wait(_END_SECONDS if self._told else _KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _keep(stream: IO[str], said: collections.deque[str]) -> None:
    for line in stream:
        said.append(line)


def _without_prefix(words: str) -> str:
    """``words`` without the name of the program that said them, which is not the one the user called."""
    return re.sub(r"^boardbench-agent(?: run)?: (?:error: )?", "", words, flags=re.MULTILINE)
