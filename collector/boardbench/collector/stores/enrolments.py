"""Which boards may report: tokens that each enrol one board, and the keys that boards have got for them.

One small SQLite file of its own beside the results, because ``boardbench-collector token`` writes into it
while the collector runs, which has the results to itself. Neither tokens nor keys are in it, only their
SHA-256: both are random and long enough that no salt is needed. The SQL is the plain kind that every
database has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from boardbench.collector.errors import InvalidRequest, NotAllowed, StoreUnavailable

LONGEST_HOURS = 24.0
"""A token can be read by whoever has the card that it is on: it must not be of use for long."""

_TOKEN_BYTES = 24
_BUSY_SECONDS = 10.0
_TABLES = (
    """CREATE TABLE IF NOT EXISTS tokens (
        token_sha256 TEXT NOT NULL PRIMARY KEY,
        name TEXT NOT NULL,
        created REAL NOT NULL,
        expires REAL NOT NULL,
        labels TEXT NOT NULL,
        used REAL,
        device_id TEXT,
        instance_id TEXT
    )""",
    """CREATE TABLE IF NOT EXISTS devices (
        device_id TEXT NOT NULL PRIMARY KEY,
        key_sha256 TEXT NOT NULL,
        enrolled REAL NOT NULL
    )""",
)


@dataclass(frozen=True)
class Token:
    """A token as the operator sees it later: by its beginning, which says nothing."""

    name: str
    created: float
    expires: float
    labels: Mapping[str, str]
    used: float | None
    device_id: str


class Enrolments:
    """Tokens and keys in one file. Calls are quick and may come from any thread."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Makes the file where there is none. Raises StoreUnavailable."""
        self._path = path
        self._clock = clock
        self._turn = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Made with its mode: what SQLite makes anybody may read.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            for statement in _TABLES:
                self._db.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise StoreUnavailable(f"{path}: can't be used: {error}") from error

    def close(self) -> None:
        """Lets the file go."""
        with self._turn:
            self._db.close()

    def create(self, hours: float = LONGEST_HOURS, labels: Mapping[str, str] | None = None) -> str:
        """A new token, which is kept nowhere; good for one board and for so many hours."""
        if not 0 < hours <= LONGEST_HOURS:
            raise InvalidRequest(f"a token is good for up to {LONGEST_HOURS:g} hours, not {hours:g}")
        token = f"bbt_{secrets.token_urlsafe(_TOKEN_BYTES)}"
        now = self._clock()
        with self._writing() as db:
            # Those that expired long ago say nothing any more.
            db.execute("DELETE FROM tokens WHERE expires < ?", (now - 30 * 86400,))
            db.execute(
                "INSERT INTO tokens (token_sha256, name, created, expires, labels) VALUES (?,?,?,?,?)",
                (
                    _sha256(token),
                    token[:10],
                    now,
                    now + hours * 3600,
                    json.dumps(dict(labels or {}), sort_keys=True),
                ),
            )
        return token

    def tokens(self) -> list[Token]:
        """All that are known, the latest first."""
        with self._turn, self._failing():
            rows = self._db.execute(
                "SELECT name, created, expires, labels, used, device_id FROM tokens ORDER BY created DESC"
            ).fetchall()
        return [
            Token(name, created, expires, json.loads(labels), used, device_id or "")
            for name, created, expires, labels, used, device_id in rows
        ]

    def revoke(self, name: str) -> bool:
        """Whether there was a token that begins like this and was not used; it is of no use from now on."""
        with self._writing() as db:
            done = db.execute("DELETE FROM tokens WHERE name = ? AND used IS NULL", (name[:10],))
        return done.rowcount > 0

    def forget(self, device_id: str) -> bool:
        """Whether the board had a key; it has none from now on."""
        with self._writing() as db:
            done = db.execute("DELETE FROM devices WHERE device_id = ?", (device_id,))
        return done.rowcount > 0

    def enroll(self, token: str, device_id: str, instance_id: str) -> tuple[str, dict[str, str]]:
        """The key and the labels of the board that shows the token. Raises NotAllowed.

        The same agent may show its token again while it is good: the answer to the first time may have been
        lost. It gets another key then, and the first is worth nothing.
        """
        now, digest = self._clock(), _sha256(token)
        key = secrets.token_urlsafe(32)
        with self._writing() as db:
            row = db.execute(
                "SELECT expires, labels, used, device_id, instance_id FROM tokens WHERE token_sha256 = ?",
                (digest,),
            ).fetchone()
            if row is None:
                raise NotAllowed("there is no such token: make one with `boardbench-collector token create`")
            expires, labels, used, by_device, by_instance = row
            if expires < now:
                raise NotAllowed("the token has expired: make one with `boardbench-collector token create`")
            if used is not None and (by_device, by_instance) != (device_id, instance_id or None):
                raise NotAllowed(
                    f"the token was used by board {by_device}: make another with "
                    "`boardbench-collector token create`"
                )
            db.execute(
                "UPDATE tokens SET used = ?, device_id = ?, instance_id = ? WHERE token_sha256 = ?",
                (now, device_id, instance_id or None, digest),
            )
            db.execute("DELETE FROM devices WHERE device_id = ?", (device_id,))
            db.execute(
                "INSERT INTO devices (device_id, key_sha256, enrolled) VALUES (?,?,?)",
                (device_id, _sha256(key), now),
            )
        return key, json.loads(labels)

    def check(self, device_id: str, key: str, *, required: bool) -> None:
        """Returns when the board may report; NotAllowed says what it lacks."""
        if not key and not required:
            return
        with self._turn, self._failing():
            row = self._db.execute(
                "SELECT key_sha256 FROM devices WHERE device_id = ?", (device_id,)
            ).fetchone()
        if key and row is not None and secrets.compare_digest(row[0], _sha256(key)):
            return
        if not key:
            problem = "is not enrolled here" if row is None else "is enrolled here and shows no key"
        else:
            problem = "shows a key that is not its own, or no longer"
        raise NotAllowed(
            f"board {device_id} {problem}: make a token with `boardbench-collector token create`, and on the "
            "board run `boardbench-agent enroll --collector HOST --token TOKEN`"
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._turn, self._failing():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{self._path}: {error}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
