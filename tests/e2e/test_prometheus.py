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
    programs: Any, start_prometheus: Any, demo_tflite: Path, demo_onnx: Path, eventually: Any
) -> None:
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    answer = programs.client(
        "push", demo_tflite, demo_onnx, "--to", agent.address, "--format", "json", *QUICK
    )
    url = start_prometheus(programs, collector.http)
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
    programs: Any, start_prometheus: Any, eventually: Any
) -> None:
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    url = start_prometheus(programs, collector.http)
    query = f'boardbench_device_up{{device="{agent.device_id}"}}'

    def value() -> str | None:
        found = _query(url, query)
        return str(found[0]["value"][1]) if found else None

    eventually("the board is up in Prometheus", lambda: value() == "1")
    agent.program.kill()
    eventually("the board is down in Prometheus", lambda: value() == "0")


def test_prometheus_finds_boards_that_serve_their_own_metrics(
    programs: Any, start_prometheus: Any, demo_tflite: Path, eventually: Any, free_port: int
) -> None:
    collector = programs.collector()
    quiet = programs.agent("quiet", collector=collector.address)
    agent = programs.agent(
        "open",
        collector=collector.address,
        environment={"BOARDBENCH_AGENT_METRICS_LISTEN": f"127.0.0.1:{free_port}"},
    )
    programs.client("push", demo_tflite, "--to", agent.address, *QUICK)

    def targets() -> list[Any]:
        return list(json.loads(collector.get("/sd/targets")))

    (group,) = eventually("the collector knows where the board is scraped", targets)
    assert group["labels"]["__meta_boardbench_device"] == agent.device_id != quiet.device_id
    discovery = {
        "job_name": "boards",
        "http_sd_configs": [{"url": f"http://{collector.http}/sd/targets", "refresh_interval": "1s"}],
        "relabel_configs": [{"source_labels": ["__meta_boardbench_up"], "target_label": "connected"}],
    }
    url = start_prometheus(programs, collector.http, discovery)
    shown = f'boardbench_latency_seconds{{device="{agent.device_id}",percentile="50",job="%s"}}'
    own = eventually("the board's own figures are there", lambda: _query(url, shown % "boards"))
    fleet = eventually("and the collector's", lambda: _query(url, shown % "boardbench"))
    assert own[0]["value"][1] == fleet[0]["value"][1]
    assert own[0]["metric"]["connected"] == "1"
    labels = [
        {
            name: value
            for name, value in found[0]["metric"].items()
            if name not in ("job", "instance", "connected")
        }
        for found in (own, fleet)
    ]
    assert labels[0] == labels[1]
    assert _query(url, 'up{job="boards"}')[0]["value"][1] == "1"
    agent.program.kill()
    eventually("that it is gone is seen", lambda: _query(url, 'up{job="boards"} == 0'))


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


def _query(url: str, promql: str) -> list[dict[str, Any]]:
    query = urllib.parse.urlencode({"query": promql})
    with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=20) as answer:
        document = json.load(answer)
    assert document["status"] == "success", document
    return list(document["data"]["result"])
