"""``boardbench push``: a file goes to boards, runs there, and comes back as a result."""

from __future__ import annotations

import contextlib
import queue
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from boardbench.cli.address import AGENT_PORT, Address, AddressType, CollectorType, ca_option
from boardbench.cli.collected import holder_option, on_option, pairs, retry_option
from boardbench.cli.errors import CliError, ExitCode, Interrupted, Refused, Unreachable, worst
from boardbench.cli.require import Requirement, all_hold, require_option
from boardbench.cli.spec import Count, Seconds, Spec, spec_from, spec_options
from boardbench.cli.terminal import Output, full_option, output_from, output_options

if TYPE_CHECKING:
    from boardbench.cli.client import AgentClient
    from boardbench.cli.progress import Watched
    from boardbench.cli.source import Source
    from boardbench.cli.via import Choice
    from boardbench.v1 import agent_pb2, model_pb2, result_pb2


_EXAMPLES = """\b
Examples:
  boardbench push model.tflite --to raspberrypi.local
  boardbench push *.onnx --to pi4 --to pi5 --threads 4 --duration 10
  boardbench push model.onnx --to 192.168.1.7:7341 --shape input=1,3,224,224
  boardbench push model.tflite --to pi5 --precision p50=1%,p99=5% --processes 5
  boardbench push a.tflite b.tflite --to pi5 --interleave
  boardbench push model.tflite --to pi5 --scenario periodic --rate 30
  boardbench push model.onnx --to pi5 --runtime all --interleave
  boardbench push model.tflite --via lab.example --on board=pi5,lab=zurich --count 3
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
@click.option(
    "--to",
    "boards",
    multiple=True,
    envvar="BOARDBENCH_AGENT",
    type=AddressType(AGENT_PORT),
    help=f"Board to run on; port {AGENT_PORT} when none is given. Repeatable: boards work at the same time.",
)
@click.option(
    "--via",
    type=CollectorType(),
    help="Let this collector hand the runs to boards that it knows, reachable or not, instead of --to.",
)
@ca_option
@on_option("With --via: which boards.")
@click.option(
    "--count",
    type=Count(1, 100_000),
    help="With --via: only so many of these boards, those with the shortest queue first.",
)
@click.option("--all", "every", is_flag=True, help="With --via: all boards, when no --on chooses some.")
@click.option(
    "--priority",
    type=Count(-(1 << 31), (1 << 31) - 1),
    default=0,
    help="With --via: higher goes first, where jobs wait.  [default: 0]",
)
@click.option(
    "--attempts", type=Count(1, 100), help="With --via: give a job up after so many attempts of its board."
)
@click.option(
    "--give-up-after",
    type=Seconds(zero=False),
    help="With --via: give a job up that has not ended after so long.",
)
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="NAME=VALUE",
    callback=pairs,
    help="With --via: a word that is kept with the jobs. Repeatable.",
)
@holder_option
@spec_options
@require_option()
@click.option("--detach", is_flag=True, help="Leave once the runs are queued, and print their ids.")
@click.option("--no-run", is_flag=True, help="Only send the files.")
@click.option(
    "--interleave",
    is_flag=True,
    help="Measure the models in turns (A B B A …), each in several fresh processes, so that what changes on "
    "the board changes for all; then compare them.  [--processes default: 6]",
)
@click.option(
    "--concurrent",
    is_flag=True,
    help="Measure each model by itself, then all at the same time, and say what they do to one another.",
)
@retry_option("a board")
@full_option
@output_options
def push(
    paths: tuple[Path, ...],
    boards: tuple[Address, ...],
    via: Address | None,
    on: tuple[str, ...],
    count: int | None,
    every: bool,
    priority: int,
    attempts: int | None,
    give_up_after: float | None,
    tags: dict[str, str],
    holder: str,
    detach: bool,
    no_run: bool,
    interleave: bool,
    concurrent: bool,
    retry_for: float,
    require: tuple[Requirement, ...],
    **values: Any,
) -> ExitCode:
    """Send models to boards, run them there and show the results.

    With --to boards are asked themselves. With --via a collector is: it keeps the file, and hands the run to
    every board that meets --on, over the connection that the board holds open. What can't be done now waits.

    A file is known by its SHA-256: one that the board has is not sent again, and a broken upload goes on
    where it stopped. Models run one after the other on each board. Ctrl-C cancels the run on the board;
    a second Ctrl-C leaves at once.

    With --format json, stdout holds one JSON document: the RunResult for one model on one board, an array of
    them for several, in the order of the models and, for each, of the boards.
    """
    output = output_from(values)
    spec = spec_from(values)
    if detach and no_run:
        raise click.UsageError("--detach and --no-run exclude one another: nothing would be queued")
    if no_run and spec != Spec():
        raise click.UsageError("--no-run sends files only: leave out the options of the run")
    if require and (detach or no_run):
        raise click.UsageError(
            "--require looks at results, and there will be none yet"
            + (": give it to `boardbench watch`" if detach else "")
        )
    every_engine = spec.runtime == "all"
    if every_engine and concurrent:
        raise click.UsageError("--runtime all compares engines: with --concurrent they disturb each other")
    together = _together(interleave, concurrent, len(paths) + every_engine, no_run=no_run)
    if interleave and spec.processes is None:
        spec = replace(spec, processes=INTERLEAVED_PROCESSES)
    from boardbench.cli.via import Choice

    asked = Choice(on, count or 0, priority, holder, attempts or 0, give_up_after, tags)
    choice = _checked(asked, via, boards, every=every)
    if choice is not None and together:
        raise click.UsageError("--interleave and --concurrent need one board: give it with --to")
    if choice is not None and every_engine:
        raise click.UsageError("--runtime all asks a board for its engines: give it with --to")
    from boardbench.cli.progress import progress_for
    from boardbench.cli.source import Source

    if via is not None and choice is not None:
        return _push_via(
            via, paths, spec, choice, output, require, detach=detach, no_run=no_run, retry_seconds=retry_for
        )
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(Source(path)) for path in paths]
        inputs = stack.enter_context(Source(spec.inputs)) if spec.inputs else None
        order = Order(
            sources,
            inputs,
            spec,
            detach=detach,
            no_run=no_run,
            retry_seconds=retry_for,
            chosen=output.shows_progress,
            together=together,
        )
        addresses = list(dict.fromkeys(boards))
        with progress_for(output) as progress:
            outcomes = push_all(order, addresses, progress, output)
    return _conclude(outcomes, order, addresses, output, require)


def _checked(
    choice: Choice, via: Address | None, boards: tuple[Address, ...], *, every: bool
) -> Choice | None:
    """The choice when a collector is to make it; None when boards are asked themselves."""
    if via is None:
        given = {
            "--on": choice.on,
            "--count": choice.count,
            "--all": every,
            "--priority": choice.priority,
            "--attempts": choice.attempts,
            "--give-up-after": choice.seconds,
            "--tag": choice.tags,
        }
        if wrong := [flag for flag, value in given.items() if value]:
            raise click.UsageError(f"{wrong[0]} is about boards of a collector: give --via, too")
        if not boards:
            raise click.UsageError("which board? Give --to HOST, or --via COLLECTOR and --on TERMS")
        return None
    # A board from the environment is for those commands that name none.
    source = click.get_current_context().get_parameter_source("boards")
    if boards and source == click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--to asks boards themselves and --via a collector: leave one of them out")
    if every and (choice.on or choice.count):
        raise click.UsageError("--all means every board: leave --on and --count out, or --all")
    if not (choice.on or choice.count or every):
        raise click.UsageError("which boards? Give --on TERMS, --count NUMBER or --all")
    return choice


def _push_via(
    collector: Address,
    paths: tuple[Path, ...],
    spec: Spec,
    choice: Choice,
    output: Output,
    require: tuple[Requirement, ...],
    *,
    detach: bool,
    no_run: bool,
    retry_seconds: float,
) -> ExitCode:
    from boardbench.cli import via
    from boardbench.cli.client import JobsClient
    from boardbench.cli.interrupt import Interrupt
    from boardbench.cli.progress import progress_for
    from boardbench.cli.source import Source

    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(Source(path)) for path in paths]
        inputs = stack.enter_context(Source(spec.inputs)) if spec.inputs else None
        progress = progress_for(output)
        stack.enter_context(progress)
        client = stack.enter_context(JobsClient(collector, retry_seconds=retry_seconds, notice=progress.note))
        with Interrupt(client.stop):
            if no_run:
                stored = [via.send(client, source, progress) for source in sources]
                with progress.paused():
                    if output.json:
                        output.show_json(stored if len(stored) > 1 else stored[0])
                    else:
                        click.echo("\n".join(f"{model.sha256}  {model.name}" for model in stored))
                return ExitCode.DONE
            jobs = via.submit(client, sources, inputs, spec, choice, progress)
        if detach:
            with progress.paused():
                via.tell_queued(jobs, output, collector)
            return ExitCode.DONE
        follower = via.Follower(client, collector, jobs, progress, output, owner=True)
        ended = follower.follow()
    return via.conclude(
        ended, len(jobs), output, require, interrupted=follower.interrupted, collector=collector
    )


INTERLEAVED_PROCESSES = 6
"""Processes of each model in a comparison: the fewest whose order statistics bound a median at 95 %."""


def _together(interleave: bool, concurrent: bool, models: int, *, no_run: bool) -> str:
    """Name of the group mode; empty when each model runs by itself. Raises click.UsageError."""
    if not (interleave or concurrent):
        return ""
    flag = "--interleave" if interleave else "--concurrent"
    if interleave and concurrent:
        raise click.UsageError("--interleave takes turns and --concurrent does not: leave one of them out")
    if models < 2:
        raise click.UsageError(f"{flag} needs at least two models")
    if no_run:
        raise click.UsageError(f"{flag} is about runs, and --no-run asks for none")
    return "GROUP_MODE_INTERLEAVED" if interleave else "GROUP_MODE_CONCURRENT"


@dataclass(frozen=True)
class Order:
    """What every board has to do."""

    sources: list[Source]
    inputs: Source | None
    spec: Spec
    detach: bool
    no_run: bool
    retry_seconds: float
    chosen: bool = False
    """Whether to tell which engine is taken, where a board chooses."""
    together: str = ""
    """Name of the group mode that all models are measured in; empty: one after the other."""


@dataclass(frozen=True)
class Outcome:
    """What became of one model on one board; exactly one of the last four is set."""

    address: Address
    index: int
    error: CliError | None = None
    result: result_pb2.RunResult | None = None
    queued: agent_pb2.RunSummary | None = None
    stored: model_pb2.Model | None = None
    turn: int = 0
    """Place among the engines that the model is run by."""


@dataclass(frozen=True)
class Task:
    """One run of one model on one board."""

    index: int
    source: Source
    label: str
    request: agent_pb2.RunBenchmarkRequest
    turn: int = 0


class Board(threading.Thread):
    """Works through the order on one board; an Outcome for each model goes to ``inbox``, then None."""

    def __init__(
        self,
        address: Address,
        order: Order,
        inbox: queue.SimpleQueue[Outcome | None],
        progress: Watched,
        *,
        alone: bool,
    ) -> None:
        super().__init__(name=f"board {address}", daemon=True)
        from boardbench.cli.client import AgentClient

        self._address = address
        self._order = order
        self._inbox = inbox
        self._progress = progress
        self._alone = alone
        self._client: AgentClient = AgentClient(
            address, retry_seconds=order.retry_seconds, notice=progress.note
        )
        self._interrupted = threading.Event()
        self._run_ids: set[str] = set()

    def run(self) -> None:
        """The work of the thread."""
        try:
            if self._order.together:
                self._do_together()
                return
            inputs_sha256 = ""
            for index, source in enumerate(self._order.sources):
                try:
                    if self._interrupted.is_set():
                        raise Interrupted("interrupted")
                    if self._order.inputs is not None and not inputs_sha256:
                        inputs_sha256 = self._send(self._order.inputs, inputs=True).sha256
                    self._do(index, source, inputs_sha256)
                except CliError as error:
                    self._inbox.put(Outcome(self._address, index, error=error))
                finally:
                    self._progress.ended(self._label(source))
        except BaseException as error:
            # Never leave the main thread waiting: a defect here is told like any other.
            self._inbox.put(Outcome(self._address, len(self._order.sources), error=_Defect.of(error)))
        finally:
            self._client.close()
            self._inbox.put(None)

    def interrupt(self) -> None:
        """Ends an upload now and a run soon: the board is asked to cancel it. Called from another thread."""
        self._interrupted.set()
        run_ids = sorted(self._run_ids)
        if not run_ids:
            self._client.stop()
            return
        self._progress.note("Cancelling the run on the board; Ctrl-C again leaves at once")
        for run_id in run_ids:
            try:
                self._client.cancel(run_id)
            except (CliError, ValueError) as error:  # ValueError: gRPC's word for a channel that is closed
                if run_id not in self._run_ids:
                    continue  # its result was faster than the answer, and the connection is closed by now
                error = CliError(f"the run could not be cancelled and goes on: {error}")
                self._inbox.put(Outcome(self._address, len(self._order.sources), error=error))
                self._client.stop()
                return

    def leave(self) -> str:
        """Ends everything now. Says what becomes of the run on the board; empty when there is none."""
        run_ids = sorted(self._run_ids)
        self._client.stop()
        if not run_ids:
            return ""
        return (
            f"left before run {', '.join(run_ids)} had ended; see what became of it with: "
            f"boardbench watch {run_ids[0][:8]} --to {self._address}"
        )

    def _label(self, source: Source) -> str:
        return source.name if self._alone else f"{source.name} → {self._address}"

    def _do(self, index: int, source: Source, inputs_sha256: str) -> None:
        model = self._send(source)
        if self._order.no_run:
            self._inbox.put(Outcome(self._address, index, stored=model))
            return
        for task in self._tasks(index, source, model, inputs_sha256):
            if self._interrupted.is_set():
                raise Interrupted("interrupted")
            self._inbox.put(self._outcome_of(task))

    def _tasks(
        self, index: int, source: Source, model: model_pb2.Model, inputs_sha256: str
    ) -> Iterator[Task]:
        """The runs of one model: one, or one by each engine that can; of the others it is told why not."""
        from boardbench.cli import engines
        from boardbench.v1 import agent_pb2

        order, label = self._order, self._label(source)

        def task(spec: Spec, label: str, turn: int = 0) -> Task:
            request = agent_pb2.RunBenchmarkRequest(
                model_sha256=model.sha256, spec=spec.message(inputs_sha256), run_id=uuid.uuid4().hex
            )
            return Task(index, source, label, request, turn)

        if order.spec.runtime != engines.ALL:
            if order.chosen and not order.spec.runtime:
                self._tell_default(model)
            yield task(order.spec, label)
            return
        found = engines.choices(self._client.describe().runtimes, model.format, order.spec)
        if not found:
            raise CliError(
                f"{self._address} knows no engine for {model.name} ({model.format or 'of no known format'})"
            )
        # Those that have to be told of begin no run.
        for turn, choice in enumerate(found):
            if choice.refusal:
                refused = engines.refused(choice, model, order.spec)
                self._inbox.put(Outcome(self._address, index, result=refused, turn=turn))
            else:
                yield task(engines.spec_for(choice, order.spec), f"{label} {choice.name}", turn)

    def _tell_default(self, model: model_pb2.Model) -> None:
        from boardbench.cli import engines

        with contextlib.suppress(CliError):
            found = engines.choices(self._client.describe().runtimes, model.format, self._order.spec)
            if line := engines.default_line(found, model.name):
                self._progress.note(line)

    def _do_together(self) -> None:
        """Sends all files, then queues all runs as one group and follows each in a thread of its own."""
        from boardbench.v1 import result_pb2

        order = self._order
        try:
            inputs_sha256 = self._send(order.inputs, inputs=True).sha256 if order.inputs else ""
            models = [self._send(source) for source in order.sources]
            tasks = [
                task
                for index, (source, model) in enumerate(zip(order.sources, models, strict=True))
                for task in self._tasks(index, source, model, inputs_sha256)
            ]
            if self._interrupted.is_set():
                raise Interrupted("interrupted")
        except CliError as error:
            for index, source in enumerate(order.sources):
                self._progress.ended(self._label(source))
                self._inbox.put(Outcome(self._address, index, error=error))
            return
        if len(tasks) > 1:
            group = result_pb2.RunGroup(
                id=uuid.uuid4().hex, size=len(tasks), mode=result_pb2.GroupMode.Value(order.together)
            )
            for task in tasks:
                task.request.spec.group.CopyFrom(group)
        # All of them, before any is asked for: a cancelled member must not leave the others waiting.
        self._run_ids.update(task.request.run_id for task in tasks)
        followers = [
            threading.Thread(
                target=self._follow_member, args=(task,), name=f"{self.name} {number}", daemon=True
            )
            for number, task in enumerate(tasks)
        ]
        for follower in followers:
            follower.start()
        for follower in followers:
            follower.join()

    def _follow_member(self, task: Task) -> None:
        try:
            outcome = self._outcome_of(task)
            if isinstance(outcome.error, Refused):
                self._cancel_others(task.request.run_id)
        except BaseException as error:
            outcome = Outcome(self._address, task.index, error=_Defect.of(error), turn=task.turn)
        self._inbox.put(outcome)

    def _outcome_of(self, task: Task) -> Outcome:
        try:
            return replace(self._measure(task), turn=task.turn)
        except CliError as error:
            return Outcome(self._address, task.index, error=error, turn=task.turn)
        finally:
            self._progress.ended(task.label)

    def _cancel_others(self, run_id: str) -> None:
        """The board does not take one of the group: the others would wait for it in vain."""
        for other in sorted(self._run_ids - {run_id}):
            with contextlib.suppress(CliError, ValueError):
                self._client.cancel(other)

    def _measure(self, task: Task) -> Outcome:
        request, run_id = task.request, task.request.run_id
        self._run_ids.add(run_id)
        try:
            if self._interrupted.is_set():
                raise Interrupted("interrupted")
            with contextlib.closing(self._client.run(request)) as events:
                return self._follow(task, run_id, events)
        except Unreachable as error:
            raise Unreachable(
                f"{error}. A run that has begun goes on without this connection; see its result with: "
                f"boardbench watch {run_id[:8]} --to {self._address}"
            ) from error
        finally:
            self._run_ids.discard(run_id)

    def _follow(self, task: Task, run_id: str, events: Iterable[agent_pb2.RunEvent]) -> Outcome:
        from boardbench.v1.agent_pb2 import RunSummary

        for event in events:
            self._progress.happened(task.label, event)
            if event.HasField("result"):
                return Outcome(self._address, task.index, result=event.result)
            if self._order.detach:
                known = (run for run in self._client.list_runs() if run.run_id == run_id)
                return Outcome(self._address, task.index, queued=next(known, RunSummary(run_id=run_id)))
        raise CliError(f"{self._address} told no end of run {run_id}")

    def _send(self, source: Source, *, inputs: bool = False) -> model_pb2.Model:
        from boardbench.v1 import agent_pb2

        label = self._label(source)
        kind = agent_pb2.FILE_KIND_INPUTS if inputs else agent_pb2.FILE_KIND_MODEL
        try:
            return self._client.push(
                source, kind, lambda sent: self._progress.sending(label, sent, source.size_bytes)
            ).model
        finally:
            if inputs:
                self._progress.ended(label)


class _Defect(CliError):
    """A defect of boardbench in a thread."""

    exit_code = ExitCode.DEFECT

    @classmethod
    def of(cls, error: BaseException) -> _Defect:
        """The defect, with its cause for the traceback."""
        defect = cls(f"a defect in boardbench: {type(error).__name__}: {error}")
        defect.__cause__ = error
        return defect


def push_all(order: Order, addresses: list[Address], progress: Watched, output: Output) -> list[Outcome]:
    """All outcomes; results are shown as they come."""
    from boardbench.cli.interrupt import Interrupt

    inbox: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
    boards = [Board(address, order, inbox, progress, alone=len(addresses) == 1) for address in addresses]

    def politely() -> None:
        for board in boards:
            threading.Thread(target=board.interrupt, daemon=True).start()

    outcomes: list[Outcome] = []
    working = len(boards)
    with Interrupt(politely) as interrupt:
        for board in boards:
            board.start()
        try:
            while working:
                try:
                    # With a time limit, since on Windows a wait without one keeps Ctrl-C from being seen.
                    outcome = inbox.get(timeout=0.2)
                except queue.Empty:
                    continue
                if outcome is None:
                    working -= 1
                    continue
                outcomes.append(outcome)
                with progress.paused():
                    _tell(outcome, order, output)
        except KeyboardInterrupt:
            for board in boards:
                if left := board.leave():
                    output.complain(left)
    if interrupt.happened:
        outcomes.append(Outcome(addresses[0], len(order.sources), error=Interrupted("interrupted")))
    return outcomes


def _tell(outcome: Outcome, order: Order, output: Output) -> None:
    """Shows one outcome to a person."""
    if outcome.error is not None:
        if isinstance(outcome.error, Interrupted):
            return  # said once, at the end
        model = order.sources[outcome.index].name if outcome.index < len(order.sources) else ""
        about = f"{model}: " if len(order.sources) > 1 and model else ""
        output.complain(f"{about}{outcome.error}")
        return
    if output.json:
        return
    name = order.sources[outcome.index].name
    if outcome.result is not None:
        if not outcome.result.run_id:
            return  # an engine that was not asked to run it; the comparison says why
        from boardbench.cli.answer import answer

        more = f"boardbench watch {outcome.result.run_id[:8]} --to {outcome.address} --full"
        answer(outcome.result, output, more=more)
    elif outcome.queued is not None:
        click.echo(outcome.queued.run_id)
        output.note(
            f"{name} is queued on {outcome.address}; follow it with: "
            f"boardbench watch {outcome.queued.run_id[:8]} --to {outcome.address}"
        )
    elif outcome.stored is not None:
        click.echo(f"{outcome.stored.sha256}  {name}")


def _conclude(
    outcomes: list[Outcome],
    order: Order,
    addresses: list[Address],
    output: Output,
    require: tuple[Requirement, ...],
) -> ExitCode:
    """The exit code, after writing the JSON document or, for several results, the comparison."""
    place = {address: position for position, address in enumerate(addresses)}
    outcomes = sorted(outcomes, key=lambda outcome: (outcome.index, place[outcome.address], outcome.turn))
    if order.spec.runtime == "all" and not order.detach:
        return _conclude_engines(outcomes, output, require)
    answers = [
        answer for outcome in outcomes if (answer := outcome.result or outcome.queued or outcome.stored)
    ]
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    if output.json:
        if len(order.sources) * len(addresses) > 1:
            output.show_json(answers)
        elif answers:
            output.show_json(answers[0])
    elif len(results) > 1:
        from boardbench.cli.tables import comparison_table

        output.show(comparison_table(results), table=True)
    codes = [exit_code_of(outcome) for outcome in outcomes]
    if not all_hold(require, results, output):
        codes.append(ExitCode.FAILED)
    code = worst(codes)
    if code == ExitCode.INTERRUPTED:
        output.complain("interrupted")
    return code


def _conclude_engines(outcomes: list[Outcome], output: Output, require: tuple[Requirement, ...]) -> ExitCode:
    """The exit code, after showing for each model and board what its engines measured, side by side."""
    from boardbench.cli import engines
    from boardbench.v1 import result_pb2

    groups: dict[tuple[int, Address], list[result_pb2.RunResult]] = {}
    codes = []
    for outcome in outcomes:
        if outcome.result is not None:
            groups.setdefault((outcome.index, outcome.address), []).append(outcome.result)
        elif outcome.error is not None and not isinstance(outcome.error, Refused):
            codes.append(outcome.error.exit_code)
    codes.append(engines.conclude(list(groups.values()), output))
    measured = [
        result
        for group in groups.values()
        for result in group
        if result.status == result_pb2.RUN_STATUS_SUCCEEDED
    ]
    if not all_hold(require, measured, output):
        codes.append(ExitCode.FAILED)
    code = worst(codes)
    if code == ExitCode.INTERRUPTED:
        output.complain("interrupted")
    return code


def exit_code_of(outcome: Outcome) -> ExitCode:
    """The exit code that one outcome would have by itself."""
    from boardbench.cli.answer import exit_code

    if outcome.error is not None:
        return outcome.error.exit_code
    return ExitCode.DONE if outcome.result is None else exit_code(outcome.result)
