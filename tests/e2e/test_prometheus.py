"""A real Prometheus server scrapes a real collector, and PromQL gives back what the client printed."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

QUICK = ("--duration", "0.2", "--min-runs", "20", "--warm-up", "0.05")


def test_promql_returns_what_the_client_printed(
    programs: Any, prometheus: dict[str, str], demo_tflite: Path, demo_onnx: Path, eventually: Any
) -> None:
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    answer = programs.client(
        "push", demo_tflite, demo_onnx, "--to", agent.address, "--format", "json", *QUICK
    )
    url = _start_prometheus(programs, prometheus, collector.http, eventually)
    for result in answer.json:
        name = result["model"]["name"]
        for percentile in result["latency"]["percentiles"]:
            labels = (
                f'{{device="{agent.device_id}",model="{name}",percentile="{percentile["percentile"]:g}"}}'
            )
            found = eventually(
                f"Prometheus has p{percentile['percentile']:g} of {name}",
                lambda labels=labels: _query(url, f"boardbench_latency_seconds{labels}"),
            )
            assert float(found[0]["value"][1]) == percentile["seconds"]
        units: dict[str, int] = {}
        for op in result["placement"]["ops"]:
            unit = op["unit"].removeprefix("UNIT_").lower()
            units[unit] = units.get(unit, 0) + 1
        for unit, count in units.items():
            labels = f'{{device="{agent.device_id}",model="{name}",unit="{unit}"}}'
            assert float(_query(url, f"boardbench_ops{labels}")[0]["value"][1]) == count
    assert float(_query(url, f'sum(boardbench_runs_total{{device="{agent.device_id}"}})')[0]["value"][1]) == 2
    assert float(_query(url, "up")[0]["value"][1]) == 1


def test_a_board_that_is_gone_is_seen_in_prometheus(
    programs: Any, prometheus: dict[str, str], eventually: Any
) -> None:
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    url = _start_prometheus(programs, prometheus, collector.http, eventually)
    query = f'boardbench_device_up{{device="{agent.device_id}"}}'

    def value() -> str | None:
        found = _query(url, query)
        return str(found[0]["value"][1]) if found else None

    eventually("the board is up in Prometheus", lambda: value() == "1")
    agent.program.kill()
    eventually("the board is down in Prometheus", lambda: value() == "0")


def test_promtool_finds_nothing(
    programs: Any, prometheus: dict[str, str], demo_tflite: Path, demo_onnx: Path
) -> None:
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    programs.client("push", demo_tflite, demo_onnx, "--to", agent.address, *QUICK)
    exposition = collector.get("/metrics")
    assert "boardbench_latency_seconds{" in exposition
    done = subprocess.run(
        [prometheus["promtool"], "check", "metrics"],
        input=exposition,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def _start_prometheus(programs: Any, paths: dict[str, str], target: str, eventually: Any) -> str:
    import socket

    folder = programs.folder / "prometheus"
    folder.mkdir()
    configuration = folder / "prometheus.yml"
    configuration.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"},
                "scrape_configs": [{"job_name": "boardbench", "static_configs": [{"targets": [target]}]}],
            }
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    programs.start(
        "prometheus",
        [
            paths["prometheus"], f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    eventually("Prometheus is ready", ready, 60)
    return url


def _query(url: str, promql: str) -> list[dict[str, Any]]:
    query = urllib.parse.urlencode({"query": promql})
    with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=20) as answer:
        document = json.load(answer)
    assert document["status"] == "success", document
    return list(document["data"]["result"])
