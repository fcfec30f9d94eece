"""Minutes of kills in random order: every job ends once, nothing acknowledged is lost or stored twice.

Collectors, the PostgreSQL server and agents get SIGKILL; cables between boards and collectors are pulled and
made bad. The agents are real ones, with the fake engine; where root may make network namespaces, each is in
one of its own. ``BOARDBENCH_SOAK_SECONDS`` says for how long (600), ``BOARDBENCH_SOAK_SEED`` which order
(random, and told).

What is proved at the end, is proved by numbers that the collector did not make: each board counts its results
before it sends them, and keeps them. What the boards have on their disks and what is in the collector's
database must be the same list: nothing missing in it, nothing twice, nothing else.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BOARDS = 3
SECONDS = float(os.environ.get("BOARDBENCH_SOAK_SECONDS", "600"))
SEED = int(os.environ.get("BOARDBENCH_SOAK_SEED", str(random.SystemRandom().randrange(1 << 32))))
CONTROL_SECONDS = min(SECONDS, 20.0)
KILLS_EACH_SECONDS = 3.0
"""A kill at least so often: 200 in ten minutes."""
ENDED = ("JOB_STATE_DONE", "JOB_STATE_DEAD")
# Whatever kills interrupt is tried so often that it gets through in the end; but for some, which may die.
ATTEMPTS = 100
OPEN_LIMIT = 4 * BOARDS


# --- the network


def call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


class Namespaces:
    """Each board in a network namespace, on a cable of its own to this machine: a pair of veth devices."""

    # The collector's addresses are one a cable.
    listen = "0.0.0.0"

    def __init__(self) -> None:
        self._net = 0
        self._bad: tuple[str, ...] = ()
        self.told = ""

    def open(self) -> str:
        """Makes them; returns why that can't be done here, or nothing."""
        if not sys.platform.startswith("linux") or os.geteuid():
            return "network namespaces need root on Linux"
        if shutil.which("ip") is None or shutil.which("tc") is None:
            return "no ip and tc on the PATH (package iproute2)"
        # The names are the lock: another test may have its own at the same time.
        for net in random.SystemRandom().sample(range(1, 255), 20):
            made = call("ip", "netns", "add", f"boardbench-{net}-0")
            if made.returncode == 0:
                self._net = net
                break
        else:
            return f"ip netns add was refused: {made.stderr.strip()}"
        for number in range(BOARDS):
            problem = self._connect(number)
            if problem:
                self.close()
                return problem
        self._choose_bad()
        return ""

    def _connect(self, number: int) -> str:
        space, near, far = self._space(number), self._near(number), f"bbf{self._net}-{number}"
        steps = [
            ("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", space),
            ("ip", "address", "add", f"{self._host(number)}/30", "dev", near),
            ("ip", "link", "set", near, "up"),
            ("ip", "-n", space, "address", "add", f"198.18.{self._net}.{4 * number + 2}/30", "dev", far),
            ("ip", "-n", space, "link", "set", far, "up"),
            ("ip", "-n", space, "link", "set", "lo", "up"),
        ]
        if number:
            steps.insert(0, ("ip", "netns", "add", space))
        for step in steps:
            done = call(*step)
            if done.returncode:
                return f"{' '.join(step)} was refused: {done.stderr.strip()}"
        return ""

    def _choose_bad(self) -> None:
        """Delay and loss by netem; a bucket that drops what is over is what most kernels have without it."""
        for told, bad in (
            ("delay and loss by netem", ("netem", "delay", "60ms", "30ms", "loss", "10%")),
            (
                "no netem in this kernel, so a token bucket (tbf) delays and drops",
                ("tbf", "rate", "96kbit", "burst", "4kb", "latency", "150ms"),
            ),
        ):
            done = call("tc", "qdisc", "replace", "dev", self._near(0), "root", *bad)
            if done.returncode == 0:
                call("tc", "qdisc", "del", "dev", self._near(0), "root")
                self._bad, self.told = bad, f"network namespaces, cables pulled, {told}"
                return
        self.told = "network namespaces, cables pulled; no netem and no tbf in this kernel"

    def _space(self, number: int) -> str:
        return f"boardbench-{self._net}-{number}"

    def _near(self, number: int) -> str:
        return f"bbn{self._net}-{number}"

    def _host(self, number: int) -> str:
        # 198.18.0.0/15 is for tests of networks (RFC 2544) and is nobody's.
        return f"198.18.{self._net}.{4 * number + 1}"

    def within(self, number: int) -> list[str]:
        """The command that starts a program where the board is."""
        return ["ip", "netns", "exec", self._space(number)]

    def address(self, number: int, collector: str) -> str:
        """Where the board finds the collector."""
        return f"{self._host(number)}:{collector.rpartition(':')[2]}"

    def harm(self, number: int, kind: str) -> str:
        """Pulls a cable or makes it bad; what was done."""
        if kind == "bad" and self._bad:
            call("tc", "qdisc", "replace", "dev", self._near(number), "root", *self._bad)
            far = f"bbf{self._net}-{number}"
            call("tc", "-n", self._space(number), "qdisc", "replace", "dev", far, "root", *self._bad)
            return "bad cable"
        done = call("ip", "link", "set", self._near(number), "down")
        assert done.returncode == 0, done.stderr
        return "cable"

    def heal(self, number: int) -> None:
        call("tc", "qdisc", "del", "dev", self._near(number), "root")
        call("tc", "-n", self._space(number), "qdisc", "del", "dev", f"bbf{self._net}-{number}", "root")
        done = call("ip", "link", "set", self._near(number), "up")
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        for number in range(BOARDS):
            call("ip", "link", "del", self._near(number))
            call("ip", "netns", "del", self._space(number))


