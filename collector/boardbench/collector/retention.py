"""Removes what is too old to be kept, a little at a time, while results come in.

Each step is one small transaction, and the next waits for as long as it took: what comes in finds the store
free at least half of the time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from boardbench.collector.errors import StoreError
from boardbench.collector.look import RetentionView
from boardbench.collector.store import Removed, ResultStore

_log = logging.getLogger(__name__)

_DAY_SECONDS = 86400.0

_PAUSE_SECONDS = 600.0
"""Between two rounds. What is counted in days is not late by ten minutes."""

_STEP_RESULTS = 50
"""Results in one transaction: a few milliseconds of the writer."""


@dataclass(frozen=True)
class Policy:
    """How long what is kept; None: for ever."""

    samples_days: float | None = None
    """Single samples of a result; its figures and their distribution stay."""
    results_days: float | None = None
    """Results; the latest of each series stays."""
    per_series: int | None = None
    """So many results of each series of a board."""

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples_days), ("results", self.results_days)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} can't be kept for {value:g} days")
        if self.per_series is not None and self.per_series < 1:
            raise ValueError(f"{self.per_series} results of a series can't be kept; at least 1")

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is ever removed."""
        return self == Policy()


class Retention:
    """A policy at work on a store."""

    def __init__(self, store: ResultStore, policy: Policy, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._policy = policy
        self._clock = clock
        self.thinned = Removed()
        """Results that lost their single samples since the start."""
        self.removed = Removed()
        """Results that were removed since the start."""
        self.failures = 0
        """Rounds that ended early because the store failed."""

    async def round(self) -> tuple[Removed, Removed]:
        """Does everything that is to do now; returns (thinned, removed). StoreError when the store fails."""
        policy, now = self._policy, self._clock()
        thinned, removed = Removed(), Removed()
        if policy.results_days is not None or policy.per_series is not None:
            before = None if policy.results_days is None else now - policy.results_days * _DAY_SECONDS
            while True:
                begin = time.monotonic()
                step = await self._store.remove(
                    received_before=before, per_series=policy.per_series, limit=_STEP_RESULTS
                )
                removed, self.removed = removed + step, self.removed + step
                if not step.more or not step.results:
                    break
                await asyncio.sleep(time.monotonic() - begin)
        if policy.samples_days is not None:
            while True:
                begin = time.monotonic()
                step = await self._store.thin(
                    received_before=now - policy.samples_days * _DAY_SECONDS, limit=_STEP_RESULTS
                )
                thinned, self.thinned = thinned + step, self.thinned + step
                if not step.more:
                    break
                await asyncio.sleep(time.monotonic() - begin)
        return thinned, removed

    def view(self) -> RetentionView | None:
        """Returns what was done since the start; None when everything is kept."""
        if self._policy.keeps_everything:
            return None
        return RetentionView(
            results_thinned=self.thinned.results,
            results_removed=self.removed.results,
            samples_dropped=self.thinned.samples,
            bytes_removed=self.thinned.size_bytes + self.removed.size_bytes,
        )

    async def run(self) -> None:
        """Does a round every ten minutes, until cancelled."""
        if self._policy.keeps_everything:
            return
        while True:
            try:
                thinned, removed = await self.round()
            except StoreError as error:
                self.failures += 1
                _log.warning("what is too old could not be removed, trying again: %s", error)
            else:
                if thinned.results or removed.results:
                    _log.info(
                        "removed %d results (%d bytes); dropped the samples of %d (%d bytes)",
                        removed.results,
                        removed.size_bytes,
                        thinned.results,
                        thinned.size_bytes,
                    )
            await asyncio.sleep(_PAUSE_SECONDS)
