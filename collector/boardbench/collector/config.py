"""What the collector is told, as one frozen value; every default is here with its reason."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

GRPC_PORT = 7342
"""Where agents report; 7341 is the agent's own port."""

HTTP_PORT = 7343
"""Where people and Prometheus look."""

ENVIRONMENT_PREFIX = "BOARDBENCH_COLLECTOR_"
"""Every option of ``serve`` can also be given as this and its name in capitals."""


@dataclass(frozen=True)
class Address:
    """A place to listen: host and port; port 0 lets the system choose one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in {"localhost", "::1"} or self.host.startswith("127.")

    @classmethod
    def parse(cls, text: str, default_port: int) -> Address:
        """Returns ``HOST``, ``HOST:PORT``, ``:PORT`` (every interface), ``[IPV6]`` or ``[IPV6]:PORT``.

        ValueError says what is wrong with anything else.
        """
        text = text.strip()
        if text.startswith("["):
            host, bracket, rest = text[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                raise ValueError(f"{text!r} is no address; write [IPV6]:PORT")
            port = rest[1:]
        elif text.count(":") > 1:
            raise ValueError(
                f"{text!r} is no address; write an IPv6 address in brackets, as [::1]:{default_port}"
            )
        else:
            host, _, port = text.partition(":")
            if not host and port:
                host = "0.0.0.0"
        if not host:
            raise ValueError(f"{text!r} names no host; write HOST:PORT, as 127.0.0.1:{default_port}")
        if not port:
            return cls(host, default_port)
        if not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{port!r} is no port; write a number from 0 to 65535 (0: any free one)")
        return cls(host, int(port))


def default_data_dir(environment: Mapping[str, str] = os.environ, *, user_id: int | None = None) -> Path:
    """Returns where the store lives by default: in ``/var/lib`` for root, else in the state folder."""
    if (os.getuid() if user_id is None else user_id) == 0:
        return Path("/var/lib/boardbench-collector")
    state = environment.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
    return Path(state) / "boardbench-collector"


@dataclass(frozen=True)
class CollectorConfig:
    """Everything that can be set."""

    listen: Address = Address("127.0.0.1", GRPC_PORT)
    """gRPC. Loopback: until boards prove who they are, opening it to a network is the user's decision."""

    http: Address = Address("127.0.0.1", HTTP_PORT)
    """HTTP: ``/metrics``, ``/api/v1``, the page. Loopback for the same reason."""

    tls_certificate: Path | None = None
    """The collector's certificate in PEM, and behind it those that lead to its CA: then gRPC and HTTP are
    encrypted. None: neither is, as there is no certificate that everybody would trust by default."""

    tls_key: Path | None = None
    """The key of that certificate in PEM, without a passphrase."""

    data_dir: Path = field(default_factory=default_data_dir)
    """Folder of the store; made if it is not there."""

    store: str = ""
    """Where results live: ``postgresql://HOST/DATABASE``; empty: an SQLite file in the folder, which takes
    a fleet of thousands and has nothing to install."""

    keep_samples_days: float | None = None
    """How long single samples are kept; None: for ever, as disks are large and re-analysis needs them."""

    keep_results_days: float | None = None
    """How long results are kept, the latest of each series apart."""

    keep_per_series: int | None = None
    """How many results of each series of a board are kept."""

    port_file: Path | None = None
    """Where to write the ports in use as JSON, for whoever started the collector with port 0."""

    heartbeat_seconds: float = 10.0
    """How often agents speak at least: 1,000 idle boards are then 100 small messages a second."""

    missed_heartbeats: int = 3
    """Silence that ends a stream, in heartbeats: one lost packet must not make a board look dead."""

    series_ttl_seconds: float = 3600.0
    """How long the series of a board that is gone stay in ``/metrics``: long enough for an alert on
    ``boardbench_device_up == 0`` to fire and be read, short enough that a board that was taken away
    leaves the dashboards the same day."""

    result_ttl_seconds: float = 30 * 86400.0
    """How long the latest result of a model stays in ``/metrics``: longer than the pause between
    monthly runs would be a guess about the future; shorter would lose weekly ones."""

    series_per_device: int = 5000
    """Series of results that one board may have in ``/metrics``: about 60 models at 80 each. Prometheus
    keeps every one in memory, so one board must not be able to fill it."""

    remote_write: tuple[str, ...] = ()
    """URLs that results are sent on to, by Prometheus's remote write: so that those of a board that was
    offline appear at the time they were measured. None: a scrape is enough where boards are online."""

    remote_write_headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of every such request: an ``Authorization``, a tenant."""

    otlp: tuple[str, ...] = ()
    """URLs that runs are sent on to as traces, and what they measured as metrics, by OpenTelemetry's
    protocol. None: it needs packages of its own, and few look at traces of boards."""

    otlp_headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of every such request, by gRPC its metadata."""

    max_result_bytes: int = 16 * 1024 * 1024
    """A record that is larger is refused: five million samples fit in it."""

    in_flight_results: int = 64
    """Results of one stream that may wait for their commit: more gained no throughput and cost memory."""

    in_flight_bytes: int = 32 * 1024 * 1024
    """The same in bytes, so that 64 results of the largest size don't take a gigabyte."""

    commit_window_seconds: float = 0.002
    """How long a commit gathers records: less of the processor for each of them, and not felt by anybody."""

    drain_seconds: float = 5.0
    """How long streams and requests get to end when the collector stops; systemd kills after 90."""

    require_enrolment: bool = False
    """Whether boards must have been enrolled with a token before they may report. Without it the first
    results come without any ceremony; a board that shows a wrong key is refused either way."""

    lease_seconds: float = 60.0
    """How long a board may have a job without naming it in a heartbeat: six of these may be lost, and a
    board that restarts is back in time."""

    jobs_per_board: int = 2
    """Jobs that a board may have at once: the files of the next come while one is measured."""

    job_attempts: int = 3
    """A job is given up after so many, unless it says otherwise: a model that takes its board down is not
    tried for ever."""

    job_timeout_seconds: float = 7 * 86400.0
    """A job is given up when it has not ended by then, unless it says otherwise: a board that is away for a
    weekend gets its jobs on Monday."""

    job_keep_seconds: float = 90 * 86400.0
    """How long a job that has ended is remembered; its result stays as long as results do."""

    files_dir: Path | None = None
    """Folder of models and inputs that are kept for boards, which collectors on one database may share; None:
    the folder of the store, and collectors on one database share files in the database."""

    files_limit_bytes: int = 32 * 1024**3
    """Bytes of models and inputs that are kept for boards; what no open job needs makes room."""

    files_free_bytes: int = 1024**3
    """What they leave free on the disk: results need it more."""

    @property
    def enrolments_path(self) -> Path:
        """The file of tokens and keys, whatever store the results are in."""
        return self.data_dir / "enrolments.db"

    @property
    def updates_path(self) -> Path:
        """The file of updates, whatever store the results are in."""
        return self.data_dir / "updates.db"

    @property
    def store_path(self) -> Path:
        """The file of the SQLite store."""
        return self.data_dir / "results.db"

    @property
    def silence_seconds(self) -> float:
        """Silence that ends a stream."""
        return self.heartbeat_seconds * self.missed_heartbeats
