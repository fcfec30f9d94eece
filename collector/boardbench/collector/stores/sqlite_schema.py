"""The tables of the SQLite store and the way there from every version that was ever released.

A migration is never edited after its release; a new one is added at the end. Each runs in a
transaction of its own together with the line that says it ran, so a crash leaves one version or the other.
"""

from __future__ import annotations

import functools
import json
import sqlite3
from collections.abc import Callable

from boardbench.collector.errors import StoreForeign
from boardbench.collector.store import Series, is_short, places_of, series_id, series_of, split
from boardbench.v1 import result_pb2

APPLICATION_ID = 0x62623031
"""Written into the file's header, so that ``file`` and this program tell it from any other SQLite file."""


def _version_1(db: sqlite3.Connection) -> None:
    db.execute(
        """CREATE TABLE devices (
            device_id TEXT NOT NULL PRIMARY KEY,
            hello BLOB NOT NULL,             -- boardbench.v1.Hello
            first_seen REAL NOT NULL,        -- Unix seconds, the collector's clock
            last_seen REAL NOT NULL,
            heartbeat BLOB                   -- boardbench.v1.Heartbeat; NULL before the first
        ) WITHOUT ROWID"""
    )
    db.execute(
        """CREATE TABLE spools (
            device_id TEXT NOT NULL,
            spool_id TEXT NOT NULL,
            sequence INTEGER NOT NULL,       -- everything up to here was dealt with
            PRIMARY KEY (device_id, spool_id)
        ) WITHOUT ROWID"""
    )
    db.execute(
        """CREATE TABLE results (
            arrival INTEGER PRIMARY KEY,
            run_id TEXT NOT NULL UNIQUE,
            device_id TEXT NOT NULL,         -- the sender, by its hello
            spool_id TEXT NOT NULL,
            sequence INTEGER NOT NULL,
            status INTEGER NOT NULL,         -- boardbench.v1.RunStatus
            runtime TEXT NOT NULL,
            model_name TEXT NOT NULL,
            model_sha256 TEXT NOT NULL,
            finished INTEGER NOT NULL,       -- Unix microseconds, the board's clock
            received REAL NOT NULL,          -- Unix seconds, the collector's clock
            record BLOB NOT NULL             -- boardbench.v1.RunResult
        )"""
    )
    _index_results(db)


def _index_results(db: sqlite3.Connection) -> None:
    db.execute("CREATE INDEX results_by_end ON results (finished, arrival)")
    db.execute("CREATE INDEX results_by_device ON results (device_id, finished, arrival)")
    db.execute("CREATE INDEX results_by_model ON results (model_name, finished, arrival)")
    db.execute("CREATE INDEX results_by_hash ON results (model_sha256)")


