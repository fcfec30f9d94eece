"""How many results a collector takes and keeps, beside the Pushgateway and VictoriaMetrics.

Everything runs as its own process on this machine. A push is counted when its sender has been told that it is
kept: here after an fsync, by the Pushgateway in memory, by VictoriaMetrics in memory. What is compared is
what one core takes: pushes, or samples, by second of the receiving process's CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import programs
from report import Check, Report, note, run

from boardbench.v1 import board_pb2, collector_pb2, placement_pb2, result_pb2

_REPORT = "/boardbench.v1.CollectorService/Report"
_DEADLINE_SECONDS = 120.0
SERIES = 30
"""Series that the result of one push comes out as."""
_MODELS = 5
"""Models that each board measures again and again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ingest")
    for name, default, what in (
        ("pushes", 20_000, "results without samples"),
        ("backlog", 2_000, "results of 1,000 samples"),
        ("connections", 2_000, "held open at once"),
        ("rate", 2_000, "pushes a second over all of them"),
    ):
        group.add_argument(f"--ingest-{name}", type=int, default=default, help=f"{what} (default {default})")
    group.add_argument("--ingest-seconds", type=float, default=10.0, help="of that rate (default 10)")
    group.add_argument(
        "--ingest-turns", type=int, default=5, help="of boardbench and the Pushgateway, in turns (default 5)"
    )


def measure(given: argparse.Namespace) -> Report:
    # Other benchmarks have options of these names, too.
    own = {name: value for name, value in vars(given).items() if name.startswith("ingest_")}
    return _measure(argparse.Namespace(**{name.removeprefix("ingest_"): own[name] for name in own}))


