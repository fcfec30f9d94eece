"""What to run and how long, as options: the same for a board and for this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from boardbench.v1 import result_pb2

    _NumberParameter = click.ParamType[float]
    _CountParameter = click.ParamType[int]
else:
    _NumberParameter = _CountParameter = click.ParamType  # generic only from click 8.2 on

_Command = TypeVar("_Command", bound=Callable[..., Any])


_UINT32 = (1 << 32) - 1
_UINT64 = (1 << 64) - 1
SCENARIOS = {
    "single-stream": "SCENARIO_KIND_SINGLE_STREAM",
    "offline": "SCENARIO_KIND_OFFLINE",
    "periodic": "SCENARIO_KIND_PERIODIC",
    "poisson": "SCENARIO_KIND_POISSON",
    "multi-stream": "SCENARIO_KIND_MULTI_STREAM",
    "sustained": "SCENARIO_KIND_SUSTAINED",
}
"""The wire's name of each scenario, by what people write."""

# What each scenario can be told; anything else with it would be ignored without a word.
_SCENARIO_OPTIONS = {
    "": (),
    "single-stream": (),
    "offline": ("streams", "batch"),
    "periodic": ("rate", "deadline"),
    "poisson": ("rate", "deadline"),
    "multi-stream": ("streams",),
    "sustained": ("window",),
}
PRECISIONS = ("float32", "float16", "bfloat16", "int8")
"""What an engine can be told to compute in."""

CACHES = {"none": "CACHE_USE_NONE", "keep": "CACHE_USE_KEEP", "renew": "CACHE_USE_RENEW"}
"""The wire's name of each use of caches, by what people write."""

_MOST_PROCESSORS = 8192
MOST_PROFILE_RUNS = 10_000  # what a board takes; beyond it a profile grows no sharper, only longer


@dataclass(frozen=True)
class Spec:
    """What was asked for; None and empty leave it to the board."""

    runtime: str = ""
    device: str = ""
    threads: int | None = None
    options: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: Path | None = None
    seed: int | None = None
    duration: float | None = None
    min_runs: int | None = None
    max_runs: int | None = None
    warm_up: float | None = None
    warm_up_runs: int | None = None
    timeout: float | None = None
    strict: bool = False
    allow_fallback: bool = False
    profile_runs: int | None = None
    precision: tuple[tuple[float, float], ...] = ()
    """Pairs of a percentile and the share of its value within which its bounds must lie."""
    confidence: float | None = None
    max_duration: float | None = None
    processes: int | None = None
    scenario: str = ""
    rate: float | None = None
    deadline: float | None = None
    streams: int | None = None
    batch: int | None = None
    window: float | None = None
    cool_to: float | None = None
    cool_for: float | None = None
    idle: float | None = None
    sample_rate: float | None = None
    tune: bool = False
    affinity: tuple[int, ...] = ()
    compute: str = ""
    power_mode: str = ""
    cache: str = ""
    output_values: int | None = None
    """Asked for by no option: where results of engines are compared, their outputs are, too."""

    def message(self, inputs_sha256: str = "") -> result_pb2.BenchmarkSpec:
        """The same for the wire, with the hash of the inputs in place of their path."""
        from boardbench.v1 import model_pb2, result_pb2, scenario_pb2

        spec = result_pb2.BenchmarkSpec(
            runtime=self.runtime,
            device=self.device,
            options=self.options,
            threads=self.threads,
            shapes={name: model_pb2.Shape(dimensions=shape) for name, shape in self.shapes.items()},
            inputs_sha256=inputs_sha256,
            seed=self.seed,
            duration_seconds=self.duration,
            min_runs=self.min_runs,
            max_runs=self.max_runs,
            warm_up_seconds=self.warm_up,
            warm_up_runs=self.warm_up_runs,
            timeout_seconds=self.timeout,
            strict=self.strict,
            allow_fallback=self.allow_fallback,
            profile_runs=self.profile_runs,
            precision=[
                result_pb2.Precision(percentile=percentile, ratio=ratio)
                for percentile, ratio in self.precision
            ],
            confidence=self.confidence,
            precision_seconds=self.max_duration,
            processes=self.processes,
            cool_down_celsius=self.cool_to,
            cool_down_seconds=self.cool_for,
            idle_seconds=self.idle,
            sample_hertz=self.sample_rate,
            tune=self.tune,
            cpu_affinity=self.affinity,
            compute_precision=self.compute,
            power_mode=self.power_mode,
            cache=result_pb2.CacheUse.Value(CACHES[self.cache] if self.cache else "CACHE_USE_UNSPECIFIED"),
            output_values=self.output_values,
        )
        if self.scenario:
            spec.scenario.CopyFrom(
                scenario_pb2.Scenario(
                    kind=scenario_pb2.ScenarioKind.Value(SCENARIOS[self.scenario]),
                    rate_hertz=self.rate,
                    deadline_seconds=self.deadline,
                    streams=self.streams,
                    batch=self.batch,
                    window_seconds=self.window,
                )
            )
        return spec

    def arguments(self) -> list[str]:
        """The same as arguments of ``boardbench-agent run``."""
        from google.protobuf import json_format

        text = json_format.MessageToJson(self.message(), preserving_proto_field_name=True, indent=None)
        return [f"--spec={text}", *([f"--inputs={self.inputs}"] if self.inputs else [])]


