"""Where the time of an inference goes: each operation is timed, in a process of its own after the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from boardbench.agent.bench.runtime import Profile, ProfileRequest
from boardbench_affine.engine import AffineRuntime


def profile(runtime: AffineRuntime, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    """The mean time of every operation. ``runs`` gives a turn for each inference to profile."""
    model = runtime.load(
        request.model_path,
        device=request.device,
        threads=request.threads,
        options=request.options,
        shapes=request.shapes,
    )
    feed = request.feeds(model.inputs)[model.graph.input_name]
    whole: list[float] = []
    sums = [0.0] * len(model.steps)
    # Told before anything that could end the process: what was told last is then left out the next time.
    request.trying("timing each operation")
    for _ in runs():
        values = {model.graph.input_name: feed}
        began = before = time.perf_counter()
        for at, step in enumerate(model.steps):
            values[step.name] = step.compute(values)
            now = time.perf_counter()
            sums[at] += now - before
            before = now
        whole.append(before - began)
    found = model.placement()
    model.close()
    return Profile(
        method="clock around each operation",
        detail=f"{len(whole)} inferences, with the clock read around each operation",
        units=tuple(op.unit for op in found.ops),
        whole_seconds=tuple(whole),
        op_seconds={at: seconds / len(whole) for at, seconds in enumerate(sums)} if whole else {},
    )
