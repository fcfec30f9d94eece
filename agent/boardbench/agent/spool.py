"""Results on the disk until the collector has them; bounded, safe from ``kill -9`` and power cuts.

    state                        two slots, written in turn and in place, so one is always whole:
                                 spool id, sequences reserved, sequences never sent, done, dropped
    00000000000000000007.seg     header: magic, epoch, spool id; then records: length, CRC-32, sequence,
                                 run id, payload

What makes it safe:

- ``append`` returns after fdatasync of the segment and fsync of the folder when the segment is new.
- A record's CRC-32 begins with the segment's random epoch: old bytes that a power cut leaves in a new
  file's blocks are no records of it. Reading a segment ends at the first record that does not hold.
- Nothing is ever appended to a segment of an earlier start, whose end may be torn.
- Sequences are reserved in blocks, before the first is used. A record that was only in memory and was sent,
  and whose sequence the disk never saw, is therefore no obstacle to the next start: a number that was
  used once is not used again, or the collector would take a new result for a repeat.
- Numbers from ``unsent_from`` on were never sent. If the collector says that it has one of them, then this
  spool is a copy of another (an image of the card that was restored or cloned): it takes a new identity.
- A state that can't be read, or can't be written at start, also means a new identity. Records keep the one
  they were written with.
- The count of what is done is only a hint: what is sent again is stored once.

What is acknowledged stays for a while, as far as there is room: a collector that was set back to a backup
welcomes the agent with less than it once had, and gets the rest again. What the journal of runs holds stays
until it lets go of it, acknowledged, refused or dropped: nowhere else is it written.

While the disk is full or fails, results go to a bounded ring in memory, and from there to the disk when
it is back.
"""

from __future__ import annotations

import bisect
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent import folder
from boardbench.agent.errors import ConfigurationError, StorageError, Unavailable

_log = logging.getLogger(__name__)

# Small, so that acknowledged results soon leave the disk; large, so that there are few files.
SEGMENT_BYTES = 1024 * 1024
# Starts are rarer than results; 2^64 sequences last for 2^48 starts.
_RESERVED_AT_ONCE = 1 << 16
_SEGMENT_SUFFIX = ".seg"
_SEGMENT_MAGIC = b"BBSPOOL\x01"
_HEADER = struct.Struct("<8s8s16s")
# Each takes half a kilobyte of memory.
_KEPT_RECORDS = 2048
_RECORD = struct.Struct("<IIQH")
_CRC = struct.Struct("<I")
_STATE_MAGIC = b"BBSTATE\x01"
_STATE = struct.Struct("<8sQ16sQQQQ")
# A slot has a page of its own: a torn write harms one of them.
_SLOT_BYTES = 4096


@dataclass(frozen=True)
class Record:
    """A result with its place: the key under which the collector stores it once."""

    spool_id: str
    sequence: int
    run_id: str
    payload: bytes


@dataclass(frozen=True)
class SpoolStatus:
    """How full the spool is; ``trouble`` says why results are in memory only, empty when they are not."""

    spool_id: str
    pending: int
    used_bytes: int
    limit_bytes: int
    dropped: int
    trouble: str


class Disk:
    """What the spool asks of the disk; another one in tests, to fail or to cut the power."""

    def create(self, path: Path) -> int:
        """A descriptor of a new file."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def open_state(self, path: Path) -> int:
        """A descriptor of the state file, which is made when it is not there."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        """All of the data, there; on the platter only after :meth:`sync`."""
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written

    def truncate(self, descriptor: int, size: int) -> None:
        """Cuts the file."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """The file's bytes last from now on."""
        os.fdatasync(descriptor)

    def sync_folder(self, path: Path) -> None:
        """The folder's names last from now on."""
        folder.sync(path)

    def unlink(self, path: Path) -> None:
        """Removes a file."""
        path.unlink(missing_ok=True)

    def free_bytes(self, path: Path) -> int:
        """Bytes that may still be written to the file system."""
        return folder.free_bytes(path)


