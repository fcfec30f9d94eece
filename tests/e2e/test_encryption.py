"""A collector with a certificate, an agent and a client that know its authority: programs, as documented."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COLLECTOR = [sys.executable, "-m", "boardbench.collector"]


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with what the commands of docs/encryption.md make, for this machine's names."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl here to make certificates with")
    page = (REPOSITORY / "docs" / "encryption.md").read_text()
    (block,) = re.findall(r"\n\n((?:    .*\n)*    openssl req -x509 .*\n(?:    .*\n)+)", page)
    script = block.replace("DNS:lab,", "DNS:localhost,").replace("IP:192.168.1.10", "IP:127.0.0.1")
    assert script != block
    folder = tmp_path / "certificates"
    folder.mkdir()
    made = subprocess.run(["sh", "-ec", script], cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return folder


def test_a_model_goes_to_a_board_and_comes_back_encrypted(
    programs: Any, eventually: Callable[..., Any], certificates: Path, demo_tflite: Path
) -> None:
    ca = certificates / "ca.pem"
    collector = programs.collector(
        options=[
            f"--tls-cert={certificates / 'lab.pem'}",
            f"--tls-key={certificates / 'lab.key'}",
            "--require-enrolment",
        ]
    )
    assert f"gRPC: tls://{collector.address}" in collector.program.log()
    address = f"tls://localhost:{collector.address.rpartition(':')[2]}"
    made = subprocess.run(
        [*COLLECTOR, "token", "create", f"--data-dir={programs.folder / 'collector'}"],
        capture_output=True,
        text=True,
        check=True,
    )
    # As it is left on a card before the first boot.
    data_dir = programs.folder / "agent"
    data_dir.mkdir(mode=0o700)
    waiting = {"collector": address, "token": made.stdout.strip(), "collector_ca": ca.read_text()}
    (data_dir / "enrolment-pending.json").write_text(json.dumps(waiting) + "\n")
    agent = programs.agent("agent", data_dir=data_dir)

    def devices(*how: str, code: int = 0) -> Any:
        return programs.client("devices", "--format", "json", *how, code=code)

    eventually(
        "the board is up",
        lambda: any(board.get("up") for board in devices("--collector", address, "--ca", str(ca)).json),
    )
    kept = json.loads((data_dir / "enrolment.json").read_text())
    assert kept["collector_ca"] == ca.read_text()
    answer = programs.client(
        *("push", demo_tflite, "--via", collector.address, "--ca", ca),
        *("--on", f"device_id={agent.device_id}", "--duration", "0.2", "--format", "json"),
    )
    assert answer.json["status"] == "RUN_STATUS_SUCCEEDED"
    # Who is not told of the authority, or of the certificate, learns why.
    told = devices("--collector", address, code=3)
    assert "an authority that is not trusted here: name that one's with --ca FILE" in told.err
    told = devices("--collector", collector.address, code=3)
    assert "if the collector has a certificate, write tls://HOST:PORT" in told.err
    told = devices("--collector", address, "--ca", str(demo_tflite), code=2)
    assert "holds no certificate in PEM" in told.err
    # The agent goes on with what it has when it starts again, without a word about either.
    assert agent.program.end() == 0
    again = programs.agent("agent-again", data_dir=data_dir, device_id=agent.device_id)
    eventually("it is there again", lambda: "connected" in again.program.log())


def test_an_agent_that_trusts_somebody_else_says_so(
    programs: Any, eventually: Callable[..., Any], certificates: Path
) -> None:
    collector = programs.collector(
        options=[f"--tls-cert={certificates / 'lab.pem'}", f"--tls-key={certificates / 'lab.key'}"]
    )
    agent = programs.agent("agent", collector=f"tls://{collector.address}")
    eventually(
        "it says what to do",
        lambda: (
            "not trusted here: name that one's with collector_ca (--collector-ca FILE)" in agent.program.log()
        ),
    )
    plain = programs.agent("plain", collector=collector.address)
    eventually(
        "the other does, too",
        lambda: "if the collector has a certificate, write tls://HOST:PORT" in plain.program.log(),
    )


def test_prometheus_scrapes_it_as_documented(
    programs: Any, eventually: Callable[..., Any], certificates: Path, start_prometheus: Any
) -> None:
    collector = programs.collector(
        options=[f"--tls-cert={certificates / 'lab.pem'}", f"--tls-key={certificates / 'lab.key'}"]
    )
    target = f"localhost:{collector.http.rpartition(':')[2]}"
    secure = {
        "job_name": "secure",
        "scheme": "https",
        "tls_config": {"ca_file": str(certificates / "ca.pem")},
        "static_configs": [{"targets": [target]}],
    }
    # The first one, by HTTP and without the authority, gets nothing.
    prometheus = start_prometheus(programs, target, secure)

    def ask(query: str) -> list[dict[str, Any]]:
        url = f"{prometheus}/api/v1/query?query={urllib.parse.quote(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return list(json.loads(answer.read())["data"]["result"])

    left = "boardbench_collector_certificate_expiry_timestamp_seconds - time()"
    (found,) = eventually("there is something", lambda: ask(left))
    assert found["metric"]["job"] == "secure"
    days = float(found["value"][1]) / 86400
    assert 364 < days <= 365
    (down,) = eventually("the other has failed", lambda: ask('up{job="boardbench"}'))
    assert down["value"][1] == "0"