class Wires:
    """What there is without root: each connection goes through this process, and is cut here."""

    listen = "127.0.0.1"

    def __init__(self, programs: Any, why: str) -> None:
        self._programs = programs
        self._wires: dict[tuple[int, str], Any] = {}
        self.told = f"connections cut ({why})"

    def within(self, number: int) -> list[str]:
        return []

    def address(self, number: int, collector: str) -> str:
        collector = f"127.0.0.1:{collector.rpartition(':')[2]}"
        if (number, collector) not in self._wires:
            self._wires[(number, collector)] = self._programs.wire(collector)
        return str(self._wires[(number, collector)].address)

    def harm(self, number: int, kind: str) -> str:
        for (board, _), wire in self._wires.items():
            if board == number:
                wire.cut()
        return "cable"

    def heal(self, number: int) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def network(programs: Any) -> Iterator[Namespaces | Wires]:
    """Namespaces and cables where they can be made; told in the output where not."""
    made = Namespaces()
    why = made.open()
    if why:
        yield Wires(programs, why)
        return
    yield made
    # Programs that are in there end first.
    programs.close()
    made.close()


# --- the store


class SqliteStore:
    """The file of the one collector that has it."""

    collectors = 1
    server = None

    def __init__(self, folder: Path) -> None:
        self._path = folder / "collector-0" / "results.db"
        self.options: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str, int, str]]:
        """Device, spool, number in the spool and run of everything that is stored."""
        with contextlib.closing(sqlite3.connect(self._path, timeout=30)) as db:
            return list(db.execute("SELECT device_id, spool_id, sequence, run_id FROM results"))

    def forget(self) -> None:
        """Takes both keys away: how far each spool is stored, and that a run is stored once."""
        with contextlib.closing(sqlite3.connect(self._path, timeout=30)) as db:
            db.execute(
                "CREATE TRIGGER IF NOT EXISTS unkeyed BEFORE INSERT ON results BEGIN UPDATE results"
                " SET run_id = run_id || '-before-' || arrival WHERE run_id = NEW.run_id; END"
            )
            db.execute("UPDATE spools SET sequence = 0")
            db.commit()


