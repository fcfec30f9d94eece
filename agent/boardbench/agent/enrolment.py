"""What makes this board one of a collector's: a token that is shown once, then a key of its own.

Both are files in the data folder that only the agent may read. A token is left there by ``boardbench flash``,
before there is a network, and is turned into a key by the first connection; a key is shown at every report.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from boardbench.agent import folder
from boardbench.agent.config import AgentConfig, parse_address
from boardbench.agent.errors import ConfigurationError, EnrolmentRefused, StorageError
from boardbench.inspect import tls
from boardbench.v1 import board_pb2, collector_pb2, collector_pb2_grpc

if TYPE_CHECKING:
    _Metadata = tuple[tuple[str, str], ...]

_log = logging.getLogger(__name__)

KEY_METADATA = "boardbench-device-key"
_KEY_FILE = "enrolment.json"
_TOKEN_FILE = "enrolment-pending.json"
# A collector far away, over a link that just came up.
_CALL_SECONDS = 20.0
# A token that the collector will never take, however often it is shown.
_FINAL = (
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
)


@dataclass(frozen=True)
class _Key:
    """What the collector gave."""

    collector: str
    device_key: str
    labels: Mapping[str, str]
    # Certificate of its authority in PEM; empty: none was named.
    ca: str = ""


@dataclass(frozen=True)
class _Token:
    """What it is to be given for."""

    collector: str
    token: str
    ca: str = ""


class Enrolment:
    """The board's key and the token that is still to be shown, as the data folder has them."""

    def __init__(self, data_dir: Path) -> None:
        """Raises StorageError, also where a file is not what it should be."""
        self._data_dir = data_dir
        self._key = self._read_key()
        self._warned = False

    @property
    def labels(self) -> Mapping[str, str]:
        """Labels that came with the token."""
        return self._key.labels if self._key is not None else {}

    @property
    def collector(self) -> str:
        """Address of the collector that the board is to report to, as far as the files say."""
        token = self._read_token()
        if token is not None:
            return token.collector
        return self._key.collector if self._key is not None else ""

    def ca(self, config: AgentConfig) -> bytes:
        """Certificate (PEM) of the authority that the collector's must be of; empty: no certain one.

        Raises ConfigurationError.
        """
        if config.collector_ca:
            return _authority(config.collector_ca).encode()
        for known in (self._read_token(), self._key):
            if known is not None and _same(known.collector, config.collector):
                return known.ca.encode()
        return b""

    @property
    def enrolled(self) -> bool:
        """Whether the board has a key."""
        return self._key is not None

    def apply(self, config: AgentConfig) -> AgentConfig:
        """The configuration, with the collector that the board was enrolled at where it names none."""
        return config if config.collector else replace(config, collector=self.collector)

    async def metadata(
        self, channel: grpc.aio.Channel, address: str, board: Callable[[], board_pb2.Board], instance_id: str
    ) -> _Metadata:
        """What a report to this collector begins with; shows a waiting token first.

        Raises AioRpcError when the collector can't be reached for that, StorageError.
        """
        token = self._read_token()
        if token is not None and _same(token.collector, address):
            try:
                await self._show(channel, token, board(), instance_id)
            except EnrolmentRefused as refused:
                # Shown again it would be refused again; without a key the board may still be welcome.
                _log.error("%s", refused)
                self._remove_token()
        if self._key is None:
            return ()
        if not _same(self._key.collector, address):
            if not self._warned:
                _log.warning(
                    "the board was enrolled at %s: its key is not shown to %s; enrol it there as well "
                    "(boardbench-agent enroll)",
                    self._key.collector,
                    address,
                )
                self._warned = True
            return ()
        return ((KEY_METADATA, self._key.device_key),)

    async def enroll(
        self, collector: str, token: str, board: board_pb2.Board, instance_id: str, *, ca: str = ""
    ) -> None:
        """Shows the token and keeps the key. Raises EnrolmentRefused, ConfigurationError, StorageError.

        ``ca`` is the file of the authority that the collector's certificate must be of; its text is kept.
        """
        parse_address(tls.split(collector)[1], "--collector")
        authority = _authority(ca) if ca else ""
        # For a moment a file, so that a power cut after the collector's answer does not lose the board: the
        # token is good for the same instance again.
        waiting = _Token(collector, token, authority)
        self._store(_TOKEN_FILE, {"collector": collector, "token": token, **_with(authority)})
        from boardbench.agent.stream import open_channel, refusal

        try:
            async with open_channel(collector, ca=authority.encode()) as channel:
                await self._show(channel, waiting, board, instance_id)
        except EnrolmentRefused:
            self._remove_token()
            raise
        except grpc.aio.AioRpcError as error:
            self._remove_token()
            why = refusal(error, collector, authority.encode())
            # One of TLS comes with its own advice.
            known = why != (error.details() or why)
            hint = "" if known else "; is it running, and does it listen to the network (--listen 0.0.0.0)?"
            raise EnrolmentRefused(
                f"the collector at {collector} can't be reached: {why} ({error.code().name}){hint}"
            ) from error

    async def _show(
        self, channel: grpc.aio.Channel, token: _Token, board: board_pb2.Board, instance_id: str
    ) -> None:
        request = collector_pb2.EnrollRequest(token=token.token, board=board, instance_id=instance_id)
        stub = collector_pb2_grpc.CollectorServiceStub(channel)
        try:
            answer = await stub.Enroll(request, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise EnrolmentRefused(
                    f"the collector at {token.collector} is too old to enrol boards: update it"
                ) from error
            if error.code() in _FINAL:
                raise EnrolmentRefused(
                    f"the collector at {token.collector} does not take the token: {error.details()}"
                ) from error
            raise
        self._store(
            _KEY_FILE,
            {
                "collector": token.collector,
                "device_key": answer.device_key,
                "labels": dict(answer.labels),
                **_with(token.ca),
            },
        )
        self._key = _Key(token.collector, answer.device_key, dict(answer.labels), token.ca)
        self._remove_token()
        _log.info("enrolled at %s", token.collector)

    def _read_key(self) -> _Key | None:
        content = self._read(_KEY_FILE)
        if content is None:
            return None
        labels = content.get("labels", {})
        texts = (content.get("collector"), content.get("device_key"))
        ca = str(content.get("collector_ca", ""))
        if not all(isinstance(text, str) and text for text in texts) or not isinstance(labels, dict):
            raise self._damaged(_KEY_FILE)
        given = {str(name): str(value) for name, value in labels.items()}
        return _Key(str(texts[0]), str(texts[1]), given, ca)

    def _read_token(self) -> _Token | None:
        content = self._read(_TOKEN_FILE)
        if content is None:
            return None
        texts = (content.get("collector"), content.get("token"))
        if not all(isinstance(text, str) and text for text in texts):
            raise self._damaged(_TOKEN_FILE)
        try:
            parse_address(tls.split(str(texts[0]))[1], "collector")
        except ConfigurationError as error:
            raise self._damaged(_TOKEN_FILE) from error
        return _Token(str(texts[0]), str(texts[1]), str(content.get("collector_ca", "")))

    def _read(self, name: str) -> dict[str, object] | None:
        path = self._data_dir / name
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{path}: can't be read: {error.strerror}") from error
        except ValueError as error:
            raise self._damaged(name) from error
        if not isinstance(content, dict):
            raise self._damaged(name)
        return content

    def _damaged(self, name: str) -> StorageError:
        return StorageError(
            f"{self._data_dir / name} is damaged: remove it, and enrol the board again with "
            "boardbench-agent enroll"
        )

    def _store(self, name: str, content: Mapping[str, object]) -> None:
        path = self._data_dir / name
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            # By root for the service: the file belongs to whom the folder belongs.
            about = self._data_dir.stat()
            owner = (about.st_uid, about.st_gid) if os.geteuid() == 0 and about.st_uid != 0 else None
            # With mode 0600 from the first.
            folder.replace(path, (json.dumps(content) + "\n").encode(), owner)
        except OSError as error:
            raise StorageError(f"{path}: can't be written: {error.strerror}; check the disk") from error

    def _remove_token(self) -> None:
        path = self._data_dir / _TOKEN_FILE
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            folder.sync(self._data_dir)


def _authority(path: str) -> str:
    try:
        return tls.read_authorities(Path(path).expanduser()).decode()
    except ValueError as error:
        raise ConfigurationError(f"collector_ca: {error}") from error


def _with(ca: str) -> dict[str, str]:
    return {"collector_ca": ca} if ca else {}


def _same(one: str, other: str) -> bool:
    """Whether both are the same collector, reached with TLS or without."""
    return tls.split(one)[1] == tls.split(other)[1]
