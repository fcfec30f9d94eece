"""boardbench beside the tools of the trade: MLPerf LoadGen, LiteRT's own tool, OpenVINO's benchmark_app.

For each engine and each of four models, one round runs a bare loop in the engine's own API, `boardbench
run` and every tool that there is for the engine, each in a fresh process, in an order that is drawn anew. All
use the same file, one thread, the same warm-up and the same number of inferences. Percentiles come from raw
samples by one rule, except LoadGen's, which are those of its own summary.

benchmark_app's latency is the engine's internal counter, without the call through Python; its time per
inference (duration over count) is told beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overhead import output, percentile
from programs import program
from report import MODELS, Check, Report, note, run

from boardbench.agent.bench import stats

WARM_UP_SECONDS = 0.5
# A tenth of the tools' spread is noise; below this the ratio of p99s of so few samples says nothing.
LEAST_RUNS, MOST_RUNS = 100, 2000
PERCENTILES = (50, 90, 99)
# From here on the tools' own overhead is under a percent of their figure.
LONG_SECONDS = 0.005

# What each engine's script begins with: `call()` is one inference on seeded inputs.
ENGINES = {
    "tflite": """
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=model, num_threads=1)
interpreter.allocate_tensors()
for detail in interpreter.get_input_details():
    interpreter.set_tensor(detail["index"], filled(detail["shape"], detail["dtype"]))
call = interpreter.invoke
""",
    "onnxruntime": """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
feeds = {each.name: filled(each.shape, numpy.float32) for each in session.get_inputs()}
names = [each.name for each in session.get_outputs()]
call = lambda: session.run(names, feeds)
""",
    "openvino": """
import openvino
core = openvino.Core()
compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1})
request = compiled.create_infer_request()
for at, port in enumerate(compiled.inputs):
    request.set_input_tensor(at, openvino.Tensor(filled(list(port.shape), port.element_type.to_dtype())))
call = request.infer
""",
}

HEAD = """
import json, sys, time
import numpy
model, runs, warm_up = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
generator = numpy.random.default_rng(0)
def filled(shape, dtype):
    if numpy.dtype(dtype).kind == "f":
        return generator.random(shape, numpy.float32).astype(dtype)
    information = numpy.iinfo(dtype)
    return generator.integers(information.min, information.max + 1, shape, dtype)
"""

WARM = """
end = time.perf_counter() + warm_up
while time.perf_counter() < end:
    call()
"""

BARE = """
samples = []
for _ in range(runs):
    begin = time.perf_counter_ns()
    call()
    samples.append(time.perf_counter_ns() - begin)
print(json.dumps(samples))
"""

# SingleStream, bounded by the number of queries alone.
LOADGEN = """
import mlperf_loadgen as loadgen
folder = sys.argv[4]
def issue(samples):
    for sample in samples:
        call()
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample.id, 0, 0)])
settings = loadgen.TestSettings()
settings.scenario = loadgen.TestScenario.SingleStream
settings.mode = loadgen.TestMode.PerformanceOnly
settings.min_duration_ms = 0
settings.min_query_count = settings.max_query_count = runs
logs = loadgen.LogSettings()
logs.log_output.outdir = folder
logs.enable_trace = False
sut = loadgen.ConstructSUT(issue, lambda: None)
qsl = loadgen.ConstructQSL(1, 1, lambda _: None, lambda _: None)
loadgen.StartTestWithLogSettings(sut, qsl, settings, logs, "")
loadgen.DestroyQSL(qsl)
loadgen.DestroySUT(sut)
"""

LITERT_TOOL = """
import json, sys
from ai_edge_litert.tools import benchmark_litert_model as tool
noted, theirs = {}, tool.percentile
def noting(sorted_data, p):
    noted["samples"] = [round(each * 1e6) for each in sorted_data]
    return theirs(sorted_data, p)