def _measure(arguments: argparse.Namespace) -> Report:
    rows: list[Sequence[Any]] = []
    checks: list[Check] = []
    _allow_files(3 * arguments.connections + 1000)
    with programs.folder() as root:
        for name in ("first", "paced", "postgres", *(f"turn{turn}" for turn in range(arguments.turns))):
            (root / name).mkdir()
        with programs.collector(root / "first") as (pid, ports):
            url = f"http://127.0.0.1:{ports['http']}/metrics"
            address = f"127.0.0.1:{ports['grpc']}"
            note("ingest: memory of idle connections")
            per_connection = _memory_per_connection(address, pid, arguments.connections)
            _flood(address, pid, 500, samples=0, prefix="warm")
            series = _series_of_a_result(url)
            note("ingest: backlog")
            backlog = _flood(address, pid, arguments.backlog, samples=1000, prefix="backlog")
        # In turns: how fast the machine is changes from one minute to the next.
        all_pushes: list[dict[str, float]] = []
        all_unchecked: list[dict[str, float]] = []
        for turn in range(arguments.turns):
            note(f"ingest: pushes, turn {turn + 1} of {arguments.turns}")
            with programs.collector(root / f"turn{turn}") as (pid, ports):
                address = f"127.0.0.1:{ports['grpc']}"
                all_pushes.append(_flood(address, pid, arguments.pushes, samples=0, prefix="push"))
            other = _pushgateway(root, ("--push.disable-consistency-check",), arguments.pushes)
            if other is not None:
                all_unchecked.append(other)
        pushes = _median(all_pushes)
        # A collector of its own: a queue that the flood left must not be in the latency.
        with programs.collector(root / "paced") as (pid, ports):
            note("ingest: acknowledgements at a steady rate")
            paced = _paced(
                f"127.0.0.1:{ports['grpc']}",
                pid,
                arguments.connections,
                arguments.rate,
                arguments.seconds,
            )
        rows.append(_row("boardbench, SQLite, fsynced: pushes", pushes, series))
        rows.append(_row("boardbench, SQLite, fsynced: backlog of 1,000 samples", backlog, 1000))
        with contextlib.suppress(_Absent), _postgres(root) as server:
            options = ("--store", server)
            with programs.collector(root / "postgres", *options) as (pid, ports):
                note("ingest: PostgreSQL")
                address = f"127.0.0.1:{ports['grpc']}"
                rows.append(
                    _row(
                        "boardbench, PostgreSQL, fsynced: pushes (the server's CPU not counted)",
                        _flood(address, pid, arguments.pushes // 2, samples=0, prefix="push"),
                        series,
                    )
                )
        if all_unchecked:
            unchecked = _median(all_unchecked)
            rows.append(_row("Pushgateway, its check off, in memory: pushes", unchecked, SERIES))
            turns = zip(all_pushes, all_unchecked, strict=True)
            ratio = statistics.median(_by_core(own) / _by_core(other) for own, other in turns)
            rows.append(["boardbench over that, by turn: median", "", ratio, "", "", ""])
        # It checks everything that it has at every push.
        found = _pushgateway(root, (), min(arguments.pushes, 30))
        if found is not None:
            rows.append(_row("Pushgateway as it comes, in memory: pushes", found, SERIES))
        found = _victoria(root, arguments.backlog)
        if found is not None:
            rows.append(_row("VictoriaMetrics import, in memory: lines of 1,000 samples", found, 1000))
    rows.append(
        [
            f"boardbench, {arguments.rate} pushes/s over {arguments.connections} connections",
            paced["count"] / paced["wall"],
            paced["count"] / paced["cpu"],
            "",
            paced["p50_ms"],
            paced["p99_ms"],
        ]
    )
    checks += [
        Check(
            f"durable pushes of {series:g} series by core",
            _by_core(pushes),
            12_000,
            "/s",
            at_least=True,
        ),
        Check(
            "durable samples of a backlog by core",
            1000 * backlog["count"] / backlog["cpu"],
            2e6,
            "/s",
            at_least=True,
        ),
        Check(f"acknowledgement at {arguments.rate} pushes/s, p99", paced["p99_ms"], 50, "ms"),
        Check("memory by open connection", per_connection / 1024, 60, "KiB"),
    ]
    return Report(
        "ingest",
        f"{arguments.pushes} pushes, to a new boardbench and a new Pushgateway in {arguments.turns} turns "
        f"(medians; of boardbench by core: {', '.join(f'{_by_core(each):.0f}' for each in all_pushes)}), and "
        f"{arguments.backlog} results of 1,000 samples over 64 connections, at most 64 under way on each; "
        f"then {arguments.connections} connections with {arguments.rate} pushes a second in all for "
        f"{arguments.seconds:g} s, each from the moment it was due to its acknowledgement. "
        f"Memory: what the resident set grew by while {arguments.connections} streams were open and idle. By "
        "core: by second of CPU time of the receiving process",
        ("what", "/s", "/s by core", "series or samples each", "p50 ms", "p99 ms"),
        rows,
        checks,
        {
            "pushes": all_pushes,
            "unchecked": all_unchecked,
            "backlog": backlog,
            "paced": paced,
            "bytes_per_connection": per_connection,
        },
    )


def _row(name: str, found: dict[str, float], each: float) -> Sequence[Any]:
    return [name, found["count"] / found["wall"], _by_core(found), each, "", ""]


def _by_core(found: dict[str, float]) -> float:
    return found["count"] / found["cpu"]


def _median(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """The turn in the middle, of an even number the lower of the two, by what a core takes."""
    return sorted(turns, key=_by_core)[(len(turns) - 1) // 2]


# What boards send


def build_result(board: str, model: int, turn: str, samples: int) -> result_pb2.RunResult:
    """A result as agents send it, of :data:`SERIES` series: latency, memory and placement of a model."""
    p50 = 0.01 + model * 1e-3
    result = result_pb2.RunResult(run_id=turn, status=result_pb2.RUN_STATUS_SUCCEEDED)
    result.board.device_id = board
    result.model.name, result.model.sha256 = f"mobilenet_v2_{model}_quant.tflite", f"{model:02x}ab" * 16
    result.model.format, result.model.size_bytes = "tflite", 3_543_216
    result.effective_spec.threads = 4
    result.runtime.name, result.runtime.device = "tflite", "cpu"
    result.import_seconds, result.create_seconds, result.first_inference_seconds = 0.31, p50 / 3, p50 * 1.4
    result.finished_at.GetCurrentTime()
    latency = result.latency
    latency.count, latency.mean_seconds, latency.stdev_seconds = samples or 200, p50 * 1.01, p50 * 0.05
    latency.min_seconds, latency.max_seconds = p50 * 0.9, p50 * 2
    for percentile, factor in ((50, 1.0), (99, 1.5)):
        latency.percentiles.add(
            percentile=percentile,
            seconds=p50 * factor,
            low_seconds=p50 * factor * 0.99,
            high_seconds=p50 * factor * 1.02,
        )
    latency.samples_nanoseconds.extend(int(p50 * 1e9) + (7919 * n) % 100_003 for n in range(samples))
    for phase in (1, 4):
        result.memory.phases.add(
            phase=phase,  # type: ignore[arg-type]
            rss_bytes=60 << 20,
            peak_rss_bytes=64 << 20,
        )
    result.memory.peak_rss_bytes, result.memory.model_rss_bytes = 74 << 20, 11 << 20
    result.placement.evidence = placement_pb2.EVIDENCE_PARTITION
    result.placement.cpu_ops = 31
    result.placement.units.add(unit=placement_pb2.UNIT_CPU, ops=31)
    return result


def _messages(board: str, spool: str, count: int, samples: int) -> list[bytes]:
    """A hello and so many results, ready to be sent: making them costs the sender, and not the collector."""
    hello = collector_pb2.Hello(
        board=board_pb2.Board(device_id=board, hostname=board, architecture="aarch64"),
        agent_version="0.1.0",
        spool_id=spool,
    )
    messages = [collector_pb2.ReportRequest(hello=hello).SerializeToString()]
    for sequence in range(1, count + 1):
        result = build_result(board, sequence % _MODELS, f"{spool}-{sequence}", samples)
        spooled = collector_pb2.SpooledResult(spool_id=spool, sequence=sequence, result=result)
        messages.append(collector_pb2.ReportRequest(result=spooled).SerializeToString())
    return messages


def _channel(address: str) -> grpc.aio.Channel:
    """A connection of its own: gRPC would share one between channels to the same address."""
    return grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))


def _open(channel: grpc.aio.Channel) -> Any:
    call = channel.stream_stream(_REPORT, response_deserializer=collector_pb2.ReportResponse.FromString)
    return call()


async def _ready(call: Any, hello: bytes) -> None:
    await call.write(hello)
    answer = await call.read()
    if answer is grpc.aio.EOF or answer.WhichOneof("response") != "welcome":
        raise SystemExit(f"the collector did not welcome a board: {await call.details()}")


# The senders are processes of their own, so that what they cost is not the collector's.


@contextlib.contextmanager
def _sender(target: Any, *arguments: Any) -> Iterator[Connection]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(there, *arguments))
    process.start()
    # Ours alone now: when the process ends without a word, the other end is closed, and heard of.
    there.close()
    try:
        yield here
    finally:
        process.join(_DEADLINE_SECONDS)
        if process.is_alive():
            process.kill()


