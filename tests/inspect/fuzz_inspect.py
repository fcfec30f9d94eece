"""A target for coverage-guided fuzzing of the readers, with atheris (https://github.com/google/atheris).

    pip install atheris
    python tests/inspect/fuzz_inspect.py -max_len=65536 CORPUS tests/inspect/files

Whatever is not a report or an InspectError is a defect; so is a report whose bytes don't add up.
"""

from __future__ import annotations

import sys
from types import ModuleType


def one_input(data: bytes) -> None:
    """Inspects the bytes as a file, and as an original of themselves."""
    from boardbench.inspect.analyse import inspect_bytes
    from boardbench.inspect.errors import InspectError
    from boardbench.inspect.sniff import sniff_bytes

    view = memoryview(data)
    compiled = sniff_bytes(view) == "tflite"
    for request in ({}, {"target": "edgetpu"}, {"original": view}) if compiled else ({},):
        try:
            report = inspect_bytes("fuzz", view, **request)
        except InspectError:
            continue
        assert sum(use.size_bytes for use in report.bytes) == report.size_bytes


def main(atheris: ModuleType) -> None:
    """Fuzzes until something breaks."""
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    import atheris

    main(atheris)
