"""Why an operation of a TensorFlow Lite model is not on the Edge TPU, as far as its file tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from boardbench.agent.bench import placement
from boardbench.agent.bench.runtimes import edgetpu
from boardbench.agent.domain import Placement


def with_causes(found: Placement, model: Path, wanted: str) -> Placement:
    """The placement with the cause of every operation away from the Edge TPU of which the file tells one."""
    from boardbench.inspect.analyse import inspect
    from boardbench.inspect.errors import InspectError
    from boardbench.inspect.report import Evidence

    away = {op.index for op in placement.fallen_back(found, wanted)}
    if not away:
        return found
    if not any(op.type == edgetpu.CUSTOM_OP for op in found.ops):
        if len(away) < len(found.ops):
            return found  # taken without having been compiled: by a stand-in
        cause, remedy = "the model is not compiled for the Edge TPU", "compile it with edgetpu_compiler"
        return replace(found, ops=tuple(replace(op, cause=cause, remedy=remedy) for op in found.ops))
    try:
        report = inspect(model)
    except (InspectError, OSError):
        return found
    if report.placement is None or report.placement.evidence is Evidence.PREDICTION:
        return found
    told = {op.index: op for op in report.placement.ops if op.cause}
    ops = tuple(
        replace(
            op, cause=told[op.index].cause, root_cause=told[op.index].root_cause, remedy=told[op.index].remedy
        )
        if op.index in away and op.index in told and told[op.index].type == op.type
        else op
        for op in found.ops
    )
    return replace(found, ops=ops)
