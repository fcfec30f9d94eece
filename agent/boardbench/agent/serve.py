"""The composition root: the only place where the agent's parts meet, and where its server is made."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from boardbench.agent import folder, footprint, wire
from boardbench.agent.board.identify import derive_device_id, identify
from boardbench.agent.board.power_modes import PowerModes
from boardbench.agent.board.rest import AtRest
from boardbench.agent.board.tune import Tuner
from boardbench.agent.config import AgentConfig, parse_address
from boardbench.agent.drift import Placements
from boardbench.agent.enrolment import Enrolment
from boardbench.agent.errors import ConfigurationError, StorageError
from boardbench.agent.examine import Examiner
from boardbench.agent.instance import instance_id
from boardbench.agent.jobs import Jobs
from boardbench.agent.journal import Journal
from boardbench.agent.part import CHUNK_LIMIT_BYTES
from boardbench.agent.probe import Engines, Statuses
from boardbench.agent.queue import Runs
from boardbench.agent.service import SERVICE_NAME, AgentService
from boardbench.agent.spool import Spool
from boardbench.agent.store import ModelStore
from boardbench.agent.stream import CollectorLink, open_channel
from boardbench.agent.updates import Updates
from boardbench.agent.version import version
from boardbench.v1 import agent_pb2_grpc, board_pb2, collector_pb2

_log = logging.getLogger(__name__)

# For watchers to take the last event of a run that is ended by the stop, over a slow link.
_FAREWELL_SECONDS = 2.0
# How long the collector is let waiting for the first probe, which its hello tells about.
_PROBE_PATIENCE_SECONDS = 30.0
# Long enough after the start for the collector's link to be up.
_CALM_SECONDS = 5.0
# For its own answer, on a board that is busy with its start.
_HEALTH_SECONDS = 10.0
_LOOKAHEAD_BYTES = 4 * 1024 * 1024
_LOOPBACK = ("localhost", "[::1]")
_EVERYWHERE = ("0.0.0.0", "[::]")


async def serve(
    config: AgentConfig,
    *,
    port_file: Path | None = None,
    ready: Callable[[str], None] = lambda _: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Runs the agent until SIGTERM, SIGINT or ``stop``, then ends the run that is measured and returns.

    ``ready`` is called once with the address that answers, empty when none does. Raises ConfigurationError,
    StorageError.
    """
    stop = stop or asyncio.Event()
    reasons: list[str] = []
    with _signals(stop, reasons):
        async with _running(config) as agent:
            with _written(port_file, agent.port):
                ready(f"{parse_address(config.listen, 'listen')[0]}:{agent.port}" if agent.port else "")
                await agent.work_until(stop)
                await agent.stop(reasons[0] if reasons else "stopped")


