"""What boardbench adds to an inference, engine by engine, at models of about a millisecond.

For every engine that is installed, one round runs a bare loop in the engine's own API and `boardbench run`,
each in a fresh process, in turn and in an order that is drawn anew: the same file, one thread, the same
warm-up and number of inferences. Percentiles of both come from their raw samples by one rule.

tflite, onnxruntime, openvino and ell are those of this Python. PyTorch and ExecuTorch have environments of
their own (`make test-engines` makes them), named in BOARDBENCH_TORCH_PYTHON and BOARDBENCH_EXECUTORCH_PYTHON
where they are elsewhere; the bare loop and boardbench's worker then run under that Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from overhead import output, percentile
from programs import program
from report import MODELS, REPOSITORY, Check, Report, note, run
from tools import BARE, ENGINES, HEAD, WARM, convolutions

from boardbench.agent.bench import stats

WARM_UP_SECONDS = 0.4
COUNTED_SECONDS = 1.0
LEAST_RUNS, MOST_RUNS = 100, 2000
# Bounds of the ratio that are nearer than this need no further rounds.
SETTLED_RATIO = 0.01

_SHAPE = (1, 3, 64, 64)

TORCH = f"""
import warnings
warnings.simplefilter("ignore")
import torch
from torch.jit.mobile import _load_for_lite_interpreter
torch.set_num_threads(1)
torch.set_grad_enabled(False)
module = _load_for_lite_interpreter(model)
data = torch.from_numpy(filled({_SHAPE}, numpy.float32))
call = lambda: module(data)
"""

EXECUTORCH = f"""
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
portable_lib._unsafe_reset_threadpool(1)
method = Runtime.get().load_program(model).load_method("forward")
data = [torch.from_numpy(filled({_SHAPE}, numpy.float32))]
call = lambda: method.execute(data)
"""

ELL = """
import ctypes
predict = ctypes.CDLL(model).bench_Predict
predict.restype, predict.argtypes = None, [ctypes.c_void_p] * 3
data, found = filled((SIZE,), numpy.float32), numpy.zeros(SIZE, numpy.float32)
into, out = (ctypes.c_void_p(each.ctypes.data) for each in (data, found))
call = lambda: predict(None, into, out)
"""

# A layer of weights that are computed and not stored, as ELL compiles a model to plain C.
_ELL_SIZE = 1024
ELL_MODULE = f"""
#include <stdint.h>
#define SIZE {_ELL_SIZE}
void bench_Predict(void *context, float *input, float *output) {{
  (void)context;
  for (int row = 0; row < SIZE; row++) {{
    float sum = 0;
    for (int column = 0; column < SIZE; column++) sum += input[column] * (float)((row ^ column) & 7);
    output[row] = sum;
  }}
}}
int32_t bench_GetInputSize(int32_t index) {{ return index == 0 ? SIZE : 0; }}
int32_t bench_GetOutputSize(int32_t index) {{ return index == 0 ? SIZE : 0; }}
int32_t bench_GetNumNodes(void) {{ return 1; }}
"""

# Under the Python of the engine: the same small network for both.
MAKE = f"""
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.manual_seed(0)
layers, channels = [], 3
for _ in range(6):
    layers += [torch.nn.Conv2d(channels, 16, 3, padding=1), torch.nn.ReLU()]
    channels = 16
network, example = torch.nn.Sequential(*layers).eval(), torch.zeros({_SHAPE})
if sys.argv[1] == "torch":
    from torch.utils.bundled_inputs import bundle_inputs
    bundle_inputs(torch.jit.script(network), [(example,)])._save_for_lite_interpreter(sys.argv[2])
else:
    from executorch.exir import to_edge_transform_and_lower
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    exported = torch.export.export(network, (example,))
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    open(sys.argv[2], "wb").write(lowered.to_executorch().buffer)
"""


class NotHere(Exception):
    """The engine can't be measured here; the message says why."""


