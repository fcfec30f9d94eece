"""agent.toml, the environment and flags, parsed once into a frozen AgentConfig. Every default is here.

What is set later in this list wins: the default, the file, ``BOARDBENCH_AGENT_…``, a flag. The variable of
a key is its path in capitals: ``store.limit_bytes`` is ``BOARDBENCH_AGENT_STORE_LIMIT_BYTES``; tables of
free names are ``name=value,name=value``: ``BOARDBENCH_AGENT_LABELS=lab=zurich,rack=2``.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from boardbench.agent.errors import ConfigurationError
from boardbench.inspect import tls

DEFAULT_PATH = Path("/etc/boardbench/agent.toml")
SYSTEM_DATA_DIR = Path("/var/lib/boardbench")
ENVIRONMENT_PREFIX = "BOARDBENCH_AGENT_"
# Names the file itself, so it is no key of it.
_CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"

_Section = TypeVar("_Section")

_MIB = 1024 * 1024
_GIB = 1024 * _MIB


@dataclass(frozen=True)
class StoreConfig:
    """Bounds of the model store."""

    # An SD card of 16 GB with the system on it has about 8 to spare; models are 1 to 500 MB.
    limit_bytes: int = 4 * _GIB
    # Enough for the system to write logs and for package managers to work.
    free_floor_bytes: int = 512 * _MIB
    # What engines keep from one load to the next, where that is asked for, of all models together: a few
    # engines of TensorRT, or blobs of OpenVINO, each about as large as its model. Oldest go first.
    cache_limit_bytes: int = 1 * _GIB


@dataclass(frozen=True)
class SpoolConfig:
    """Bounds of the spool."""

    # A result with 100,000 samples is about 0.4 MB: 160 of the largest, thousands of usual ones.
    limit_bytes: int = 64 * _MIB
    # Share of what is free on the file system: the spool must not be what fills up the card.
    free_share: float = 0.1
    # Results that the collector has stay here, too, so that one that was set back to an old backup gets them
    # again: a day's, at a thousand usual ones.
    kept_bytes: int = 16 * _MIB
    # And no longer than backups are apart.
    kept_days: float = 14.0


@dataclass(frozen=True)
class JobsConfig:
    """Runs that the collector hands out."""

    # Whether the board takes them.
    take: bool = True
    # That it has at most, waiting and running; beyond it they are given back. Every heartbeat names them, so
    # 32 are the most.
    open_limit: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.open_limit <= 32:
            raise ConfigurationError(f"jobs.open_limit: {self.open_limit} is not from 1 to 32")


@dataclass(frozen=True)
class UpdateConfig:
    """Releases of the agent that the collector offers."""

    # Whether the board takes those that are signed with a key in /etc/boardbench/update.pub.
    take: bool = True
    # Folder that holds opt/boardbench and etc/boardbench; another one in tests.
    root: Path = Path("/")


@dataclass(frozen=True)
class RunsConfig:
    """Bounds of the queue."""

    # A client that loops over a folder of models must not fill the board with waiting runs.
    waiting_limit: int = 256
    # Ended runs that stay to be watched or listed; the collector has them all.
    kept_limit: int = 64
    # Bytes that their results may take on disk: in the spool, where they don't count once they are sent.
    kept_bytes: int = 64 * _MIB
    # Runs that are to be measured together wait this long for each other: the slowest upload of a large
    # model.
    group_seconds: float = 600.0


@dataclass(frozen=True)
class DeadlinesConfig:
    """How long each stage of a run may take, in seconds, before the worker is taken as hung.

    Warm-up and measurement also get what was asked for and what the first inference says they need.
    """

    # Starting Python takes a second; from a worn card under load, many.
    start_seconds: float = 60.0
    # The largest engines are gigabytes of libraries, and a card reads some 20 MB/s.
    import_seconds: float = 180.0
    # TensorRT builds its engine inside session creation: minutes, on a small Jetson many.
    create_seconds: float = 1800.0
    # Inputs are made at the speed of memory, or read from the card.
    inputs_seconds: float = 120.0
    # Includes lazy compilation and, on an Edge TPU over USB 2, the upload of the parameters.
    first_inference_seconds: float = 300.0
    # On top of what the warm-up itself needs.
    warm_up_seconds: float = 60.0
    # On top of what the measurement itself needs.
    measure_seconds: float = 60.0
    # Placement may profile the model once more.
    report_seconds: float = 180.0
    # From the report to the end of the process; the result is in by then, so a hang there costs nothing more.
    exit_seconds: float = 5.0
    # Importing every engine, once, at start.
    probe_seconds: float = 180.0


@dataclass(frozen=True)
class SpecConfig:
    """What a run does when the request leaves it open."""

    # Long enough for clocks to settle, short enough to wait for.
    duration_seconds: float = 3.0
    # TFLite's own tool takes 50; p50 needs 11 and p90 64 for a bound that holds.
    min_runs: int = 50
    # Every sample is kept and sent: about 4 bytes each.
    max_runs: int = 100_000
    # As TFLite's own tool has it.
    warm_up_seconds: float = 0.5
    warm_up_runs: int = 1
    # Half an hour: nobody waits longer without having asked for it.
    timeout_seconds: float = 1800.0
    # With a precision, what is reached by luck within less than this is not believed: clocks move within it.
    precision_least_seconds: float = 1.0
    # With a precision, the measurement ends after this time even so: a tenth of MLPerf's shortest run.
    precision_seconds: float = 60.0
    # A board without a fan has its final temperature after half an hour.
    sustained_seconds: float = 1800.0
    # Turns that each of several interleaved runs takes: the fewest whose extremes enclose a median at 95 %.
    interleaved_processes: int = 6
    # A board without a fan takes minutes from 80 °C to 50; one that has not got there by then does not.
    cool_down_seconds: float = 300.0
    # Only where a power rail can be read: as long as the measurement, so that idle is known as well as it is.
    idle_seconds: float = 3.0
    # Heat and power move within tenths of a second; ten samples of all sensors cost a board some percent of
    # one processor. 0: none.
    sample_hertz: float = 10.0
    # What engines keep from one load to the next: "none", so that every load is a first one and loading times
    # compare; or "keep", where the engine can.
    cache: str = "none"

    def __post_init__(self) -> None:
        if self.cache not in CACHE_USES:
            raise ConfigurationError(f"spec.cache is {self.cache!r}; it must be {' or '.join(CACHE_USES)}")


@dataclass(frozen=True)
class SensorsConfig:
    """Which sensors are read around a run."""

    # Kinds that are not to be read, separated by commas ("nvidia,raspberry_pi"): for one that disturbs.
    without: str = ""
    # Rail or meter that energy is taken from, as the telemetry names it; empty: the one that covers most.
    rail: str = ""
    # Share of one processor that reading them may take: beyond it the dearest are read less often. A
    # hundredth can't be seen in the median of a model that uses all processors. 0: whatever it takes.
    cost_share: float = 0.01

    def __post_init__(self) -> None:
        if self.without:
            # Only then, since an agent that waits needs no sensors.
            from boardbench.agent.board.sensors import KINDS

            for kind in self.without_kinds:
                if kind not in KINDS:
                    raise ConfigurationError(
                        f"sensors.without: there is no kind of sensor {kind!r}; there are {', '.join(KINDS)}"
                    )

    @property
    def without_kinds(self) -> tuple[str, ...]:
        """What ``without`` lists."""
        return tuple(name for part in self.without.split(",") if (name := part.strip()))


@dataclass(frozen=True)
class MetricsConfig:
    """Metrics that the board itself serves, for Prometheus in a small fleet."""

    # HOST:PORT for `GET /metrics`; empty: none, which costs nothing. A scrape while a model is measured takes
    # the board some milliseconds: the collector has the same without asking the board.
    listen: str = ""


@dataclass(frozen=True)
class ValidityConfig:
    """From where on something around a run makes its figures doubtful, and from where on invalid.

    Shares are of one: 0.1 is 10 %. What is not read on a board raises no doubt.
    """

    # Other programs' share of all processors while it measured. A tenth can be seen in any tail.
    load_doubtful: float = 0.10
    # A whole processor of four: a model that uses all of them then takes a third longer.
    load_invalid: float = 0.25
    # Share of the processors' time that the host of a virtual machine took away: as much as p99 leaves out.
    steal_doubtful: float = 0.01
    # As much as p90 leaves out.
    steal_invalid: float = 0.10
    # Share of the measurement in which some task waited for a processor (/proc/pressure/cpu): beyond a tenth
    # p90 holds waiting. The worker's own threads can be those that wait.
    cpu_pressure_doubtful: float = 0.10
    # Share of the measurement in which some task waited for memory: as much as p99 leaves out.
    memory_pressure_doubtful: float = 0.01
    # Least share of the board's memory that was available. Below it the kernel drops pages of the model's own
    # file, and reads them again from the card.
    memory_available_doubtful: float = 0.05
    # Bytes of the worker that were swapped out, or that came back from swap while it measured.
    swap_doubtful_bytes: int = _MIB
    # Share by which the slowest tenth of the measurement was clocked lower than the fastest. A Raspberry Pi's
    # steps are 4 to 7 %, and one for a whole tenth of the run is to be seen.
    clock_drop_doubtful: float = 0.05
    # The end was measured on another board than the begin.
    clock_drop_invalid: float = 0.20
    # Share by which the limit of the frequency must lie below the maximum to be told: drivers round.
    frequency_cap_note: float = 0.01
    # Degrees below the temperature at which the board throttles. Within them the next run may be throttled.
    temperature_margin_celsius: float = 5.0
    # Half of the greatest difference between the medians of a run's processes, as a share of their median.
    # Below it they are pooled, however sure it is: the clocks of a board move as much between two processes.
    processes_doubtful: float = 0.01
    # Share of one processor that reading the sensors took, though it was bounded (sensors.cost_share): one
    # that is dear at its first read, or a program. Beyond it they are a part of what is measured.
    sensors_doubtful: float = 0.05
    # Share of all processors that was busy while the idle board's power was measured.
    idle_load_note: float = 0.05
    # What a warning means for the measurement, by its code, where that is not to be as documented:
    # "note", "doubtful" or "invalid".
    severity: Mapping[str, str] = field(default_factory=dict)
    # Where the doubts begin that the worker finds in the figures themselves, by name, where that is not to be
    # as documented.
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for lower, higher in (
            ("load_doubtful", "load_invalid"),
            ("steal_doubtful", "steal_invalid"),
            ("clock_drop_doubtful", "clock_drop_invalid"),
        ):
            if getattr(self, lower) > getattr(self, higher):
                raise ConfigurationError(
                    f"validity.{lower}: {getattr(self, lower):g} is above validity.{higher}, "
                    f"{getattr(self, higher):g}: what is invalid is doubtful, too"
                )
        if self.severity:
            from boardbench.agent.validity import codes

            known = sorted(codes())
            for code, name in self.severity.items():
                if code not in known:
                    raise ConfigurationError(
                        f"validity.severity: no warning is called {code!r}; there are {', '.join(known)}"
                    )
                if name not in SEVERITIES:
                    raise ConfigurationError(
                        f"validity.severity: {code} is {name!r}; it must be {', '.join(SEVERITIES)}"
                    )
        if self.thresholds:
            from boardbench.agent.bench.doubts import thresholds

            names = [name for name, _, _ in thresholds()]
            for name in self.thresholds:
                if name not in names:
                    raise ConfigurationError(
                        f"validity.thresholds: there is no threshold {name!r}; there are {', '.join(names)}"
                    )


CACHE_USES = ("none", "keep")
SEVERITIES = ("note", "doubtful", "invalid")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where one runtime lives."""

    # Python interpreter that has the engine; empty: the agent's own.
    python: str = ""


