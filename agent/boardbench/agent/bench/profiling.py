"""The profiling pass: where the time of an inference goes, found in a process of its own.

It begins when the result has been told and the model is closed, so nothing that happens in it can change or
lose a figure, and the accelerator and the memory are free for it. The process may crash or hang; what it was
trying then is left out in a second attempt. Without a profile the placement stands as it is, with the reason.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from boardbench.agent.bench import cost, doubts, placement
from boardbench.agent.bench.runtime import Cause, NoProfile, Profile
from boardbench.agent.domain import (
    Crossings,
    Evidence,
    EvidenceReport,
    FallbackCost,
    OpPlacement,
    Placement,
    Unit,
    Verdict,
    Warning,
)

DEFAULT_RUNS = 50
"""Inferences when nobody said how many; the bounds of their median enclose some 28 % of the sample."""

DEFAULT_SECONDS = 3.0
"""A pass of this length ends before DEFAULT_RUNS: as long as a measurement is by default."""

LEAST_RUNS = 10
"""Not fewer however slow the model is, up to MOST_SECONDS: below, the bounds of a median say little."""

MOST_SECONDS = 30.0

SLOW_TO_LOAD_SECONDS = 20.0
"""A model that takes longer is profiled on request only: it is loaded again, by TensorRT for minutes."""

_START_SECONDS = 60.0
"""For Python and the engine, from the slowest card, and for what an engine finds out besides."""

_LONGEST_ANSWER_BYTES = 16 << 20
_BY_INFERENCE = (
    "whole_seconds",
    "fallback_seconds",
    "whole_queued_seconds",
    "fallback_queued_seconds",
    "whole_cpu_seconds",
)
_WORKER = Path(__file__).with_name("__main__.py")


def turns(asked: Optional[int], clock: Callable[[], float] = time.monotonic) -> Iterator[int]:
    """One for every inference to profile: as many as were asked for, or as the defaults above say."""
    began = clock()
    most = DEFAULT_RUNS if asked is None else asked
    for turn in range(most):
        if asked is None:
            limit = DEFAULT_SECONDS if turn >= LEAST_RUNS else MOST_SECONDS
            if turn and clock() - began >= limit:
                return
        yield turn


def wanted_runs(asked: Optional[int], *, profiles: bool, create_seconds: float) -> int:
    """How many inferences will be profiled at most; 0 when there will be no pass."""
    if not profiles or asked == 0:
        return 0
    if asked is None:
        return 0 if create_seconds > SLOW_TO_LOAD_SECONDS else DEFAULT_RUNS
    return asked


# In the worker


def profiled(
    job: Mapping[str, Any],
    found: Placement,
    *,
    wanted: str,
    runs: int,
    counted: cost.Counted,
    create_seconds: float,
    python: str = sys.executable,
) -> Placement:
    """``found`` with everything that a profile adds to it; with the reason when there is none.

    ``job`` is the job line of the run. ``runs`` is only for how long to wait.
    """
    limit = _START_SECONDS + 4.0 * create_seconds + 4.0 * runs * counted.median_seconds
    avoid: List[str] = []
    end = time.monotonic() + limit
    while True:
        tried: List[str] = []
        try:
            profile = _in_child(
                {**job, "kind": "profile", "avoid": list(avoid)}, end - time.monotonic(), tried, python
            )
            break
        except NoProfile as error:
            reason = str(error)
        except _Died as death:
            reason = str(death)
            # What was begun last took the process with it; there may be another way.
            if tried and tried[-1] not in avoid and end - time.monotonic() > 1.0:
                avoid.append(tried[-1])
                continue
        return placement.with_report(found, _no_profile(reason))
    return merged(found, profile, wanted=wanted, counted=counted)


class _Died(Exception):
    """The profiling process ended without an answer, or did not end; the message says how."""


def _no_profile(reason: str) -> EvidenceReport:
    return EvidenceReport(
        evidence=Evidence.PROFILED, verdict=Verdict.UNSPECIFIED, detail=f"there is no profile: {reason}"
    )


def _in_child(job: Mapping[str, Any], seconds: float, tried: List[str], python: str) -> Profile:
    """What a process of its own says. Raises NoProfile, _Died."""
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [python, str(_WORKER), "--events-fd", str(writing)],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            pass_fds=(writing,),
        )
    except OSError as error:
        os.close(reading)
        raise NoProfile(f"its process can't be started: {error}") from error
    finally:
        os.close(writing)
    try:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job).encode("ascii") + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone: its exit code says more
        answer = _answer(reading, time.monotonic() + seconds, tried)
        if answer is None:
            code = process.wait()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            raise _Died(f"its process {how}{_during(tried)}")
        return answer
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        if process.stdin is not None:
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass


def _during(tried: List[str]) -> str:
    return f" during {tried[-1]}" if tried else ""


def _answer(descriptor: int, end: float, tried: List[str]) -> Optional[Profile]:
    """The profile that comes on the descriptor; None when it ends without. Raises NoProfile, _Died."""
    buffer = bytearray()
    while True:
        left = end - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            raise _Died(f"its process took too long{_during(tried)} and was ended")
        content = os.read(descriptor, 1 << 16)
        if not content:
            return None
        buffer += content
        if len(buffer) > _LONGEST_ANSWER_BYTES:
            raise NoProfile("its process says too much")
        *lines, rest = bytes(buffer).split(b"\n")
        buffer = bytearray(rest)
        for line in lines:
            found = _heard(line, tried)
            if found is not None:
                return found


def _heard(line: bytes, tried: List[str]) -> Optional[Profile]:
    try:
        event = json.loads(line)
        if event["event"] == "trying":
            tried.append(str(event["method"]))
        elif event["event"] == "profiled":
            return _parsed(event["profile"])
        elif event["event"] == "error":
            raise NoProfile(str(event["error"]["message"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NoProfile(f"its process answers what is no answer ({type(error).__name__}: {error})") from error
    return None


def _parsed(content: Mapping[str, Any]) -> Profile:
    fields: Dict[str, Any] = dict(content)
    fields["units"] = tuple(Unit(unit) for unit in content["units"])
    for name in _BY_INFERENCE:
        fields[name] = tuple(float(seconds) for seconds in content.get(name, ()))
    fields["op_seconds"] = {int(at): float(seconds) for at, seconds in content["op_seconds"].items()}
    fields["causes"] = {int(at): Cause(**cause) for at, cause in content["causes"].items()}
    if "crossings" in content:
        fields["crossings"] = Crossings(**content["crossings"])
    return Profile(**fields)


# Joining


def merged(found: Placement, profile: Profile, *, wanted: str, counted: cost.Counted) -> Placement:
    """The placement with the time of its operations, what fallback costs, and the profile as evidence."""
    if profile.units != tuple(op.unit for op in found.ops):
        return placement.with_report(
            found,
            replace(
                _report(profile, found.ops, wanted),
                verdict=Verdict.UNSPECIFIED,
                detail="under the profiler operations ran elsewhere than in the counted inferences, so its "
                f"times are left out: {profile.detail}",
            ),
        )
    ops = tuple(
        _with_cause(replace(op, seconds=profile.op_seconds.get(at)), profile.causes.get(at))
        for at, op in enumerate(found.ops)
    )
    return placement.with_report(
        replace(
            found,
            ops=ops,
            crossings=found.crossings or profile.crossings,
            fallback_cost=_cost(found, profile, wanted, counted),
        ),
        _report(profile, ops, wanted),
    )


def _with_cause(op: OpPlacement, cause: Optional[Cause]) -> OpPlacement:
    if cause is None or op.cause:
        return op
    return replace(op, cause=cause.cause, root_cause=cause.root_cause, remedy=cause.remedy)


def _report(profile: Profile, ops: Tuple[OpPlacement, ...], wanted: str) -> EvidenceReport:
    ran = [replace(op, unit=unit) for op, unit in zip(ops, profile.units)]
    away = sum(placement.is_away(op, wanted) for op in ran)
    unknown = sum(op.unit is Unit.UNSPECIFIED for op in ran)
    on_cpu = sum(op.unit in placement.ON_CPU for op in ran)
    return EvidenceReport(
        evidence=Evidence.PROFILED,
        verdict=placement.verdict(len(ran) - away - unknown, away, unknown),
        detail=profile.detail,
        accelerated_ops=len(ran) - on_cpu - unknown,
        cpu_ops=on_cpu,
    )


def _cost(found: Placement, profile: Profile, wanted: str, counted: cost.Counted) -> Optional[FallbackCost]:
    """What the operations cost that are not where they were asked to be.

    None where nothing was asked for, where nothing got there (everything would be the cost), or where it is
    doubtful that anything did.
    """
    if not wanted or found.verdict not in (Verdict.ACCELERATED, Verdict.PARTLY):
        return None
    if not placement.fallen_back(found, wanted):
        method = "no operation is away from the device that was asked for"
        return FallbackCost(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, counted.median_seconds, method)
    inferences = _inferences(profile)
    method = f"{profile.method}, {len(inferences)} inferences"
    return cost.of_fallback(inferences, counted, method, by_rest=profile.accelerator_apart)


def _inferences(profile: Profile) -> List[cost.Inference]:
    unknown = (0.0,) * len(profile.whole_seconds)
    return [
        cost.Inference(*each)
        for each in zip(
            profile.fallback_seconds,
            profile.whole_seconds,
            profile.fallback_queued_seconds or unknown,
            profile.whole_queued_seconds or unknown,
            profile.whole_cpu_seconds or unknown,
        )
    ]


def doubts_of(found: Placement) -> Iterator[Warning]:
    """Doubts about what a profile added to a placement."""
    told = found.fallback_cost
    if told is not None and cost.is_uncertain(told):
        low, share, high = (100 * each for each in (told.share_low, told.share, told.share_high))
        yield doubts.warn(
            "cost_uncertain",
            f"fallback costs {share:.0f} % of the time, by its bounds {low:.0f} to {high:.0f} %",
            evidence={"share": told.share, "share_low": told.share_low, "share_high": told.share_high},
        )
