"""Everything the agent raises on purpose, as one tree.

    AgentError
    ├── ConfigurationError      the configuration can't be used; the agent does not start
    ├── InvalidRequest          wrong as asked; asking again changes nothing
    │   ├── InvalidTransfer     a push that breaks the protocol: bad digest, name, size, order
    │   ├── MislabelledFile     the name claims one format, the bytes are another
    │   └── DamagedFile         the bytes are no whole file of their format
    │       └── UnknownFormat   they begin as no format that anything here knows
    ├── NotFound                the thing that was named is not here
    │   ├── ModelNotFound
    │   └── RunNotFound
    ├── Conflict                not possible in the present state; it may be later, or differently
    │   ├── ModelInUse          a waiting or running job holds the file
    │   ├── RunExists           the run id is taken by a run that was asked for differently
    │   ├── GroupClosed         the group of runs is complete, has begun, or has ended
    │   └── NotRunnable         the board can't run it: no runtime for the format, runtime missing
    ├── NoRoom                  it does not fit
    │   ├── OverQuota           more than the store may ever hold, or everything in it is in use
    │   ├── DiskFull            the file system is full, or would go below its free floor
    │   └── QueueFull           too many runs wait already
    ├── DataLoss                bytes arrived that are not the bytes that were sent
    │   ├── CorruptChunk        a chunk and its CRC-32 disagree
    │   └── DigestMismatch      the whole file and its SHA-256 disagree
    ├── Superseded              another client took the transfer over, or ended it; push again
    ├── NotFetched              the collector does not hand a file out, or only damaged
    ├── Unavailable             not now: the agent is stopping
    ├── EnrolmentRefused        the collector does not take the token
    └── StorageError            the disk fails in a way that is nobody's quota (EIO, read-only)

Each carries a message for a person (what happened, to which file or run, what to do) and knows
nothing of gRPC: :mod:`boardbench.agent.service` turns the branches into status codes, in one place.
"""

from __future__ import annotations


class AgentError(Exception):
    """Something the agent reports to a person; ``str()`` is the message."""


class ConfigurationError(AgentError):
    """The configuration can't be used; names the file or variable, the value and what is taken."""


class InvalidRequest(AgentError):
    """The request is wrong as asked; asking again changes nothing."""


class InvalidTransfer(InvalidRequest):
    """A push that breaks the protocol: digest, name or size can't be, or chunks out of order."""


class MislabelledFile(InvalidRequest):
    """The file's name claims one format and its bytes are another; names both."""


class DamagedFile(InvalidRequest):
    """The bytes are no whole file of the format they begin as."""


class UnknownFormat(DamagedFile):
    """The bytes are of no format that this board knows."""


class NotFound(AgentError):
    """The thing that was named is not here."""


class ModelNotFound(NotFound):
    """No file with this SHA-256 is in the store."""


class RunNotFound(NotFound):
    """No run with this id is known."""


class Conflict(AgentError):
    """Not possible in the present state."""


class ModelInUse(Conflict):
    """A waiting or running job holds the file."""


class RunExists(Conflict):
    """The run id is taken by a run that was asked for differently."""


class GroupClosed(Conflict):
    """The group takes no more runs: it is complete, has begun, or has ended."""


class NotRunnable(Conflict):
    """The board can't run it: no runtime takes the format, or the runtime is not installed."""


class NoRoom(AgentError):
    """It does not fit; the message says what is needed and what there is."""


class OverQuota(NoRoom):
    """More than the model store may hold, or more than it can free."""


class DiskFull(NoRoom):
    """The file system is full, or would go below the floor that is kept free."""


class QueueFull(NoRoom):
    """Too many runs wait already."""


class DataLoss(AgentError):
    """Bytes arrived that are not the bytes that were sent; sending again helps."""


class CorruptChunk(DataLoss):
    """A chunk and its CRC-32 disagree; what was received before it is kept."""


class DigestMismatch(DataLoss):
    """The whole file and its SHA-256 disagree; what was received is removed."""


class Superseded(AgentError):
    """Another client took this transfer over or ended it; a new push goes on from there."""


class NotFetched(AgentError):
    """The collector does not hand a file out, or only damaged; says what it answered."""


class Unavailable(AgentError):
    """Not now: the agent is stopping."""


class StorageError(AgentError):
    """The disk fails in a way that is nobody's quota: an I/O error, read-only, no permission."""


class EnrolmentRefused(AgentError):
    """The collector does not take the token; the message holds its words."""
