"""``boardbench-collector``: serves, checks, backs up, prunes. Heavy parts load when a command runs."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from boardbench.collector.config import (
    ENVIRONMENT_PREFIX,
    GRPC_PORT,
    HTTP_PORT,
    Address,
    CollectorConfig,
    default_data_dir,
)
from boardbench.collector.errors import CollectorError

if TYPE_CHECKING:
    from boardbench.collector.serve import Listening
    from boardbench.collector.store import ResultStore
    from boardbench.collector.stores.backup import Told
    from boardbench.collector.stores.enrolments import Enrolments

_GRPC_EXPERIMENTS = "-event_engine_listener"
"""gRPC reads connections in the thread that waits for them, and not in a pool that hands each message on: a
tenth of all that a result costs here. A gRPC that does not know the name goes on without it
(https://github.com/grpc/grpc/blob/master/doc/environment_variables.md)."""

_Answer = TypeVar("_Answer")
_Command = TypeVar("_Command", bound=Callable[..., Any])

# What boardbench[collector] brings, by the name that it is imported as.
_EXTRA = ("aiohttp", "grpc_health", "grpc_reflection", "prometheus_client")


class _AddressType(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4
    name = "HOST[:PORT]"

    def __init__(self, default_port: int) -> None:
        self._default_port = default_port

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        if isinstance(value, Address):
            return value
        try:
            return Address.parse(str(value), self._default_port)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _option(name: str, **more: Any) -> Callable[[_Command], _Command]:
    """Returns a click option that can also be given in the environment."""
    variable = ENVIRONMENT_PREFIX + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, envvar=variable, show_envvar=True, **more)


class _Line(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4
    """Text in which spaces are nothing special: several of them in the environment are lines."""

    name = "text"
    envvar_list_splitter = "\n"


def _urls(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    for url in given:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise click.BadParameter(f"{url!r} can't be sent to; write http://HOST:PORT/api/v1/write")
    return given


def _otlp_urls(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    for url in given:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https", "grpc", "grpcs"} or not parts.hostname:
            raise click.BadParameter(
                f"{url!r} can't be sent to; write http://HOST:4318 or grpc://HOST:4317 (https, grpcs: by TLS)"
            )
    return given


def _headers(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    headers = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{text!r} is no header; write NAME=VALUE")
        headers[name.strip()] = value.strip()
    return headers


_data_dir = _option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Folder of the store.  [default: {default_data_dir(user_id=0)} for root, else in the state folder]",
)


_store_url = _option(
    "--store",
    default="",
    metavar="URL",
    help="Where results live: postgresql://HOST/DATABASE.  [default: an SQLite file in the folder]",
)


def _take_password(_context: click.Context, _option: click.Parameter, path: Path | None) -> None:
    """Hands the password to PostgreSQL's library by its own variable, which no list of processes shows."""
    if path is not None:
        try:
            os.environ["PGPASSWORD"] = path.read_text().rstrip("\n")
        except OSError as error:
            raise click.BadParameter(f"{path} can't be read: {error.strerror}") from error


def _store(command: _Command) -> _Command:
    """Adds the options that say where results live."""
    password = _option(
        "--store-password-file",
        type=click.Path(path_type=Path, dir_okay=False),
        expose_value=False,
        callback=_take_password,
        metavar="FILE",
        help="The password for the store, in a file of its own.  [default: PGPASSWORD, or ~/.pgpass]",
    )
    return _store_url(password(command))


def _tls_options(command: _Command) -> _Command:
    """Adds the options that encrypt what comes and goes."""
    for option in (
        _option(
            "--tls-key",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="The certificate's key in PEM, without a passphrase.",
        ),
        _option(
            "--tls-cert",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Encrypt gRPC and HTTP with this certificate in PEM, and those behind it up to its CA;"
            " it is read again when it changes.  [default: nothing is encrypted]",
        ),
    ):
        command = option(command)
    return command


def _keep_options(command: _Command) -> _Command:
    """Adds the options that say how long what is kept."""
    days = click.FloatRange(min=0, min_open=True)
    for option in (
        _option(
            "--keep-per-series",
            type=click.IntRange(min=1),
            help="Keep so many results of each series of a board.  [default: all]",
        ),
        _option(
            "--keep-results",
            type=days,
            metavar="DAYS",
            help="Keep results so long, and the latest of each series.  [default: for ever]",
        ),
        _option(
            "--keep-samples",
            type=days,
            metavar="DAYS",
            help="Keep single samples so long; their distribution and all figures stay.  [default: for ever]",
        ),
    ):
        command = option(command)
    return command


def _job_options(command: _Command) -> _Command:
    """Adds the options that say how jobs are handed out."""
    for option in (
        _option(
            "--files-limit",
            type=click.FloatRange(min=0, min_open=True),
            default=CollectorConfig.files_limit_bytes / 1024**3,
            show_default=True,
            metavar="GIB",
            help="Keep so much of models and inputs for boards; what no open job needs makes room.",
        ),
        _option(
            "--files-dir",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder of these files; collectors on one database that are given the same one share it, and"
            " put no files into the database.  [default: the data folder]",
        ),
        _option(
            "--job-timeout",
            type=click.FloatRange(min=1),
            default=CollectorConfig.job_timeout_seconds,
            show_default=True,
            metavar="SECONDS",
            help="Give a job up that has not ended by then, unless it says otherwise.",
        ),
        _option(
            "--job-attempts",
            type=click.IntRange(min=1, max=100),
            default=CollectorConfig.job_attempts,
            show_default=True,
            help="Give a job up after so many attempts, unless it says otherwise.",
        ),
        _option(
            "--jobs-per-board",
            type=click.IntRange(min=1),
            default=CollectorConfig.jobs_per_board,
            show_default=True,
            help="Jobs that a board may have at once; the others wait here.",
        ),
        _option(
            "--lease",
            type=click.FloatRange(min=1),
            default=CollectorConfig.lease_seconds,
            show_default=True,
            metavar="SECONDS",
            help="Queue a job again when its board has not named it for so long; at least three heartbeats.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="boardbench", prog_name="boardbench-collector")
def main() -> None:
    """Takes results from boards, keeps them, and shows them to people and to Prometheus."""


@main.command()
@_option(
    "--listen",
    type=_AddressType(GRPC_PORT),
    default=str(CollectorConfig.listen),
    show_default=True,
    help="Address for agents and clients (gRPC); port 0: any free one.",
)
@_option(
    "--http",
    type=_AddressType(HTTP_PORT),
    default=str(CollectorConfig.http),
    show_default=True,
    help="Address for /metrics, /api/v1 and the page; port 0: any free one.",
)
@_tls_options
@_data_dir
@_store
@_keep_options
@_job_options
@_option(
    "--port-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help='Write the ports in use here, as {"grpc": …, "http": …}, once both answer.',
)
@_option(
    "--heartbeat",
    type=click.FloatRange(min=0.1, max=3600),
    default=CollectorConfig.heartbeat_seconds,
    show_default=True,
    metavar="SECONDS",
    help="How often boards must be heard of; after three times this a silent stream is ended.",
)
@_option(
    "--series-ttl",
    type=click.FloatRange(min=0),
    default=CollectorConfig.series_ttl_seconds,
    show_default=True,
    metavar="SECONDS",
    help="How long the series of a board that is gone stay in /metrics.",
)
@_option(
    "--result-ttl",
    type=click.FloatRange(min=1),
    default=CollectorConfig.result_ttl_seconds,
    show_default=True,
    metavar="SECONDS",
    help="How long the latest result of a model stays in /metrics.",
)
@_option(
    "--series-per-device",
    type=click.IntRange(min=1),
    default=CollectorConfig.series_per_device,
    show_default=True,
    help="Series of results that one board may have in /metrics.",
)
@_option(
    "--require-enrolment",
    is_flag=True,
    help="Refuse boards that were not enrolled with a token.",
)
@_option(
    "--remote-write",
    multiple=True,
    metavar="URL",
    callback=_urls,
    help="Send every result on to this address, by Prometheus's remote write; may be repeated.",
)
@_option(
    "--remote-write-header",
    multiple=True,
    type=_Line(),
    metavar="NAME=VALUE",
    callback=_headers,
    help="Header of these requests, as X-Scope-OrgID=lab; may be repeated, in the environment line by line.",
)
@_option(
    "--otlp",
    multiple=True,
    metavar="URL",
    callback=_otlp_urls,
    help="Send every run on to this address as a trace, and its results as metrics, by OpenTelemetry's"
    " protocol: http://HOST:4318 or grpc://HOST:4317; may be repeated. Needs boardbench[otel].",
)
@_option(
    "--otlp-header",
    multiple=True,
    type=_Line(),
    metavar="NAME=VALUE",
    callback=_headers,
    help="Header of these requests; may be repeated, in the environment line by line.",
)
@_option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What goes to stderr.",
)
def serve(
    *,
    listen: Address,
    http: Address,
    tls_cert: Path | None,
    tls_key: Path | None,
    data_dir: Path | None,
    store: str,
    keep_samples: float | None,
    keep_results: float | None,
    keep_per_series: int | None,
    port_file: Path | None,
    heartbeat: float,
    series_ttl: float,
    result_ttl: float,
    series_per_device: int,
    remote_write: tuple[str, ...],
    remote_write_header: dict[str, str],
    otlp: tuple[str, ...],
    otlp_header: dict[str, str],
    require_enrolment: bool,
    lease: float,
    jobs_per_board: int,
    job_attempts: int,
    job_timeout: float,
    files_dir: Path | None,
    files_limit: float,
    log_level: str,
) -> None:
    """Run the collector until SIGTERM or Ctrl-C."""
    config = CollectorConfig(
        listen=listen,
        http=http,
        tls_certificate=tls_cert,
        tls_key=tls_key,
        data_dir=data_dir or default_data_dir(),
        store=store,
        keep_samples_days=keep_samples,
        keep_results_days=keep_results,
        keep_per_series=keep_per_series,
        port_file=port_file,
        heartbeat_seconds=heartbeat,
        series_ttl_seconds=series_ttl,
        result_ttl_seconds=result_ttl,
        series_per_device=series_per_device,
        remote_write=remote_write,
        remote_write_headers=remote_write_header,
        otlp=otlp,
        otlp_headers=otlp_header,
        require_enrolment=require_enrolment,
        lease_seconds=max(lease, CollectorConfig.missed_heartbeats * heartbeat),
        jobs_per_board=jobs_per_board,
        job_attempts=job_attempts,
        job_timeout_seconds=job_timeout,
        files_dir=files_dir,
        files_limit_bytes=round(files_limit * 1024**3),
    )
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    # gRPC looks at these when it is imported. Its own resolver knows no mDNS, which --otlp may need; what it
    # writes beside the log, about each connection that breaks, is for its developers.
    os.environ.setdefault("GRPC_EXPERIMENTS", _GRPC_EXPERIMENTS)
    os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from boardbench.collector.serve import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise click.ClickException(
            f"the collector needs more of boardbench ({error.name} is missing): "
            "pip install 'boardbench[collector]'"
        ) from error

    from boardbench.collector.stores.opening import name_of

    # What is loaded stays, and what comes in goes when nothing refers to it: looking for cycles as often as
    # Python does by default takes 6 % of the time while results come in.
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)

    def ready(listening: Listening) -> None:
        tls = config.tls_certificate is not None
        click.echo(f"gRPC: {'tls://' if tls else ''}{listening.grpc}")
        click.echo(f"HTTP: {'https' if tls else 'http'}://{listening.http}/")
        click.echo(f"Store: {name_of(config)}")

    _run(run(config, ready=ready))


@main.command()
@_data_dir
@_store
@click.option(
    "--backup",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Read this backup instead, and say what it holds.",
)
def check(*, data_dir: Path | None, store: str, file: Path | None) -> None:
    """Read the whole store, or a backup, and say whether it is sound. Exit 1 when it is not.

    An SQLite store must not be in use: while a collector runs, make a backup and check that.
    """
    if file is not None:
        from boardbench.collector.stores import backup as backups

        _say(file, _guarded(lambda: backups.look(file)))
        return
    config = _existing(data_dir, store)

    async def run(opened: ResultStore) -> None:
        await opened.check()

    _on_store(config, run)
    click.echo(f"{_name(config)}: sound")


@main.command()
@_data_dir
@_store
@click.argument("target", type=click.Path(path_type=Path))
def backup(*, data_dir: Path | None, store: str, target: Path) -> None:
    """Write everything that the store holds into a file, while the collector runs or not.

    TARGET is the file; in a folder that is there, one is made whose name is the time. Of tokens and keys of
    boards only SHA-256 sums are kept, and are in it; files that wait for boards are not.
    """
    from importlib import metadata

    from boardbench.collector.stores import backup as backups
    from boardbench.collector.stores.opening import moment

    config = _existing(data_dir, store)
    if target.is_dir():
        import time

        target = target / time.strftime("boardbench-%Y%m%dT%H%M%SZ.backup", time.gmtime())
    version = metadata.version("boardbench")
    _say(target, _guarded(lambda: backups.save(target, moment(config), version=version)))


@main.command()
@_data_dir
@_store
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def restore(*, data_dir: Path | None, store: str, file: Path) -> None:
    """Make a store from a backup of any kind of store; nothing that is there is overwritten."""
    from boardbench.collector.stores.opening import restore as fill

    config = CollectorConfig(data_dir=data_dir or default_data_dir(), store=store)
    _say(file, _guarded(lambda: fill(config, file)))
    click.echo(f"Store: {_name(config)}")


@main.command()
@_data_dir
@_store
@_keep_options
def prune(
    *,
    data_dir: Path | None,
    store: str,
    keep_samples: float | None,
    keep_results: float | None,
    keep_per_series: int | None,
) -> None:
    """Remove what is too old at once, as `serve` does by and by.

    An SQLite store must not be in use; its file gives the space back. In PostgreSQL collectors may run.
    """
    from boardbench.collector.retention import Policy, Retention

    policy = Policy(keep_samples, keep_results, keep_per_series)
    if policy.keeps_everything:
        raise click.UsageError("say what to keep: --keep-samples, --keep-results or --keep-per-series")
    config = _existing(data_dir, store)

    async def run(opened: ResultStore) -> None:
        thinned, removed = await Retention(opened, policy).round()
        await opened.compact()
        click.echo(
            f"{removed.results} results removed, {removed.size_bytes:,} bytes;"
            f" {thinned.samples} samples of {thinned.results} dropped, {thinned.size_bytes:,} bytes"
        )

    _on_store(config, run)


def _existing(data_dir: Path | None, store: str) -> CollectorConfig:
    """Returns the configuration of a store that is there."""
    config = CollectorConfig(data_dir=data_dir or default_data_dir(), store=store)
    if not store and not config.store_path.is_file():
        raise click.ClickException(f"there is no store {config.store_path}; name its folder with --data-dir")
    return config


def _name(config: CollectorConfig) -> str:
    from boardbench.collector.stores.opening import name_of

    return name_of(config)


def _on_store(config: CollectorConfig, work: Callable[[ResultStore], Coroutine[Any, Any, None]]) -> None:
    from boardbench.collector.stores.opening import open_store

    async def run() -> None:
        opened = await open_store(config)
        try:
            await work(opened)
        finally:
            await opened.close()

    _run(run())


def _guarded(work: Callable[[], _Answer]) -> _Answer:
    try:
        return work()
    except CollectorError as error:
        raise click.ClickException(str(error)) from error


def _say(path: Path, held: Told) -> None:
    import time

    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(held.created))
    rows = ", ".join(f"{count:,} {name}" for name, count in held.rows.items() if count)
    click.echo(f"{path}: whole, of {made}, by version {held.collector_version}: {rows or 'nothing'}")


@main.group()
def token() -> None:
    """Tokens that each let one board be enrolled."""


@token.command()
@_data_dir
@_store
@click.option(
    "--hours",
    type=click.FloatRange(min=0, max=24, min_open=True),
    default=24.0,
    show_default=True,
    help="How long it is good.",
)
@click.option(
    "--label", "labels", multiple=True, metavar="NAME=VALUE", help="A label that the board gets. Repeatable."
)
def create(*, data_dir: Path | None, store: str, hours: float, labels: tuple[str, ...]) -> None:
    """Make a token, good for one board, and print it; it is kept nowhere."""
    given = {}
    for label in labels:
        name, equals, value = label.partition("=")
        if not equals or not name.strip():
            raise click.UsageError(f"--label: {label!r} is not NAME=VALUE")
        given[name.strip()] = value
    click.echo(_enrolments(data_dir, store, lambda kept: kept.create(hours, given)))


@token.command("list")
@_data_dir
@_store
def list_tokens(*, data_dir: Path | None, store: str) -> None:
    """List the tokens by their beginning: until when each is good, and which board has used it."""
    import time

    for kept in _enrolments(data_dir, store, lambda enrolments: enrolments.tokens()):
        if kept.used is not None:
            state = f"used by {kept.device_id}"
        else:
            left = kept.expires - time.time()
            state = f"good for {left / 3600:.1f} h" if left > 0 else "expired"
        labels = " ".join(f"{name}={value}" for name, value in sorted(kept.labels.items()))
        click.echo(f"{kept.name}…  {state}  {labels}".rstrip())


@token.command()
@_data_dir
@_store
@click.argument("beginning")
def revoke(*, data_dir: Path | None, store: str, beginning: str) -> None:
    """Make a token that was not used yet worth nothing; its BEGINNING is what `token list` shows."""
    if not _enrolments(data_dir, store, lambda enrolments: enrolments.revoke(beginning.rstrip("…"))):
        raise click.ClickException(f"no token that was not used begins with {beginning!r}")


@main.command()
@_data_dir
@_store
@click.argument("device_id")
def forget(*, data_dir: Path | None, store: str, device_id: str) -> None:
    """Make the key of a board worth nothing: it must be enrolled again. Its results stay."""
    if not _enrolments(data_dir, store, lambda enrolments: enrolments.forget(device_id)):
        raise click.ClickException(f"no board {device_id!r} is enrolled")


def _enrolments(
    data_dir: Path | None, store: str, ask: Callable[[Enrolments], Coroutine[Any, Any, _Answer]]
) -> _Answer:
    """What is asked of the tokens and keys; the collector may run meanwhile."""
    from boardbench.collector.stores.opening import open_enrolments

    config = CollectorConfig(data_dir=data_dir or default_data_dir(), store=store)

    async def run() -> _Answer:
        async with open_enrolments(config) as enrolments:
            return await ask(enrolments)

    return _guarded(lambda: asyncio.run(run()))


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except CollectorError as error:
        raise click.ClickException(str(error)) from error
