"""One package in a Debian of its own, with Debian's own dpkg; and every processor. The other packages are in
test_every_package.py.

Soak: a minute or two. As root (a chroot), with mmdebstrap.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

# One behind the other, and behind the shorter story of tests/board: they share folders in .cache.
pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800), pytest.mark.xdist_group("script")]


def test_from_install_to_purge(live: Callable[[str], None]) -> None:
    live("amd64-cp311")


PROCESSORS = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_wheel_runs_on_every_processor(processor: str, loads: Callable[[str, str], None]) -> None:
    """An illegal instruction here is one on the board: onnxruntime 1.21 was such on the Cortex-A72 of a Pi 4
    (microsoft/onnxruntime#23957).
    """
    loads("arm64-cp311", processor)
