"""The tables of the PostgreSQL store and the way there from every version that was ever released.

A migration is never edited after its release; a new one is added at the end. Each runs in a transaction
of its own whose first statement claims its number, so that of several collectors that start at once one
migrates, and the others wait and find it done.

The tables and columns are those of the SQLite store (``sqlite_schema.py``), so that a backup of one can be
restored into the other; a test compares them. Texts are compared byte by byte (``COLLATE "C"``), as SQLite
and Python do it, whatever the database's own rules are (:class:`_Making`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from boardbench.collector.errors import StoreForeign

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]

_BY_BYTES = ' COLLATE "C"'

MAX_INDEXED = 500
"""Characters of a text that stand in an index: an entry may have 2,700 bytes, and a character four."""


def _version_1(db: _Making) -> None:
    db.execute(
        """CREATE TABLE devices (
            device_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
            hello BYTEA NOT NULL,
            first_seen DOUBLE PRECISION NOT NULL,
            last_seen DOUBLE PRECISION NOT NULL,
            heartbeat BYTEA
        )"""
    )
    db.execute(
        """CREATE TABLE spools (
            device_id TEXT COLLATE "C" NOT NULL,
            spool_id TEXT COLLATE "C" NOT NULL,
            sequence BIGINT NOT NULL,
            PRIMARY KEY (device_id, spool_id)
        )"""
    )
    db.execute(
        """CREATE TABLE results (
            arrival BIGINT NOT NULL UNIQUE,
            run_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
            device_id TEXT COLLATE "C" NOT NULL,
            spool_id TEXT COLLATE "C" NOT NULL,
            sequence BIGINT NOT NULL,
            status INTEGER NOT NULL,
            runtime TEXT COLLATE "C" NOT NULL,
            model_name TEXT COLLATE "C" NOT NULL,
            model_sha256 TEXT COLLATE "C" NOT NULL,
            finished BIGINT NOT NULL,
            received DOUBLE PRECISION NOT NULL,
            summary BYTEA NOT NULL,
            detail BYTEA NOT NULL,
            series_id BIGINT NOT NULL
        )"""
    )
    db.execute("CREATE INDEX results_by_end ON results (finished, arrival)")
    db.execute("CREATE INDEX results_by_device ON results (device_id, finished, arrival)")
    db.execute("CREATE INDEX results_by_model ON results (model_name, finished, arrival)")
    db.execute("CREATE INDEX results_by_hash ON results (model_sha256)")
    db.execute("CREATE INDEX results_by_series ON results (series_id, arrival)")
    db.execute('CREATE TABLE progress (name TEXT COLLATE "C" NOT NULL PRIMARY KEY, arrival BIGINT NOT NULL)')
    db.execute(
        """CREATE TABLE series (
            device_id TEXT COLLATE "C" NOT NULL,
            series_key TEXT COLLATE "C" NOT NULL,
            series TEXT COLLATE "C" NOT NULL,
            arrival BIGINT NOT NULL,
            places BYTEA,
            drifts BIGINT NOT NULL DEFAULT 0,
            PRIMARY KEY (device_id, series_key)
        )"""
    )
    db.execute(
        """CREATE TABLE outcomes (
            device_id TEXT COLLATE "C" NOT NULL,
            status INTEGER NOT NULL,
            total BIGINT NOT NULL,
            PRIMARY KEY (device_id, status)
        )"""
    )
    db.execute("CREATE TABLE probe (id BIGINT PRIMARY KEY, written DOUBLE PRECISION NOT NULL)")
    # Which collector holds the stream of a board: written with every sighting, and no part of a backup.
    db.execute(
        """CREATE TABLE streams (
            device_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
            collector TEXT NOT NULL,
            heard DOUBLE PRECISION NOT NULL
        )"""
    )
    # Not a sequence: the row is locked until the transaction ends, so that places become readable in
    # their order, whichever collector gave them.
    db.execute("CREATE TABLE counters (name TEXT NOT NULL PRIMARY KEY, value BIGINT NOT NULL)")
    db.execute("INSERT INTO counters (name, value) VALUES ('results', 0), ('jobs', 0)")
    _jobs(db)


def _jobs(db: _Making) -> None:
    db.execute(
        """CREATE TABLE jobs (
            arrival BIGINT NOT NULL UNIQUE,
            job_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
            batch_id TEXT COLLATE "C" NOT NULL,
            device_id TEXT COLLATE "C" NOT NULL,
            state INTEGER NOT NULL,
            priority INTEGER NOT NULL,
            holder TEXT COLLATE "C" NOT NULL,
            model_sha256 TEXT COLLATE "C" NOT NULL,
            inputs_sha256 TEXT COLLATE "C" NOT NULL,
            version BIGINT NOT NULL,
            deadline DOUBLE PRECISION NOT NULL,
            lease_until DOUBLE PRECISION,
            not_before DOUBLE PRECISION NOT NULL,
            ended DOUBLE PRECISION,
            cancelling INTEGER NOT NULL,
            lapsed INTEGER NOT NULL,
            returns INTEGER NOT NULL,
            job BYTEA NOT NULL,
            inputs BYTEA
        )"""
    )
    db.execute("CREATE INDEX jobs_by_state ON jobs (state, device_id, priority, arrival)")
    db.execute("CREATE INDEX jobs_by_device ON jobs (device_id, arrival)")
    db.execute("CREATE INDEX jobs_by_batch ON jobs (batch_id, arrival)")
    # What is looked at every second must not be all that waits.
    db.execute("CREATE INDEX jobs_by_deadline ON jobs (state, deadline)")
    db.execute("CREATE INDEX jobs_by_lease ON jobs (state, lease_until)")
    db.execute("CREATE INDEX jobs_that_wait ON jobs (state, device_id, not_before, deadline, holder)")
    db.execute("CREATE INDEX jobs_by_end ON jobs (ended)")
    db.execute(
        """CREATE TABLE batches (
            batch_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
            digest TEXT COLLATE "C" NOT NULL,
            created DOUBLE PRECISION NOT NULL
        )"""
    )
    db.execute(
        """CREATE TABLE reservations (
            device_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
            holder TEXT COLLATE "C" NOT NULL,
            reason TEXT COLLATE "C" NOT NULL,
            ends DOUBLE PRECISION NOT NULL
        )"""
    )
    db.execute(
        """CREATE TABLE labels (
            device_id TEXT COLLATE "C" NOT NULL,
            name TEXT COLLATE "C" NOT NULL,
            value TEXT COLLATE "C" NOT NULL,
            PRIMARY KEY (device_id, name)
        )"""
    )


def _version_2(db: _Making) -> None:
    """Tokens, keys and updates, which each collector had in files of its own; files that wait for boards."""
    db.execute(
        """CREATE TABLE enrolment_tokens (
            token_sha256 TEXT COLLATE "C" NOT NULL PRIMARY KEY,
            name TEXT COLLATE "C" NOT NULL,
            created DOUBLE PRECISION NOT NULL,
            expires DOUBLE PRECISION NOT NULL,
            labels TEXT COLLATE "C" NOT NULL,
            used DOUBLE PRECISION,
            device_id TEXT COLLATE "C",
            instance_id TEXT COLLATE "C"
        )"""
    )
    db.execute(
        """CREATE TABLE device_keys (
            device_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
            key_sha256 TEXT COLLATE "C" NOT NULL,
            enrolled DOUBLE PRECISION NOT NULL
        )"""
    )
    db.execute(
        """CREATE TABLE updates (
            update_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
            created BIGINT NOT NULL,
            content BYTEA NOT NULL,
            version BIGINT NOT NULL DEFAULT 1
        )"""
    )
    db.execute("INSERT INTO counters (name, value) VALUES ('updates', 0)")
    db.execute(
        """CREATE TABLE files (
            sha256 TEXT COLLATE "C" NOT NULL PRIMARY KEY,
            name TEXT COLLATE "C" NOT NULL,
            format TEXT COLLATE "C" NOT NULL,
            kind INTEGER NOT NULL,
            size_bytes BIGINT NOT NULL,
            whole INTEGER NOT NULL,
            used DOUBLE PRECISION NOT NULL
        )"""
    )
    # Rows, and not large objects, which some databases that speak PostgreSQL's language lack.
    db.execute(
        """CREATE TABLE file_chunks (
            sha256 TEXT COLLATE "C" NOT NULL,
            place BIGINT NOT NULL,
            content BYTEA NOT NULL,
            PRIMARY KEY (sha256, place)
        )"""
    )


MIGRATIONS: tuple[Callable[[_Making], None], ...] = (_version_1, _version_2)
"""The step to version n is at n - 1."""

LATEST_VERSION = len(MIGRATIONS)

DERIVED = {"series": ("series_key",)}
"""Columns that SQLite's tables lack and that follow from the others, by table."""


