"""Where the time of an ONNX Runtime inference goes."""

from __future__ import annotations

from typing import Callable, Iterable

from boardbench.agent.bench.runtime import NoProfile, Profile, ProfileRequest, Runtime


def profile(runtime: Runtime, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    """Profiles the model as it was loaded in the run. Raises NoProfile, and what ``load`` raises."""
    raise NoProfile(f"{runtime.name} {request.device} {runs}")