tool.percentile = noting
report = sys.argv.pop(1)
tool.main()
open(report, "w").write(json.dumps(noted["samples"]))
"""

BENCHMARK_APP = """
import json, sys
from openvino.tools.benchmark import benchmark, main as tool
noted, theirs = {}, benchmark.Benchmark.sync_inference
def noting(self, request, data_queue):
    found = theirs(self, request, data_queue)
    times, seconds, count = found
    noted.update(samples=[round(each * 1e6) for each in times], each=seconds / count)
    return found
benchmark.Benchmark.sync_inference = noting
report = sys.argv.pop(1)
tool.main()
open(report, "w").write(json.dumps(noted))
"""


@dataclass(frozen=True)
class Subject:
    """An engine with a model."""

    engine: str
    model: Path
    runs: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tools")
    group.add_argument("--tool-rounds", type=int, default=8, help="least rounds of every tool (default 8)")
    group.add_argument(
        "--tool-most-rounds",
        type=int,
        default=20,
        help="rounds of a model whose ratios are not known to 1 %% by then (default 20)",
    )
    group.add_argument("--tool-seconds", type=float, default=1.5, help="seconds counted, about (default 1.5)")
    group.add_argument("--engine", action="append", choices=sorted(ENGINES), help="only this one; repeatable")


def measure(arguments: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        return _measure(arguments, Path(folder))


def _measure(arguments: argparse.Namespace, folder: Path) -> Report:
    engines = [name for name in ENGINES if not arguments.engine or name in arguments.engine]
    subjects = [
        subject for engine in engines for subject in subjects_of(engine, folder, arguments.tool_seconds)
    ]
    rows: list[list[object]] = []
    checks: list[Check] = []
    details: dict[str, object] = {}
    order = random.Random(3)
    for subject in subjects:
        tools = _tools(subject.engine)
        found: dict[str, list[dict[float, float]]] = {name: [] for name in tools}
        for number in range(max(arguments.tool_rounds, arguments.tool_most_rounds)):
            if number >= arguments.tool_rounds and _is_settled(found):
                break
            for name in order.sample(sorted(tools), len(tools)):
                found[name].append(tools[name](subject, folder))
            note(f"tools: {subject.engine} {subject.model.name}: round {number + 1}")
        rows += _rows(subject, found)
        checks += _checks(subject, found)
        details[f"{subject.engine} {subject.model.name}"] = found
    return Report(
        "beside other tools",
        f"one thread, {WARM_UP_SECONDS} s of warm-up, at least {arguments.tool_rounds} rounds, each in a "
        "fresh process; n: inferences of each; times in ms (median of rounds); ratios of the medians to the "
        "bare loop of the same round: their median, and its bounds at 95 %: where these are wide, the "
        "median is that of the machine as well",
        ("", "rounds", "n", "p50 ms", "ratio", "bounds", "p90 ms", "p99 ms"),
        rows,
        checks,
        details,
    )


def _rows(subject: Subject, found: dict[str, list[dict[float, float]]]) -> list[list[object]]:
    rows = []
    for name, rounds in found.items():
        against = _against(found, name, "bare loop")
        rows.append(
            [
                f"{subject.engine}, {subject.model.stem}: {name}",
                len(rounds),
                subject.runs,
                _median(rounds, 50) * 1e3,
                f"{statistics.median(against):.4f}",
                "{:.4f} … {:.4f}".format(*_bounds(against)),
                *(_median(rounds, p) * 1e3 if any(p in each for each in rounds) else "" for p in (90, 99)),
            ]
        )
    return rows


def _checks(subject: Subject, found: dict[str, list[dict[float, float]]]) -> list[Check]:
    about = f"{subject.engine}, {subject.model.stem}"
    difference = abs(statistics.median(_against(found, "boardbench", "bare loop")) - 1)
    checks = [Check(f"{about}: median against the bare loop, difference", difference * 100, 1, "%")]
    for name in found:
        if name in ("bare loop", "boardbench") or name.endswith("internal counter"):
            continue
        ratio = statistics.median(_against(found, "boardbench", name))
        if _median(found["bare loop"], 50) >= LONG_SECONDS:
            what = f"{about}: median against {name}, difference"
            checks.append(Check(what, abs(ratio - 1) * 100, 1, "%"))
        else:
            # The ratio of two medians of rounds is itself uncertain by a few tenths of a percent.
            checks.append(Check(f"{about}: median against {name}, ratio", ratio, 1.005, "times"))
        theirs = [each[99] for each in found[name] if 99 in each]
        if theirs:
            tail = _median(found["boardbench"], 99)
            outside = max(0.0, min(theirs) / tail - 1, tail / max(theirs) - 1)
            checks.append(
                Check(f"{about}: p99 outside {name}'s own spread from run to run", outside * 100, 0, "%")
            )
    return checks


def _against(found: dict[str, list[dict[float, float]]], name: str, other: str) -> list[float]:
    return [mine[50] / theirs[50] for mine, theirs in zip(found[name], found[other], strict=True)]


def _bounds(ratios: list[float]) -> tuple[float, float]:
    """Bounds of the median of what the ratios are drawn from, at 95 %; the extremes of fewer than six."""
    ordered = sorted(ratios)
    low, high = stats.bounds("50", len(ordered), 0.95) or (1, len(ordered))
    return ordered[low - 1], ordered[high - 1]


def _is_settled(found: dict[str, list[dict[float, float]]]) -> bool:
    """Whether the ratio to the bare loop is known to half a percent."""
    low, high = _bounds(_against(found, "boardbench", "bare loop"))
    return high - low <= 0.01


def _median(rounds: list[dict[float, float]], p: float) -> float:
    return statistics.median([each[p] for each in rounds if p in each])


# What is measured


def subjects_of(engine: str, folder: Path, seconds: float) -> list[Subject]:
    if engine == "tflite":
        names = (
            "mobilenet_v1_0.25_128_quant",
            "mobilenet_v1_0.5_160_quant",
            "movenet_single_pose_lightning_ptq",
            "deeplabv3_mnv2_dm05_pascal_quant",
        )
        models = [MODELS / f"{name}.tflite" for name in names]
    else:
        # OpenVINO computes these in bfloat16 where the processor can, several times as fast.
        sizes = {
            "onnxruntime": ((10, 96), (16, 112), (32, 160), (48, 256)),
            "openvino": ((16, 112), (32, 160), (48, 256), (64, 448)),
        }
        models = [convolutions(folder, width, size) for width, size in sizes[engine]]
    found = []
    for model in models:
        samples = _bare(Subject(engine, model, 30), folder)
        runs = math.ceil(seconds / samples[50])
        found.append(Subject(engine, model, min(MOST_RUNS, max(LEAST_RUNS, runs))))
    return found


def convolutions(folder: Path, width: int, size: int) -> Path:
    """Eight 3 × 3 convolutions of ``width`` channels on ``size`` × ``size``, in ONNX."""
    import numpy
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    path = folder / f"conv8_{width}x{size}.onnx"
    if path.exists():
        return path
    generator = numpy.random.default_rng(1)
    nodes, weights, before, channels = [], [], "image", 3
    for layer in range(8):
        kernel = generator.standard_normal((width, channels, 3, 3)).astype(numpy.float32) / 10
        weights.append(numpy_helper.from_array(kernel, f"w{layer}"))
        stride = 2 if layer == 0 else 1
        nodes.append(
            helper.make_node(
                "Conv", [before, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1], strides=[stride, stride]
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        before, channels = f"r{layer}", width
    nodes.append(helper.make_node("GlobalAveragePool", [before], ["pooled"]))
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [1, width, 1, 1])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


# Who measures


def _tools(engine: str) -> dict[str, Callable[[Subject, Path], dict[float, float]]]:
    tools: dict[str, Callable[[Subject, Path], dict[float, float]]] = {
        "bare loop": _bare,
        "boardbench": _boardbench,
    }
    if importlib.util.find_spec("mlperf_loadgen"):
        tools["LoadGen"] = _loadgen
    else:
        note("tools: no LoadGen here: pip install mlcommons-loadgen")
    if engine == "tflite":
        tools["LiteRT's tool"] = _litert_tool
    if engine == "openvino":
        tools["benchmark_app, internal counter"] = _benchmark_app
        tools["benchmark_app, time each"] = _benchmark_app_each
    return tools


def _percentiles(samples: list[int]) -> dict[float, float]:
    return {p: percentile(samples, p) / 1e9 for p in PERCENTILES}


def _script(subject: Subject, body: str, *more: str) -> str:
    code = HEAD + ENGINES[subject.engine] + WARM + body
    return output(
        [sys.executable, "-c", code, str(subject.model), str(subject.runs), str(WARM_UP_SECONDS), *more]
    )


def raw_loop(subject: Subject, folder: Path) -> list[int]:  # noqa: ARG001 - as all of them
    """Nanoseconds of each inference in a bare loop."""
    return [int(each) for each in json.loads(_script(subject, BARE))]


def _bare(subject: Subject, folder: Path) -> dict[float, float]:
    return _percentiles(raw_loop(subject, folder))


def _loadgen(subject: Subject, folder: Path) -> dict[float, float]:
    with tempfile.TemporaryDirectory(dir=folder) as logs:
        _script(subject, LOADGEN, logs)
        summary = (Path(logs) / "mlperf_log_summary.txt").read_text()
    found = re.findall(r"^(\d+\.\d+) percentile latency \(ns\)\s*:\s*(\d+)", summary, re.MULTILINE)
    return {float(p): int(nanoseconds) / 1e9 for p, nanoseconds in found if float(p) in PERCENTILES}


def raw_litert_tool(subject: Subject, folder: Path) -> list[int]:
    """Nanoseconds of each inference, as LiteRT's tool times it."""
    warm_up = max(5, round(WARM_UP_SECONDS * subject.runs / 1.5))
    report = folder / "litert.json"
    output([
        sys.executable, "-c", LITERT_TOOL, str(report), f"--model={subject.model}", "--num_threads=1",
        f"--num_runs={subject.runs}", f"--warmup_runs={warm_up}",
    ])  # fmt: skip
    return [int(each) for each in json.loads(report.read_text())]


