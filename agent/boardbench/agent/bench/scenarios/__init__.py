"""How inferences are asked for: one module a kind of asking."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Mapping, Optional, Sequence

from boardbench.agent.bench.runtime import OptionRejected
from boardbench.agent.bench.scenarios.offline import Offline
from boardbench.agent.bench.scenarios.open_loop import OpenLoop
from boardbench.agent.bench.scenarios.streams import MultiStream, SingleStream
from boardbench.agent.bench.scenarios.sustained import Sustained
from boardbench.agent.bench.scenarios.terms import Call, Drive, Run, Terms, Told
from boardbench.agent.domain import Scenario, ScenarioKind

__all__ = ["Call", "Drive", "Run", "Terms", "Told", "create", "instances", "name_of", "settle"]

QUERY_SAMPLES = 8
"""In a query of multi-stream, as MLPerf has it (mlcommons/inference_policies, inference_rules.adoc)."""

WINDOW_SECONDS = 60.0
"""Of a sustained run, or a tenth of it: a minute shows heat, and ten windows are enough to see it come."""

MOST_STREAMS = 1024
MOST_BATCH = 65536

_AT_A_RATE = (ScenarioKind.PERIODIC, ScenarioKind.POISSON)
_TAKERS: Mapping[str, Sequence[ScenarioKind]] = {
    "rate_hertz": _AT_A_RATE,
    "deadline_seconds": _AT_A_RATE,
    "streams": (ScenarioKind.OFFLINE, ScenarioKind.MULTI_STREAM),
    "batch": (ScenarioKind.OFFLINE,),
    "window_seconds": (ScenarioKind.SUSTAINED,),
}

WITHOUT_PRECISION = (ScenarioKind.OFFLINE, ScenarioKind.SUSTAINED)
"""Scenarios that last their duration: one is about throughput, the other about what time does."""


def name_of(kind: ScenarioKind) -> str:
    """As a person reads it: "multi stream"."""
    return kind.value[len("SCENARIO_KIND_") :].lower().replace("_", " ")


def settle(scenario: Optional[Scenario], *, duration_seconds: float) -> Scenario:
    """The scenario with every default filled in. Raises OptionRejected for what makes no sense."""
    found = Scenario() if scenario is None else scenario
    for field, takers in _TAKERS.items():
        value = getattr(found, field)
        if value is None:
            continue
        if found.kind not in takers:
            raise OptionRejected(
                f"{field} says nothing to the scenario {name_of(found.kind)}; it is for "
                + " and ".join(name_of(taker) for taker in takers)
            )
        if not (math.isfinite(value) and value > 0):
            raise OptionRejected(f"{field} of a scenario is above 0, not {value}")
    for field, most in (("streams", MOST_STREAMS), ("batch", MOST_BATCH)):
        value = getattr(found, field)
        if value is not None and not (value == int(value) and value <= most):
            raise OptionRejected(f"{field} of a scenario is a whole number from 1 to {most}, not {value}")
    if found.kind in _AT_A_RATE:
        if found.rate_hertz is None:
            raise OptionRejected(f"the scenario {name_of(found.kind)} needs a rate: inferences a second")
        if found.deadline_seconds is None:
            return replace(found, deadline_seconds=1 / found.rate_hertz)
    elif found.streams is None and found.kind in _TAKERS["streams"]:
        return replace(found, streams=QUERY_SAMPLES if found.kind is ScenarioKind.MULTI_STREAM else 1)
    elif found.kind is ScenarioKind.SUSTAINED and found.window_seconds is None:
        window = min(WINDOW_SECONDS, duration_seconds / 10)
        return replace(found, window_seconds=window if window > 0 else WINDOW_SECONDS)
    return found


def instances(scenario: Scenario) -> int:
    """How many instances of the model the scenario wants."""
    return (scenario.streams or 1) if scenario.kind is ScenarioKind.OFFLINE else 1


def create(scenario: Scenario, calls: Sequence[Call], terms: Terms, *, seed: int) -> Drive:
    """What asks for inferences: with a call for each instance, in a scenario that is settled."""
    kind = scenario.kind
    if kind is ScenarioKind.OFFLINE:
        return Offline(calls, terms, scenario.batch or 1)
    (call,) = calls
    if kind in _AT_A_RATE:
        return OpenLoop(call, terms, scenario, seed)
    if kind is ScenarioKind.MULTI_STREAM:
        return MultiStream(call, terms, scenario.streams or QUERY_SAMPLES)
    if kind is ScenarioKind.SUSTAINED:
        return Sustained(call, terms, scenario.window_seconds or WINDOW_SECONDS)
    return SingleStream(call, terms)