@dataclass(frozen=True)
class AgentConfig:
    """Everything that can be configured."""

    # Only this board, until somebody opens it: there is no authentication on this port yet. Empty: nowhere;
    # the board then works for its collector alone.
    listen: str = "127.0.0.1:7341"
    # Models, inputs, the spool and the journal of runs.
    data_dir: Path = field(default_factory=lambda: default_data_dir(os.environ))
    # HOST:PORT of the collector, or tls://HOST:PORT where it has a certificate; empty: results stay in the
    # spool.
    collector: str = ""
    # File with the certificate (PEM) of the authority that the collector's must be of; empty: what enrolment
    # brought, or with tls:// any that this system trusts.
    collector_ca: str = ""
    # HOST:PORT that the collector tells others for pushing here; empty: what `listen` says.
    address: str = ""
    # Identity of the board; empty: made from the machine id.
    device_id: str = ""
    # Free labels of the board.
    labels: Mapping[str, str] = field(default_factory=dict)
    # Folder that holds proc, sys and etc of the board; another one in tests and containers.
    sys_root: Path = Path("/")
    store: StoreConfig = field(default_factory=StoreConfig)
    spool: SpoolConfig = field(default_factory=SpoolConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    runs: RunsConfig = field(default_factory=RunsConfig)
    deadlines: DeadlinesConfig = field(default_factory=DeadlinesConfig)
    spec: SpecConfig = field(default_factory=SpecConfig)
    sensors: SensorsConfig = field(default_factory=SensorsConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    validity: ValidityConfig = field(default_factory=ValidityConfig)
    # By the runtime's name.
    runtimes: Mapping[str, RuntimeConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("listen", "collector", "address"):
            if getattr(self, key):
                text = getattr(self, key)
                parse_address(tls.split(text)[1] if key == "collector" else text, key)
        if self.metrics.listen:
            parse_address(self.metrics.listen, "metrics.listen")
        _check_text("device_id", self.device_id)
        for name, value in self.labels.items():
            _check_text("labels", name)
            _check_text(f"labels.{name}", value)
        if self.spec.min_runs > self.spec.max_runs:
            raise ConfigurationError(
                f"spec.min_runs is {self.spec.min_runs} and spec.max_runs {self.spec.max_runs}: "
                "the first must not be greater"
            )


def load(
    path: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, object] | None = None,
) -> AgentConfig:
    """The configuration; without a path, ``BOARDBENCH_AGENT_CONFIG`` or the default file if there is one.

    Files in the folder beside it (``agent.d/*.toml``) are read before it, by name: what the operator writes
    into the file itself counts, whatever a program has put there.

    ``flags`` holds values by their dotted key. Raises ConfigurationError.
    """
    if path is None and environment.get(_CONFIG_VARIABLE):
        path = Path(environment[_CONFIG_VARIABLE])
    if path is None and (DEFAULT_PATH.is_file() or _folder(DEFAULT_PATH).is_dir()):
        path = DEFAULT_PATH
    raw: dict[str, Any] = {}
    for part in sorted(_folder(path).glob("*.toml")) if path is not None else ():
        content = _read_toml(part)
        # Each by itself first, so that a mistake in it is told as one of the file.
        _Reader(str(part)).build(AgentConfig, content, ())
        _merge(raw, content)
    if path is not None and (path.is_file() or path != DEFAULT_PATH):
        _merge(raw, _read_toml(path))
    reader = _Reader(str(path) if path is not None else "configuration")
    config = reader.build(AgentConfig, raw, ())
    changes = _from_environment(environment)
    changes += [(key, value, "--" + key.replace("_", "-")) for key, value in (flags or {}).items()]
    for key, value, origin in changes:
        _set(raw, key.split("."), value)
        reader.origins[key] = origin
    return reader.build(AgentConfig, raw, ()) if changes else config


def _folder(path: Path) -> Path:
    return path.with_suffix(".d")


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Lays settings over others; tables are laid over each other, anything else takes the place."""
    for key, value in more.items():
        old = into.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value)
        else:
            into[key] = value


def default_data_dir(environment: Mapping[str, str]) -> Path:
    """Folder that systemd gives, else /var/lib/boardbench where it may be written, else the user's own."""
    if environment.get("STATE_DIRECTORY"):
        return Path(environment["STATE_DIRECTORY"].split(":")[0])
    nearest = SYSTEM_DATA_DIR if SYSTEM_DATA_DIR.exists() else SYSTEM_DATA_DIR.parent
    if os.access(nearest, os.W_OK | os.X_OK):
        return SYSTEM_DATA_DIR
    state = environment.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "boardbench"


def parse_address(text: str, key: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` (``[::1]:7341`` for IPv6). Raises ConfigurationError naming the key."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(f"{key}: {text!r} is not HOST:PORT, as in 127.0.0.1:7341 or [::1]:7341")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigurationError(f"{key}: write an IPv6 address in brackets: [{host}]:{port}")
    return host, int(port)


def _check_text(key: str, value: str) -> None:
    if len(value) > 128 or not value.isprintable():
        raise ConfigurationError(f"{key}: {value!r} must be printable and at most 128 characters long")


def _read_toml(path: Path) -> dict[str, Any]:
    # tomli is tomllib for Python 3.10; both raise subclasses of ValueError.
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        with path.open("rb") as file:
            return dict(toml.load(file))
    except OSError as error:
        raise ConfigurationError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: not TOML: {error}") from error


def _from_environment(environment: Mapping[str, str]) -> list[tuple[str, object, str]]:
    """(key, value, what to call it in an error) of every variable of ours that is set."""
    keys = {(ENVIRONMENT_PREFIX + key.replace(".", "_")).upper(): key for key in _keys() if key != "runtimes"}
    found: list[tuple[str, object, str]] = []
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == _CONFIG_VARIABLE:
            continue
        if variable not in keys:
            raise ConfigurationError(
                f"environment variable {variable}: no such setting; there are {', '.join(sorted(keys))}"
            )
        found.append((keys[variable], value, f"environment variable {variable}"))
    return found


def _keys() -> list[str]:
    """Every dotted key."""
    found = []
    for name, hint in get_type_hints(AgentConfig).items():
        inner = [f"{name}.{entry.name}" for entry in fields(hint)] if is_dataclass(hint) else [name]
        found.extend(inner)
    return found


def _set(raw: dict[str, Any], path: list[str], value: object) -> None:
    for name in path[:-1]:
        raw = raw.setdefault(name, {})
    raw[path[-1]] = value


class _Reader:
    """Turns raw values into the frozen classes; every mistake names the key and where it was set."""

    def __init__(self, origin: str) -> None:
        self.origins: dict[str, str] = {}
        self._origin = origin

    def build(self, kind: type[_Section], raw: object, path: tuple[str, ...]) -> _Section:
        if not isinstance(raw, Mapping):
            raise self._error(path, f"{'.'.join(path)} must be a table, not {raw!r}")
        hints = get_type_hints(kind)
        values: dict[str, Any] = {}
        for name, value in raw.items():
            inner = (*path, name)
            if name not in hints:
                table = f"[{'.'.join(path)}]" if path else "the top level"
                raise self._error(inner, f"no key {name!r} in {table}; there are {', '.join(sorted(hints))}")
            values[name] = self._convert(hints[name], value, inner)
        try:
            return kind(**values)
        except ConfigurationError as error:
            key, _, problem = str(error).partition(": ")
            known = key in self.origins
            raise self._error((key,), problem if known else str(error)) from None

    def _convert(self, hint: Any, value: object, path: tuple[str, ...]) -> Any:
        if is_dataclass(hint):
            return self.build(hint, value, path)  # type: ignore[arg-type]
        if get_args(hint):
            return self._table(get_args(hint)[1], value, path)
        try:
            return _PARSERS[hint](value)
        except (ValueError, OverflowError):
            noun = _NOUNS[hint]
            raise self._error(path, f"{'.'.join(path)} must be {noun}, not {value!r}") from None

    def _table(self, inner: Any, value: object, path: tuple[str, ...]) -> dict[str, Any]:
        if isinstance(value, str):
            value = dict(_pair(part) for part in value.split(",") if part.strip())
            if "" in value:
                raise self._error(path, f"{'.'.join(path)} must be name=value,name=value")
        if not isinstance(value, Mapping):
            raise self._error(path, f"{'.'.join(path)} must be a table, not {value!r}")
        return {name: self._convert(inner, item, (*path, name)) for name, item in value.items()}

    def _error(self, path: tuple[str, ...], problem: str) -> ConfigurationError:
        return ConfigurationError(f"{self.origins.get('.'.join(path), self._origin)}: {problem}")


def _pair(text: str) -> tuple[str, str]:
    """Name and value of ``name=value``; the name is empty when it is not that."""
    name, equals, value = text.partition("=")
    return (name.strip(), value.strip()) if equals else ("", text)


def _parse_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _parse_path(value: object) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError
    # Workers have a folder of their own to work in.
    return Path(value).expanduser().absolute()


def _parse_switch(value: object) -> bool:
    word = str(value).lower()
    if word not in _SWITCH or not isinstance(value, (bool, str)):
        raise ValueError
    return _SWITCH[word]


def _parse_whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or int(value) < 0:
        raise ValueError
    return int(value)


def _parse_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError
    return number


# Variables and flags are text.
_SWITCH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

_PARSERS: dict[Any, Callable[[object], object]] = {
    str: _parse_text,
    Path: _parse_path,
    bool: _parse_switch,
    int: _parse_whole,
    float: _parse_number,
}
_NOUNS = {
    str: "text",
    Path: "a path",
    bool: "true or false",
    int: "a whole number, 0 or more",
    float: "a number, 0 or more",
}