class _Agent:
    """The parts of an agent that runs."""

    def __init__(
        self,
        config: AgentConfig,
        port: int,
        health: HealthServicer,
        store: ModelStore,
        runs: Runs,
        engines: Engines,
        link: CollectorLink | None,
    ) -> None:
        self.port = port
        self._store = store
        self._config = config
        self._health = health
        self._runs = runs
        self._engines = engines
        self._link = link
        self._work = asyncio.create_task(runs.work())
        self._report = asyncio.create_task(self._keep_reporting())
        self._rest = asyncio.create_task(self._keep_small())
        self._tasks = (self._work, self._report, self._rest)

    async def work_until(self, stop: asyncio.Event) -> None:
        """Returns when it is to stop; raises when a part of it has failed."""
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((stopped, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks:
                if task.done():
                    task.result()
        finally:
            stopped.cancel()

    async def stop(self, reason: str) -> None:
        """Ends the run that is measured; its result is in the spool then."""
        _log.info("stopping: %s", reason)
        await self._health.enter_graceful_shutdown()
        await self._runs.stop(reason)
        await self._work

    async def close(self) -> None:
        """Ends what is left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep_reporting(self) -> None:
        # The hello tells what the board can run.
        probe = asyncio.create_task(self._probe())
        try:
            await asyncio.wait([probe], timeout=_PROBE_PATIENCE_SECONDS)
            if self._link is not None:
                await self._link.run()
            await probe
            await asyncio.Event().wait()
        finally:
            # Not cancelled: it sees its child to the end, which comes at once.
            self._engines.close()
            await asyncio.gather(probe, return_exceptions=True)

    async def _keep_small(self) -> None:
        """Lets memory go when the start is over, and again when runs and uploads are."""
        seen = (-1, -1)
        while True:
            await asyncio.sleep(_CALM_SECONDS)
            arriving, arrived = self._store.transfers
            busy = self._runs.running_run_id or self._runs.waiting or arriving
            if self._engines.known and not busy and seen != (self._runs.finished, arrived):
                seen = (self._runs.finished, arrived)
                await asyncio.to_thread(footprint.let_go)

    async def _probe(self) -> None:
        for status in await self._engines.statuses():
            if status.available:
                _log.info("%s: %s", status.name, status.version)
            else:
                _log.warning("%s is not available: %s", status.name, status.reason)


@contextlib.asynccontextmanager
async def _running(config: AgentConfig) -> AsyncIterator[_Agent]:
    """The agent, listening inside the context; leaving it ends everything that it started."""
    enrolment = Enrolment(config.data_dir)
    config = enrolment.apply(config)
    if not (config.listen or config.collector):
        raise ConfigurationError(
            "listen is empty and there is no collector, so nobody could reach this agent: set one of them"
        )
    data_dir = config.data_dir
    async with contextlib.AsyncExitStack() as stack:
        # First, because it makes sure that no other agent has the folder.
        store = ModelStore(
            data_dir / "models",
            config.store.limit_bytes,
            config.store.free_floor_bytes,
            marks=lambda: engines.marks(),
        )
        stack.push_async_callback(store.close)
        spool = Spool(
            data_dir / "spool",
            config.spool.limit_bytes,
            config.spool.free_share,
            kept_bytes=config.spool.kept_bytes if config.collector else 0,
            kept_seconds=config.spool.kept_days * 86400,
        )
        stack.callback(spool.close)
        device_id = config.device_id or derive_device_id(config.sys_root, data_dir)

        def describe_board() -> board_pb2.Board:
            labels = {**enrolment.labels, **config.labels}
            return identify(config.sys_root, device_id=device_id, labels=labels)

        # Before anything is measured again: what a life that was killed had set is put back.
        tuner = Tuner(config.sys_root, data_dir)
        for line in await asyncio.to_thread(tuner.recover):
            _log.warning("put back, after the last agent was killed: %s", line)
        for line in tuner.failed:
            _log.warning("%s", line)
        for line in await asyncio.to_thread(PowerModes(config.sys_root, data_dir).recover):
            _log.warning("%s", line)

        scratch = data_dir / "scratch"
        await asyncio.to_thread(folder.remove_tree, scratch)
        engines = Engines(config, scratch)
        try:
            journal = Journal(data_dir / "runs", config.runs.kept_limit, config.runs.kept_bytes, spool)
            placements = Placements(data_dir / "placements")
            runs = Runs(config, store, spool, journal, placements, engines, describe_board, scratch, tuner)
            await runs.recover()
        except OSError as error:
            raise StorageError(f"{data_dir / 'runs'}: can't be read: {error}; check the disk") from error

        examiner = Examiner(
            config,
            tuner,
            identify=describe_board,
            # While a run is measured nothing is probed: then what is known must do.
            statuses=lambda: engines.statuses() if not runs.running_run_id else _known(engines),
            running=lambda: runs.running_run_id,
        )
        stack.push_async_callback(examiner.close)
        link: CollectorLink | None = None
        server = grpc.aio.server(
            options=(
                # Two agents on one port would share the calls between them, silently.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", 2 * CHUNK_LIMIT_BYTES),
                # What may be on its way in an upload: enough for 80 MB/s over 50 ms. Left to itself gRPC
                # lets it grow with the speed of the wire, on loopback to more than 30 MiB of memory.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", _LOOKAHEAD_BYTES),
                # A result with all its samples is bounded by what the worker may send.
                ("grpc.max_send_message_length", -1),
                # A client that follows a long run keeps its way through a NAT open.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            )
        )
        service = AgentService(
            store=store,
            spool=spool,
            runs=runs,
            engines=engines,
            examiner=examiner,
            identify=describe_board,
            link=lambda: link.status() if link is not None else None,
            started_at=wire.timestamp(time.time_ns()),
        )
        agent_pb2_grpc.add_AgentServiceServicer_to_server(service, server)
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        server.add_generic_rpc_handlers((_Reflection((SERVICE_NAME, health_name)),))
        port = 0
        if config.listen:
            port = await _listen(server, config.listen)
            stack.push_async_callback(server.stop, _FAREWELL_SECONDS)
        for name in ("", SERVICE_NAME):
            await health.set(name, health_pb2.HealthCheckResponse.SERVING)

        rest: AtRest | None = None
        if config.collector or config.metrics.listen:
            rest = AtRest(config.sys_root, config.sensors.without_kinds)
            stack.push_async_callback(rest.close)
            await asyncio.to_thread(rest.look)

        def hello() -> collector_pb2.Hello:
            return collector_pb2.Hello(
                board=describe_board(), agent_version=version(), runtimes=engines.known
            )

        metrics_address = ""
        if config.metrics.listen and rest is not None:
            metrics_address = await _serve_metrics(
                config.metrics.listen, rest, runs, spool, journal, hello, stack
            )

        if config.collector and rest is not None:
            instance = await asyncio.to_thread(instance_id, data_dir, config.sys_root)
            life = os.urandom(16).hex()
            ca = await asyncio.to_thread(enrolment.ca, config)
            channel = functools.partial(open_channel, ca=ca)

            async def credentials(channel: grpc.aio.Channel) -> tuple[tuple[str, str], ...]:
                return await enrolment.metadata(channel, config.collector, describe_board, instance)

            jobs = Jobs(
                config.jobs,
                data_dir / "jobs",
                collector=config.collector,
                device_id=device_id,
                store=store,
                runs=runs,
                spool=spool,
                credentials=credentials,
                channel=channel,
            )
            stack.push_async_callback(jobs.close)
            updates = Updates(
                config.update,
                data_dir,
                collector=config.collector,
                device_id=device_id,
                runs=runs,
                health=lambda: _health(link, _near(config.listen, port) if port else ""),
                free_floor_bytes=config.store.free_floor_bytes,
                credentials=credentials,
                channel=channel,
            )
            stack.push_async_callback(updates.close)
            kinds, parties = rest.kinds, (jobs, updates, rest)
            link = CollectorLink(
                config.collector,
                spool,
                hello=lambda: collector_pb2.Hello(
                    board=describe_board(),
                    agent_version=version(),
                    runtimes=engines.known,
                    address=config.address or (_reachable(config.listen, port) if port else ""),
                    instance_id=instance,
                    life_id=life,
                    sensors=kinds,
                    takes_jobs=config.jobs.take,
                    metrics_address=metrics_address,
                ),
                heartbeat=lambda: collector_pb2.Heartbeat(
                    running_run_id=runs.running_run_id, queued_runs=runs.waiting
                ),
                parties=parties,
                credentials=credentials,
                channel=channel,
                ca=ca,
            )
            jobs.speak = updates.speak = link.speak
            jobs.recover()
            await updates.recover()
        agent = _Agent(config, port, health, store, runs, engines, link)
        stack.push_async_callback(agent.close)
        yield agent


async def _serve_metrics(
    listen: str,
    rest: AtRest,
    runs: Runs,
    spool: Spool,
    journal: Journal,
    hello: Callable[[], collector_pb2.Hello],
    stack: contextlib.AsyncExitStack,
) -> str:
    """Serves the board's own metrics and returns where others reach them."""
    # Only then: an agent that is not scraped does not load it.
    from boardbench.agent.metrics import MetricsServer

    def heartbeat() -> collector_pb2.Heartbeat:
        status = spool.status()
        return collector_pb2.Heartbeat(
            running_run_id=runs.running_run_id,
            queued_runs=runs.waiting,
            spool_pending=status.pending,
            spool_dropped=status.dropped,
        )

    host, port = parse_address(listen, "metrics.listen")
    server = MetricsServer(
        hello=hello,
        heartbeat=heartbeat,
        readings=lambda: rest.readings,
        refresh=rest.refresh,
        ended=runs.summaries,
        result=journal.result,
    )
    try:
        bound = await server.listen(host, port)
    except OSError as error:
        raise ConfigurationError(
            f"metrics.listen: can't listen on {listen}: {error.strerror}; choose another address"
        ) from error
    stack.push_async_callback(server.close)
    return _reachable(listen, bound)


async def _health(link: CollectorLink | None, address: str) -> str:
    """Why this agent is not what a new release has to be; empty when it is."""
    status = link.status() if link is not None else None
    if status is not None and not status.connected:
        return f"its collector {status.address} is not reached: {status.error}"
    if not address:
        return ""
    try:
        async with open_channel(address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=_HEALTH_SECONDS
            )
    except grpc.aio.AioRpcError as error:
        return f"it does not answer at {address}: {error.details()} ({error.code().name})"
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return "" if serving else f"it answers at {address} that it does not serve"


async def _known(engines: Engines) -> Statuses:
    return engines.known


class _Reflection(grpc.GenericRpcHandler):
    """Server reflection, loaded when somebody asks for it: few do, and it takes 0.7 MB."""

    _SERVICE = "grpc.reflection.v1alpha.ServerReflection"

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = (*services, self._SERVICE)

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a reflection call; None for every other."""
        if handler_call_details.method != f"/{self._SERVICE}/ServerReflectionInfo":
            return None
        from grpc_reflection.v1alpha import reflection, reflection_pb2

        return grpc.stream_stream_rpc_method_handler(
            reflection.aio.ReflectionServicer(self._services).ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )


async def _listen(server: grpc.aio.Server, listen: str) -> int:
    """The port that the server listens on."""
    host, port = parse_address(listen, "listen")
    if not host.startswith("127.") and host not in _LOOPBACK:
        _log.warning("%s is open to the network, and whoever reaches it may run models on this board", listen)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise _cannot_listen(listen) from error
    if not bound:
        raise _cannot_listen(listen)
    await server.start()
    return bound


def _cannot_listen(listen: str) -> ConfigurationError:
    return ConfigurationError(
        f"can't listen on {listen}; another program may have the port, or the address is not this "
        "machine's: choose another with --listen"
    )


def _near(listen: str, port: int) -> str:
    """Where this machine itself reaches it."""
    host, _ = parse_address(listen, "listen")
    return f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"


def _reachable(listen: str, port: int) -> str:
    """Where others reach what listens there: every address of the machine is its name."""
    host, _ = parse_address(listen, "listen")
    return f"{os.uname().nodename if host in _EVERYWHERE else host}:{port}"


@contextlib.contextmanager
def _signals(stop: asyncio.Event, reasons: list[str]) -> Iterator[None]:
    """SIGTERM and SIGINT set ``stop`` inside the context, instead of ending the process."""
    loop = asyncio.get_running_loop()

    def stopped(number: signal.Signals) -> None:
        reasons.append(number.name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped, number)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _written(path: Path | None, port: int) -> Iterator[None]:
    """The port as JSON in a file while it is open; renamed into place, so never seen half written."""
    if path is None:
        yield
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Without a port it says that the agent is up.
        fresh.write_text(json.dumps({"grpc": port} if port else {}) + "\n")
        fresh.replace(path)
    except OSError as error:
        raise ConfigurationError(
            f"can't write {path}: {error.strerror}; choose another file with --port-file"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
