"""The engines: one line of the table each, loaded when asked for."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Mapping, Optional, Tuple, cast

if TYPE_CHECKING:
    from boardbench.agent.bench.runtime import Profiler, Runtime


@dataclass(frozen=True)
class Engine:
    """A line of the table. ``environment`` names a variable that must be set for the engine to be offered.

    ``magic`` is how files of its format begin, where the format is the engine's own and nobody else's.
    ``more_devices`` says how devices that the board lacks come to it.
    ``profiler`` is the module whose function ``profile`` tells where the time of an inference goes.

    For engines that come from elsewhere (``boardbench.agent.bench.plugins``): ``suffixes`` are endings of
    files in a format of their own, ``contract`` is the CONTRACT they are made for.
    """

    name: str
    module: str
    type: str
    formats: Tuple[str, ...]
    environment: str = ""
    magic: bytes = b""
    profiler: str = ""
    more_devices: str = ""
    suffixes: Tuple[str, ...] = ()
    contract: int = 0


CONTRACT = 1
"""Raised when the contract of an engine changes in a way that engines have to follow."""

# For a format that two engines take, the first of them is the default.
_HERE = "boardbench.agent.bench.runtimes"
ENGINES = (
    Engine(
        "tflite",
        f"{_HERE}.tflite",
        "TfliteRuntime",
        ("tflite",),
        profiler=f"{_HERE}.tflite_profile",
        more_devices="edgetpu needs libedgetpu.so.1 (package libedgetpu1-std or libedgetpu1-max); "
        "any device can be given by the option delegate=PATH of its library",
    ),
    Engine(
        "onnxruntime",
        f"{_HERE}.onnx",
        "OnnxRuntime",
        ("onnx",),
        profiler=f"{_HERE}.onnx_profile",
        more_devices="another build of ONNX Runtime may have it (onnxruntime-gpu, onnxruntime-openvino, …)",
    ),
    Engine(
        "openvino",
        f"{_HERE}.openvino",
        "OpenVinoRuntime",
        ("openvino", "onnx", "tflite"),
        profiler=f"{_HERE}.openvino",
        more_devices="gpu and npu need the drivers of the hardware (libOpenCL.so.1, Intel compute runtime)",
    ),
    Engine(
        "tensorrt",
        f"{_HERE}.tensorrt",
        "TensorRtRuntime",
        ("tensorrt", "onnx"),
        profiler=f"{_HERE}.tensorrt",
        more_devices="dla is in some Jetsons (Xavier, Orin)",
    ),
    Engine("torch", f"{_HERE}.torch", "TorchRuntime", ("torchscript",), profiler=f"{_HERE}.torch"),
    Engine(
        "executorch",
        f"{_HERE}.executorch",
        "ExecuTorchRuntime",
        ("executorch",),
        profiler=f"{_HERE}.executorch",
        more_devices="another build of ExecuTorch may have its delegate",
    ),
    Engine(
        "coreml",
        f"{_HERE}.coreml",
        "CoreMlRuntime",
        ("coreml",),
        more_devices="gpu and npu (the neural engine) are there where the Mac has them",
    ),
    Engine("ell", f"{_HERE}.ell", "EllRuntime", ("ell",), profiler=f"{_HERE}.ell"),
    Engine(
        "fake",
        f"{_HERE}.fake",
        "FakeRuntime",
        ("fake",),
        environment="BOARDBENCH_FAKE_RUNTIME",
        magic=b"boardbench-fake/1\n",
        profiler=f"{_HERE}.fake",
    ),
)


def offered(environ: Optional[Mapping[str, str]] = None) -> Tuple[Engine, ...]:
    """Every engine that boardbench knows here, whether it is installed or not."""
    variables = os.environ if environ is None else environ
    return tuple(engine for engine in ENGINES if not engine.environment or variables.get(engine.environment))


def default_for(model_format: str, environ: Optional[Mapping[str, str]] = None) -> str:
    """Name of the engine that runs a format when none is asked for; empty where none takes it."""
    for engine in offered(environ):
        if model_format in engine.formats:
            return engine.name
    return ""


def own_format(head: bytes, environ: Optional[Mapping[str, str]] = None) -> str:
    """The format of a file that begins like this, if an engine that is offered has it for its own."""
    for engine in offered(environ):
        if engine.magic and head.startswith(engine.magic):
            return engine.formats[0]
    return ""


def create(name: str, environ: Optional[Mapping[str, str]] = None) -> Runtime:
    """The engine called ``name``; nothing heavy is imported yet. Raises RuntimeUnavailable."""
    # The agent's main process has this table too, and no use for the contract of an engine.
    from boardbench.agent.bench.runtime import RuntimeUnavailable

    for engine in offered(environ):
        if engine.name == name:
            return cast("Runtime", getattr(importlib.import_module(engine.module), engine.type)())
    from boardbench.agent.bench import plugins

    offer = plugins.find(name)
    if offer is not None:
        return plugins.create(offer)
    names = ", ".join((*(engine.name for engine in offered(environ)), *(o.name for o in plugins.offers())))
    raise RuntimeUnavailable(f"there is no runtime {name!r}; boardbench knows {names}")


def profiler(name: str, environ: Optional[Mapping[str, str]] = None) -> Optional[Profiler]:
    """The profiler of the engine called ``name``; None when it has none. Raises RuntimeUnavailable."""
    for engine in offered(environ):
        if engine.name == name:
            return _profiler(engine)
    from boardbench.agent.bench import plugins

    offer = plugins.find(name)
    return None if offer is None else _profiler(plugins.declaration(offer))


def _profiler(engine: Engine) -> Optional[Profiler]:
    if not engine.profiler:
        return None
    return cast("Profiler", importlib.import_module(engine.profiler).profile)


def full_version(runtime: Runtime) -> str:
    """Package and version of an engine, and the distribution that it comes from when that is another's.

    Imports the engine. Raises RuntimeUnavailable.
    """
    version = runtime.version()
    if any(engine.name == runtime.name for engine in ENGINES):
        return version
    from boardbench.agent.bench import plugins

    offer = plugins.find(runtime.name)
    return version if offer is None else plugins.with_distribution(version, offer)
