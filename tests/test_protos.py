"""The wire: what is committed is what the .proto files say, and nothing of version 1 was broken."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.timeout(400)
def test_generated_code_is_what_the_protos_say(tmp_path: Path) -> None:
    """The generators live in an environment of their own, built once by make."""
    built = subprocess.run(
        ["make", "-s", ".cache/protos/.installed", f"PYTHON={sys.executable}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    fresh = tmp_path / "gen"
    generator = REPOSITORY / ".cache" / "protos" / "bin" / "python"
    subprocess.run(
        [generator, REPOSITORY / "protos" / "generate.py", fresh], check=True, capture_output=True, text=True
    )
    committed = REPOSITORY / "protos" / "gen"
    names = {p.relative_to(fresh) for p in fresh.rglob("*") if p.is_file()}
    assert names, "the generator wrote nothing"
    assert names == {
        p.relative_to(committed) for p in committed.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }, "run `make protos` and commit protos/gen"
    changed = [str(n) for n in sorted(names) if (fresh / n).read_bytes() != (committed / n).read_bytes()]
    assert not changed, f"run `make protos` and commit: {changed}"


def test_a_broken_field_is_found(tmp_path: Path) -> None:
    """Renumbering a field must fail the check that `make lint` runs against the baseline."""
    package = tmp_path / "protos" / "boardbench" / "v1"
    package.mkdir(parents=True)
    for proto in (REPOSITORY / "protos" / "boardbench" / "v1").glob("*.proto"):
        text = proto.read_text()
        if proto.name == "result.proto":
            assert "string run_id = 1;" in text
            text = text.replace("string run_id = 1;", "string run_id = 99;", 1)
        (package / proto.name).write_text(text)
    (tmp_path / "buf.yaml").write_text((REPOSITORY / "buf.yaml").read_text())
    # buf is a program in a wheel: it lies beside the interpreter that runs the tests.
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    found = subprocess.run(
        [buf, "breaking", "--against", REPOSITORY / "protos" / "baseline.binpb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode != 0
    assert "run_id" in found.stdout
