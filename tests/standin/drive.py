"""Runs models through a real interpreter, in a process of its own, under any Python: JSON in, JSON out.

{"library": path or null, "cases": [{"model", "options", "invokes", "seed", "xnnpack", "resize"}]} gives a
list with, for each case, either {"error": {"type", "message"}} and how far it got, or what was seen.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time


def engine():
    """The module with Interpreter and load_delegate, and its name."""
    try:
        from ai_edge_litert import interpreter

        return interpreter, "ai-edge-litert"
    except ImportError:
        from tflite_runtime import interpreter

        return interpreter, "tflite-runtime"


def closure(operators, delegate):
    """Indices of the original operators that a DELEGATE stands for: back from its outputs to its inputs."""
    originals = [op for op in operators if op["op_name"] != "DELEGATE"]
    maker = {int(tensor): op for op in originals for tensor in op["outputs"] if tensor >= 0}
    stop = {int(tensor) for tensor in delegate["inputs"]}
    queue, met = [int(tensor) for tensor in delegate["outputs"]], set()
    while queue:
        tensor = queue.pop()
        op = maker.get(tensor)
        if tensor in stop or op is None or op["index"] in met:
            continue
        met.add(op["index"])
        queue += [int(tensor) for tensor in op["inputs"] if tensor >= 0]
    return sorted(met)


def largest(interpreter, operators):
    """For each original operator, the bytes of its largest tensor that is no constant."""
    originals = [op for op in operators if op["op_name"] != "DELEGATE"]
    made = {int(tensor) for op in originals for tensor in op["outputs"]}
    made |= {int(spec["index"]) for spec in interpreter.get_input_details()}
    size = {
        int(spec["index"]): int(spec["shape"].prod()) * spec["dtype"]().itemsize
        for spec in interpreter.get_tensor_details()
        if int(spec["index"]) in made
    }
    return [max(size.get(int(tensor), 0) for tensor in [*op["inputs"], *op["outputs"]]) for op in originals]


def run(tflite, library, case):
    import numpy

    seen = {"stage": "load_delegate", "seconds": []}
    try:
        delegates = None
        if library is not None and case.get("options") is not None:
            delegates = [tflite.load_delegate(library, case["options"])]
        seen["stage"] = "create"
        resolver = tflite.OpResolverType
        started = time.monotonic()
        interpreter = tflite.Interpreter(
            model_path=case["model"],
            experimental_delegates=delegates,
            num_threads=1,
            experimental_op_resolver_type=(
                resolver.AUTO if case.get("xnnpack") else resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            ),
        )
        early = interpreter._get_ops_details()
        seen["delegates_before_allocation"] = sum(op["op_name"] == "DELEGATE" for op in early)
        seen["stage"] = "allocate"
        for name, shape in case.get("resize", {}).items():
            index = next(i["index"] for i in interpreter.get_input_details() if i["name"] == name)
            interpreter.resize_tensor_input(index, shape)
        interpreter.allocate_tensors()
        seen["create_seconds"] = time.monotonic() - started
        operators = interpreter._get_ops_details()
        seen["operators"] = [op["op_name"] for op in operators if op["op_name"] != "DELEGATE"]
        seen["largest_bytes"] = largest(interpreter, operators)
        seen["delegates"] = [closure(operators, op) for op in operators if op["op_name"] == "DELEGATE"]
        random = numpy.random.default_rng(case.get("seed", 0))
        for spec in interpreter.get_input_details():
            if numpy.issubdtype(spec["dtype"], numpy.floating):
                data = random.uniform(-1, 1, spec["shape"]).astype(spec["dtype"])
            else:
                limits = numpy.iinfo(spec["dtype"])
                data = random.integers(limits.min, limits.max, spec["shape"], spec["dtype"], endpoint=True)
            interpreter.set_tensor(spec["index"], data)
        seen["stage"] = "invoke"
        for _ in range(case.get("invokes", 1)):
            started = time.monotonic()
            cpu = time.process_time()
            interpreter.invoke()
            seen["seconds"].append(time.monotonic() - started)
            seen["cpu_seconds"] = time.process_time() - cpu
        seen["stage"] = "done"
        outputs = [interpreter.get_tensor(spec["index"]) for spec in interpreter.get_output_details()]
        seen["shapes"] = [list(output.shape) for output in outputs]
        seen["outputs"] = [hashlib.sha256(output.tobytes()).hexdigest() for output in outputs]
        seen["finite"] = all(bool(numpy.isfinite(output).all()) for output in outputs)
    except Exception as error:
        seen["error"] = {"type": type(error).__name__, "message": str(error)}
    return seen


def main():
    job = json.load(sys.stdin)
    tflite, name = engine()
    answer = {"engine": name, "cases": [run(tflite, job["library"], case) for case in job["cases"]]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