class PostgresStore:
    """A server of its own, and two collectors on it."""

    collectors = 2

    def __init__(self, server: Any) -> None:
        self.server = server
        self._url = self.server.new_database()
        # Files go through the database: a board is sent to either collector by chance.
        self.options = ("--store", self._url)

    def rows(self) -> list[tuple[str, str, int, str]]:
        import psycopg

        with psycopg.connect(self._url) as db:
            return list(db.execute("SELECT device_id, spool_id, sequence, run_id FROM results").fetchall())

    def forget(self) -> None:
        import psycopg

        with psycopg.connect(self._url) as db:
            db.execute(
                "CREATE OR REPLACE FUNCTION unkeyed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " IF EXISTS (SELECT 1 FROM results WHERE run_id = NEW.run_id) THEN"
                " NEW.run_id := NEW.run_id || '-again-' || NEW.arrival; END IF; RETURN NEW; END $$"
            )
            db.execute(
                "CREATE OR REPLACE TRIGGER unkeyed BEFORE INSERT ON results"
                " FOR EACH ROW EXECUTE FUNCTION unkeyed()"
            )
            db.execute("UPDATE spools SET sequence = 0")


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, programs: Any) -> Iterator[Any]:
    if request.param == "sqlite":
        yield SqliteStore(programs.folder)
    else:
        yield PostgresStore(request.getfixturevalue("postgres_server"))
    # Before the server ends, on which they are.
    programs.close()


# --- the lab


class Lab:
    """Collectors and boards, each of which may be killed at any moment and comes back."""

    def __init__(
        self, programs: Any, store: Any, network: Any, chance: random.Random, *, keyed: bool = True
    ) -> None:
        self.programs, self.store, self.network = programs, store, network
        self.chance, self.keyed = chance, keyed
        self.kills: collections.Counter[str] = collections.Counter()
        self.gave_up: list[str] = []
        self.options = ("--heartbeat", "0.5", *store.options)
        self.collectors = [
            programs.collector(f"collector-{number}", listen=f"{network.listen}:0", options=self.options)
            for number in range(store.collectors)
        ]
        self.addresses = [collector.address for collector in self.collectors]
        self.boards: list[Any] = [self._start_board(number) for number in range(BOARDS)]
        # What is down, and when it comes back: its name, the moment, how.
        self._down: dict[str, tuple[float, Callable[[], None]]] = {}
        self._postgres_fell = 0.0

    def _start_board(self, number: int) -> Any:
        return self.programs.agent(
            f"board{number}",
            collector=self.network.address(number, self.chance.choice(self.addresses)),
            listen="",
            environment={
                "BOARDBENCH_FAKE_RUNTIME": "1",
                # The proof needs all that was ever acknowledged.
                "BOARDBENCH_AGENT_SPOOL_KEPT_BYTES": str(1 << 30),
            },
            within=self.network.within(number),
            wait=False,
        )

    def _start_collector(self, number: int) -> None:
        if not self.keyed and self.store.server is None:
            self.store.forget()
        port = self.addresses[number].rpartition(":")[2]
        self.collectors[number] = self.programs.collector(
            f"collector-{number}", listen=f"{self.network.listen}:{port}", options=self.options, wait=False
        )

    def _put_board_back(self, number: int) -> None:
        self.boards[number] = self._start_board(number)

    def _start_postgres(self) -> None:
        self.store.server.start()
        if not self.keyed:
            self.store.forget()

    def tick(self) -> None:
        """Brings back what is due, and, as systemd does, a collector that gave up without its database."""
        now = time.monotonic()
        for name, (moment, back) in sorted(self._down.items(), key=lambda item: item[1][0]):
            if moment <= now:
                del self._down[name]
                back()
        for number, collector in enumerate(self.collectors):
            if f"collector {number}" not in self._down and not collector.program.running:
                self.gave_up.append(f"collector {number}: exit {collector.program.process.returncode}")
                assert self.store.server is not None and now - self._postgres_fell < 60, (
                    f"{self.gave_up[-1]}, and nobody had killed it:\n{collector.program.log()[-5000:]}"
                )
                self._down[f"collector {number}"] = (
                    now + 1.0,
                    lambda number=number: self._start_collector(number),
                )
        for number, board in enumerate(self.boards):
            assert f"board {number}" in self._down or board.program.running, (
                f"board {number} ended by itself: exit {board.program.process.returncode}\n"
                f"{board.program.log()[-5000:]}"
            )

    def hit(self) -> None:
        """Kills something that is up, or does something to a cable; it comes back after a while."""
        chance = self.chance
        up = [name for name, _ in self._all() if name not in self._down]
        weights = dict(self._all())
        if not up:
            return
        (name,) = chance.choices(up, [weights[name] for name in up])
        kind, _, digits = name.partition(" ")
        number = int(digits or 0)
        pause = chance.uniform(0.0, 1.5)
        back: Callable[[], None]
        if kind == "collector":
            self.collectors[number].program.kill()
            back = lambda: self._start_collector(number)  # noqa: E731
        elif kind == "board":
            self.boards[number].program.kill()
            back = lambda: self._put_board_back(number)  # noqa: E731
        elif kind == "postgres":
            self.store.server.kill()
            self._postgres_fell = time.monotonic()
            back = self._start_postgres
        else:
            kind = self.network.harm(number, chance.choice(("pulled", "pulled", "bad")))
            pause = chance.uniform(0.1, 6.0)
            back = lambda: self.network.heal(number)  # noqa: E731
        self.kills[kind] += 1
        self._down[name] = (time.monotonic() + pause, back)

    def _all(self) -> list[tuple[str, float]]:
        """What can be hit, and how often it is, against the others."""
        found = [(f"board {number}", 2.0) for number in range(BOARDS)]
        found += [(f"cable {number}", 2.0) for number in range(BOARDS)]
        found += [
            (f"collector {number}", 5.0 / len(self.collectors)) for number in range(len(self.collectors))
        ]
        if self.store.server is not None:
            found.append(("postgres", 3.0))
        return found

    def calm(self) -> None:
        """Brings everything back."""
        for _, back in list(self._down.values()):
            back()
        self._down.clear()
        if not self.keyed:
            # Kills came when they came; this one comes in any case.
            for collector in self.collectors:
                collector.program.kill()
            self.store.forget()
            for number in range(len(self.collectors)):
                self._start_collector(number)

    def killed(self) -> int:
        """How often something was killed: a bad cable still is one."""
        return sum(count for kind, count in self.kills.items() if kind != "bad cable")


