"""Everything the collector can complain about, as one tree.

    CollectorError
    ├── StartError            it can't start: an address is taken, a folder can't be used, …
    ├── RequestError          a caller asked for something that can't be answered
    │   ├── InvalidRequest    the question itself is wrong
    │   ├── NotAllowed        whoever asks has not shown that it may
    │   ├── NotFound          nothing has that name
    │   ├── Ambiguous         more than one thing has that name
    │   ├── Occupied          somebody else has it
    │   └── NoRoom            it does not fit
    ├── ResultRefused         a record can never be stored; the rest of its stream can
    ├── PlaceTaken            another run has had the record's place in its spool
    ├── StreamEnded           the collector ends an agent's stream; the agent may come back
    │   ├── Superseded        the same board opened a newer stream
    │   ├── IdentityTaken     another agent with the same identity has a stream
    │   ├── SilentAgent       no message for several heartbeats
    │   └── ShuttingDown      the collector stops
    └── StoreError            the store can't do it now
        ├── StoreUnavailable  disk full, locked, closed: the same call may work later
        ├── StoreDamaged      what is on disk is not what was written
        ├── StoreForeign      the file is no store of this program, or of a newer one
        ├── BackupUnfit       a backup is damaged, not whole, or of a newer program
        └── OutOfOrder        the record before this one is not stored; start again after the last one that is

Third-party exceptions become one of these at one boundary each: SQLite's in ``stores/sqlite.py`` and, for
the small files, in ``stores/beside.py``; PostgreSQL's in ``stores/postgres_connection.py``; the sockets' in
``serve.py``. What a caller is told is decided in ``service.py`` (gRPC status) and ``web/app.py`` (HTTP
status), and nowhere else.
"""

from __future__ import annotations


class CollectorError(Exception):
    """Any complaint of the collector; the message says what, which, and what to do."""


class StartError(CollectorError):
    """The collector can't start."""


class RequestError(CollectorError):
    """A caller asked for something that can't be answered."""


class InvalidRequest(RequestError):
    """The question itself is wrong."""


class NotAllowed(RequestError):
    """Whoever asks has not shown that it may."""


class NotFound(RequestError):
    """Nothing has the name that was asked for."""


class Ambiguous(RequestError):
    """More than one thing has the name that was asked for."""


class Occupied(RequestError):
    """Somebody else has what was asked for."""


class NoRoom(RequestError):
    """There is no room for it now."""


class ResultRefused(CollectorError):
    """A record can never be stored, however often it is sent.

    ``code`` is a short stable word for counting, the message is for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class PlaceTaken(CollectorError):
    """Another run has had the record's place in its spool: the spool was copied, or set back."""

    def __init__(self, device_id: str, spool_id: str, sequence: int) -> None:
        super().__init__(
            f"device {device_id}, spool {spool_id}: another run was stored as {sequence};"
            " the spool was copied to a second board, or set back"
        )


class StreamEnded(CollectorError):
    """The collector ends an agent's stream; the agent may come back."""


class Superseded(StreamEnded):
    """The same board opened a newer stream."""


class IdentityTaken(StreamEnded):
    """Another agent with the same identity has a stream."""


class SilentAgent(StreamEnded):
    """Nothing was heard for several heartbeats."""


class ShuttingDown(StreamEnded):
    """The collector stops."""


class StoreError(CollectorError):
    """The store can't do it now."""


class StoreUnavailable(StoreError):
    """Disk full, locked or closed: the same call may work later."""


class StoreDamaged(StoreError):
    """What is on disk is not what was written."""


class StoreForeign(StoreError):
    """The file is no store of this program, or was written by a newer one."""


class BackupUnfit(StoreError):
    """A backup is damaged, not whole, or was made by a newer program."""


class OutOfOrder(StoreError):
    """The record before this one is not stored, so this one must wait for it."""
