"""Execution providers that come to ONNX Runtime as a library of their own.

``register_execution_provider_library`` loads it, and from then on it is among ``get_ep_devices()``, each a
provider with a piece of hardware; ``SessionOptions.add_provider_for_devices`` says which of them to use.
Some providers have a name of their own, others take the one under which their library is registered, which
is the name of the device.
Source: https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/usage.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

from boardbench.agent.bench import libraries
from boardbench.agent.bench.runtime import OptionRejected, RuntimeUnavailable
from boardbench.agent.domain import Unit

HARDWARE = ("any", "cpu", "gpu", "npu")
UNITS: Mapping[str, Unit] = {"cpu": Unit.CPU_DELEGATE, "gpu": Unit.GPU, "npu": Unit.NPU}
_SUFFIX = "ExecutionProvider"

# By the library's path: the providers that came with it. As long as the process, as ONNX Runtime has it.
_registered: Dict[str, Tuple[str, ...]] = {}


@dataclass(frozen=True)
class Plugin:
    """A provider from a library, with the hardware that it is to use."""

    provider: str
    unit: Unit
    devices: Tuple[Any, ...]
    """What ``add_provider_for_devices`` takes."""

    def tell(self, session_options: Any, options: Mapping[str, str]) -> None:
        """Makes sessions of these options use it."""
        session_options.add_provider_for_devices(list(self.devices), dict(options))


def load(ort: Any, library: str, *, device: str, hardware: str) -> Plugin:
    """The library's provider that a device stands for. Raises RuntimeUnavailable, OptionRejected.

    ``hardware`` is one of HARDWARE; with ``any`` what the provider names first.
    """
    if not hasattr(ort, "register_execution_provider_library"):
        raise RuntimeUnavailable(
            f"onnxruntime {ort.__version__} takes no providers from libraries: update it to 1.23 or later"
        )
    path = library if "/" not in library else str(Path(library).resolve())
    if path not in _registered:
        _registered[path] = _new_providers(ort, library, path, device)
    providers = {_as_device(name): name for name in _registered[path]}
    if not providers:
        raise RuntimeUnavailable(
            f"the provider library {library} finds no hardware here that it can use, so it has no device"
        )
    if device not in providers:
        raise OptionRejected(
            f"the provider library {library} brings the device {' and '.join(sorted(providers))}, not "
            f"{device!r}: ask for that with --device"
        )
    found = [each for each in ort.get_ep_devices() if each.ep_name == providers[device]]
    kinds = [_kind(each) for each in found]
    kind = kinds[0] if hardware == "any" else hardware
    if kind not in kinds:
        raise OptionRejected(
            f"provider_hardware={hardware}: {providers[device]} finds no such here; it finds "
            f"{', '.join(dict.fromkeys(kinds))}"
        )
    chosen = tuple(each for each, its in zip(found, kinds) if its == kind)
    return Plugin(providers[device], UNITS.get(kind, Unit.DELEGATE), chosen)


def _new_providers(ort: Any, library: str, path: str, device: str) -> Tuple[str, ...]:
    before = _names(ort)
    taken = {_as_device(name) for name in before}
    try:
        ort.register_execution_provider_library(Path(path).stem if device in taken else device, path)
    except Exception as error:  # onnxruntime's own classes, which have no public place
        said = " ".join(str(error).split())
        if "CreateEpFactories" in said:
            why = "it is a shared library, and no execution provider of ONNX Runtime"
        else:
            why = libraries.why_not(path, said) or "give its path on the board"
        raise RuntimeUnavailable(
            f"the provider library {library} can't be loaded: {why} (onnxruntime said: {said[:400]})"
        ) from error
    return tuple(name for name in _names(ort) if name not in before)


def _names(ort: Any) -> List[str]:
    return list(dict.fromkeys(str(each.ep_name) for each in ort.get_ep_devices()))


def _as_device(provider: str) -> str:
    return (provider[: -len(_SUFFIX)] if provider.endswith(_SUFFIX) else provider).lower()


def _kind(device: Any) -> str:
    """``cpu``, ``gpu``, ``npu``, or whatever kind comes later."""
    return str(device.device.type).rpartition(".")[2].lower()
