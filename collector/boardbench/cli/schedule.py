"""When a suite is due: by a cron expression, and when a new file has come whole into a folder."""

from __future__ import annotations

import datetime
import time
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from boardbench.cli.errors import CliError
from boardbench.cli.suite_file import is_model


def check_cron(expression: str, timezone: str = "") -> None:
    """Raises ValueError, saying what is wrong with the expression or the time zone."""
    next(_ticks(expression, datetime.datetime.now(_zone(timezone))))


def next_tick(expression: str, timezone: str, after: float) -> float:
    """Unix time at which the expression holds next, later than ``after``."""
    begin = datetime.datetime.fromtimestamp(after, _zone(timezone))
    return next(_ticks(expression, begin)).timestamp()


def latest_tick(expression: str, timezone: str, now: float, since: float) -> float | None:
    """The last time that it held after ``since`` and until now; None when it did not."""
    found = None
    tick = since
    while (tick := next_tick(expression, timezone, tick)) <= now:
        found = tick
    return found


def _ticks(expression: str, begin: datetime.datetime) -> Iterator[datetime.datetime]:
    try:
        from cronsim import CronSim, CronSimError
    except ModuleNotFoundError:
        raise CliError("a cron expression needs cronsim: pip install 'boardbench[suites]'") from None
    try:
        return CronSim(expression, begin)
    except CronSimError as error:
        raise ValueError(
            f"cron is {expression!r}: {error}: give minute, hour, day, month and weekday, as in '0 3 * * *'"
        ) from None


def _zone(name: str) -> datetime.tzinfo | None:
    if not name:
        # Times without a zone are the machine's own, with its summer time.
        return None
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError):
        raise ValueError(f"timezone is {name!r}; give one as Europe/Zurich or UTC") from None


class Folders:
    """Files that came whole into folders: looked at again and again, since no file system tells it all.

    A file is whole when its size and time have not changed for a while, and it is at least that old. What
    was there before is known by what is remembered, so that a restart neither misses a file nor takes one
    twice.
    """

    def __init__(
        self,
        folders: Iterable[Path],
        settle_seconds: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``settle_seconds``: for so long a file must not have changed."""
        self._folders = tuple(folders)
        self._settle_seconds = settle_seconds
        self._monotonic = monotonic
        # Size and time of each file, and since when they are so.
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}

    def whole(self, known: Mapping[str, list[int]]) -> dict[Path, tuple[int, int]]:
        """Files that are whole now and not known as they are, with their size and time in nanoseconds."""
        now = self._monotonic()
        found: dict[Path, tuple[int, int]] = {}
        there: set[Path] = set()
        for path in self._models():
            try:
                about = path.stat()
            except OSError:
                continue
            there.add(path)
            mark = (about.st_size, about.st_mtime_ns)
            before, since = self._seen.get(path, (None, now))
            if before != mark:
                self._seen[path] = (mark, now)
                since = now
            if known.get(str(path)) == list(mark) or not about.st_size:
                continue
            if now - since >= self._settle_seconds:
                found[path] = mark
        for path in self._seen.keys() - there:
            del self._seen[path]
        return found

    def _models(self) -> list[Path]:
        found = []
        for folder in self._folders:
            try:
                found += sorted(path for path in folder.iterdir() if is_model(path))
            except OSError:
                # A share that is not mounted now may be another time.
                continue
        return found
