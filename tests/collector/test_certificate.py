"""TLS of the collector, with certificates that openssl makes: who connects, who does not, and why."""

from __future__ import annotations

import asyncio
import calendar
import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from boardbench.agent.enrolment import Enrolment
from boardbench.agent.errors import ConfigurationError, EnrolmentRefused
from boardbench.agent.stream import open_channel
from boardbench.cli.address import Address as Place
from boardbench.cli.client import CollectorClient
from boardbench.cli.errors import CliError, Unreachable
from boardbench.collector import certificate
from boardbench.collector.certificate import Certificate
from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import StartError
from boardbench.collector.serve import Listening, running
from boardbench.collector.stores.beside import TablesFile
from boardbench.collector.stores.enrolments import MIGRATIONS, Enrolments
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.inspect import tls
from boardbench.v1 import board_pb2, collector_pb2, collector_pb2_grpc

HERE = "DNS:localhost,IP:127.0.0.1"
SCRAPED = "boardbench_collector_certificate_expiry_timestamp_seconds"


class Authority:
    """An authority of one's own, as docs/encryption.md makes it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        folder.mkdir(exist_ok=True)
        self.openssl(
            *("req", "-x509", *self._key(f"{name}.key"), "-days", "3650"),
            *("-out", f"{name}.pem", "-subj", f"/CN={name}"),
        )
        (folder / "index").mkdir()
        (folder / "index" / "list").touch()

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.pem"

    def openssl(self, *arguments: str) -> str:
        done = subprocess.run(
            ["openssl", *arguments], cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _key(self, name: str) -> tuple[str, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", name)

    def sign(
        self, name: str, names: str = HERE, *, begin: str = "20200101000000Z", end: str = "20491231235959Z"
    ) -> tuple[Path, Path]:
        """A certificate and its key, made by ``openssl ca``, which takes times of the past."""
        (self.folder / "settings").write_text(
            "[ca]\ndefault_ca=own\n[own]\ndatabase=index/list\nnew_certs_dir=index\nrand_serial=yes\n"
            "default_md=sha256\npolicy=any\nx509_extensions=more\nunique_subject=no\n"
            "[any]\ncommonName=supplied\n[more]\nauthorityKeyIdentifier=keyid\n"
            f"subjectAltName={names}\n"
        )
        self.openssl("req", *self._key(f"{name}.key"), "-out", f"{name}.csr", "-subj", f"/CN={name}")
        self.openssl(
            *("ca", "-config", "settings", "-batch", "-notext", "-in", f"{name}.csr", "-out", f"{name}.pem"),
            *("-cert", self.file.name, "-keyfile", f"{self.name}.key", "-startdate", begin, "-enddate", end),
        )
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl here to make certificates with")
    return Authority(tmp_path_factory.mktemp("authority"), "lab")


@pytest.fixture(scope="module")
def stranger(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@contextlib.asynccontextmanager
async def collector(
    config: CollectorConfig, pair: tuple[Path, Path] | None, enrolments: Enrolments | None = None
) -> AsyncIterator[Listening]:
    if pair is not None:
        config = replace(config, tls_certificate=pair[0], tls_key=pair[1])
    async with running(config, MemoryResultStore(), enrolments) as listening:
        yield listening


async def as_agent(address: str, ca: bytes = b"") -> str:
    """What an agent gets: "" when it is answered."""
    async with open_channel(address, ca=ca) as channel:
        stub = collector_pb2_grpc.CollectorServiceStub(channel)
        try:
            await stub.ListDevices(collector_pb2.ListDevicesRequest(), timeout=20)
        except grpc.aio.AioRpcError as error:
            return str(error.details())
    return ""


async def as_client(place: Place) -> str:
    """What a person reads: "" when it is answered."""

    def ask() -> str:
        with CollectorClient(place) as client:
            try:
                client.devices()
            except Unreachable as error:
                return str(error)
        return ""

    return await asyncio.to_thread(ask)


async def test_agents_clients_and_scrapes_are_encrypted(
    authority: Authority, local_config: CollectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = authority.sign("good", end="20450607080910Z")
    async with collector(local_config, pair) as listening:
        port = listening.grpc.port
        ca = authority.file.read_bytes()
        for address in (f"tls://localhost:{port}", f"127.0.0.1:{port}"):
            assert await as_agent(address, ca) == ""
        for host in ("localhost", "127.0.0.1"):
            assert await as_client(Place(host, port, tls=True, ca=authority.file)) == ""
        # Without a file it is whom the system trusts.
        assert "not trusted" in await as_client(Place("localhost", port, tls=True))
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        assert await as_client(Place("localhost", port, tls=True)) == ""
        assert await as_agent(f"tls://localhost:{port}") == ""

        def scrape() -> str:
            context = ssl.create_default_context(cafile=str(authority.file))
            url = f"https://localhost:{listening.http.port}/metrics"
            with urllib.request.urlopen(url, context=context) as answer:
                return str(answer.read().decode())

        page = await asyncio.to_thread(scrape)
    (value,) = [line.split()[1] for line in page.splitlines() if line.startswith(f"{SCRAPED} ")]
    assert float(value) == calendar.timegm((2045, 6, 7, 8, 9, 10))


@pytest.mark.parametrize(
    ("names", "end", "words"),
    [
        ("DNS:elsewhere.lab", "20491231235959Z", "its certificate is for other names"),
        (HERE, "20200201000000Z", "its certificate has expired: renew it"),
    ],
    ids=["name", "expired"],
)
async def test_a_certificate_that_is_not_good_is_told(
    authority: Authority, local_config: CollectorConfig, names: str, end: str, words: str
) -> None:
    pair = authority.sign("bad", names, end=end)
    async with collector(local_config, pair) as listening:
        told = await as_client(Place("localhost", listening.grpc.port, tls=True, ca=authority.file))
        assert f"the connection to tls://localhost:{listening.grpc.port} failed: {words}" in told
        address = f"tls://localhost:{listening.grpc.port}"
        details = await as_agent(address, authority.file.read_bytes())
        assert words in tls.advice(details, tls=True, option="collector_ca")


async def test_one_that_is_not_valid_yet_is_told(authority: Authority, local_config: CollectorConfig) -> None:
    pair = authority.sign("early", begin="20480101000000Z")
    async with collector(local_config, pair) as listening:
        told = await as_client(Place("localhost", listening.grpc.port, tls=True, ca=authority.file))
    assert "its certificate is not valid yet: look at the clocks of both sides" in told


async def test_a_stranger_s_authority_is_told(
    authority: Authority, stranger: Authority, local_config: CollectorConfig
) -> None:
    async with collector(local_config, authority.sign("good")) as listening:
        told = await as_client(Place("localhost", listening.grpc.port, tls=True, ca=stranger.file))
        assert "an authority that is not trusted here: name that one's with --ca FILE" in told


async def test_both_must_know_of_it(authority: Authority, local_config: CollectorConfig) -> None:
    async with collector(local_config, authority.sign("good")) as listening:
        told = await as_client(Place("127.0.0.1", listening.grpc.port))
        assert "if the collector has a certificate, write tls://HOST:PORT" in told
        details = await as_agent(str(listening.grpc))
        assert "write tls://HOST:PORT" in tls.advice(details, tls=False, option="")
    async with collector(local_config, None) as listening:
        told = await as_client(Place("127.0.0.1", listening.grpc.port, tls=True, ca=authority.file))
        assert "it does not speak TLS: leave tls:// and --ca FILE out" in told


async def test_a_new_certificate_is_taken_without_a_restart(
    authority: Authority,
    local_config: CollectorConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(certificate, "_LOOK_SECONDS", 0.02)
    caplog.set_level(logging.INFO)
    in_use = (tmp_path / "in-use.pem", tmp_path / "in-use.key")

    def use(number: int, path: Path) -> None:
        fresh = tmp_path / "fresh"
        fresh.write_bytes(path.read_bytes())
        fresh.replace(in_use[number])

    def serial(port: int) -> str:
        context = ssl.create_default_context(cafile=str(authority.file))
        context.set_alpn_protocols(["h2", "http/1.1"])
        with (
            contextlib.closing(socket.create_connection(("localhost", port), 20)) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as wrapped,
        ):
            return str((wrapped.getpeercert() or {})["serialNumber"])

    async def until(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, caplog.text
            await asyncio.sleep(0.02)

    old, new = authority.sign("old"), authority.sign("new")
    for number in (0, 1):
        use(number, old[number])
    async with collector(local_config, in_use) as listening:
        ports = (listening.grpc.port, listening.http.port)
        first = {await asyncio.to_thread(serial, port) for port in ports}
        assert len(first) == 1
        address, ca = f"tls://localhost:{ports[0]}", authority.file.read_bytes()
        async with open_channel(address, ca=ca) as channel:
            stub = collector_pb2_grpc.CollectorServiceStub(channel)
            await stub.ListDevices(collector_pb2.ListDevicesRequest(), timeout=20)
            # The one is written before the other; in between they do not belong together.
            use(0, new[0])
            await until(lambda: "is not the key of the certificate" in caplog.text)
            assert {await asyncio.to_thread(serial, port) for port in ports} == first
            use(1, new[1])
            await until(lambda: "was read again; it ends on 2049-12-31" in caplog.text)
            second = {await asyncio.to_thread(serial, port) for port in ports}
            assert len(second) == 1
            assert second != first
            # Who was connected still is.
            await stub.ListDevices(collector_pb2.ListDevicesRequest(), timeout=20)
        assert await as_agent(address, ca) == ""
    assert caplog.text.count("is not the key of the certificate") == 1


async def test_a_board_is_enrolled_and_remembers_the_authority(
    authority: Authority, stranger: Authority, local_config: CollectorConfig, tmp_path: Path
) -> None:
    from boardbench.agent.config import AgentConfig

    with contextlib.closing(TablesFile(None, MIGRATIONS)) as tables:
        tokens = Enrolments(tables)
        async with collector(local_config, authority.sign("good"), tokens) as listening:
            address, board = f"tls://localhost:{listening.grpc.port}", board_pb2.Board(device_id="pi5")
            token = await tokens.create()
            with pytest.raises(
                EnrolmentRefused, match=r"not trusted here: name that one's with collector_ca"
            ):
                await Enrolment(tmp_path / "a").enroll(address, token, board, "i", ca=str(stranger.file))
            with pytest.raises(ConfigurationError, match=r"collector_ca: .*no-such.* can't be read"):
                await Enrolment(tmp_path / "a").enroll(address, token, board, "i", ca="/no-such/ca.pem")
            await Enrolment(tmp_path / "a").enroll(address, token, board, "i", ca=str(authority.file))
            known = Enrolment(tmp_path / "a")
            config = known.apply(AgentConfig(data_dir=tmp_path / "a"))
            assert config.collector == address
            assert known.ca(config) == authority.file.read_bytes()
            async with open_channel(config.collector, ca=known.ca(config)) as channel:
                metadata = await known.metadata(channel, config.collector, lambda: board, "i")
            await tokens.check("pi5", dict(metadata)["boardbench-device-key"], required=True)
            # It is the same collector when the configuration names it as it was before it had a certificate.
            plain = replace(config, collector=address.removeprefix("tls://"))
            assert known.ca(plain) == authority.file.read_bytes()
            async with open_channel(plain.collector, ca=known.ca(plain)) as channel:
                assert await known.metadata(channel, plain.collector, lambda: board, "i") == metadata
            # The file that the configuration names comes before it; another collector has nothing of it.
            named = replace(config, collector_ca=str(stranger.file))
            assert known.ca(named) == stranger.file.read_bytes()
            assert known.ca(replace(config, collector="elsewhere:7342")) == b""


def test_the_end_is_read_from_any_certificate(authority: Authority) -> None:
    for end in ("20491231235959Z", "20500101000000Z", "20991231235959Z"):
        chain, key = authority.sign("long", end=end)
        wanted = calendar.timegm(time.strptime(end, "%Y%m%d%H%M%SZ"))
        assert Certificate(chain, key).ends_at == wanted
        # Of a chain, what ends first counts.
        both = authority.folder / "both.pem"
        both.write_bytes(chain.read_bytes() + authority.file.read_bytes())
        told = authority.openssl("x509", "-in", authority.file.name, "-noout", "-enddate").strip()
        first = calendar.timegm(time.strptime(told.partition("=")[2], "%b %d %H:%M:%S %Y GMT"))
        assert Certificate(both, key).ends_at == min(first, wanted)


async def test_what_can_not_be_used_is_told_at_the_start(
    authority: Authority, local_config: CollectorConfig, tmp_path: Path
) -> None:
    chain, key = authority.sign("good")
    other = authority.sign("other")[1]
    locked, empty = authority.folder / "locked.key", tmp_path / "empty.pem"
    authority.openssl("pkey", "-in", key.name, "-aes256", "-passout", "pass:secret", "-out", locked.name)
    empty.write_bytes(b"")
    for pair, words in (
        ((chain, other), "is not the key of the certificate"),
        ((chain, locked), "locked by a passphrase"),
        ((chain, tmp_path / "none.key"), r"can't read .*none\.key: No such file"),
        ((empty, key), "no certificate in PEM"),
        ((key, key), "no certificate in PEM"),
    ):
        with pytest.raises(StartError, match=words):
            async with collector(local_config, pair):
                pass
    with pytest.raises(StartError, match="give both --tls-cert and --tls-key"):
        async with running(replace(local_config, tls_certificate=chain), MemoryResultStore()):
            pass


async def test_a_file_of_an_authority_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(CliError, match=r"ca\.pem holds no certificate in PEM"):
        CollectorClient(Place("127.0.0.1", 1, tls=True, ca=tmp_path / "ca.pem"))