@dataclass(slots=True)
class _Segment:
    number: int
    path: Path
    epoch: bytes
    spool_id: str
    size_bytes: int
    # Records whose current copy is here, and how many of them wait.
    sequences: list[int]
    waiting: int = 0
    # Unix time.
    written_at: float = 0.0


@dataclass(slots=True)
class _Entry:
    sequence: int
    run_id: str
    spool_id: str
    done: bool = False
    # The collector will not get it: it is here only to be read.
    lost: bool = False
    # On the disk.
    segment: _Segment | None = None
    offset: int = 0
    length: int = 0
    # In memory only.
    payload: bytes | None = None


class Spool:
    """Results in the order of their sequences. Every method may be called from every thread.

    Calls that write wait for the disk: an event loop calls them in a thread. Raises ConfigurationError when
    another process uses the folder or this one may not; every other trouble with the disk is survived,
    logged and told by ``status()``.
    """

    def __init__(
        self,
        root: Path,
        limit_bytes: int,
        # Of what is free: the spool must not be what fills up the card.
        free_share: float = 0.1,
        *,
        # Of what is acknowledged, and not longer than this.
        kept_bytes: int = 0,
        kept_seconds: float = 14 * 86400.0,
        # Acknowledgements that are noted together: each note is a page of flash, written over the last one.
        # After a kill as many results look as if they waited, until the collector says what it has.
        unsaved_limit: int = 32,
        # For when the disk is full: as much again as the rest of the agent at most.
        memory_limit_bytes: int = 8 * 1024 * 1024,
        segment_bytes: int = SEGMENT_BYTES,
        disk: Disk | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._kept_bytes = kept_bytes
        self._kept_seconds = kept_seconds
        self._unsaved_limit = unsaved_limit
        self._clock = clock
        self._root = root
        self._limit_bytes = limit_bytes
        self._free_share = free_share
        self._memory_limit_bytes = memory_limit_bytes
        self._segment_bytes = segment_bytes
        self._disk = disk or Disk()
        self._random_bytes = random_bytes
        self._lock = threading.RLock()
        self._listeners: list[Callable[[], None]] = []
        self._entries: dict[int, _Entry] = {}
        self._runs: dict[str, int] = {}
        # Runs whose results stay. Replaced and never changed: it is read without the lock.
        self._held: frozenset[str] = frozenset()
        # Sequences that wait for the collector, rising.
        self._waiting: list[int] = []
        # Of these, in memory only; rising, and higher than all on the disk.
        self._ring: list[int] = []
        self._ring_bytes = 0
        self._segments: list[_Segment] = []
        self._next_segment = 1
        self._active: _Segment | None = None
        self._active_descriptor = -1
        # Out of which a result is being copied that is nowhere else yet.
        self._copied_from: _Segment | None = None
        self._state_descriptor = -1
        self._generation = 0
        self._spool_id = self._new_id()
        self._reserved = self._unsent_from = 1
        self._dropped = 0
        self._saved_done_through = 0
        self._unsaved = False
        self._trouble = ""
        self._closed = False
        self._claim = -1
        try:
            self._claim = folder.claim(root)
        except OSError as error:
            self._be_troubled(error)
        has_state = self._read_state()
        self._read_segments()
        last_sequence = max(self._entries, default=0)
        self._next = max(self._reserved, last_sequence + 1)
        if not has_state:
            if self._entries:
                _log.warning("%s: the spool's state is lost; new results get a new identity", root)
            # Nothing under this identity was ever sent, nor may anything below be taken for it.
            self._unsent_from = self._next
        # The block is taken when the first result comes: a start that measures nothing writes nothing.
        self._reserved = self._next
        if not has_state:
            self._save()

    # What is there.

    def status(self) -> SpoolStatus:
        """How full it is."""
        # Without the lock, which is held while the disk works: this is called from the event loop.
        return SpoolStatus(
            spool_id=self._spool_id,
            pending=len(self._waiting),
            used_bytes=self._used_bytes() + self._ring_bytes,
            limit_bytes=self._limit_bytes,
            dropped=self._dropped,
            trouble=self._trouble,
        )

    def pending(self) -> Iterator[Record]:
        """Results that wait for the collector, oldest first; read one by one, so some may go meanwhile."""
        sequence = 0
        while True:
            with self._lock:
                at = bisect.bisect_right(self._waiting, sequence)
                if at == len(self._waiting):
                    return
                sequence = self._waiting[at]
                record = self._read(self._entries[sequence])
            if record is not None:
                yield record

    def find(self, run_id: str) -> Record | None:
        """The run's result; also an acknowledged one until its segment is removed, which no start does."""
        with self._lock:
            sequence = self._runs.get(run_id)
            return None if sequence is None else self._read(self._entries[sequence])

    def hold(self, run_id: str) -> int:
        """Bytes of the run's result on the disk, where it stays until :meth:`release`; 0: it is not there.

        It then takes no room from those that wait, nor is it removed for them.
        """
        with self._lock:
            entry = self._entries.get(self._runs.get(run_id, 0))
            if entry is None or entry.segment is None:
                return 0
            self._held |= {run_id}
            return entry.length

    def release(self, run_id: str) -> None:
        """The run's result need not stay any longer."""
        with self._lock:
            self._held -= {run_id}
            self._reap()

    def place(self, run_id: str) -> int:
        """Where the run's result is in the order of ending; 0: it is not here."""
        return self._runs.get(run_id, 0)

    def waits(self, run_id: str) -> bool:
        """Whether the run's result is here and the collector has not acknowledged it."""
        # Without the lock, as status().
        entry = self._entries.get(self._runs.get(run_id, 0))
        return entry is not None and not entry.done

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls the listener after each append, in the appending thread; returns what ends that."""
        with self._lock:
            self._listeners.append(listener)

        def unsubscribe() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return unsubscribe

    # What comes.

    def append(self, run_id: str, payload: bytes) -> int:
        """The result's sequence; it survives a power cut from now on, unless ``status().trouble`` is set.

        Raises Unavailable when the spool is closed.
        """
        with self._lock:
            if self._closed:
                raise Unavailable(f"the agent is stopping; the result of run {run_id} was not kept")
            if self._next >= self._reserved:
                self._reserve()
            entry = _Entry(self._next, run_id, self._spool_id, payload=payload)
            self._next += 1
            self._entries[entry.sequence] = entry
            self._runs[run_id] = entry.sequence
            self._waiting.append(entry.sequence)
            self._ring.append(entry.sequence)
            self._ring_bytes += len(payload)
            self._flush_ring()
            while self._ring_bytes > self._memory_limit_bytes:
                self._drop_from_ring()
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()
        return entry.sequence

    def settle(self) -> None:
        """Tries again to bring results from memory to the disk."""
        with self._lock:
            self._flush_ring()

    # For the stream.

    def outgoing_id(self) -> str:
        """Identity under which the oldest waiting result goes out; the spool's own when none waits."""
        with self._lock:
            return self._entries[self._waiting[0]].spool_id if self._waiting else self._spool_id

    def next_after(self, sequence: int, spool_id: str) -> Record | None:
        """The next result to send after a sequence, if it goes out under this identity.

        From then on the spool remembers, over restarts, that it may have been sent.
        """
        with self._lock:
            while True:
                at = bisect.bisect_right(self._waiting, sequence)
                if at == len(self._waiting):
                    return None
                entry = self._entries[self._waiting[at]]
                if entry.spool_id != spool_id:
                    return None
                record = self._read(entry)
                if record is None:
                    continue
                if spool_id == self._spool_id and entry.sequence >= self._unsent_from:
                    self._unsent_from = self._reserved
                    self._save()
                return record

    def reconcile(self, spool_id: str, acknowledged: int) -> None:
        """Takes in what the collector has of an identity, as it says when it welcomes the agent.

        Less than it once acknowledged: what is still here is sent again. More than was ever sent: this
        spool is a copy; what was not sent gets a new identity. Raises StorageError when the disk does not
        let it: then nothing may be sent.
        """
        with self._lock:
            if spool_id == self._spool_id and acknowledged >= self._unsent_from:
                unsent = [self._entries[each] for each in self._waiting if each >= self._unsent_from]
                try:
                    self._renew(
                        unsent,
                        spool_id,
                        f"the collector has results of spool {spool_id} that were never sent from here",
                    )
                except OSError as error:
                    raise StorageError(
                        f"{self._root}: the spool can't take a new identity: {error}"
                    ) from error
            again = [
                entry
                for entry in self._entries.values()
                if self._is_kept(entry) and entry.spool_id == spool_id and entry.sequence > acknowledged
            ]
            if again:
                # It was set back, so it may lack what came under earlier identities, too.
                again += [
                    entry
                    for entry in self._entries.values()
                    if self._is_kept(entry) and entry.spool_id != spool_id
                ]
                self._want_again(again)
                self._save()
                _log.warning(
                    "the collector has results up to %d only; %d that are still here are sent again",
                    acknowledged,
                    len(again),
                )
            self.acknowledge(spool_id, acknowledged)

    def renew(self, spool_id: str, sequence: int) -> None:
        """Takes a new identity for this one, and everything from the sequence on goes out under it.

        Raises StorageError when the disk does not let it: then nothing may be sent.
        """
        with self._lock:
            moved = [
                entry
                for _, entry in sorted(self._entries.items())
                if entry.spool_id == spool_id and entry.sequence >= sequence and not entry.lost
            ]
            try:
                self._renew(
                    moved, spool_id, f"the collector has other results of spool {spool_id} from {sequence} on"
                )
            except OSError as error:
                raise StorageError(f"{self._root}: the spool can't take a new identity: {error}") from error

    def acknowledge(self, spool_id: str, sequence: int) -> None:
        """Everything of this identity up to the sequence is stored for good and may leave the disk."""
        with self._lock:
            upto = self._waiting[: bisect.bisect_right(self._waiting, sequence)]
            for waiting in upto:
                entry = self._entries[waiting]
                if entry.spool_id == spool_id:
                    self._finish(entry)
            self._reap()

    def reject(self, spool_id: str, sequence: int, reason: str) -> None:
        """The collector will never store this result: it is dropped, counted and logged."""
        with self._lock:
            entry = self._entries.get(sequence)
            if entry is None or entry.done or entry.spool_id != spool_id:
                return
            _log.error("the collector refuses the result of run %s for good: %s", entry.run_id, reason)
            self._lose(entry)
            if entry.run_id not in self._held:
                self._forget(entry)
            self._reap()

    def close(self) -> None:
        """Lets go of the folder. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._flush_ring()
            if self._done_through() != self._saved_done_through and self._entries:
                self._save()
            self._closed = True
            self._seal()
            for descriptor in (self._state_descriptor, self._claim):
                if descriptor >= 0:
                    os.close(descriptor)
            self._state_descriptor = self._claim = -1

    # Waiting, done, dropped.

    def _finish(self, entry: _Entry) -> None:
        """The entry waits no more."""
        if entry.done:
            return
        entry.done = True
        del self._waiting[bisect.bisect_left(self._waiting, entry.sequence)]
        if entry.segment is not None:
            entry.segment.waiting -= 1
        else:
            self._ring.remove(entry.sequence)
            self._ring_bytes -= len(entry.payload or b"")
            self._forget(entry)

    def _lose(self, entry: _Entry) -> None:
        """The entry will never reach the collector."""
        self._finish(entry)
        entry.lost = True
        self._dropped += 1
        self._save()

    def _forget(self, entry: _Entry) -> None:
        self._entries.pop(entry.sequence, None)
        if self._runs.get(entry.run_id) == entry.sequence:
            del self._runs[entry.run_id]

    def _done_through(self) -> int:
        return self._waiting[0] - 1 if self._waiting else self._next - 1

    def _reap(self) -> None:
        """Removes segments in which nothing waits, but for what is kept."""
        dead = self._too_old()
        if dead:
            self._unlink(dead)
        unsaved = self._done_through() - self._saved_done_through
        if not self._waiting and self._entries and unsaved >= self._unsaved_limit:
            # What is kept is not taken for waiting after a restart, but for the last few.
            self._save()

    @staticmethod
    def _is_kept(entry: _Entry) -> bool:
        """Whether the collector had it, and it is still here."""
        return entry.done and not entry.lost

    def _held_segments(self) -> set[int]:
        """Numbers of the segments that stay for the sake of a run."""
        found = set()
        for run_id in self._held:
            entry = self._entries.get(self._runs.get(run_id, 0))
            segment = None if entry is None else entry.segment
            if segment is not None:
                found.add(segment.number)
        return found

    def _removable_segments(self) -> list[_Segment]:
        """Those in which nothing waits or is held, the oldest first."""
        held = self._held_segments()
        return [segment for segment in self._done_segments() if segment.number not in held]

    def _done_segments(self) -> list[_Segment]:
        """Those in which nothing waits, nor is being copied from, the oldest first."""
        return [
            segment
            for segment in self._segments
            if not segment.waiting and segment is not self._active and segment is not self._copied_from
        ]

    def _too_old(self) -> list[_Segment]:
        """Those of them that are not kept; of what is kept, the oldest goes first."""
        oldest = self._clock() - self._kept_seconds
        dead, used_bytes, records = [], 0, 0
        held = self._held_segments()
        for segment in reversed(self._done_segments()):
            used_bytes += segment.size_bytes
            records += len(segment.sequences)
            if segment.number not in held and (
                used_bytes > self._kept_bytes
                or records > _KEPT_RECORDS
                or segment.written_at < oldest
                or not segment.sequences
            ):
                dead.append(segment)
        return dead[::-1]

    def _unlink(self, segments: list[_Segment]) -> None:
        if self._closed:
            return
        try:
            for segment in segments:
                self._disk.unlink(segment.path)
                self._segments.remove(segment)
                for sequence in segment.sequences:
                    entry = self._entries.get(sequence)
                    if entry is not None and entry.segment is segment:
                        self._forget(entry)
            self._disk.sync_folder(self._root)
        except OSError as error:
            # Read-only after an error of the card: they stay, done, and are tried again.
            _log.debug("%s: %s", self._root, error)

    def _drop_oldest_segment(self) -> bool:
        """Makes room by dropping the oldest results; whether there were any."""
        # What the collector has goes before what it has not.
        done = self._removable_segments()
        copied = self._copied_from
        if copied is not None and copied in self._segments and not copied.waiting:
            done += [copied] if copied.number not in self._held_segments() else []
        if done:
            self._unlink(done[:1])
            return done[0] not in self._segments
        segment = next((each for each in self._segments if each.waiting or each is self._active), None)
        # A disk that takes no state gives up no segment either.
        if segment is None or not self._save():
            return False
        if segment is self._active:
            self._seal()
        entries = [self._entries.get(sequence) for sequence in segment.sequences]
        lost = [entry for entry in entries if entry and entry.segment is segment and not entry.done]
        for entry in lost:
            self._finish(entry)
            entry.lost = True
        if lost:
            self._dropped += len(lost)
            _log.error("%s is full: the %d oldest results are dropped", self._root, len(lost))
            # Counted before they are gone: a power cut in between brings none of them back.
            self._save()
        if segment.number in self._held_segments():
            # Only to be read from now on, which takes no room from the others.
            return True
        before = len(self._segments)
        self._unlink([segment])
        return len(self._segments) < before

    def _drop_from_ring(self) -> None:
        entry = self._entries[self._ring[0]]
        _log.error("no room for results on disk or in memory: that of run %s is dropped", entry.run_id)
        self._lose(entry)
        self._forget(entry)

    # Reading.

    def _read(self, entry: _Entry) -> Record | None:
        """The record; None, and it is counted as dropped, when the disk has lost it."""
        if entry.payload is not None:
            return Record(entry.spool_id, entry.sequence, entry.run_id, entry.payload)
        segment = entry.segment
        assert segment is not None
        try:
            with segment.path.open("rb") as file:
                file.seek(entry.offset)
                found = _parse_record(file.read(entry.length), segment.epoch)
        except OSError as error:
            _log.error("%s: %s", segment.path, error)
            found = None
        if found is not None and found[0] == entry.sequence:
            return Record(entry.spool_id, entry.sequence, entry.run_id, found[2])
        _log.error("%s: the disk has lost the result of run %s", segment.path, entry.run_id)
        if not entry.done:
            self._lose(entry)
        self._forget(entry)
        return None

    def _read_segments(self) -> None:
        done_through = self._saved_done_through
        try:
            paths = [path for path in self._root.iterdir() if path.suffix == _SEGMENT_SUFFIX]
        except OSError as error:
            self._be_troubled(error)
            return
        numbered = sorted((int(path.stem), path) for path in paths if path.stem.isdecimal())
        found: dict[int, _Entry] = {}
        for number, path in numbered:
            self._next_segment = number + 1
            segment = self._read_segment(number, path, found)
            if segment is not None:
                self._segments.append(segment)
        for sequence in sorted(found):
            entry = found[sequence]
            self._entries[sequence] = entry
            self._runs[entry.run_id] = sequence
            entry.done = sequence <= done_through
            if not entry.done and entry.segment is not None:
                entry.segment.waiting += 1
                self._waiting.append(sequence)

    def _read_segment(self, number: int, path: Path, found: dict[int, _Entry]) -> _Segment | None:
        try:
            data = memoryview(path.read_bytes())
            written_at = path.stat().st_mtime
        except OSError as error:
            _log.error("%s: can't be read: %s", path, error)
            return None
        segment = _Segment(number, path, b"", "", len(data), [], written_at=written_at)
        header_bytes = _HEADER.size + _CRC.size
        if len(data) >= header_bytes:
            magic, epoch, spool_id = _HEADER.unpack_from(data)
            (crc,) = _CRC.unpack_from(data, _HEADER.size)
            if magic == _SEGMENT_MAGIC and crc == zlib.crc32(data[: _HEADER.size]):
                segment.epoch, segment.spool_id = epoch, spool_id.hex()
        if not segment.epoch:
            # A power cut while it was made, which no append had returned from; or the card lost it.
            _log.warning("%s: no header; its %d bytes are dropped", path, len(data))
            return segment
        offset = header_bytes
        while offset < len(data):
            parsed = _parse_record(data[offset:], segment.epoch)
            if parsed is None:
                _log.warning("%s: ends with a damaged record at byte %d of %d", path, offset, len(data))
                break
            sequence, run_id, _, length = parsed
            # The same sequence again: written again after an error; the later copy counts.
            found[sequence] = _Entry(
                sequence, run_id, segment.spool_id, segment=segment, offset=offset, length=length
            )
            segment.sequences.append(sequence)
            offset += length
        return segment

    # Writing.

    def _flush_ring(self) -> None:
        """Brings results from memory to the disk, oldest first, as far as that goes."""
        while self._ring and not self._closed:
            entry = self._entries[self._ring[0]]
            payload = entry.payload
            assert payload is not None
            try:
                if self._claim < 0:
                    self._claim = folder.claim(self._root)
                self._write(entry, payload)
            except (OSError, ConfigurationError) as error:
                self._be_troubled(error)
                return
            entry.payload = None
            del self._ring[0]
            self._ring_bytes -= len(payload)
        if self._trouble and self._save():
            _log.warning("%s: results are on the disk again", self._root)
            self._trouble = ""

    def _be_troubled(self, error: Exception) -> None:
        if not self._trouble:
            _log.warning("%s: results stay in memory for now: %s", self._root, error)
        self._trouble = f"results stay in memory: {error}"

    def _write(self, entry: _Entry, payload: bytes) -> None:
        """The entry is on the disk. Raises OSError; then it is as if nothing had been written."""
        run_id = entry.run_id.encode()
        size_bytes = _RECORD.size + len(run_id) + len(payload)
        active = self._active
        if active is not None and (
            active.spool_id != entry.spool_id or active.size_bytes + size_bytes > self._segment_bytes
        ):
            self._seal()
            active = None
        header_bytes = 0 if active is not None else _HEADER.size + _CRC.size
        self._make_room(size_bytes + header_bytes)
        active = self._active
        if active is None:
            active = self._create_segment(entry.spool_id)
        offset = active.size_bytes
        record = _pack_record(active.epoch, entry.sequence, run_id, payload)
        try:
            self._disk.write(self._active_descriptor, record, offset)
            self._disk.sync(self._active_descriptor)
            if not active.sequences:
                self._disk.sync_folder(self._root)
        except OSError:
            # After a failed sync nobody knows what the file holds: never append to it again.
            try:
                self._disk.truncate(self._active_descriptor, offset)
            except OSError as error:
                _log.debug("%s: %s", active.path, error)
            self._seal()
            self._reap()
            raise
        active.size_bytes = offset + len(record)
        active.sequences.append(entry.sequence)
        active.waiting += 1
        entry.segment, entry.offset, entry.length = active, offset, len(record)

    def _make_room(self, size_bytes: int) -> None:
        """Room for so many bytes, dropping the oldest. Raises OSError when there is none to be had."""
        while self._used_bytes() + size_bytes > self._limit_bytes:
            if size_bytes > self._limit_bytes or not self._drop_oldest_segment():
                raise OSError(
                    f"{size_bytes} bytes are more than the {self._limit_bytes} that the spool may use"
                )
        # Drops for this one only what the collector has: what others do to the disk must not cost results
        # that are safe.
        free_bytes = self._disk.free_bytes(self._root)
        while self._used_bytes() + size_bytes > self._free_share * (free_bytes + self._used_bytes()):
            done = self._removable_segments()
            self._unlink(done[:1])
            if not done or done[0] in self._segments:
                break
            free_bytes = self._disk.free_bytes(self._root)
        if self._used_bytes() + size_bytes > self._free_share * (free_bytes + self._used_bytes()):
            raise OSError(f"only {free_bytes} bytes are free on the disk")

    def _used_bytes(self) -> int:
        """Of what waits, and of what is kept for the collector; not of what is here for the journal alone."""
        held = self._held_segments()
        return sum(
            segment.size_bytes
            for segment in self._segments
            if segment.waiting or segment is self._active or segment.number not in held
        )

    def _create_segment(self, spool_id: str) -> _Segment:
        path = self._root / f"{self._next_segment:020d}{_SEGMENT_SUFFIX}"
        epoch = self._random_bytes(8)
        header = _HEADER.pack(_SEGMENT_MAGIC, epoch, bytes.fromhex(spool_id))
        header += _CRC.pack(zlib.crc32(header))
        descriptor = self._disk.create(path)
        self._next_segment += 1
        number = self._next_segment - 1
        segment = _Segment(number, path, epoch, spool_id, len(header), [], written_at=self._clock())
        self._segments.append(segment)
        self._active, self._active_descriptor = segment, descriptor
        try:
            self._disk.write(descriptor, header, 0)
        except OSError:
            self._seal()
            self._reap()
            raise
        return segment

    def _seal(self) -> None:
        """Nothing is appended to the active segment any more."""
        if self._active is not None:
            os.close(self._active_descriptor)
            self._active, self._active_descriptor = None, -1

    # Identity and state.

    def _new_id(self) -> str:
        return self._random_bytes(16).hex()

    def _reserve(self) -> None:
        self._reserved = self._next + _RESERVED_AT_ONCE
        if not self._save():
            # The next start will not know that these numbers were used, but it will not know this name.
            self._spool_id = self._new_id()
            self._unsent_from = self._next

    def _renew(self, moved: list[_Entry], old_id: str, why: str) -> None:
        """Gives a new identity to these results, and to the spool when it had the old one. Raises OSError."""
        new_id = self._new_id()
        _log.warning("%s, so this is a copy of it; from now on it is spool %s", why, new_id)
        self._want_again([entry for entry in moved if entry.done])
        for entry in moved:
            if entry.done:
                # Dropped since, to make room for the copies.
                continue
            record = self._read(entry)
            old_segment, entry.spool_id, entry.segment = entry.segment, new_id, None
            if record is None or old_segment is None:
                continue
            # Apart from its old segment, which is dropped only where both are more than the limit.
            old_segment.waiting -= 1
            self._copied_from = old_segment
            try:
                self._write(entry, record.payload)
            except OSError:
                entry.spool_id, entry.segment = old_id, old_segment
                old_segment.waiting += 1
                raise
            finally:
                self._copied_from = None
        # After the copies: a power cut before this line brings the spool back here.
        if old_id == self._spool_id:
            self._spool_id = new_id
        if not self._save():
            raise OSError("the state can't be written")
        self._reap()

    def _want_again(self, entries: list[_Entry]) -> None:
        """These wait again, though they were acknowledged once."""
        for entry in entries:
            entry.done = False
            if entry.segment is not None:
                entry.segment.waiting += 1
            bisect.insort(self._waiting, entry.sequence)

    def _save(self) -> bool:
        """Whether the state is on the disk."""
        if self._closed:
            return False
        done_through = self._done_through()
        self._generation += 1
        slot = _STATE.pack(
            _STATE_MAGIC,
            self._generation,
            bytes.fromhex(self._spool_id),
            self._reserved,
            self._unsent_from,
            done_through,
            self._dropped,
        )
        slot += _CRC.pack(zlib.crc32(slot))
        try:
            new = self._state_descriptor < 0
            if new:
                self._state_descriptor = self._disk.open_state(self._root / "state")
                size_bytes = os.fstat(self._state_descriptor).st_size
                if size_bytes < 2 * _SLOT_BYTES:
                    # Later writes are in place: they need no room on a disk that is full.
                    zeros = bytes(2 * _SLOT_BYTES - size_bytes)
                    self._disk.write(self._state_descriptor, zeros, size_bytes)
            self._disk.write(self._state_descriptor, slot, self._generation % 2 * _SLOT_BYTES)
            self._disk.sync(self._state_descriptor)
            if new:
                self._disk.sync_folder(self._root)
        except OSError as error:
            self._generation -= 1
            _log.log(
                logging.DEBUG if self._unsaved else logging.WARNING,
                "%s: the spool's state can't be written: %s",
                self._root,
                error,
            )
            self._unsaved = True
            return False
        self._unsaved = False
        self._saved_done_through = done_through
        return True

    def _read_state(self) -> bool:
        """Whether there is a state."""
        try:
            data = (self._root / "state").read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            _log.error("%s: the spool's state can't be read: %s", self._root, error)
            return False
        for at in (0, _SLOT_BYTES):
            slot = data[at : at + _STATE.size]
            crc = data[at + _STATE.size : at + _STATE.size + _CRC.size]
            if len(crc) < _CRC.size or _CRC.unpack(crc)[0] != zlib.crc32(slot):
                continue
            magic, generation, spool_id, reserved, unsent_from, done_through, dropped = _STATE.unpack(slot)
            if magic == _STATE_MAGIC and generation > self._generation:
                self._generation = generation
                self._spool_id = spool_id.hex()
                self._reserved, self._unsent_from = reserved, unsent_from
                self._saved_done_through, self._dropped = done_through, dropped
        return self._generation > 0


def _pack_record(epoch: bytes, sequence: int, run_id: bytes, payload: bytes) -> bytes:
    length = _RECORD.size + len(run_id) + len(payload)
    crc = _record_crc(epoch, length, sequence, run_id, payload)
    return _RECORD.pack(length, crc, sequence, len(run_id)) + run_id + payload


def _parse_record(data: bytes | memoryview, epoch: bytes) -> tuple[int, str, bytes, int] | None:
    """Sequence, run id, payload and length of the record that the bytes begin with; None: they don't."""
    if len(data) < _RECORD.size:
        return None
    length, crc, sequence, run_id_bytes = _RECORD.unpack_from(data)
    if not _RECORD.size + run_id_bytes <= length <= len(data):
        return None
    run_id = bytes(data[_RECORD.size : _RECORD.size + run_id_bytes])
    payload = bytes(data[_RECORD.size + run_id_bytes : length])
    if crc != _record_crc(epoch, length, sequence, run_id, payload):
        return None
    return sequence, run_id.decode(), payload, length


def _record_crc(epoch: bytes, length: int, sequence: int, run_id: bytes, payload: bytes) -> int:
    head = epoch + _RECORD.pack(length, 0, sequence, len(run_id)) + run_id
    return zlib.crc32(payload, zlib.crc32(head))