class Seconds(_NumberParameter):
    """Reads a length of time in seconds; NaN and infinity are none."""

    name = "SECONDS"

    def __init__(self, *, zero: bool) -> None:
        """``zero``: whether no time at all makes sense."""
        self._zero = zero

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; fails with a usage error."""
        try:
            number = float(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        if not math.isfinite(number) or number < 0 or (number == 0 and not self._zero):
            which = "0 or more" if self._zero else "more than 0"
            self.fail(f"{value!r} is not a length of time: give seconds, {which}", param, ctx)
        return number


class Count(_CountParameter):
    """Reads a whole number within bounds that are too plain to be shown in the help."""

    name = "NUMBER"

    def __init__(self, least: int, most: int) -> None:
        """Both bounds are taken."""
        self._least = least
        self._most = most

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; fails with a usage error."""
        try:
            number = int(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a whole number", param, ctx)
        if not self._least <= number <= self._most:
            self.fail(f"{number} is not from {self._least} to {self._most}", param, ctx)
        return number


class Number(_NumberParameter):
    """Reads a number within bounds; NaN is none."""

    def __init__(self, name: str, least: float, most: float) -> None:
        """Both bounds are taken; ``name`` is shown in the help."""
        self.name = name
        self._least = least
        self._most = most

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; fails with a usage error."""
        try:
            number = float(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not self._least <= number <= self._most:
            self.fail(f"{number:g} is not from {self._least:g} to {self._most:g}", param, ctx)
        return number


class Share(_NumberParameter):
    """Reads a share: 95% or 0.95."""

    name = "SHARE"

    def __init__(self, least: float, most: float) -> None:
        """Both bounds are taken."""
        self._least = least
        self._most = most

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share, from 0 to 1; fails with a usage error."""
        share = _share(str(value))
        if share is None:
            self.fail(f"{value!r} is not a share, as in 95% or 0.95", param, ctx)
        if not self._least <= share <= self._most:
            self.fail(f"{value} is not from {self._least:.1%} to {self._most:.1%}", param, ctx)
        return share


def _share(text: str) -> float | None:
    number, percent, rest = text.strip().partition("%")
    try:
        return None if rest else float(number) / 100 if percent else float(number)
    except ValueError:
        return None


def _precision(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[float, float], ...]:
    found: dict[float, float] = {}
    for text in (part.strip() for value in values for part in value.split(",")):
        name, equals, share = text.partition("=")
        ratio = _share(share)
        try:
            percentile = float(name.strip().removeprefix("p")) if equals else math.nan
        except ValueError:
            percentile = math.nan
        if not 0 < percentile < 100 or ratio is None or not 0 < ratio <= 1:
            raise click.BadParameter(
                f"{text!r} is no precision: write percentile=share, as in p50=1% or p99=5%", ctx, param
            )
        if percentile in found:
            raise click.BadParameter(f"p{percentile:g} is given twice", ctx, param)
        found[percentile] = ratio
    return tuple(found.items())


def _options(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    options: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{text!r} is not NAME=VALUE, as in precision=fp16", ctx, param)
        if name in options:
            raise click.BadParameter(f"{name!r} is given twice", ctx, param)
        options[name] = value
    return options


def _processors(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    found: list[int] = []
    for text in (value or "").split(",") if value is not None else ():
        first, dash, last = text.strip().partition("-")
        try:
            low, high = int(first), int(last) if dash else int(first)
        except ValueError:
            low, high = 0, -1
        if not 0 <= low <= high < _MOST_PROCESSORS:
            raise click.BadParameter(
                f"{text!r} is no processor: write numbers and ranges, as in 0,2-3", ctx, param
            )
        found += range(low, high + 1)
    if len(set(found)) < len(found):
        raise click.BadParameter("a processor is given twice", ctx, param)
    return tuple(sorted(found))


def _shapes(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for text in values:
        # Names of inputs may hold "=" themselves; sizes never do.
        name, equals, sizes = text.rpartition("=")
        try:
            shape = tuple(int(size) for size in sizes.split(","))
        except ValueError:
            shape = ()
        if not equals or not name or not shape or min(shape) < 1 or max(shape) >= 1 << 31:
            raise click.BadParameter(
                f"{text!r} is not NAME=SIZE,SIZE,… with sizes from 1 on, as in input=1,224,224,3", ctx, param
            )
        if name in shapes:
            raise click.BadParameter(f"the shape of {name!r} is given twice", ctx, param)
        shapes[name] = shape
    return shapes


_OPTIONS: tuple[Callable[[_Command], _Command], ...] = (
    click.option(
        "--runtime",
        default="",
        help="Engine: tflite, onnxruntime, …; all: every one that takes the model, compared.  "
        "[default: the board's for the format, see `boardbench runtimes`]",
    ),
    click.option(
        "--affinity",
        metavar="0,2-3",
        default=None,
        callback=lambda ctx, param, value: _processors(ctx, param, value),
        help="Processors that the engine may use, whichever it is.  [default: those of the agent]",
    ),
    click.option(
        "--compute",
        type=click.Choice(PRECISIONS),
        default=None,
        callback=lambda _ctx, _param, value: value or "",
        help="Arithmetic to compute in; an engine that can't be told is an error.  [default: the engine's]",
    ),
    click.option(
        "--power-mode",
        metavar="NAME",
        default="",
        help="Power mode of the board for the time of the run, as MAXN on a Jetson; then it is put back.",
    ),
    click.option(
        "--cache",
        type=click.Choice(tuple(CACHES)),
        default=None,
        callback=lambda _ctx, _param, value: value or "",
        help="What the engine may keep on the board for its next load: nothing, so that every load is a "
        "first one; compiled blobs, engines and timing caches; or these anew.  [default: the board's, none]",
    ),
    click.option("--device", default="", help="cpu, edgetpu, cuda, …  [default: cpu]"),
    click.option("--threads", type=Count(1, 1024), help="Threads of the engine.  [default: the engine's]"),
    click.option(
        "--option",
        "options",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_options,
        help="An option of the engine. Repeatable.",
    ),
    click.option(
        "--delegate",
        default=None,
        metavar="LIBRARY",
        help="tflite: a delegate's shared library on the board.",
    ),
    click.option(
        "--delegate-option",
        "delegate_options",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_options,
        help="An option of that delegate. Repeatable.",
    ),
    click.option(
        "--inputs",
        type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path),
        metavar="FILE.npz",
        help="Input data, an array for each input by name.  [default: random from the seed]",
    ),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        metavar="NAME=SIZE,…",
        callback=_shapes,
        help="Sizes of an input whose shape the model leaves open. Repeatable.",
    ),
    click.option("--seed", type=Count(0, _UINT64), help="Seed of the generated inputs.  [default: 0]"),
    click.option(
        "--duration", type=Seconds(zero=True), help="Measure at least this long.  [default: the board's, 3]"
    ),
    click.option("--min-runs", type=Count(1, _UINT32), help="At least so many counted inferences."),
    click.option("--max-runs", type=Count(1, _UINT32), help="At most so many counted inferences."),
    click.option("--warm-up", type=Seconds(zero=True), help="Warm up at least this long."),
    click.option("--warm-up-runs", type=Count(0, _UINT32), help="At least so many warm-up inferences."),
    click.option(
        "--timeout", type=Seconds(zero=False), help="The whole run must end within this time, or it fails."
    ),
    click.option("--strict", is_flag=True, help="Fail when any op runs on the CPU."),
    click.option(
        "--allow-fallback",
        is_flag=True,
        help="Run on what there is, with a warning, when the device that was asked for is not there.",
    ),
    click.option(
        "--profile-runs",
        type=Count(0, MOST_PROFILE_RUNS),
        help="Inferences of the profiling pass, apart from the counted ones, that tells where the time goes "
        "op by op.  [default: the engine's]",
    ),
    click.option("--no-profile", is_flag=True, help="No profiling pass; the same as --profile-runs 0."),
    click.option(
        "--precision",
        multiple=True,
        metavar="p50=1%,p99=5%",
        callback=_precision,
        help="Measure until the bounds of these percentiles lie within these shares of them.",
    ),
    click.option(
        "--confidence",
        type=Share(0.5, 0.999),
        help="Confidence of all bounds, as 95% or 0.95.  [default: 95%]",
    ),
    click.option(
        "--max-duration",
        type=Seconds(zero=False),
        help="With --precision: measure at most this long.  [default: the board's]",
    ),
    click.option(
        "--processes",
        type=Count(1, 100),
        help="Measure in so many fresh processes, one after the other.  [default: 1]",
    ),
    click.option(
        "--scenario",
        type=click.Choice(tuple(SCENARIOS)),
        default=None,
        callback=lambda _ctx, _param, value: value or "",
        help="How inferences are asked for: one after the other, all at once, by a camera, at random, in "
        "queries of several, or for long.  [default: single-stream]",
    ),
    click.option(
        "--rate",
        type=Number("HERTZ", 1e-3, 1e6),
        help="Periodic and poisson: inferences a second, as frames of a camera.",
    ),
    click.option(
        "--deadline",
        type=Seconds(zero=False),
        help="Periodic and poisson: later than this after its due start an inference has missed its "
        "deadline.  [default: one period]",
    ),
    click.option(
        "--streams",
        type=Count(1, 1024),
        help="Multi-stream: samples in a query; offline: instances of the model side by side.",
    ),
    click.option(
        "--batch", type=Count(1, 65536), help="Offline: size of the first dimension of every input."
    ),
    click.option("--window", type=Seconds(zero=False), help="Sustained: length of a window.  [default: 60]"),
    click.option(
        "--cool-to",
        type=Number("CELSIUS", -40, 150),
        help="Wait before the run until the hottest zone is at most this warm.",
    ),
    click.option(
        "--cool-for",
        type=Seconds(zero=False),
        help="Wait for that at most this long, then run with a warning.  [default: the board's]",
    ),
    click.option(
        "--idle",
        type=Seconds(zero=True),
        help="Measure the idle board's power this long before the run; 0: not.  [default: the board's, where "
        "it has a power rail]",
    ),
    click.option(
        "--sample-rate",
        type=Number("HERTZ", 0, 100),
        help="Samples of the board's sensors a second; 0: none.  [default: the board's]",
    ),
    click.option(
        "--tune",
        is_flag=True,
        help="Set the board up for measuring (governor, clocks) for the time of the run, then put it back.",
    ),
)


def spec_options(command: _Command) -> _Command:
    """Adds the options; :func:`spec_from` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def spec_from(values: dict[str, Any]) -> Spec:
    """What the options say. Raises click.UsageError where they contradict one another."""
    if values.pop("no_profile"):
        if values["profile_runs"]:
            raise click.UsageError(f"--no-profile and --profile-runs {values['profile_runs']} contradict")
        values["profile_runs"] = 0
    values["options"] = {
        **values["options"],
        **_of_delegate(values["options"], values.pop("delegate"), values.pop("delegate_options")),
    }
    spec = Spec(**values)
    if spec.strict and spec.allow_fallback:
        raise click.UsageError("--strict forbids what --allow-fallback allows: leave one of them out")
    if spec.max_duration is not None and not spec.precision:
        raise click.UsageError("--max-duration bounds --precision: give that too, or --duration instead")
    if spec.cool_for is not None and spec.cool_to is None:
        raise click.UsageError("--cool-for is how long to wait for a temperature: give --cool-to too")
    _check_scenario(spec)
    if spec.min_runs is not None and spec.max_runs is not None and spec.min_runs > spec.max_runs:
        raise click.UsageError(f"--min-runs {spec.min_runs} is more than --max-runs {spec.max_runs}")
    return spec


def _of_delegate(
    options: dict[str, str], library: str | None, delegate_options: dict[str, str]
) -> dict[str, str]:
    """The delegate and its options as options of the engine. Raises click.UsageError."""
    if library is not None and not library:
        raise click.UsageError("--delegate is the path, or the name, of a shared library; it is empty")
    found = {} if library is None else {"delegate": library}
    found.update({f"delegate.{name}": value for name, value in delegate_options.items()})
    for name in found:
        if name in options:
            flag = "--delegate" if name == "delegate" else f"--delegate-option {name[len('delegate.') :]}"
            raise click.UsageError(f"{flag} and --option {name} say the same: leave one of them out")
    return found


def _check_scenario(spec: Spec) -> None:
    taken = _SCENARIO_OPTIONS[spec.scenario]
    for name in ("rate", "deadline", "streams", "batch", "window"):
        if getattr(spec, name) is not None and name not in taken:
            takers = [scenario for scenario, options in _SCENARIO_OPTIONS.items() if name in options]
            raise click.UsageError(
                f"--{name} says nothing to {spec.scenario or 'single-stream'}: give --scenario "
                + " or ".join(takers)
            )
    if "rate" in taken and spec.rate is None:
        raise click.UsageError(f"--scenario {spec.scenario} needs --rate, as in --rate 30 for a camera")