def _told(pipe: Connection) -> Any:
    if not pipe.poll(_DEADLINE_SECONDS):
        raise SystemExit("the sender of results does not answer")
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit("the sender of results failed; what it said is above") from None


def _flood(address: str, pid: int, count: int, *, samples: int, prefix: str) -> dict[str, float]:
    """Sends as fast as it is taken, over 64 connections."""
    with _sender(_flooding, address, count, samples, prefix) as pipe:
        _told(pipe)
        before, begin = programs.cpu_seconds(pid), time.perf_counter()
        pipe.send("go")
        sent = _told(pipe)
        return {
            "count": sent,
            "wall": time.perf_counter() - begin,
            "cpu": programs.cpu_seconds(pid) - before,
        }


def _flooding(pipe: Connection, address: str, count: int, samples: int, prefix: str) -> None:
    streams = 64
    each = max(1, count // streams)
    batches = [_messages(f"board-{number}", f"{prefix}-{number}", each, samples) for number in range(streams)]

    async def send(messages: list[bytes], begin: asyncio.Event, ready: asyncio.Semaphore) -> None:
        async with _channel(address) as channel:
            call = _open(channel)
            await _ready(call, messages[0])
            ready.release()
            await begin.wait()

            async def write() -> None:
                for message in messages[1:]:
                    await call.write(message)

            writing = asyncio.create_task(write())
            while (await call.read()).acknowledgement.sequence < len(messages) - 1:
                pass
            await writing
            await call.done_writing()

    async def main() -> None:
        begin, ready = asyncio.Event(), asyncio.Semaphore(0)
        tasks = [asyncio.create_task(send(messages, begin, ready)) for messages in batches]
        for _ in tasks:
            await ready.acquire()
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        begin.set()
        await asyncio.gather(*tasks)
        pipe.send(each * streams)

    asyncio.run(main())


def _paced(address: str, pid: int, connections: int, rate: int, seconds: float) -> dict[str, float]:
    with _sender(_pacing, address, connections, rate, seconds) as pipe:
        _told(pipe)
        before, begin = programs.cpu_seconds(pid), time.perf_counter()
        pipe.send("go")
        found: dict[str, float] = _told(pipe)
        found["wall"] = time.perf_counter() - begin
        found["cpu"] = programs.cpu_seconds(pid) - before
        return found


def _pacing(pipe: Connection, address: str, connections: int, rate: int, seconds: float) -> None:
    each = max(1, int(rate * seconds / connections))
    period = connections / rate
    batches = [_messages(f"board-{number}", f"paced-{number}", each, 0) for number in range(connections)]
    latencies: list[float] = []

    async def send(number: int, begin: asyncio.Future[float], gate: asyncio.Semaphore) -> None:
        messages = batches[number]
        async with _channel(address) as channel:
            async with gate:
                call = _open(channel)
                await _ready(call, messages[0])
            ready.release()
            start = await begin + period * number / connections
            for turn, message in enumerate(messages[1:]):
                due = start + turn * period
                await asyncio.sleep(due - time.perf_counter())
                await call.write(message)
                await call.read()
                # From the moment it was due: a sender that is late waits for its answer, too.
                latencies.append(time.perf_counter() - due)
            # So many connections are open until the last of them is done: what it costs when boards leave is
            # not in the time to answer others.
            done.release()
            await over.wait()
            await call.done_writing()

    ready, done, over = asyncio.Semaphore(0), asyncio.Semaphore(0), asyncio.Event()

    async def main() -> None:
        begin: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        gate = asyncio.Semaphore(50)
        tasks = [asyncio.create_task(send(number, begin, gate)) for number in range(connections)]
        for _ in tasks:
            await ready.acquire()
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        begin.set_result(time.perf_counter() + 1)
        for _ in tasks:
            await done.acquire()
        over.set()
        await asyncio.gather(*tasks)
        ordered = sorted(latencies)
        pipe.send(
            {
                "count": len(ordered),
                "p50_ms": ordered[len(ordered) // 2] * 1e3,
                "p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3,
            }
        )

    _allow_files(3 * connections + 1000)
    asyncio.run(main())


def _memory_per_connection(address: str, pid: int, connections: int) -> float:
    """Bytes that the collector grows by with each idle stream, after some have been opened and closed."""
    with _sender(_idling, address, 50, "warm") as pipe:
        _told(pipe)
        pipe.send("go")
    before = programs.memory_bytes(pid)["rss"]
    with _sender(_idling, address, connections, "idle") as pipe:
        _told(pipe)
        grown = programs.memory_bytes(pid)["rss"] - before
        pipe.send("go")
    return grown / connections


def _idling(pipe: Connection, address: str, connections: int, prefix: str) -> None:
    _allow_files(3 * connections + 1000)

    async def main() -> None:
        gate = asyncio.Semaphore(50)

        async def join(number: int) -> Any:
            channel = _channel(address)
            async with gate:
                # Within the gate: a collector ends a stream on which no hello comes for a while.
                call = _open(channel)
                await _ready(call, _messages(f"{prefix}-{number}", f"{prefix}-{number}", 0, 0)[0])
            return channel, call

        joined = await asyncio.gather(*(join(number) for number in range(connections)))
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        for channel, call in joined:
            call.cancel()
            await channel.close()

    asyncio.run(main())


def _series_of_a_result(url: str) -> float:
    """How many series a board has in /metrics for each of its models, distributions apart."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    board = [line for line in lines if 'device="board-1"' in line and 'model="' in line]
    models = {line.partition('model="')[2].partition('"')[0] for line in board}
    return len([line for line in board if "_distribution_" not in line]) / max(1, len(models))


# The others


def _pushgateway(root: Path, options: Sequence[str], count: int) -> dict[str, float] | None:
    binary = shutil.which("prometheus-pushgateway")
    if binary is None:
        note("ingest: prometheus-pushgateway is not installed, so it does not stand beside it")
        return None
    port = _free_port()
    command = [binary, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error", *options]
    with programs.running(command, root / "pushgateway.log") as process:
        _wait_for(port)
        text = "".join(
            f'# TYPE boardbench_m{n} gauge\nboardbench_m{n}{{model="mobilenet_v2.tflite"}} {n}.5\n'
            for n in range(SERIES)
        ).encode()
        requests = [
            (
                f"PUT /metrics/job/boardbench/instance/board-{number % 2000} HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Length: {len(text)}\r\n\r\n"
            ).encode()
            + text
            for number in range(count)
        ]
        return _over_http(process.pid, port, requests, 64)


def _victoria(root: Path, count: int) -> dict[str, float] | None:
    binary = shutil.which("victoria-metrics")
    if binary is None:
        note("ingest: victoria-metrics is not installed, so it does not stand beside it")
        return None
    port = _free_port()
    command = [binary, f"-storageDataPath={root / 'victoria'}", f"-httpListenAddr=127.0.0.1:{port}"]
    with programs.running(command, root / "victoria.log") as process:
        _wait_for(port)
        now = int(time.time() * 1000)
        requests = []
        for number in range(count):
            line = json.dumps(
                {
                    "metric": {"__name__": "latency_seconds", "device": f"board-{number % 64}"},
                    "values": [0.01 + (7919 * n) % 100_003 * 1e-9 for n in range(1000)],
                    "timestamps": [now - 1_000_000 * (number // 64 + 1) + 1000 * n for n in range(1000)],
                }
            ).encode()
            head = f"POST /api/v1/import HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(line)}\r\n\r\n"
            requests.append(head.encode() + line)
        return _over_http(process.pid, port, requests, 16)


def _over_http(pid: int, port: int, requests: list[bytes], connections: int) -> dict[str, float]:
    with _sender(_requesting, port, requests, connections) as pipe:
        _told(pipe)
        before, begin = programs.cpu_seconds(pid), time.perf_counter()
        pipe.send("go")
        count = _told(pipe)
        return {
            "count": count,
            "wall": time.perf_counter() - begin,
            "cpu": programs.cpu_seconds(pid) - before,
        }


def _requesting(pipe: Connection, port: int, requests: list[bytes], connections: int) -> None:
    async def send(some: list[bytes], begin: asyncio.Event) -> None:
        await begin.wait()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in some:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(None, 2)[1])
            if status // 100 != 2:
                raise SystemExit(f"answered with {status}")
            lower = head.lower()
            if b"content-length:" in lower:
                await reader.readexactly(int(lower.partition(b"content-length:")[2].split(None, 1)[0]))
        writer.close()

    async def main() -> None:
        begin = asyncio.Event()
        tasks = [
            asyncio.create_task(send(requests[number::connections], begin)) for number in range(connections)
        ]
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        begin.set()
        await asyncio.gather(*tasks)
        pipe.send(len(requests))

    asyncio.run(main())


class _Absent(Exception):
    """What is to be measured beside is not here."""


@contextlib.contextmanager
def _postgres(root: Path) -> Iterator[str]:
    """The address of a database on a PostgreSQL server of our own, with its ordinary durability."""
    del root
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found or importable("psycopg") is False:
        note("ingest: no PostgreSQL server, or no psycopg, so it is not measured")
        raise _Absent
    binaries = found[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="boardbench-postgres-"))
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        user = {"user": 65534, "group": 65534, "extra_groups": []}
    try:
        subprocess.run(
            [str(binaries / "initdb"), "-D", "data", "-U", "bench", "--auth", "trust", "-E", "UTF8"],
            cwd=folder, check=True, capture_output=True, **user,
        )  # fmt: skip
        process = subprocess.Popen(
            [str(binaries / "postgres"), "-D", "data", "-k", str(folder), "-h", ""],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not (folder / ".s.PGSQL.5432").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1)
            yield f"postgresql://bench@/postgres?host={folder}"
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def importable(name: str) -> bool:
    """Whether a package is installed."""
    from importlib.util import find_spec

    return find_spec(name) is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


def _allow_files(count: int) -> None:
    """Lets this process and its children have so many connections open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise SystemExit(f"only {hard} files may be open here (ulimit -Hn); {count} are needed")
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__ or "", section="ingest"))
