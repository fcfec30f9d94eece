"""The composition root: the only place where store, service and web meet, and where sockets are made."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from boardbench.collector.certificate import Certificate
from boardbench.collector.config import Address, CollectorConfig
from boardbench.collector.dispatch import Dispatcher, Rules
from boardbench.collector.errors import StartError, StoreError
from boardbench.collector.expose import MIN_SERIES_PER_RESULT, Exposition, Scrapes
from boardbench.collector.files import Files, Shelf
from boardbench.collector.fleet import Fleet
from boardbench.collector.forward import Forwarder, posting
from boardbench.collector.job_service import JOB_SERVICE_NAME, JobService
from boardbench.collector.look import ReadModel
from boardbench.collector.retention import Policy, Retention
from boardbench.collector.service import SERVICE_NAME, CollectorService, add_service
from boardbench.collector.store import ResultStore
from boardbench.collector.stores.enrolments import Enrolments
from boardbench.collector.stores.opening import open_beside, open_store
from boardbench.collector.stores.updates import UpdateStore
from boardbench.collector.update_service import UPDATE_SERVICE_NAME, UpdateService
from boardbench.collector.updates import Updater
from boardbench.collector.web.app import create_app
from boardbench.v1 import job_pb2_grpc, update_pb2_grpc

if TYPE_CHECKING:
    from boardbench.collector.otlp import OtlpForwarder

_log = logging.getLogger(__name__)

_OTEL = ("opentelemetry", "google")
"""What ``boardbench[otel]`` brings, by the name that it is imported as."""

_RECEIVE_FACTOR = 4
"""A record that is too large must still arrive to be refused, or it would block its spool for ever."""


@dataclass(frozen=True)
class Listening:
    """Where the collector is reached, once it is."""

    grpc: Address
    http: Address


def version() -> str:
    """Returns the version of the installed distribution."""
    return metadata.version("boardbench")


async def serve(
    config: CollectorConfig,
    *,
    ready: Callable[[Listening], None] = lambda _: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Runs the collector until SIGTERM, SIGINT or ``stop``; then lets open streams end and returns.

    ``ready`` is called once, when both addresses answer. StartError and StoreError when it can't start.
    """
    stop = stop or asyncio.Event()
    with _signals(stop):
        store = await open_store(config)
        try:
            async with (
                open_beside(config, store) as beside,
                running(config, store, beside.enrolments, beside.updates, beside.files) as listening,
            ):
                with _port_file(config.port_file, listening):
                    ready(listening)
                    await stop.wait()
                    _log.info("stopping")
        finally:
            await store.close()