@dataclass(frozen=True)
class Engine:
    """An engine, the loop that anybody would write in its API, and how its model is made."""

    name: str
    bare: str
    make: Callable[[str, Path], Path]
    package: str = ""
    threads: bool = True
    """Whether the engine can be told to use one thread; a compiled module has its own number."""
    environment: dict[str, str] = field(default_factory=dict)

    def python(self) -> str:
        """The Python that has it. Raises NotHere."""
        named = os.environ.get(f"BOARDBENCH_{self.name.upper()}_PYTHON", "")
        folder = REPOSITORY / ".cache" / "engines"
        beside = [folder / each / "bin" / "python" for each in (self.name, "executorch")]
        if self.name in ("torch", "executorch"):
            for path in (named, *map(str, beside)):
                if path and Path(path).exists():
                    return path
        if self.package and not importlib.util.find_spec(self.package):
            raise NotHere(f"{self.package} is not installed")
        return sys.executable


def _tflite(python: str, folder: Path) -> Path:  # noqa: ARG001 - as all of them
    path = MODELS / "mobilenet_v1_0.5_160_quant.tflite"
    if not path.exists():
        raise NotHere(f"there is no {path} (set BOARDBENCH_MODELS)")
    return path


def _onnx(width: int, size: int) -> Callable[[str, Path], Path]:
    return lambda python, folder: convolutions(folder, width, size)  # noqa: ARG005 - as all of them


def _of_torch(python: str, folder: Path, kind: str, suffix: str) -> Path:
    path = folder / f"convolutions{suffix}"
    output([python, "-c", MAKE, kind, str(path)])
    return path


def _ell(python: str, folder: Path) -> Path:  # noqa: ARG001 - as all of them
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise NotHere("there is no C compiler (cc, gcc, clang)")
    source, path = folder / "module.c", folder / "module.so"
    source.write_text(ELL_MODULE)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


