"""Connections to PostgreSQL: how they are made, what is made sure of, and what their errors mean."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from boardbench.collector.errors import (
    CollectorError,
    StartError,
    StoreDamaged,
    StoreForeign,
    StoreUnavailable,
)
from boardbench.collector.stores.postgres_schema import migrate

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 10
"""How long a server may take to answer before it counts as gone."""

_STATEMENT_SECONDS = 60
"""How long one statement may take, so that a lock that somebody holds by hand does not stop a collector."""


def place(url: str) -> str:
    """Returns where the database is, without user and password: as in ``postgresql://host:5432/boardbench``."""
    parts = urlsplit(url)
    hosts = parts.netloc.rpartition("@")[2] or parse_qs(parts.query).get("host", ["localhost"])[0]
    return f"postgresql://{hosts}{parts.path if parts.path.startswith('/') else '/'}"


def connect(url: str) -> Connection:
    """Returns a connection in autocommit mode, for one thread at a time."""
    import psycopg

    parts = psycopg.conninfo.conninfo_to_dict(url)
    more: dict[str, Any] = {"application_name": "boardbench-collector"} | {
        # A server that is gone without a word is noticed in half a minute, and not in two hours.
        "connect_timeout": _CONNECT_SECONDS,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    }
    db: Connection = psycopg.connect(
        url, autocommit=True, **{name: value for name, value in more.items() if name not in parts}
    )
    try:
        db.execute(f"SET statement_timeout = {_STATEMENT_SECONDS * 1000}")
    except BaseException:
        db.close()
        raise
    return db


def opened(url: str, clock: Callable[[], float]) -> Connection:
    """Returns the connection that writes, its tables up to date."""
    try:
        import psycopg
    except ImportError as error:
        raise StartError("a store in PostgreSQL needs psycopg: pip install 'boardbench[postgres]'") from error
    name = place(url)
    try:
        psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.Error as error:
        raise StartError(f"--store {name} is no address: {' '.join(str(error).split())}") from error
    try:
        db = connect_writer(url, name)
        try:
            migrate(db, now=clock())
        except BaseException:
            db.close()
            raise
    except StoreForeign as error:
        raise StoreForeign(f"can't use {name}: {error}") from error
    except psycopg.Error as error:
        raise told(error, name) from error
    return db


def connect_writer(url: str, name: str) -> Connection:
    """Returns a connection whose commits are kept; StoreForeign when the database can't hold what comes."""
    db = connect(url)
    try:
        _check_encoding(db, name)
        _keep_promises(db, name)
    except BaseException:
        db.close()
        raise
    return db


def _check_encoding(db: Connection, name: str) -> None:
    """Returns when text comes back as it was stored; StoreForeign when the database knows only bytes."""
    encoding = db.info.parameter_status("server_encoding")
    if encoding not in {"UTF8", None}:
        raise StoreForeign(
            f"{name} keeps text as {encoding}, which can't hold every name of a model or board: create it"
            " with createdb --encoding UTF8 --template template0"
        )


def _keep_promises(db: Connection, name: str) -> None:
    """Makes a commit mean what the collector tells boards: that a power cut does not undo it."""
    import psycopg

    try:
        row = db.execute("SHOW synchronous_commit").fetchone()
        if row is not None and row[0] == "off":
            db.execute("SET synchronous_commit = on")
        row = db.execute("SHOW fsync").fetchone()
    except psycopg.errors.UndefinedObject:
        return  # a server that has no such setting has no way to be told to lose commits
    if row is not None and row[0] == "off":
        _log.warning(
            "%s runs with fsync = off: a power cut there loses results that boards were told are kept", name
        )


def is_passing(error: BaseException) -> bool:
    """Whether the connection failed, or the moment, so that the same may be answered on another one.

    What took too long would take as long again.
    """
    from psycopg import InterfaceError, OperationalError, errors

    failed = isinstance(error, (InterfaceError, OperationalError))
    return failed and not isinstance(error, errors.QueryCanceled)


def told(error: BaseException, name: str) -> CollectorError:
    """Returns the error in the collector's words."""
    if isinstance(error, CollectorError):
        return error
    import psycopg

    text = " ".join(str(error).split())
    code = error.sqlstate if isinstance(error, psycopg.Error) else None
    if code in ("53100", "53200"):
        return StoreUnavailable(f"{name} has no space left ({text}); agents keep their results meanwhile")
    if code in ("XX001", "XX002"):
        return StoreDamaged(f"{name} is damaged ({text}); restore a backup")
    if code in ("25006", "42501"):
        return StoreUnavailable(f"{name} can't be written ({text}); name the primary, and a user that may")
    if isinstance(error, psycopg.OperationalError) and code is None:
        return StoreUnavailable(f"{name} can't be reached: {text}")
    return StoreUnavailable(f"{name}: {text}")