class _Making:
    """A connection that takes the statements of a migration as its database wants them."""

    def __init__(self, db: Connection) -> None:
        self._db = db
        row = db.execute("SELECT version()").fetchone()
        # It compares by bytes anyway, and takes no such collation for a column
        # (https://github.com/cockroachdb/cockroach/issues/108657).
        self._by_bytes = row is not None and str(row[0]).startswith("CockroachDB")

    def execute(self, statement: str) -> None:
        """Executes it."""
        self._db.execute(statement.replace(_BY_BYTES, "") if self._by_bytes else statement)


def series_key(series: str) -> str:
    """Returns the text that stands for a series in an index: itself, or a digest where it is long."""
    if len(series) <= MAX_INDEXED:
        return series
    return "sha256:" + hashlib.sha256(series.encode()).hexdigest()


def storable(text: str, limit: int | None = MAX_INDEXED) -> str:
    """Returns the text as PostgreSQL can keep and index it: without zero characters, and not too long."""
    return text.replace("\0", "\ufffd")[:limit]


def migrate(db: Connection, *, now: float, to_version: int = LATEST_VERSION) -> int:
    """Returns the version that was found, after bringing the tables to ``to_version``.

    StoreForeign when the database holds something else, or is newer than this program. The connection is
    in autocommit mode.
    """
    from psycopg import errors

    tables = {
        str(name)
        for (name,) in db.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()"
        )
    }
    if "boardbench_schema" not in tables:
        theirs = sorted(tables & {"devices", "results", "spools", "series", "outcomes", "probe"})
        if theirs:
            raise StoreForeign(
                f"it has tables of another program ({', '.join(theirs)});"
                " make a database for boardbench alone"
            )
        try:
            db.execute(
                "CREATE TABLE IF NOT EXISTS boardbench_schema"
                " (version BIGINT NOT NULL PRIMARY KEY, migrated DOUBLE PRECISION NOT NULL)"
            )
        except (errors.UniqueViolation, errors.DuplicateTable, errors.DuplicateObject):
            # IF NOT EXISTS is no lock: another collector made it, or the type of its rows, in this moment.
            pass
    found = _version(db)
    if found > LATEST_VERSION:
        raise StoreForeign(
            f"it has version {found}, and this boardbench-collector knows versions up to {LATEST_VERSION};"
            " install a newer one"
        )
    for version in range(found + 1, to_version + 1):
        try:
            with db.transaction():
                db.execute(
                    "INSERT INTO boardbench_schema (version, migrated) VALUES (%s, %s)", (version, now)
                )
                MIGRATIONS[version - 1](_Making(db))
        except errors.UniqueViolation:
            if _version(db) < version:
                raise
    return found


def _version(db: Connection) -> int:
    row = db.execute("SELECT COALESCE(MAX(version), 0) FROM boardbench_schema").fetchone()
    assert row is not None
    return int(row[0])
