"""A fake of Apple's coremltools 9 on macOS: the part of its interface that boardbench uses.

Names, arguments and refusals are those of the package itself. Graphs of relu and add are computed with
NumPy; of any other the outputs are zeros. Its neural engine takes no softmax, and no layer outside a program.
"""

from __future__ import annotations

import enum

boardbench_standin = "standin-coreml"
__version__ = "9.0"


class ComputeUnit(enum.Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


from . import models  # noqa: E402, F401
