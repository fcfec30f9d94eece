"""suite.toml: models × runtimes × boards × scenarios, as cases.

An example:

    name = "nightly"                 tag of every result: suite=nightly
    models = ["models/*.tflite"]     files, or patterns, relative to this file

    [defaults]                       options of every run, by the names that `boardbench push` has
    duration = 5

    [runtimes.tflite-1]              options again; every table named so is one runtime of the matrix
    runtime = "tflite"
    threads = 1

    [boards.pi5]                     terms; so many of the boards that meet them, or all
    on = ["board=pi5", "lab=zurich"]
    count = 1

    [scenarios.camera]               options again
    scenario = "periodic"
    rate = 30

    [[exclude]]                      combinations that are left out: all that meets every key
    board = "pi5"
    model = "*edgetpu*"

    [[include]]                      combinations beside the matrix, from the same names
    model = "models/large.tflite"
    board = "orin"

    require = ["p50<=20ms"]          what every result must hold (also in [boards.…] and [scenarios.…])

    [schedule]                       for `boardbench suite watch`
    cron = "0 3 * * *"               local time, or timezone = "Europe/Zurich"
    folders = ["incoming"]           a new model there runs on everything, as one of `models` would
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from boardbench.cli.collected import terms
from boardbench.cli.errors import WrongUse
from boardbench.cli.spec import Spec, spec_from, spec_options

_ANY = "any"
_KEYS = {
    "": ("name", "models", "defaults", "runtimes", "boards", "scenarios", "exclude", "include", "require",
         "schedule", "inputs", "priority", "attempts", "give_up_after"),
    "boards": ("on", "count", "require"),
    "schedule": ("cron", "timezone", "folders", "settle"),
    "combination": ("model", "runtime", "board", "scenario"),
}  # fmt: skip
# What a new file in a folder is, when nothing says otherwise.
_NO_MODELS = (".part", ".tmp", ".crdownload", ".json", ".toml", ".txt", ".md", ".npz", ".bin")


@dataclass(frozen=True)
class BoardChoice:
    """Boards of the matrix by one name."""

    name: str
    on: tuple[str, ...]
    count: int
    require: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One model with one runtime and one scenario, for some boards."""

    model: Path
    runtime: str
    board: BoardChoice
    scenario: str
    spec: Spec
    require: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people, and the same as long as the case is."""
        parts = (self.model.name, self.runtime, self.board.name, self.scenario)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Schedule:
    """When `suite watch` submits."""

    cron: str = ""
    timezone: str = ""
    folders: tuple[Path, ...] = ()
    settle_seconds: float = 2.0
    """A file in a folder is whole when it has not changed for so long."""


@dataclass(frozen=True)
class Suite:
    """What a suite.toml says, with everything checked that can be without a board."""

    name: str
    path: Path
    cases: tuple[Case, ...]
    schedule: Schedule
    inputs: Path | None
    priority: int
    attempts: int
    give_up_after: float | None
    _matrix: _Matrix

    def cases_for(self, models: Sequence[Path]) -> tuple[Case, ...]:
        """The matrix for other models than its own: those that came into a folder."""
        return tuple(self._matrix.cases(models))


@dataclass(frozen=True)
class _Matrix:
    """What is multiplied."""

    where: str
    defaults: Mapping[str, Any]
    runtimes: Mapping[str, Mapping[str, Any]]
    boards: Mapping[str, BoardChoice]
    scenarios: Mapping[str, Mapping[str, Any]]
    require: tuple[str, ...]
    exclude: tuple[Mapping[str, str], ...]
    scenario_require: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def cases(self, models: Sequence[Path]) -> Iterator[Case]:
        """Every combination that is not excluded."""
        for model in models:
            for runtime in self.runtimes or {"": {}}:
                for board in self.boards.values():
                    for scenario in self.scenarios or {"": {}}:
                        if not self._excluded(model, runtime, board.name, scenario):
                            yield self.case(model, runtime, board, scenario)

    def case(self, model: Path, runtime: str, board: BoardChoice, scenario: str) -> Case:
        """One combination. Raises WrongUse where its options contradict one another."""
        options = {**self.defaults, **self.runtimes.get(runtime, {}), **self.scenarios.get(scenario, {})}
        where = " ".join(part for part in (runtime, scenario) if part) or "defaults"
        return Case(
            model,
            runtime,
            board,
            scenario,
            _spec(options, f"{self.where}: {where}"),
            self.require + board.require + self.scenario_require.get(scenario, ()),
        )

    def _excluded(self, model: Path, runtime: str, board: str, scenario: str) -> bool:
        named = {"runtime": runtime, "board": board, "scenario": scenario}
        return any(
            all(
                fnmatch.fnmatchcase(model.name, pattern) or fnmatch.fnmatchcase(model.as_posix(), pattern)
                if key == "model"
                else fnmatch.fnmatchcase(named[key], pattern)
                for key, pattern in rule.items()
            )
            for rule in self.exclude
        )


def read(path: Path) -> Suite:
    """The suite of the file. Raises WrongUse, which names the key."""
    try:
        # tomli is tomllib for Python 3.10; both raise subclasses of ValueError.
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        with path.open("rb") as file:
            raw: dict[str, Any] = toml.load(file)
    except ModuleNotFoundError:
        raise WrongUse("suites need tomli under Python 3.10: pip install 'boardbench[suites]'") from None
    except OSError as error:
        raise WrongUse(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise WrongUse(f"{path}: not TOML: {error}") from None
    return _Reader(path).suite(raw)


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path.parent

    def suite(self, raw: Mapping[str, Any]) -> Suite:
        self._known("", raw)
        name = self._text(raw, "name", self._path.stem)
        if not name or not name.isprintable() or len(name) > 100:
            raise self._wrong(f"name is {name!r}; give printable text of at most 100 letters")
        boards = {
            key: self._board(key, self._table(entry, f"boards.{key}"))
            for key, entry in self._table(raw.get("boards", {}), "boards").items()
        }
        scenarios = self._tables(raw, "scenarios")
        matrix = _Matrix(
            str(self._path),
            self._table(raw.get("defaults", {}), "defaults"),
            self._tables(raw, "runtimes"),
            boards or {_ANY: BoardChoice(_ANY, (), 1, ())},
            {key: {n: v for n, v in entry.items() if n != "require"} for key, entry in scenarios.items()},
            self._texts(raw, "require"),
            tuple(self._combinations(raw, "exclude")),
            {key: self._texts(entry, "require") for key, entry in scenarios.items()},
        )
        _check_requirements(matrix, boards.values(), self._path)
        models = self._models(self._texts(raw, "models"))
        cases = list(matrix.cases(models))
        for extra in self._combinations(raw, "include"):
            cases += [case for case in self._included(matrix, extra) if case not in cases]
        schedule = self._schedule(self._table(raw.get("schedule", {}), "schedule"))
        if not cases and not schedule.folders:
            raise self._wrong("it has no cases: `models` names none, or all are excluded")
        return Suite(
            name,
            self._path,
            tuple(cases),
            schedule,
            self._file(raw["inputs"], "inputs") if "inputs" in raw else None,
            self._number(raw, "priority", 0, least=-(1 << 31)),
            self._number(raw, "attempts", 0),
            self._seconds(raw, "give_up_after"),
            matrix,
        )

    def _included(self, matrix: _Matrix, extra: Mapping[str, str]) -> Iterator[Case]:
        if "model" not in extra:
            raise self._wrong("include needs a model")
        for key, there in (
            ("runtime", matrix.runtimes),
            ("board", matrix.boards),
            ("scenario", matrix.scenarios),
        ):
            if key in extra and extra[key] not in there:
                known = ", ".join(there) or "none"
                raise self._wrong(f"include has the {key} {extra[key]!r}; there are {known}")
        boards = [matrix.boards[extra["board"]]] if "board" in extra else list(matrix.boards.values())
        for model in self._models((extra["model"],)):
            for board in boards:
                yield matrix.case(model, extra.get("runtime", ""), board, extra.get("scenario", ""))

    def _board(self, name: str, raw: Mapping[str, Any]) -> BoardChoice:
        self._known("boards", raw, f"boards.{name}")
        try:
            on = terms(self._texts(raw, "on", where=f"boards.{name}."))
        except ValueError as error:
            raise self._wrong(f"boards.{name}.on: {error}") from None
        if not on and "count" not in raw:
            raise self._wrong(f"boards.{name} names no boards: give on, or count")
        return BoardChoice(name, on, self._number(raw, "count", 0), self._texts(raw, "require"))

    def _schedule(self, raw: Mapping[str, Any]) -> Schedule:
        self._known("schedule", raw)
        cron, timezone = self._text(raw, "cron", ""), self._text(raw, "timezone", "")
        folders = tuple(self._folder / text for text in self._texts(raw, "folders", where="schedule."))
        if cron:
            from boardbench.cli.schedule import check_cron

            try:
                check_cron(cron, timezone)
            except ValueError as error:
                raise self._wrong(f"schedule: {error}") from None
        return Schedule(cron, timezone, folders, self._seconds(raw, "settle") or Schedule.settle_seconds)

    def _models(self, patterns: Sequence[str]) -> list[Path]:
        found: dict[Path, None] = {}
        for pattern in patterns:
            if any(letter in pattern for letter in "*?["):
                base = Path(pattern)
                matches = (
                    sorted(Path(base.anchor).glob(str(base.relative_to(base.anchor))))
                    if base.is_absolute()
                    else sorted(self._folder.glob(pattern))
                )
                if not matches:
                    raise self._wrong(f"models: nothing is at {pattern}")
                found.update((path, None) for path in matches if is_model(path))
            else:
                found[self._file(pattern, "models", folder=True)] = None
        return list(found)

    def _file(self, text: object, key: str, *, folder: bool = False) -> Path:
        path = self._folder / str(text)
        if not (path.is_file() or (folder and path.is_dir())):
            raise self._wrong(f"{key}: {path} is not there")
        return path

    def _combinations(self, raw: Mapping[str, Any], key: str) -> Iterator[Mapping[str, str]]:
        entries = raw.get(key, [])
        if not isinstance(entries, list):
            raise self._wrong(f"{key} must be tables: write [[{key}]]")
        for entry in entries:
            table = self._table(entry, key)
            self._known("combination", table, key)
            if not table or not all(isinstance(value, str) for value in table.values()):
                raise self._wrong(f"{key} has names and patterns only, and one at least")
            yield table

    def _tables(self, raw: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
        return {
            name: self._table(entry, f"{key}.{name}")
            for name, entry in self._table(raw.get(key, {}), key).items()
        }

    def _table(self, value: object, key: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self._wrong(f"{key} must be a table")
        return value

    def _known(self, kind: str, raw: Mapping[str, Any], where: str = "") -> None:
        for key in raw:
            if key not in _KEYS[kind]:
                place = f" in {where or kind}" if where or kind else ""
                raise self._wrong(f"no key {key!r}{place}; there are {', '.join(_KEYS[kind])}")

    def _texts(self, raw: Mapping[str, Any], key: str, where: str = "") -> tuple[str, ...]:
        value = raw.get(key, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(f"{where}{key} must be text, or a list of texts")
        return tuple(value)

    def _text(self, raw: Mapping[str, Any], key: str, default: str) -> str:
        value = raw.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(f"{key} must be text, not {value!r}")
        return value

    def _number(self, raw: Mapping[str, Any], key: str, default: int, *, least: int = 0) -> int:
        value = raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            raise self._wrong(f"{key} must be a whole number from {least} on, not {value!r}")
        return value

    def _seconds(self, raw: Mapping[str, Any], key: str) -> float | None:
        value = raw.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise self._wrong(f"{key} must be a number of seconds above 0, not {value!r}")
        return float(value)

    def _wrong(self, problem: str) -> WrongUse:
        return WrongUse(f"{self._path}: {problem}")


def is_model(path: Path) -> bool:
    """Whether a file in a folder is taken for a model: not what is on its way, hidden, or beside one."""
    if path.name.startswith(".") or path.suffix.lower() in _NO_MODELS:
        return False
    return path.is_file() or (path.is_dir() and path.suffix == ".mlpackage")


@click.command()
@spec_options
def _options(**_values: object) -> None:
    """The options of a run, to be read from a table as from a command line."""


def _spec(options: Mapping[str, Any], where: str) -> Spec:
    """The options as :class:`Spec`; tables and lists stand for options that are repeated."""
    known = {
        parameter.name: parameter for parameter in _options.params if isinstance(parameter, click.Option)
    }
    long = {name.lstrip("-").replace("-", "_"): p for p in known.values() for name in p.opts}
    arguments: list[str] = []
    for key, value in options.items():
        parameter = long.get(key.replace("-", "_")) or known.get(key.replace("-", "_"))
        if parameter is None:
            raise WrongUse(f"{where}: a run has no option {key!r}; there are {', '.join(sorted(long))}")
        flag = parameter.opts[0]
        if parameter.is_flag:
            if not isinstance(value, bool):
                raise WrongUse(f"{where}: {key} must be true or false, not {value!r}")
            arguments += [flag] * value
        elif isinstance(value, Mapping):
            arguments += [f"{flag}={name}={_told(item)}" for name, item in value.items()]
        elif isinstance(value, list):
            arguments += [f"{flag}={_told(item)}" for item in value]
        else:
            arguments.append(f"{flag}={_told(value)}")
    try:
        with _options.make_context("suite", arguments) as context:
            return spec_from(dict(context.params))
    except click.UsageError as error:
        raise WrongUse(f"{where}: {error.format_message()}") from None


def _told(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_requirements(matrix: _Matrix, boards: Any, path: Path) -> None:
    from boardbench.cli.require import parse

    texts = [*matrix.require, *(text for board in boards for text in board.require)]
    texts += [text for each in matrix.scenario_require.values() for text in each]
    for text in texts:
        try:
            parse(text)
        except ValueError as error:
            raise WrongUse(f"{path}: require: {error}") from None


def request_id(suite: str, case: Case, sha256: str, inputs_sha256: str, tick: str) -> str:
    """Identity of the request that the case makes at a moment: the same moment again queues nothing twice.

    What is asked for is in it, so that a changed suite is not taken for the old one.
    """
    from google.protobuf import json_format

    about = [
        suite,
        case.name,
        sha256,
        list(case.board.on),
        case.board.count,
        json_format.MessageToDict(case.spec.message(inputs_sha256)),
        tick,
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