@contextlib.asynccontextmanager
async def running(
    config: CollectorConfig,
    store: ResultStore,
    enrolments: Enrolments | None = None,
    updates: UpdateStore | None = None,
    shelf: Shelf | None = None,
) -> AsyncIterator[Listening]:
    """Both faces over a store, listening inside the context; leaving it drains them. The store stays open."""
    certificate = _certificate(config)
    fleet = Fleet(store, silence_seconds=config.silence_seconds)
    forwarders: list[Forwarder | OtlpForwarder] = []
    retention = Retention(
        store, Policy(config.keep_samples_days, config.keep_results_days, config.keep_per_series)
    )
    look = ReadModel(
        store,
        fleet,
        result_ttl_seconds=config.result_ttl_seconds,
        results_per_device=max(1, config.series_per_device // MIN_SERIES_PER_RESULT),
        queue=lambda: dispatcher.view(),
        forwarded=lambda: tuple(forwarder.view() for forwarder in forwarders),
        retention=lambda: retention.view(),
        certificate_ends_at=lambda: certificate.ends_at if certificate is not None else None,
        silence_seconds=config.silence_seconds,
    )

    async def files_in_use() -> frozenset[str]:
        packages = updater.files_in_use() if updater is not None else frozenset()
        return packages | await store.jobs.files_in_use()

    files = Files(
        config.files_dir or config.data_dir,
        limit_bytes=config.files_limit_bytes,
        free_bytes=config.files_free_bytes,
        in_use=files_in_use,
        shelf=shelf,
    )
    await files.open()
    updater = None
    if updates is not None:
        updater = Updater(updates, files, look)
        await updater.load()
    dispatcher = Dispatcher(
        store.jobs,
        files,
        look,
        Rules(
            lease_seconds=config.lease_seconds,
            jobs_per_board=config.jobs_per_board,
            max_attempts=config.job_attempts,
            timeout_seconds=config.job_timeout_seconds,
            keep_seconds=config.job_keep_seconds,
        ),
    )
    for address in (config.listen, config.http):
        if not address.is_loopback:
            _log.warning("%s is open to the network, and whoever reaches it may read and report", address)
    async with contextlib.AsyncExitStack() as stack:
        if certificate is not None:
            _run_within(certificate.watch(), stack)
        grpc_address = await _start_grpc(
            config, store, fleet, look, dispatcher, files, enrolments, updater, certificate, stack
        )
        scrapes = _scrapes(config, look)
        http_address = await _start_http(config, look, scrapes, dispatcher, certificate, stack)
        await _start_forwarders(config, store, forwarders, stack)
        await _start_otlp(config, store, forwarders, stack)
        tasks = [asyncio.create_task(work) for work in (fleet.watch(), dispatcher.run(), retention.run())]
        if updater is not None:
            tasks.append(asyncio.create_task(updater.run()))
        try:
            yield Listening(grpc_address, http_address)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await stack.aclose()
            try:
                await fleet.flush()
            except StoreError as error:
                _log.warning("when boards were last seen could not be stored: %s", error)


async def _start_grpc(
    config: CollectorConfig,
    store: ResultStore,
    fleet: Fleet,
    look: ReadModel,
    dispatcher: Dispatcher,
    files: Files,
    enrolments: Enrolments | None,
    updater: Updater | None,
    certificate: Certificate | None,
    stack: contextlib.AsyncExitStack,
) -> Address:
    limit = config.max_result_bytes * _RECEIVE_FACTOR
    server = grpc.aio.server(
        options=(
            # Two collectors on one port would share the boards between them, silently.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            # Agents behind a NAT keep their way open; a ping a minute is fine even without a call.
            ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
            ("grpc.keepalive_permit_without_calls", 1),
        )
    )
    service = CollectorService(
        config,
        store,
        fleet,
        look,
        version=version(),
        dispatcher=dispatcher,
        enrolments=enrolments,
        updater=updater,
    )
    add_service(service, server)
    job_service = JobService(config, dispatcher, files, admit=service.admit)
    job_pb2_grpc.add_JobServiceServicer_to_server(job_service, server)
    update_service = UpdateService(updater) if updater is not None else None
    served = [SERVICE_NAME, JOB_SERVICE_NAME]
    if update_service is not None:
        update_pb2_grpc.add_UpdateServiceServicer_to_server(update_service, server)
        served.append(UPDATE_SERVICE_NAME)
    health = grpc_health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (
            *served,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        ),
        server,
    )
    try:
        if certificate is None:
            port = server.add_insecure_port(str(config.listen))
        else:
            port = server.add_secure_port(str(config.listen), certificate.for_grpc())
    except RuntimeError as error:
        raise _cannot_listen(config.listen, "--listen", "") from error
    if not port:
        raise _cannot_listen(config.listen, "--listen", "")
    await server.start()
    for name in ("", *served):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop() -> None:
        await health.enter_graceful_shutdown()
        job_service.close()
        if update_service is not None:
            update_service.close()
        await fleet.close(config.drain_seconds)
        await server.stop(config.drain_seconds)

    stack.push_async_callback(stop)
    return Address(config.listen.host, port)


async def _start_forwarders(
    config: CollectorConfig,
    store: ResultStore,
    forwarders: list[Forwarder | OtlpForwarder],
    stack: contextlib.AsyncExitStack,
) -> None:
    if config.remote_write:
        config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for url in config.remote_write:
        post = await stack.enter_async_context(posting(url, config.remote_write_headers))
        forwarder = Forwarder(url, store, config.data_dir, post)
        forwarders.append(forwarder)
        _run_within(forwarder.run(), stack)


