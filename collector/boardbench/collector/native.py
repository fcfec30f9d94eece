"""Prometheus's protobuf format, which is the one that can carry native histograms.

Messages and field numbers: https://github.com/prometheus/client_model/blob/master/io/prometheus/client/metrics.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry

from boardbench.collector.histogram import SCHEMA, Distribution
from boardbench.collector.metrics import Metric
from boardbench.collector.protowire import double, number, piece, text, varint, zigzag

CONTENT_TYPE = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"

_COUNTER, _GAUGE, _HISTOGRAM, _GAUGE_HISTOGRAM = 0, 1, 4, 5
_METRIC = varint(4 << 3 | 2)
_DOUBLE = struct.Struct("<d")
_VALUE_HEAD = {
    kind: varint(field << 3 | 2) + bytes((9, 1 << 3 | 1))
    for kind, field in (("gauge", 2), ("info", 2), ("counter", 3))
}
"""A field that holds a message of nine bytes, which is one double."""
_VALUE_BYTES = 11
ZERO_THRESHOLD_SECONDS = 2.0**-128
"""Prometheus's default: nothing that was measured is so short."""


def labels(pairs: Iterable[tuple[str, str]]) -> bytes:
    """Returns the labels as fields of a Metric."""
    return b"".join(piece(1, text(1, name) + text(2, value)) for name, value in pairs)


def metrics(kind: str, shared: bytes, labelled: Sequence[bytes], values: Sequence[float]) -> bytes:
    """Returns fields of a MetricFamily, one a sample, each with the shared labels and its own."""
    head = _VALUE_HEAD[kind]
    pieces: list[bytes] = []
    for more, value in zip(labelled, values, strict=True):
        size = len(shared) + len(more) + _VALUE_BYTES
        pieces += (_METRIC, varint(size), shared, more, head, _DOUBLE.pack(value))
    return b"".join(pieces)


def histogram_metric(
    labelled: bytes,
    entries: Sequence[tuple[str, tuple[str, ...]]],
    values: Sequence[float],
    shape: Distribution | None,
) -> bytes:
    """Returns a field of a MetricFamily that is one histogram, with the classic buckets of these samples."""
    buckets: list[bytes] = []
    count, total = 0, 0.0
    for (name, extra), value in zip(entries, values, strict=True):
        if name.endswith("_bucket"):
            if extra[0] != "+Inf":
                buckets.append(piece(3, number(1, int(value)) + double(2, float(extra[0]))))
        elif name.endswith("_sum"):
            total = value
        else:
            count = int(value)
    content = number(1, count) + double(2, total) + b"".join(buckets)
    if shape is not None:
        content += (
            number(5, zigzag(SCHEMA))
            + double(6, ZERO_THRESHOLD_SECONDS)
            + number(7, 0)
            + b"".join(
                piece(12, number(1, zigzag(offset)) + number(2, length))
                for offset, length in shape.native.spans
            )
            + b"".join(number(13, zigzag(delta)) for delta in shape.native.deltas)
        )
    return piece(4, labelled + piece(7, content))


def family(described: Metric, content: bytes) -> bytes:
    """Returns a MetricFamily with its length in front."""
    kinds = {"counter": _COUNTER, "gauge": _GAUGE, "info": _GAUGE, "histogram": _HISTOGRAM}
    kind = kinds[described.kind]
    if described.name == "boardbench_latency_distribution_seconds":
        # Of the latest run: it goes down as well as up.
        kind = _GAUGE_HISTOGRAM
    return _delimited(described.name, described.meaning, kind, content)


def registry(collectors: CollectorRegistry) -> bytes:
    """Returns the families of a registry that has counters and gauges only."""
    pieces: list[bytes] = []
    for found in collectors.collect():
        counter = found.type == "counter"
        shown = b"".join(
            metrics("counter" if counter else "gauge", labels(sample.labels.items()), (b"",), (sample.value,))
            for sample in found.samples
            if not sample.name.endswith("_created")
        )
        name = found.samples[0].name if found.samples else found.name
        pieces.append(_delimited(name, found.documentation, _COUNTER if counter else _GAUGE, shown))
    return b"".join(pieces)


def _delimited(name: str, meaning: str, kind: int, metrics: bytes) -> bytes:
    content = text(1, name) + text(2, meaning) + number(3, kind) + metrics
    return varint(len(content)) + content