def _version_2(db: sqlite3.Connection) -> None:
    """Long lists apart from the rest; each series' latest result and the counts kept ready for a scrape."""
    for index in ("results_by_end", "results_by_device", "results_by_model", "results_by_hash"):
        db.execute(f"DROP INDEX {index}")
    db.execute("ALTER TABLE results RENAME TO results_1")
    db.execute(
        """CREATE TABLE results (
            arrival INTEGER PRIMARY KEY,
            run_id TEXT NOT NULL UNIQUE,
            device_id TEXT NOT NULL,
            spool_id TEXT NOT NULL,
            sequence INTEGER NOT NULL,
            status INTEGER NOT NULL,
            runtime TEXT NOT NULL,
            model_name TEXT NOT NULL,
            model_sha256 TEXT NOT NULL,
            finished INTEGER NOT NULL,
            received REAL NOT NULL,
            summary BLOB NOT NULL,           -- RunResult without raw samples and per-op list
            detail BLOB NOT NULL             -- those two; summary || detail is the whole record
        )"""
    )
    db.execute(
        """CREATE TABLE series (
            device_id TEXT NOT NULL,
            series TEXT NOT NULL,            -- what series_of() says, as a JSON list
            arrival INTEGER NOT NULL,        -- the latest SUCCEEDED result of it
            PRIMARY KEY (device_id, series)
        ) WITHOUT ROWID"""
    )
    db.execute(
        """CREATE TABLE outcomes (
            device_id TEXT NOT NULL,
            status INTEGER NOT NULL,
            total INTEGER NOT NULL,          -- only ever grows, also when results are removed
            PRIMARY KEY (device_id, status)
        ) WITHOUT ROWID"""
    )
    db.execute("CREATE TABLE probe (id INTEGER PRIMARY KEY CHECK (id = 1), written REAL NOT NULL)")
    last = 0
    while rows := db.execute(
        "SELECT arrival, run_id, device_id, spool_id, sequence, status, runtime, model_name, model_sha256,"
        " finished, received, record FROM results_1 WHERE arrival > ? ORDER BY arrival LIMIT 100",
        (last,),
    ).fetchall():
        for *columns, record in rows:
            last, device_id, status = columns[0], columns[2], columns[5]
            result = result_pb2.RunResult.FromString(record)
            db.execute("INSERT INTO results VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)", (*columns, *split(result)))
            db.execute(ADD_OUTCOMES, (device_id, status, 1))
            if status == result_pb2.RUN_STATUS_SUCCEEDED:
                db.execute(SET_SERIES, (device_id, series_text(series_of(result)), last))
    db.execute("DROP TABLE results_1")
    _index_results(db)


def _version_3(db: sqlite3.Connection) -> None:
    """Where the ops of each series last were, and how often they were elsewhere than just before."""
    db.execute("ALTER TABLE series ADD COLUMN places BLOB")  # Places.packed(); NULL: never known
    db.execute("ALTER TABLE series ADD COLUMN drifts INTEGER NOT NULL DEFAULT 0")
    for device_id, series, arrival in db.execute("SELECT device_id, series, arrival FROM series").fetchall():
        found = db.execute("SELECT summary, detail FROM results WHERE arrival = ?", (arrival,)).fetchone()
        places = places_of(result_pb2.RunResult.FromString(found[0] + found[1])) if found else None
        if places is not None:
            db.execute(
                "UPDATE series SET places = ? WHERE device_id = ? AND series = ?",
                (places.packed(), device_id, series),
            )


def _version_4(db: sqlite3.Connection) -> None:
    """Jobs, reservations and the operator's labels."""
    db.execute(
        """CREATE TABLE jobs (
            arrival INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice: pages end at one
            job_id TEXT NOT NULL UNIQUE,
            batch_id TEXT NOT NULL,
            device_id TEXT NOT NULL,
            state INTEGER NOT NULL,          -- boardbench.v1.JobState
            priority INTEGER NOT NULL,
            holder TEXT NOT NULL,
            model_sha256 TEXT NOT NULL,
            inputs_sha256 TEXT NOT NULL,     -- empty: none
            version INTEGER NOT NULL,        -- rises with every change that can be seen
            deadline REAL NOT NULL,          -- Unix seconds, the collector's clock, as all times here
            lease_until REAL,                -- NULL: no board has it
            not_before REAL NOT NULL,
            ended REAL,
            cancelling INTEGER NOT NULL,
            lapsed INTEGER NOT NULL,
            returns INTEGER NOT NULL,
            job BLOB NOT NULL,               -- boardbench.v1.Job
            inputs BLOB                      -- boardbench.v1.Model
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
            batch_id TEXT NOT NULL PRIMARY KEY,
            digest TEXT NOT NULL,            -- of the request
            created REAL NOT NULL
        ) WITHOUT ROWID"""
    )
    db.execute(
        """CREATE TABLE reservations (
            device_id TEXT NOT NULL PRIMARY KEY,
            holder TEXT NOT NULL,
            reason TEXT NOT NULL,
            ends REAL NOT NULL
        ) WITHOUT ROWID"""
    )
    db.execute(
        """CREATE TABLE labels (
            device_id TEXT NOT NULL,
            name TEXT NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (device_id, name)
        ) WITHOUT ROWID"""
    )


