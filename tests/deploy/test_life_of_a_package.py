"""One package in a Debian of its own, with Debian's own dpkg; and every processor. The other packages are in
test_every_package.py.

Soak: a minute or two. As root (a chroot), with mmdebstrap.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


def test_from_install_to_purge(live: Callable[[str], None]) -> None:
    live("amd64-cp311")


# Every engine is imported, and one of each kind of work done: NumPy's BLAS, and a quantised model.
_LOADS = """
import numpy, onnxruntime, grpc, google.protobuf, psutil
from ai_edge_litert import interpreter
matrix = numpy.random.default_rng(0).standard_normal((64, 64)).astype("f")
assert numpy.isfinite(matrix @ matrix).all()
model = interpreter.Interpreter("/root/model.tflite", num_threads=1)
model.allocate_tensors()
given = model.get_input_details()[0]
model.set_tensor(given["index"], numpy.full(given["shape"], 128, given["dtype"]))
model.invoke()
print(int(model.get_tensor(model.get_output_details()[0]["index"]).argmax()))
"""

PROCESSORS = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")


@pytest.fixture(scope="module")
def board(debian: Callable[..., Path], qemu: Callable[[str], Path]) -> tuple[Path, Path]:
    """An arm64 Debian in a folder, and a QEMU that runs its programs here."""
    root = debian(
        "bookworm-arm64",
        "--architectures=arm64",
        "--variant=extract",
        "--include=base-files,bash,dash,coreutils,python3,libstdc++6,libc-bin,zlib1g",
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        "bookworm",
    )
    return root, qemu("arm64")


@pytest.fixture(scope="module")
def release(
    board: tuple[Path, Path],
    packed: Callable[[str, Path, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The package's release, unpacked in the place that it has on a board."""
    root, _ = board
    folder = tmp_path_factory.mktemp("package")
    deb = packed("arm64-cp311", folder, "0.1.0")
    shutil.rmtree(root / "opt/boardbench", ignore_errors=True)
    subprocess.run(["dpkg-deb", "-x", deb, str(root)], check=True)
    return Path("/opt/boardbench/releases/0.1.0+cp311/bin/boardbench-agent")


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_wheel_runs_on_every_processor(
    processor: str, board: tuple[Path, Path], release: Path, shared_models: Path
) -> None:
    """An illegal instruction here is one on the board: onnxruntime 1.21 was such on the Cortex-A72 of a Pi 4
    (microsoft/onnxruntime#23957).
    """
    root, emulator = board
    shutil.copy(shared_models / "mobilenet_v1_0.25_128_quant.tflite", root / "root/model.tflite")
    shutil.copy(emulator, root / "usr/bin/qemu-aarch64")
    python = str(release.parent / "python")
    script = (
        f'mount -t proc proc "{root}/proc" && mount --rbind /dev "{root}/dev" && '
        f'exec chroot "{root}" /usr/bin/qemu-aarch64 -cpu {processor} "$@"'
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "_", python, "-IB", "-c", _LOADS],
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": "/root",
            "ORT_DISABLE_TELEMETRY": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{processor}: {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stdout.strip().isdigit()