SUBJECTS = (
    Engine("tflite", ENGINES["tflite"], _tflite, "ai_edge_litert"),
    Engine("onnxruntime", ENGINES["onnxruntime"], _onnx(16, 112), "onnxruntime"),
    Engine("openvino", ENGINES["openvino"], _onnx(16, 112), "openvino"),
    Engine("torch", TORCH, lambda python, folder: _of_torch(python, folder, "torch", ".ptl"), "torch"),
    Engine(
        "executorch",
        EXECUTORCH,
        lambda python, folder: _of_torch(python, folder, "executorch", ".pte"),
        "executorch",
    ),
    Engine(
        "ell",
        ELL.replace("SIZE", str(_ELL_SIZE)),
        _ell,
        threads=False,
        environment={"BOARDBENCH_NATIVE_MODELS": "1"},
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engines")
    group.add_argument(
        "--engine-rounds", type=int, default=6, help="least rounds of every engine (default 6)"
    )
    group.add_argument(
        "--engine-seconds",
        type=float,
        default=45,
        help="further rounds, while the ratio is not known to 1 %%, up to so many seconds (default 45)",
    )
    group.add_argument(
        "--only", action="append", choices=[each.name for each in SUBJECTS], help="this one; repeatable"
    )


def measure(arguments: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        return _measure(arguments, Path(folder))


def _measure(arguments: argparse.Namespace, folder: Path) -> Report:
    rows: list[Sequence[object]] = []
    checks: list[Check] = []
    details: dict[str, object] = {}
    absent: list[str] = []
    order = random.Random(5)
    for engine in SUBJECTS:
        if arguments.only and engine.name not in arguments.only:
            continue
        try:
            python = engine.python()
            model = engine.make(python, folder)
            loop = _Loop(engine, python, model, folder)
        except NotHere as error:
            absent.append(f"{engine.name}: {error}")
            note(f"engines: no {engine.name} here: {error}")
            continue
        found = _rounds(loop, order, arguments)
        ratios = _ratios(found)
        low, high = _bounds(ratios)
        milliseconds = {name: statistics.median(each) * 1e3 for name, each in found.items()}
        ratio = statistics.median(ratios)
        rows.append(
            [
                f"{engine.name}, {model.name}",
                len(ratios),
                loop.runs,
                milliseconds["bare loop"],
                milliseconds["boardbench"],
                f"{ratio:.4f}",
                f"{low:.4f} … {high:.4f}",
            ]
        )
        what = f"{engine.name}: overhead over its bare loop, median"
        checks.append(Check(what, (ratio - 1) * 100, 1, "%"))
        details[engine.name] = found
    missing = f"; not here: {'; '.join(absent)}" if absent else ""
    return Report(
        "overhead by engine",
        f"one thread, {WARM_UP_SECONDS} s of warm-up, at least {arguments.engine_rounds} rounds, each in a "
        "fresh process; n: inferences of each; p50 in ms (median of rounds); ratio of boardbench's p50 to "
        f"that of the bare loop in the same round: its median, with bounds at 95 %{missing}",
        ("", "rounds", "n", "bare loop ms", "boardbench ms", "ratio", "bounds"),
        rows,
        checks,
        details,
    )


def _rounds(loop: _Loop, order: random.Random, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the median of every round, by who measured."""
    who = {"bare loop": loop.bare, "boardbench": loop.boardbench}
    found: dict[str, list[float]] = {name: [] for name in who}
    began = time.monotonic()
    while True:
        for name in order.sample(sorted(who), len(who)):
            found[name].append(percentile(who[name](), 50) / 1e9)
        rounds = len(found["boardbench"])
        note(f"engines: {loop.engine.name}: round {rounds}")
        if rounds < arguments.engine_rounds:
            continue
        low, high = _bounds(_ratios(found))
        if high - low <= SETTLED_RATIO or time.monotonic() - began >= arguments.engine_seconds:
            return found


def _ratios(found: dict[str, list[float]]) -> list[float]:
    return [ours / bare for ours, bare in zip(found["boardbench"], found["bare loop"], strict=True)]


def _bounds(ratios: list[float]) -> tuple[float, float]:
    """Bounds of their median at 95 %; the extremes of fewer than six."""
    ordered = sorted(ratios)
    low, high = stats.bounds("50", len(ordered), 0.95) or (1, len(ordered))
    return ordered[low - 1], ordered[high - 1]


class _Loop:
    """A model in an engine, by both programs; as many inferences as take a second."""

    def __init__(self, engine: Engine, python: str, model: Path, folder: Path) -> None:
        self.engine = engine
        self._python = python
        self._model = model
        self.runs = 30
        self._config = folder / f"{engine.name}.toml"
        self._config.write_text(f'[runtimes.{engine.name}]\npython = "{python}"\n')
        each = percentile(self.bare(), 50) / 1e9
        self.runs = min(MOST_RUNS, max(LEAST_RUNS, math.ceil(COUNTED_SECONDS / each)))

    def bare(self) -> list[int]:
        """Nanoseconds of each inference in the bare loop."""
        code = HEAD + self.engine.bare + WARM + BARE
        arguments = [str(self._model), str(self.runs), str(WARM_UP_SECONDS)]
        # What an engine says on its output comes before the samples.
        last = output([self._python, "-c", code, *arguments]).splitlines()[-1]
        return [int(each) for each in json.loads(last)]

    def boardbench(self) -> list[int]:
        """Nanoseconds of each inference, as boardbench tells them."""
        environment = {"BOARDBENCH_AGENT_CONFIG": str(self._config), **self.engine.environment}
        answer = output([
            "env", *(f"{name}={value}" for name, value in environment.items()),
            *program("boardbench"), "run", str(self._model),
            "--runtime", self.engine.name, "--format", "json",
            *(("--threads", "1") if self.engine.threads else ()), "--duration", "0", "--no-profile",
            "--warm-up", str(WARM_UP_SECONDS), "--min-runs", str(self.runs), "--max-runs", str(self.runs),
        ])  # fmt: skip
        return [int(each) for each in json.loads(answer)["latency"]["samples_nanoseconds"]]


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__, section="engines"))
