"""``make observe``: boards, a collector and a Prometheus on this machine, filled by real runs.

Three boards by default, all this machine: one as it is, two with the sensor files of a synthetic Jetson and
of a synthetic Raspberry Pi that is throttled (their labels say so). With the real models and a C compiler
there is a fourth, whose Edge TPU is a stand-in. Each measures its models again and again. With `grafana` or
`grafana-server` on the PATH a Grafana is started with the dashboards; without one, their files are named.
Everything runs on loopback, in a folder that is removed at the end; Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DEPLOY = REPOSITORY / "deploy"
MODELS = Path(os.environ.get("BOARDBENCH_MODELS", REPOSITORY.parent / "shared" / "models"))
QUEUED = "synthetic-jetson"
PARTLY = "deeplabv3_mnv2_dm05_pascal_quant_edgetpu.tflite"
START_SECONDS = 60.0
# Long enough for figures that are worth something, short enough to see something happen.
BETWEEN_SECONDS = 20.0


def main() -> int:
    """Runs until Ctrl-C, or for the seconds that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, help="end by itself after this time")
    parser.add_argument("--ports", type=Path, help="write the addresses here, as JSON")
    arguments = parser.parse_args()
    for name in ("prometheus", "boardbench-agent"):
        if shutil.which(name, path=_path()) is None:
            print(f"{name} is not here: `make observe` installs what it can", file=sys.stderr)
            return 1
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with tempfile.TemporaryDirectory(prefix="boardbench-observe-") as folder, Stage(Path(folder)) as stage:
        collector = stage.collector()
        boards = stage.boards(collector["grpc"])
        prometheus = stage.prometheus(collector["http"])
        grafana = stage.grafana(prometheus)
        print(f"Collector    http://127.0.0.1:{collector['http']}/")
        print(f"Prometheus   {prometheus}/graph")
        print(f"Alerts       {prometheus}/alerts")
        if grafana:
            print(f"Grafana      {grafana}/dashboards (admin, admin)")
        else:
            print(
                f"Grafana      none on the PATH; import {DEPLOY / 'grafana' / 'dashboards'}/*.json into yours"
            )
        print("Boards       " + ", ".join(f"{name} ({address})" for name, address in boards.items()))
        print("Ctrl-C ends it.", flush=True)
        if arguments.ports:
            found = {"collector": collector, "prometheus": prometheus, "grafana": grafana, "boards": boards}
            arguments.ports.write_text(json.dumps(found) + "\n")
        stage.measure(boards, collector["grpc"], ended, arguments.seconds)
    return 0


def _path() -> str:
    return os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))


