"""Which boards may report: tokens that each enrol one board, and the keys that boards have got for them.

Neither tokens nor keys are kept, only their SHA-256: both are random and long enough that no salt is needed.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from boardbench.collector.errors import InvalidRequest, NotAllowed
from boardbench.collector.stores.beside import Session, Tables

LONGEST_HOURS = 24.0
"""A token can be read by whoever has the card that it is on: it must not be of use for long."""

_TOKEN_BYTES = 24
_MAKE = "make one with `boardbench-collector token create`"


def _version_1(db: sqlite3.Connection) -> None:
    """The names that the tables have in a database that they share with results."""
    found = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "tokens" in found:
        db.execute("ALTER TABLE tokens RENAME TO enrolment_tokens")
        db.execute("ALTER TABLE devices RENAME TO device_keys")
        return
    db.execute(
        """CREATE TABLE enrolment_tokens (
            token_sha256 TEXT NOT NULL PRIMARY KEY,
            name TEXT NOT NULL,
            created REAL NOT NULL,
            expires REAL NOT NULL,
            labels TEXT NOT NULL,            -- JSON
            used REAL,                       -- NULL: not yet
            device_id TEXT,
            instance_id TEXT                 -- NULL: the agent told none
        )"""
    )
    db.execute(
        """CREATE TABLE device_keys (
            device_id TEXT NOT NULL PRIMARY KEY,
            key_sha256 TEXT NOT NULL,
            enrolled REAL NOT NULL
        )"""
    )


MIGRATIONS = (_version_1,)
"""Of the SQLite file: the step to version n is at n - 1. PostgreSQL's are in ``postgres_schema.py``."""

_NEW_KEY = (
    "ON CONFLICT (device_id) DO UPDATE SET key_sha256 = excluded.key_sha256, enrolled = excluded.enrolled"
)

TABLES = {
    "enrolment_tokens": "ON CONFLICT DO NOTHING",
    "device_keys": f"{_NEW_KEY} WHERE excluded.enrolled > device_keys.enrolled",
}
"""What becomes of a row that is taken over from another collector's file and is there already."""


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
    """Tokens and keys, of one collector or of all that share a database."""

    def __init__(self, tables: Tables, clock: Callable[[], float] = time.time) -> None:
        self._tables = tables
        self._clock = clock

    async def create(self, hours: float = LONGEST_HOURS, labels: Mapping[str, str] | None = None) -> str:
        """A new token, which is kept nowhere; good for one board and for so many hours."""
        if not 0 < hours <= LONGEST_HOURS:
            raise InvalidRequest(f"a token is good for up to {LONGEST_HOURS:g} hours, not {hours:g}")
        token = f"bbt_{secrets.token_urlsafe(_TOKEN_BYTES)}"
        now = self._clock()
        told = json.dumps(dict(labels or {}), sort_keys=True)
        row = (_sha256(token), token[:10], now, now + hours * 3600, told)

        def write(db: Session) -> None:
            # Those that expired long ago say nothing any more.
            db.execute("DELETE FROM enrolment_tokens WHERE expires < ?", (now - 30 * 86400,))
            db.execute(
                "INSERT INTO enrolment_tokens (token_sha256, name, created, expires, labels)"
                " VALUES (?,?,?,?,?)",
                row,
            )

        await self._tables.write(write)
        return token

    async def tokens(self) -> list[Token]:
        """All that are known, the latest first."""

        def read(db: Session) -> list[Token]:
            rows = db.execute(
                "SELECT name, created, expires, labels, used, device_id FROM enrolment_tokens"
                " ORDER BY created DESC"
            ).fetchall()
            return [
                Token(name, created, expires, json.loads(labels), used, device_id or "")
                for name, created, expires, labels, used, device_id in rows
            ]

        return await self._tables.read(read)

    async def revoke(self, name: str) -> bool:
        """Whether there was a token that begins like this and was not used; it is of no use from now on."""
        return await self._removed("enrolment_tokens WHERE name = ? AND used IS NULL", name[:10])

    async def forget(self, device_id: str) -> bool:
        """Whether the board had a key; it has none from now on."""
        return await self._removed("device_keys WHERE device_id = ?", device_id)

    async def _removed(self, which: str, value: str) -> bool:
        def write(db: Session) -> bool:
            return bool(db.execute(f"DELETE FROM {which}", (value,)).rowcount > 0)

        return await self._tables.write(write)

    async def enroll(self, token: str, device_id: str, instance_id: str) -> tuple[str, dict[str, str]]:
        """The key and the labels of the board that shows the token. Raises NotAllowed.

        The same agent may show its token again while it is good: the answer to the first time may have been
        lost. It gets another key then, and the first is worth nothing.
        """
        now, digest = self._clock(), _sha256(token)
        key = secrets.token_urlsafe(32)

        def write(db: Session) -> dict[str, str]:
            # One statement takes the token: of two that show it at once, at one collector or at two, the
            # database lets one have it.
            taken = db.execute(
                "UPDATE enrolment_tokens SET used = ?, device_id = ?, instance_id = ?"
                " WHERE token_sha256 = ? AND expires >= ? AND (used IS NULL"
                " OR (device_id = ? AND COALESCE(instance_id, '') = ?)) RETURNING labels",
                (now, device_id, instance_id or None, digest, now, device_id, instance_id),
            ).fetchall()
            if not taken:
                raise NotAllowed(_why_not(db, digest, now))
            db.execute(
                f"INSERT INTO device_keys (device_id, key_sha256, enrolled) VALUES (?,?,?) {_NEW_KEY}",
                (device_id, _sha256(key), now),
            )
            return dict(json.loads(taken[0][0]))

        return key, await self._tables.write(write)

    async def check(self, device_id: str, key: str, *, required: bool) -> None:
        """Returns when the board may report; NotAllowed says what it lacks."""
        if not key and not required:
            return

        def read(db: Session) -> str | None:
            row = db.execute(
                "SELECT key_sha256 FROM device_keys WHERE device_id = ?", (device_id,)
            ).fetchone()
            return None if row is None else str(row[0])

        kept = await self._tables.read(read)
        if key and kept is not None and secrets.compare_digest(kept, _sha256(key)):
            return
        if not key:
            problem = "is not enrolled here" if kept is None else "is enrolled here and shows no key"
        else:
            problem = "shows a key that is not its own, or no longer"
        raise NotAllowed(
            f"board {device_id} {problem}: make a token with `boardbench-collector token create`, and on the "
            "board run `boardbench-agent enroll --collector HOST --token TOKEN`"
        )


def _why_not(db: Session, digest: str, now: float) -> str:
    """Returns what is wrong with a token that could not be taken."""
    row = db.execute(
        "SELECT expires, device_id FROM enrolment_tokens WHERE token_sha256 = ?", (digest,)
    ).fetchone()
    if row is None:
        return f"there is no such token: {_MAKE}"
    if row[0] < now:
        return f"the token has expired: {_MAKE}"
    return f"the token was used by board {row[1]}: {_MAKE.replace('one', 'another')}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
