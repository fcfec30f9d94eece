"""deploy/compose.yaml: by the schema of its format, and as the same programs with the same files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(YAML(typ="safe").load((DEPLOY / "compose.yaml").read_text()))


def test_it_is_a_compose_file() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"),
            DEPLOY / "compose.yaml",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_are_pinned_and_healthy_before_others_need_them(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        version = service["image"].partition(":")[2]
        assert version and "latest" not in version and any(part.isdigit() for part in version), name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == "unless-stopped", name
        for waited in service.get("depends_on", {}).values():
            assert waited["condition"] == "service_healthy", name


def test_there_are_no_secrets_in_it(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if any(word in variable.lower() for word in ("password", "token", "secret", "key")):
                assert str(value).startswith("/run/secrets/"), f"{name}: {variable}"
        for secret in service.get("secrets", []):
            assert compose["secrets"][secret]["file"].startswith("./compose/secrets/")
    assert "/deploy/compose/secrets/" in (REPOSITORY / ".gitignore").read_text().splitlines()


def test_every_file_that_it_mounts_is_there(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        build = service.get("build")
        if build:
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists() and volume.endswith(":ro"), volume
            else:
                assert source in compose["volumes"], volume


def test_the_same_programs_run_with_the_same_files(compose: dict[str, Any], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("namespaces and an overlay of the file system need root")
    stage = [sys.executable, str(Path(__file__).with_name("compose_stage.py")), str(tmp_path)]
    for name in ("unshare", "prometheus", "prometheus-alertmanager"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} here: `make test` unpacks Debian's")
    # All that runs in there ends with it, however it ends.
    apart = ["unshare", "--net", "--mount", "--propagation", "private"]
    apart += ["--pid", "--mount-proc", "--fork", "--kill-child"]
    probe = subprocess.run([*apart, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no namespaces here: {probe.stderr.strip()}")
    done = subprocess.run([*apart, *stage], capture_output=True, text=True, timeout=170)
    if "mount -t overlay" in done.stderr:
        pytest.skip(f"no overlay of the file system here: {done.stderr.strip()}")
    logs = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{logs}"
    told = json.loads(done.stdout)
    assert (
        told["order"].index("postgres") < told["order"].index("collector") < told["order"].index("prometheus")
    )
    assert told["result"] == "RUN_STATUS_SUCCEEDED"
    assert told["models"] == ["demo.tflite"]
    assert told["stored"] == 1
    assert "BoardbenchBoardGone" in told["rules"]
    assert told["alertmanagers"] == ["http://alertmanager:9093/api/v2/alerts"]
    assert "BoardbenchBoardGone" in told["alertmanager"]