async def _start_otlp(
    config: CollectorConfig,
    store: ResultStore,
    forwarders: list[Forwarder | OtlpForwarder],
    stack: contextlib.AsyncExitStack,
) -> None:
    if not config.otlp:
        return
    try:
        from boardbench.collector.otlp import OtlpForwarder, exporting, targets_of
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OTEL:
            raise
        raise StartError(
            f"--otlp needs more of boardbench ({error.name} is missing): pip install 'boardbench[otel]'"
        ) from error
    config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for target in (target for url in config.otlp for target in targets_of(url)):
        post = await stack.enter_async_context(exporting(target, config.otlp_headers))
        forwarder = OtlpForwarder(target, store, config.data_dir, post, version=version())
        forwarders.append(forwarder)
        _run_within(forwarder.run(), stack)


def _run_within(work: Coroutine[Any, Any, None], stack: contextlib.AsyncExitStack) -> None:
    """Runs it as a task until the stack is closed."""
    task = asyncio.create_task(work)

    async def stop() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    stack.push_async_callback(stop)


def _scrapes(config: CollectorConfig, look: ReadModel) -> Scrapes:
    exposition = Exposition(
        version=version(),
        series_ttl_seconds=config.series_ttl_seconds,
        result_ttl_seconds=config.result_ttl_seconds,
        series_per_device=config.series_per_device,
    )
    return Scrapes(look, exposition)


async def _start_http(
    config: CollectorConfig,
    look: ReadModel,
    scrapes: Scrapes,
    dispatcher: Dispatcher,
    certificate: Certificate | None,
    stack: contextlib.AsyncExitStack,
) -> Address:
    runner = web.AppRunner(
        create_app(look, scrapes, dispatcher, version=version()),
        access_log=None,
        logger=_http_log(),
        handle_signals=False,
        shutdown_timeout=config.drain_seconds,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    context = certificate.for_http if certificate is not None else None
    site = web.TCPSite(runner, config.http.host, config.http.port, ssl_context=context, reuse_port=False)
    try:
        await site.start()
    except OSError as error:
        raise _cannot_listen(config.http, "--http", error.strerror or str(error)) from error
    # With a name that has several addresses there are several sockets; the first one's port is told.
    port: int = runner.addresses[0][1]
    return Address(config.http.host, port)


def _http_log() -> logging.Logger:
    """A log in which what a stranger sends that is not HTTP is one line, and not a traceback."""
    log = logging.getLogger(f"{__name__}.http")
    log.addFilter(_shorten)
    return log


def _shorten(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        reason = " ".join(error.message.split())[:120]
        record.msg, record.args, record.exc_info = f"{record.getMessage()}: not HTTP: {reason}", (), None
        record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
    return True


def _certificate(config: CollectorConfig) -> Certificate | None:
    """The collector's certificate; StartError when only half of it is given, or it can't be used."""
    if config.tls_certificate is None and config.tls_key is None:
        return None
    if config.tls_certificate is None or config.tls_key is None:
        raise StartError("a certificate and its key go together: give both --tls-cert and --tls-key")
    return Certificate(config.tls_certificate, config.tls_key)


def _cannot_listen(address: Address, option: str, reason: str) -> StartError:
    why = f": {reason}" if reason else "; another program may have it"
    return StartError(f"can't listen on {address}{why}; choose another address with {option}")


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set ``stop`` inside the context, instead of ending the process."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _port_file(path: Path | None, listening: Listening) -> Iterator[None]:
    """The ports as JSON in a file while they are open; renamed into place, so never seen half written."""
    if path is None:
        yield
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps({"grpc": listening.grpc.port, "http": listening.http.port}) + "\n")
        fresh.replace(path)
    except OSError as error:
        raise StartError(
            f"can't write {path}: {error.strerror}; choose another file with --port-file"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