def _litert_tool(subject: Subject, folder: Path) -> dict[float, float]:
    return _percentiles(raw_litert_tool(subject, folder))


def raw_benchmark_app(subject: Subject, folder: Path) -> list[int]:
    """Nanoseconds of each inference by the engine's own counter, as benchmark_app tells it."""
    return [int(each) for each in _of_benchmark_app(subject, folder)["samples"]]


def _benchmark_app(subject: Subject, folder: Path) -> dict[float, float]:
    return _percentiles(raw_benchmark_app(subject, folder))


def _benchmark_app_each(subject: Subject, folder: Path) -> dict[float, float]:
    return {50: _of_benchmark_app(subject, folder)["each"]}


def _of_benchmark_app(subject: Subject, folder: Path) -> dict[str, Any]:
    report = folder / "benchmark_app.json"
    output([
        sys.executable, "-c", BENCHMARK_APP, str(report), "-m", str(subject.model), "-d", "CPU",
        "-api", "sync", "-hint", "none", "-nthreads", "1", "-niter", str(subject.runs),
        "-inference_only", "true",
    ])  # fmt: skip
    return dict(json.loads(report.read_text()))


def _boardbench(subject: Subject, folder: Path) -> dict[float, float]:  # noqa: ARG001 - as all of them
    answer = output([
        *program("boardbench"), "run", str(subject.model), "--runtime", subject.engine, "--format", "json",
        "--threads", "1", "--duration", "0", "--no-profile", "--warm-up", str(WARM_UP_SECONDS),
        "--min-runs", str(subject.runs), "--max-runs", str(subject.runs),
    ])  # fmt: skip
    return _percentiles([int(each) for each in json.loads(answer)["latency"]["samples_nanoseconds"]])


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__, section="tools"))