class Stage:
    """Everything that runs, ended with the context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self._models = self._built()
        self._standin = self._standin_built()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def collector(self) -> dict[str, int]:
        """Ports of a collector."""
        return self._started(
            "collector",
            *("boardbench-collector", "serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"),
        )

    def boards(self, collector: int) -> dict[str, str]:
        """Addresses of agents, by the board's name."""
        settings: dict[str, dict[str, str]] = {"this-machine": {}}
        for name in ("jetson_orin_nano", "raspberry_pi_4_throttled"):
            tree = self.folder / name
            shutil.copytree(REPOSITORY / "tests" / "boards" / name, tree, symlinks=True)
            settings["synthetic-" + name.split("_")[0]] = {
                "BOARDBENCH_AGENT_SYS_ROOT": str(tree),
                "BOARDBENCH_AGENT_LABELS": "synthetic=true",
            }
        if self._standin is not None:
            settings["standin-tpu"] = {
                "BOARDBENCH_AGENT_LABELS": "standin=true",
                "BOARDBENCH_STANDIN_DELAY_US": "1000",
            }
        found = {}
        for name, environment in settings.items():
            ports = self._started(
                name,
                *("boardbench-agent", "serve", "--listen", "127.0.0.1:0", "--device-id", name),
                *("--collector", f"127.0.0.1:{collector}"),
                environment=environment,
            )
            found[name] = f"127.0.0.1:{ports['grpc']}"
        return found

    def prometheus(self, target: int) -> str:
        """Address of a Prometheus with the rules, which scrapes the collector every second."""
        configuration = self.folder / "prometheus.json"
        configuration.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "5s"},
                    "rule_files": [str(DEPLOY / "prometheus" / "rules" / "*.yml")],
                    "scrape_configs": [
                        {"job_name": "boardbench", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
                    ],
                }
            )
        )
        port = _free_port()
        self._run(
            "prometheus",
            [
                "prometheus", f"--config.file={configuration}",
                f"--storage.tsdb.path={self.folder / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
        )  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        _until("Prometheus is ready", lambda: _answers(f"{address}/-/ready"))
        return address

    def grafana(self, prometheus: str) -> str:
        """Address of a Grafana with the dashboards; empty where there is no Grafana."""
        server = shutil.which("grafana") or shutil.which("grafana-server")
        homes = [Path("/usr/share/grafana"), Path("/usr/local/share/grafana")]
        home = next((each for each in homes if (each / "conf").is_dir()), None)
        if server is None or home is None:
            return ""
        port = _free_port()
        provisioning = self.folder / "provisioning"
        shutil.copytree(DEPLOY / "grafana" / "provisioning", provisioning)
        provider = provisioning / "dashboards" / "boardbench.yaml"
        provider.write_text(
            provider.read_text().replace(
                "/var/lib/grafana/dashboards", str(DEPLOY / "grafana" / "dashboards")
            )
        )
        self._run(
            "grafana",
            [server, *(["server"] if Path(server).name == "grafana" else []), "--homepath", str(home)],
            {
                "GF_PATHS_PROVISIONING": str(provisioning),
                "GF_PATHS_DATA": str(self.folder / "grafana"),
                "GF_PATHS_LOGS": str(self.folder / "grafana"),
                "GF_SERVER_HTTP_ADDR": "127.0.0.1",
                "GF_SERVER_HTTP_PORT": str(port),
                "GF_ANALYTICS_REPORTING_ENABLED": "false",
                "PROMETHEUS_URL": prometheus,
            },
        )
        address = f"http://127.0.0.1:{port}"
        _until("Grafana is ready", lambda: _answers(f"{address}/api/health"))
        return address

    def measure(
        self, boards: Mapping[str, str], collector: int, ended: threading.Event, seconds: float | None
    ) -> None:
        """Measures the models on all boards, one board after the other, until it is to end."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not ended.is_set() and (deadline is None or time.monotonic() < deadline):
            for name, address in boards.items():
                if ended.is_set():
                    return
                # One of them by the collector's queue, as boards behind NAT are reached.
                to = ["--to", address]
                if name == QUEUED:
                    to = ["--via", f"127.0.0.1:{collector}", "--on", f"device_id={name}"]
                done = subprocess.run(
                    [*_program("boardbench"), "push", *self._what(name), *to, "--quiet"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                # 1: what was asked for does not hold; an Edge TPU that takes a part of the model.
                if done.returncode not in (0, 1) and not ended.is_set():
                    print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
            left = BETWEEN_SECONDS if deadline is None else deadline - time.monotonic()
            ended.wait(max(0.0, min(BETWEEN_SECONDS, left)))

    def _what(self, board: str) -> list[str]:
        if board == "standin-tpu":
            return [str(MODELS / PARTLY), "--device", "edgetpu", "--option", f"delegate={self._standin}"]
        return [*map(str, self._models), "--duration", "1"]

    def _built(self) -> list[Path]:
        from boardbench.cli import demo_models

        made = []
        for name, build in (
            ("demo_mobilenet_int8.tflite", demo_models.build_tflite),
            ("demo_net.onnx", demo_models.build_onnx),
        ):
            path = self.folder / name
            path.write_bytes(build())
            made.append(path)
        return made

    def _standin_built(self) -> Path | None:
        """The library in the place of libedgetpu.so.1; None without a compiler or the models for it."""
        if not (MODELS / PARTLY).exists():
            return None
        spec = importlib.util.spec_from_file_location("build", REPOSITORY / "tests" / "standin" / "build.py")
        assert spec is not None and spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        folder = self.folder / "standin"
        folder.mkdir()
        try:
            return Path(build.build(folder))
        except build.NoCompiler as error:
            print(f"no board with a stand-in for the Edge TPU: {error}", file=sys.stderr)
            return None

    def _started(
        self, name: str, *command: str, environment: Mapping[str, str] | None = None
    ) -> dict[str, int]:
        """Ports of a program of ours, once it answers."""
        port_file = self.folder / f"{name}.ports"
        data = self.folder / name
        arguments = [
            *_program(command[0]),
            *command[1:],
            "--data-dir",
            str(data),
            "--port-file",
            str(port_file),
        ]
        process = self._run(name, arguments, environment or {})

        def ports() -> dict[str, int] | None:
            if process.poll() is not None:
                raise SystemExit(f"{name} ended at once:\n{(self.folder / f'{name}.log').read_text()}")
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                return dict(json.loads(port_file.read_text()))
            return None

        return dict(_until(f"{name} answers", ports) or {})

    def _run(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self.folder / f"{name}.log").open("wb"))
        settings = self.folder / "agent.toml"
        settings.touch()  # or it would take those of a real agent on this machine
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C is for this program, which ends the others in their order.
            start_new_session=True,
            env=os.environ | {"BOARDBENCH_AGENT_CONFIG": str(settings)} | dict(environment or {}),
        )
        self._stack.enter_context(_ending(process))
        return process


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _program(name: str) -> list[str]:
    return [sys.executable, str(Path(sysconfig.get_path("scripts")) / name)]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _until(what: str, check: object) -> dict[str, int] | None:
    assert callable(check)
    deadline = time.monotonic() + START_SECONDS
    while not (answer := check()):
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {START_SECONDS:.0f} s in vain until {what}")
        time.sleep(0.1)
    return answer if isinstance(answer, dict) else None


if __name__ == "__main__":
    sys.exit(main())
