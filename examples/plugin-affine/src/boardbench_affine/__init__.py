"""The engine ``affine``: small graphs of matrices, computed by NumPy. See :mod:`boardbench_affine.graph`.

Importing this imports nothing heavy: a probe does it to every engine that is offered.
"""

from __future__ import annotations

from boardbench.agent.bench.runtimes import Engine

ENGINE = Engine(
    name="affine",
    module="boardbench_affine.engine",
    type="AffineRuntime",
    formats=("affine",),
    magic=b"AFFINE1\n",
    suffixes=(".affine",),
    profiler="boardbench_affine.profiler",
    more_devices="NumPy computes on the CPU, and there is no other device",
    contract=1,
)
