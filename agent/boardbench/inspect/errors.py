"""What can go wrong when a model file is read.

InspectError            anything this package raises about a file
├── Unreadable          the file can't be opened or read
├── UnknownFormat       the bytes are of no format that is known here
├── Malformed           the bytes are of a known format and break its rules
└── TooLarge            nothing is known to be wrong, but reading it all would take too long
"""

from __future__ import annotations


class InspectError(Exception):
    """A model file that can't be reported on; the message says what, where and what to do."""


class Unreadable(InspectError):
    """The file can't be opened or read."""


class UnknownFormat(InspectError):
    """The bytes are of no format that is known here."""


class Malformed(InspectError):
    """The bytes break the rules of the format: truncated, or never valid."""


class TooLarge(InspectError):
    """The file has more parts than are read; it may be sound."""
