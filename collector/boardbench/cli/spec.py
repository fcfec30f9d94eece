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

    def message(self, inputs_sha256: str = "") -> result_pb2.BenchmarkSpec:
        """The same for the wire, with the hash of the inputs in place of their path."""
        from boardbench.v1 import model_pb2, result_pb2

        return result_pb2.BenchmarkSpec(
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
        )

    def arguments(self) -> list[str]:
        """The same as arguments of ``boardbench-agent run``, which has these options too."""
        arguments: list[str] = []
        for name, value in (
            ("--runtime", self.runtime or None),
            ("--device", self.device or None),
            ("--threads", self.threads),
            ("--inputs", self.inputs),
            ("--seed", self.seed),
            ("--duration", self.duration),
            ("--min-runs", self.min_runs),
            ("--max-runs", self.max_runs),
            ("--warm-up", self.warm_up),
            ("--warm-up-runs", self.warm_up_runs),
            ("--timeout", self.timeout),
            ("--profile-runs", self.profile_runs),
        ):
            if value is not None:
                arguments.append(f"{name}={value}")
        for name, wanted in (("--strict", self.strict), ("--allow-fallback", self.allow_fallback)):
            if wanted:
                arguments.append(name)
        for name, text in self.options.items():
            arguments.append(f"--option={name}={text}")
        for name, shape in self.shapes.items():
            arguments.append(f"--shape={name}={','.join(map(str, shape))}")
        return arguments


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
            self.fail(
                f"{value!r} is not a length of time: give seconds, {'0 or' if self._zero else ''} more",
                param,
                ctx,
            )
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
        "--runtime", default="", help="Engine: tflite, onnxruntime, …  [default: the board's for the format]"
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
    spec = Spec(**values)
    if spec.strict and spec.allow_fallback:
        raise click.UsageError("--strict forbids what --allow-fallback allows: leave one of them out")
    if spec.min_runs is not None and spec.max_runs is not None and spec.min_runs > spec.max_runs:
        raise click.UsageError(f"--min-runs {spec.min_runs} is more than --max-runs {spec.max_runs}")
    return spec
