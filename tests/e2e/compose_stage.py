"""Starts what deploy/compose.yaml starts, with the very files that it mounts; tells what came of it as JSON.

``compose_stage.py FOLDER`` as root, in network and mount namespaces of its own: the file system is laid over
a copy of itself, so that files can be put where containers have them, and the services' names lead to the
loopback. Each service's command, environment, secrets, order and health check are those of the compose file;
the programs are Debian's and this installation's. Grafana is not among them.
"""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
SERVICES = ("postgres", "collector", "alertmanager", "prometheus")
START_SECONDS = 90.0
SYSTEM = REPOSITORY / ".cache" / "system" / "usr"


class Stage:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.compose = YAML(typ="safe").load((DEPLOY / "compose.yaml").read_text())
        self.started: list[subprocess.Popen[bytes]] = []

    def prepare(self) -> None:
        """The file system as the containers have it, all of them in one."""
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir()
        options = f"lowerdir=/,upperdir={self.folder / 'upper'},workdir={self.folder / 'work'}"
        run("mount", "-t", "overlay", "overlay", "-o", options, self.root)
        run("mount", "-t", "proc", "proc", self.root / "proc")
        run("mount", "--rbind", "/dev", self.root / "dev")
        run("ip", "link", "set", "lo", "up")
        names = " ".join(self.compose["services"])
        (self.root / "etc" / "hosts").write_text(f"127.0.0.1 localhost {names}\n")
        secrets = DEPLOY / "compose" / "secrets"
        made = not secrets.exists()
        run(DEPLOY / "compose" / "make_secrets.sh")
        for name in SERVICES:
            service = self.compose["services"][name]
            for volume in service.get("volumes", []):
                source, target = volume.split(":")[:2]
                place = self.root / target.lstrip("/")
                if source.startswith("./"):
                    self._copied(DEPLOY / source, place)
                else:
                    place.mkdir(parents=True, exist_ok=True)
            for secret in service.get("secrets", []):
                self._copied(
                    DEPLOY / self.compose["secrets"][secret]["file"], self.root / "run" / "secrets" / secret
                )
        if made:
            shutil.rmtree(secrets)
        # What Debian's Alertmanager looks for at a fixed place, wherever it was unpacked.
        program = Path(shutil.which("prometheus-alertmanager") or "/usr/bin/prometheus-alertmanager")
        templates = program.parents[1] / "share" / "prometheus" / "alertmanager"
        if templates != Path("/usr/share/prometheus/alertmanager"):
            self._copied(templates, self.root / "usr" / "share" / "prometheus" / "alertmanager")
        user = pwd.getpwnam("nobody")
        # Where Debian's server has its socket, and the images' too.
        for name in ("var/lib/postgresql/data", "run/postgresql"):
            place = self.root / name
            place.mkdir(parents=True, exist_ok=True)
            os.chown(place, user.pw_uid, user.pw_gid)
            place.chmod(0o700)

    def run(self) -> dict[str, Any]:
        """What was seen once all were healthy, in the order that they wait for each other."""
        told: dict[str, Any] = {"order": []}
        left = [name for name in self.compose["services"] if name in SERVICES]
        while left:
            ready = [name for name in left if not set(self._waits_for(name)) & set(left)]
            for name in ready:
                self._start(name)
                self._until_healthy(name)
                told["order"].append(name)
                left.remove(name)
        told["result"] = self._a_board_reports()
        wait("the result is in Prometheus", lambda: query("boardbench_latency_seconds"))
        told["models"] = sorted({each["metric"]["model"] for each in query("boardbench_latency_seconds")})
        told["rules"] = sorted(
            rule["name"]
            for group in get("http://prometheus:9090/api/v1/rules")["data"]["groups"]
            for rule in group["rules"]
        )
        wait("Prometheus has found the Alertmanager", lambda: managers())
        told["alertmanagers"] = managers()
        told["alertmanager"] = get("http://alertmanager:9093/api/v2/status")["config"]["original"]
        told["stored"] = self._in_postgres("SELECT count(*) FROM results")
        return told

    def end(self) -> None:
        for process in reversed(self.started):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _copied(self, source: Path, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True)
        else:
            shutil.copy(source, place)

    def _waits_for(self, name: str) -> list[str]:
        waited = self.compose["services"][name].get("depends_on", {})
        assert all(each["condition"] == "service_healthy" for each in waited.values())
        return [each for each in waited if each in SERVICES]

    def _start(self, name: str) -> None:
        service = self.compose["services"][name]
        command = [str(part) for part in service.get("command", [])]
        if name == "postgres":
            # What the image's entry point does at the first start.
            secret = "/run/secrets/postgres_password"
            self._inside(
                *("initdb", "-D", "/var/lib/postgresql/data", "-U", "boardbench", "--auth", "scram-sha-256"),
                # As the image's locale has it.
                *("--encoding", "UTF8"),
                *(f"--pwfile={secret}", "--no-sync"),
                user="nobody",
            )
            command += ["-D", "/var/lib/postgresql/data", "-h", "127.0.0.1"]
        elif name == "collector":
            command = ["boardbench-collector", "serve"]
        elif name == "alertmanager":
            command = ["prometheus-alertmanager", *command]
        else:
            command = [name, *command]
        log = (self.folder / f"{name}.log").open("wb")
        user = "nobody" if name == "postgres" else "root"
        self.started.append(
            subprocess.Popen(
                self._chroot(command, user),
                env=self._environment(service),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        )

    def _until_healthy(self, name: str) -> None:
        check = self.compose["services"][name]["healthcheck"]["test"]
        assert check[0] == "CMD"

        def healthy() -> bool:
            if self.started[-1].poll() is not None:
                raise SystemExit(f"{name} ended:\n{(self.folder / f'{name}.log').read_text()}")
            return self._call(*check[1:]).returncode == 0

        wait(f"{name} is healthy", healthy)
        if name == "postgres":
            # The image makes the database that is named; so would its entry point.
            password = (self.root / "run" / "secrets" / "postgres_password").read_text()
            made = self._call(
                "createdb", "-h", "postgres", "-U", "boardbench", "boardbench", PGPASSWORD=password
            )
            assert made.returncode == 0 or "exists" in made.stderr, made.stderr

    def _a_board_reports(self) -> str:
        """Status of a run on an agent that only knows the collector's name."""
        model = self.folder / "demo.tflite"
        from boardbench.cli.demo_models import build_tflite

        model.write_bytes(build_tflite())
        ports = self.folder / "agent.ports"
        log = (self.folder / "agent.log").open("wb")
        self.started.append(
            subprocess.Popen(
                self._chroot(
                    [
                        *("boardbench-agent", "serve", "--listen", "127.0.0.1:0", "--port-file", str(ports)),
                        *("--collector", "collector:7342", "--data-dir", str(self.folder / "agent")),
                    ],
                    "root",
                ),
                env=self._environment({}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        )
        inside = self.root / str(ports).lstrip("/")
        wait("the agent answers", inside.exists)
        shutil.copy(model, self.root / str(model).lstrip("/"))
        address = f"127.0.0.1:{json.loads(inside.read_text())['grpc']}"
        done = self._call(
            *("boardbench", "push", str(model), "--to", address, "--duration", "0.2", "--format", "json")
        )
        result = json.loads(done.stdout)
        if result["status"] != "RUN_STATUS_SUCCEEDED":
            raise SystemExit(f"the run: {result.get('error')}")
        return str(result["status"])

    def _in_postgres(self, statement: str) -> int:
        password = (self.root / "run" / "secrets" / "postgres_password").read_text()
        asked = ("psql", "-h", "postgres", "-U", "boardbench", "-tAc", statement, "boardbench")
        done = self._call(*asked, PGPASSWORD=password)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def _environment(self, service: dict[str, Any]) -> dict[str, str]:
        postgres = sorted((SYSTEM / "lib" / "postgresql").glob("*/bin"))
        postgres += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        path = [sysconfig.get_path("scripts"), *map(str, reversed(postgres)), str(SYSTEM / "bin")]
        libraries = ":".join(map(str, SYSTEM.glob("lib/*-linux-*")))
        return {
            "PATH": ":".join([*path, os.environ["PATH"], "/usr/sbin", "/sbin"]),
            "LD_LIBRARY_PATH": libraries,
            "HOME": "/root",
            "LC_ALL": "C",
        } | {key: str(value) for key, value in service.get("environment", {}).items()}

    def _chroot(self, command: list[str], user: str) -> list[str]:
        return ["/usr/sbin/chroot", f"--userspec={user}", str(self.root), *command]

    def _inside(self, *command: str, user: str = "root") -> None:
        done = subprocess.run(
            self._chroot(list(command), user), env=self._environment({}), capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}: {done.stdout}{done.stderr}")

    def _call(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._chroot(list(command), "root"),
            env=self._environment({}) | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )


def get(url: str) -> Any:
    # Names are those of the file system inside; out here everything is the loopback.
    parts = urllib.parse.urlsplit(url)
    with urllib.request.urlopen(url.replace(str(parts.hostname), "127.0.0.1", 1), timeout=20) as answer:
        return json.load(answer)


def query(promql: str) -> list[dict[str, Any]]:
    url = f"http://prometheus:9090/api/v1/query?{urllib.parse.urlencode({'query': promql})}"
    return list(get(url)["data"]["result"])


def managers() -> list[str]:
    found = get("http://prometheus:9090/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
    return [each["url"] for each in found]


def wait(what: str, check: Callable[[], Any]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not check():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {START_SECONDS:.0f} s in vain until {what}")
        time.sleep(0.2)


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr}")


if __name__ == "__main__":
    # An ordinary user's path has no programs of the administrator.
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    stage = Stage(Path(sys.argv[1]))
    stage.prepare()
    try:
        sys.stdout.write(json.dumps(stage.run()) + "\n")
    finally:
        stage.end()