def _version_5(db: sqlite3.Connection) -> None:
    """Which series a result is of, and how far old results have been made smaller."""
    db.execute("ALTER TABLE results ADD COLUMN series_id INTEGER NOT NULL DEFAULT 0")  # store.series_id()
    db.execute(
        "CREATE TABLE progress (name TEXT NOT NULL PRIMARY KEY, arrival INTEGER NOT NULL) WITHOUT ROWID"
    )
    last = 0
    while rows := db.execute(
        "SELECT arrival, device_id, summary FROM results WHERE arrival > ? ORDER BY arrival LIMIT 1000",
        (last,),
    ).fetchall():
        last = rows[-1][0]
        db.executemany(
            "UPDATE results SET series_id = ? WHERE arrival = ?",
            [
                (series_id(device_id, series_of(result_pb2.RunResult.FromString(summary))), arrival)
                for arrival, device_id, summary in rows
            ],
        )
    db.execute("CREATE INDEX results_by_series ON results (series_id, arrival)")


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    _version_1,
    _version_2,
    _version_3,
    _version_4,
    _version_5,
)
"""The step to version n is at n - 1."""

LATEST_VERSION = len(MIGRATIONS)

ADD_OUTCOMES = (
    "INSERT INTO outcomes (device_id, status, total) VALUES (?,?,?)"
    " ON CONFLICT (device_id, status) DO UPDATE SET total = total + excluded.total"
)

SET_SERIES = (
    "INSERT INTO series (device_id, series, arrival) VALUES (?,?,?)"
    " ON CONFLICT (device_id, series) DO UPDATE SET arrival = excluded.arrival"
)

TRACK_SERIES = (
    "INSERT INTO series (device_id, series, arrival, places, drifts) VALUES (?,?,?,?,?)"
    " ON CONFLICT (device_id, series) DO UPDATE SET arrival = excluded.arrival,"
    " places = COALESCE(excluded.places, places), drifts = drifts + excluded.drifts"
)


def series_text(series: Series) -> str:
    """Returns the series as the text that stands for it in the table."""
    return (_series_text if is_short(series) else _series_text.__wrapped__)(series)


@functools.lru_cache(maxsize=1 << 14)
def _series_text(series: Series) -> str:
    return json.dumps(
        [
            series.model_name,
            series.model_sha256,
            series.runtime,
            series.target,
            series.threads,
            series.variant,
        ],
        ensure_ascii=False,
        separators=(",", ":"),
    )


def version_of(db: sqlite3.Connection) -> int:
    """Returns the version of the tables, 0 when there are none; StoreForeign says why they can't be used."""
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if application_id != APPLICATION_ID and (application_id or tables):
        raise StoreForeign("it is an SQLite file, but no store of boardbench-collector")
    found = 0
    if "schema_version" in tables:
        found = db.execute("SELECT COALESCE(MAX(version), 0) FROM schema_version").fetchone()[0]
    if found > LATEST_VERSION:
        raise StoreForeign(
            f"it has version {found}, and this boardbench-collector knows versions up to {LATEST_VERSION};"
            " install a newer one"
        )
    return int(found)


def migrate(db: sqlite3.Connection, *, now: float, to_version: int = LATEST_VERSION) -> int:
    """Returns the version that was found, after bringing the tables to ``to_version``.

    StoreForeign when the file is something else, or newer than this program. The connection is in
    autocommit mode (``isolation_level=None``).
    """
    found = version_of(db)
    for version in range(found + 1, to_version + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            if version == 1:
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(
                    "CREATE TABLE schema_version"
                    " (version INTEGER NOT NULL PRIMARY KEY, migrated REAL NOT NULL)"
                )
            MIGRATIONS[version - 1](db)
            db.execute("INSERT INTO schema_version (version, migrated) VALUES (?,?)", (version, now))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
    return found