# --- who uses it


class Submitter(threading.Thread):
    """Queues jobs for all boards at any collector, each request as often as it takes, and once more."""

    def __init__(self, addresses: list[str], models: Path, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self._addresses, self._models, self._chance = addresses, models, chance
        self.enough = threading.Event()
        self.jobs: set[str] = set()
        self.mortal: set[str] = set()
        self.seen: set[str] = set()
        self.problems: list[str] = []

    def run(self) -> None:
        from boardbench.cli.errors import CliError
        from boardbench.cli.source import Source
        from boardbench.v1 import job_pb2, result_pb2

        spec = result_pb2.BenchmarkSpec(
            duration_seconds=0.0, min_runs=3, warm_up_seconds=0.0, profile_runs=0, idle_seconds=0.0
        )
        rounds = 0
        while not self.enough.wait(1.5):
            try:
                if self._open_jobs() >= OPEN_LIMIT:
                    continue
                if rounds % 8 == 0:
                    # What can be read at one moment must be there ever after.
                    self.seen |= {
                        result.run_id for result in results_of(self._chance.choice(self._addresses))
                    }
            except CliError:
                continue
            rounds += 1
            request = job_pb2.SubmitJobsRequest(
                request_id=uuid.uuid4().hex,
                on=["device_id=*"],
                spec=spec,
                max_attempts=1 if rounds % 3 == 0 else ATTEMPTS,
                timeout_seconds=7200,
            )
            with Source(self._model(rounds // 5)) as source:
                self._submit(source, request)

    def _model(self, number: int) -> Path:
        """A file that was not pushed before this number was asked for, so that transfers are hit, too."""
        path = self._models / f"m{number}.fake"
        if not path.exists():
            head = 'boardbench-fake/1\n{"create": [{"sleep_seconds": 0.3}]}'
            path.write_text(head + " " * (300_000 + number))
        return path

    def _open_jobs(self) -> int:
        from boardbench.cli.address import parse_address
        from boardbench.cli.client import JobsClient
        from boardbench.v1 import job_pb2

        still = (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_LEASED, job_pb2.JOB_STATE_RUNNING)
        with JobsClient(parse_address(self._chance.choice(self._addresses), 0)) as client:
            return len(list(client.jobs(job_pb2.JobFilter(states=still))))

    def _submit(self, source: Any, request: Any) -> None:
        from boardbench.cli.address import parse_address
        from boardbench.cli.client import JobsClient
        from boardbench.cli.errors import CliError

        answers: list[set[str]] = []
        while len(answers) < 2 and not self.enough.is_set():
            try:
                address = parse_address(self._chance.choice(self._addresses), 0)
                with JobsClient(address, retry_seconds=2.0) as client:
                    request.model_sha256 = client.push(source).model.sha256
                    answers.append({job.job_id for job in client.submit(request)})
            except CliError:
                time.sleep(0.1)
        for answer in answers:
            self.jobs |= answer
            if request.max_attempts == 1:
                self.mortal |= answer
        if len(answers) == 2 and answers[0] != answers[1]:
            self.problems.append(f"request {request.request_id} gave {answers}")


def jobs_of(address: str) -> list[dict[str, Any]]:
    from google.protobuf import json_format

    from boardbench.cli.address import parse_address
    from boardbench.cli.client import JobsClient
    from boardbench.v1 import job_pb2

    with JobsClient(parse_address(address, 0)) as client:
        return [
            json_format.MessageToDict(job, preserving_proto_field_name=True)
            for job in client.jobs(job_pb2.JobFilter())
        ]


def results_of(address: str) -> list[Any]:
    from boardbench.cli.address import parse_address
    from boardbench.cli.client import CollectorClient

    with CollectorClient(parse_address(address, 0)) as client:
        return list(client.results(limit=1_000_000, summary=True))


def up(address: str) -> list[Any]:
    from boardbench.cli.address import parse_address
    from boardbench.cli.client import CollectorClient
    from boardbench.cli.errors import CliError

    try:
        with CollectorClient(parse_address(address, 0)) as client:
            return client.devices(["up=true"])
    except CliError:
        return []


def emptied(address: str) -> bool:
    found = up(address)
    return len(found) == BOARDS and all(device.heartbeat.spool_pending == 0 for device in found)


def spooled(data_dir: Path) -> list[tuple[str, int, str]]:
    """Spool, number and run of every result that the board has ever had; the agent must not run."""
    from boardbench.agent.spool import Spool

    spool = Spool(data_dir / "spool", 1 << 40, kept_bytes=1 << 40)
    try:
        status = spool.status()
        assert status.dropped == 0, f"{data_dir} has dropped {status.dropped} results"
        # As to a collector that has nothing: everything that is kept is to be sent.
        spool.reconcile(status.spool_id, 0)
        return [(record.spool_id, record.sequence, record.run_id) for record in spool.pending()]
    finally:
        spool.close()


@dataclass
class Evidence:
    """What there is when everything has come to rest, read from those who have it."""

    told: str
    stored: list[tuple[str, str, int, str]]
    """Device, spool, number, run: the database."""
    sent: list[tuple[str, str, int, str]]
    """The same, of the boards' own disks."""
    jobs: list[dict[str, Any]]
    results: list[Any]
    submitted: set[str]
    mortal: set[str]
    seen: set[str]
    logs: list[str] = field(default_factory=list)

    def prove(self) -> None:
        """Fails when anything is lost or twice."""
        told = self.told
        places = collections.Counter(row[:3] for row in self.stored)
        twice = [place for place, count in places.items() if count > 1]
        assert not twice, f"{told}: stored twice, by number: {twice[:10]} and more, {len(twice)} in all"
        runs = collections.Counter(row[3] for row in self.stored)
        assert max(runs.values()) == 1, f"{told}: stored twice: {[run for run, n in runs.items() if n > 1]}"
        assert len(set(self.sent)) == len(self.sent)
        lost, invented = set(self.sent) - set(self.stored), set(self.stored) - set(self.sent)
        assert not lost, f"{told}: lost: {sorted(lost)[:10]}, {len(lost)} in all"
        assert not invented, f"{told}: no board has sent {sorted(invented)[:10]}"
        assert sorted(result.run_id for result in self.results) == sorted(runs)
        assert self.seen <= set(runs), f"{told}: was there once: {self.seen - set(runs)}"
        again = [log for log in self.logs if "that are still here are sent again" in log]
        assert not again, f"{told}: the collector had acknowledged more than it had"
        self._prove_jobs(runs)

    def _prove_jobs(self, runs: collections.Counter[str]) -> None:
        told = self.told
        assert len({job["job_id"] for job in self.jobs}) == len(self.jobs)
        assert self.submitted <= {job["job_id"] for job in self.jobs}, f"{told}: jobs are lost"
        succeeded = collections.Counter(
            result.run_id.rpartition("-")[0] for result in self.results if result.status == 1
        )
        for job in self.jobs:
            job_id = job["job_id"]
            if job["state"] == "JOB_STATE_DEAD":
                # A result that comes after all ends the job, so that a dead one has none.
                assert job_id in self.mortal and job.get("reason"), f"{told}: {job}"
                assert succeeded[job_id] == 0, f"{told}: {succeeded[job_id]} times: {job}"
            else:
                assert job["state"] == "JOB_STATE_DONE", f"{told}: {job}"
                assert job["run_id"] in runs, f"{told}: the result of {job} is lost"
                assert succeeded[job_id] == 1, f"{told}: {succeeded[job_id]} times: {job}"


def live(lab: Lab, models: Path, seconds: float, eventually: Callable[..., Any]) -> Evidence:
    """Kills for so long, lets everything come to rest, and returns what there is then."""
    eventually("all boards are there", lambda: len(up(lab.addresses[0])) == BOARDS, 60.0)
    submitter = Submitter(lab.addresses, models, random.Random(lab.chance.random()))
    submitter.start()
    began = time.monotonic()
    following = 0.0
    while (now := time.monotonic()) < began + seconds:
        lab.tick()
        if now >= following:
            lab.hit()
            following = now + lab.chance.uniform(0.2, 3.2)
        time.sleep(0.05)
    submitter.enough.set()
    lab.calm()
    submitter.join(60)

    def told() -> str:
        return (
            f"seed {SEED}, {lab.killed()} kills ({dict(lab.kills)}), {len(submitter.jobs)} jobs, "
            f"{lab.network.told}"
        )

    assert submitter.jobs, told()
    assert not submitter.problems, told()

    def over() -> bool:
        from boardbench.cli.errors import CliError

        lab.tick()
        try:
            return all(job["state"] in ENDED for job in jobs_of(lab.addresses[0]))
        except CliError:
            return False

    eventually(f"all jobs have ended ({told()})", over, 900.0)
    for attempt in range(3):
        if attempt:
            for number in range(BOARDS):
                lab.boards[number] = lab._start_board(number)
        eventually(f"all spools are empty ({told()})", lambda: emptied(lab.addresses[0]), 120.0)
        for board in lab.boards:
            board.program.end()
        sent = [(board.device_id, *each) for board in lab.boards for each in spooled(board.data_dir)]
        stored = lab.store.rows()
        # A heartbeat may be older than the last result; what is lost does not come later either.
        if set(sent) <= set(stored):
            break
    jobs = jobs_of(lab.addresses[0])
    results = results_of(lab.addresses[0])
    dead = sum(job["state"] == "JOB_STATE_DEAD" for job in jobs)
    told_all = (
        f"{told()} ({dead} in dead-letter), {len(results)} results, {len(lab.gave_up)} collectors gave up"
    )
    return Evidence(
        told_all,
        stored,
        sent,
        jobs,
        results,
        submitter.jobs,
        submitter.mortal,
        submitter.seen,
        [board.program.log() for board in lab.boards],
    )


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 1200)
def test_every_job_ends_once_whatever_is_killed(
    programs: Any,
    network: Any,
    store: Any,
    models: Path,
    eventually: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab = Lab(programs, store, network, random.Random(SEED))
    evidence = live(lab, models, SECONDS, eventually)
    evidence.prove()
    assert lab.killed() >= SECONDS / KILLS_EACH_SECONDS, evidence.told
    with capsys.disabled():
        sys.stdout.write(f"\n{evidence.told}: each once\n")


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_without_its_keys_the_same_proof_fails(
    programs: Any, network: Any, store: Any, models: Path, eventually: Callable[..., Any]
) -> None:
    """The negative control: the database forgets what it has, and takes a run again."""
    lab = Lab(programs, store, network, random.Random(SEED), keyed=False)
    evidence = live(lab, models, CONTROL_SECONDS, eventually)
    with pytest.raises(AssertionError, match="stored twice, by number"):
        evidence.prove()
