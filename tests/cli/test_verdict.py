"""What all evidence amounts to, in one line."""

from __future__ import annotations

from boardbench.cli.verdict import verdict_of
from boardbench.v1 import placement_pb2, result_pb2


def test_what_a_dla_leaves_to_the_gpu_fell_back_though_nothing_is_on_the_cpu():
    result = result_pb2.RunResult()
    result.runtime.device = "dla"
    placement = result.placement
    placement.evidence = placement_pb2.EVIDENCE_PARTITION
    placement.verdict = placement_pb2.PLACEMENT_VERDICT_PARTLY
    placement.accelerated_ops, placement.cpu_ops = 3, 0
    for unit, delegate in (("UNIT_NPU", "DLA"), ("UNIT_GPU", "GPU"), ("UNIT_NPU", "DLA")):
        placement.ops.add(type="layer", unit=unit, delegate=delegate)
    verdict = verdict_of(result)
    assert verdict is not None
    assert verdict.text == "partly on the DLA: 1 of 3 ops fell back to another accelerator, cost not measured"
