"""Writes the Python code of the wire: ``generate.py FOLDER``. Run by ``make protos``.

Runs in an environment of its own, with generators pinned low, because generated code refuses any
grpcio or protobuf that is older than its generator.
"""

from __future__ import annotations

import os
import sys
from importlib.resources import files as package_files
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
# Only these hold services; for the others gRPC's generator would write empty files.
SERVICES = ("agent.proto", "collector.proto", "job.proto", "update.proto")


def generate(folder: Path) -> None:
    """Generates messages, services and type stubs under ``folder``, replacing what is there."""
    package = folder / "boardbench" / "v1"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.glob("*_pb2*"):
        old.unlink()
    include = [f"-I{PROTOS}", f"-I{package_files('grpc_tools') / '_proto'}"]
    files = sorted((PROTOS / "boardbench" / "v1").glob("*.proto"))
    services = [path for path in files if path.name in SERVICES]
    # The mypy plug-in is a script beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for arguments in (
        [f"--python_out={folder}", f"--mypy_out=quiet:{folder}", *map(str, files)],
        [f"--grpc_python_out={folder}", f"--mypy_grpc_out=quiet:{folder}", *map(str, services)],
    ):
        if protoc.main(["protoc", *include, *arguments]) != 0:
            raise SystemExit("protoc failed; its message is above")
    (package / "py.typed").touch()


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve())
