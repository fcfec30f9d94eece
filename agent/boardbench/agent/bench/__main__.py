"""The worker process: one job in on stdin, events out on a descriptor of its own, then it ends.

Run as a file it needs nothing but a Python >= 3.9 with one engine: the agent starts it under
whichever interpreter has that engine, without PYTHONPATH, so that none of the agent's own packages
can be seen there. See :mod:`boardbench.agent.bench.jobline` for the job and
:mod:`boardbench.agent.bench.events` for the events.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    # The agent asks for the version then, and says what to do.
    sys.exit("the worker needs Python 3.9 or newer")

if __package__ in (None, ""):
    # Started as a file: Python has put this folder first, where modules such as `inputs` or `memory`
    # would hide others of that name.
    sys.path[:] = sys.path[1:]
    import types
    from pathlib import Path

    _root = Path(__file__).resolve().parents[3]
    _namespace = types.ModuleType("boardbench")
    _namespace.__path__ = [str(_root / "boardbench")]
    sys.modules["boardbench"] = _namespace

import argparse
import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import threading
import traceback
from typing import Any, BinaryIO, Callable, List, Mapping, NoReturn, Optional

from boardbench.agent.bench import probe, runtimes
from boardbench.agent.bench.events import EventWriter
from boardbench.agent.bench.job import (
    CpuFallback,
    InferenceFailed,
    execute,
    out_of_memory,
    profile,
)
from boardbench.agent.bench.jobline import Job, JobRejected
from boardbench.agent.bench.runtime import (
    InputsRejected,
    ModelRejected,
    NoProfile,
    OptionRejected,
    RuntimeUnavailable,
)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_CODES = (
    (RuntimeUnavailable, "runtime_unavailable"),
    (ModelRejected, "model_rejected"),
    (OptionRejected, "option_rejected"),
    (InputsRejected, "inputs_rejected"),
    (InferenceFailed, "inference_failed"),
    (CpuFallback, "cpu_fallback"),
    (NoProfile, "no_profile"),
    (JobRejected, "internal"),
)


def main(arguments: Optional[List[str]] = None) -> NoReturn:
    """Does the job on stdin and ends the process: 0 after a result, 1 after an error event."""
    parser = argparse.ArgumentParser(prog="boardbench-worker", description=__doc__)
    parser.add_argument("--events-fd", type=int, required=True, help="descriptor that events are written to")
    descriptor = parser.parse_args(arguments).events_fd
    os.set_inheritable(descriptor, False)  # nothing that an engine starts may hold the stream open
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A crash in native code leaves the Python stack in stderr, hence in the failed run's output.
    faulthandler.enable()
    parent = os.getppid()
    line = sys.stdin.buffer.readline()
    if not line:
        _end(1)  # the parent died before it could say what to do
    orders = StdinOrders(sys.stdin.buffer, lambda: _end(1))
    _die_with_parent(parent, orders)
    _go_first_when_memory_ends()
    _end(_serve(line, EventWriter(descriptor), orders))


class StdinOrders:
    """What the agent says on stdin after the job: the lines ``go`` and ``stop``; its end ends the worker."""

    def __init__(self, stream: BinaryIO, on_end: Callable[[], None]) -> None:
        """Nothing is read before :meth:`listen`."""
        self._stream = stream
        self._on_end = on_end
        self._go, self._stop = threading.Event(), threading.Event()
        self._listens = False

    def listen(self) -> None:
        """Reads on, in a thread of its own that sleeps until there is something to read."""
        if not self._listens:
            self._listens = True
            threading.Thread(target=self._read, name="orders", daemon=True).start()

    def _read(self) -> None:
        for line in iter(self._stream.readline, b""):
            if line.strip() == b"go":
                self._go.set()
            elif line.strip() == b"stop":
                self._stop.set()
        self._on_end()

    def wait_for_go(self) -> None:
        """Returns when told to go."""
        self._go.wait()

    def stopped(self) -> bool:
        """Whether told to stop."""
        return self._stop.is_set()


def _serve(line: bytes, events: EventWriter, orders: StdinOrders) -> int:
    """Carries out one job line; the exit code. Every exception ends here."""
    content: Any = None
    try:
        content = json.loads(line)
        if not isinstance(content, dict):
            raise JobRejected("the job is not a JSON object")
        kind = content.get("kind")
        if kind == "probe":
            events.probe(probe.probe(_names(content)))
        elif kind == "run":
            job = Job.parse(content)
            if job.hold:
                orders.listen()
            execute(job, events, orders)
        elif kind == "profile":
            profile(Job.parse(content), events)
        else:
            raise JobRejected(f"there is no job of kind {kind!r}")
    except BrokenPipeError:
        return 1  # nobody listens any more
    except Exception as error:
        traceback.print_exc()
        if events.ended:
            return 1  # the engine failed to close: the result is out
        code, message = _explain(error, _whose(content))
        with contextlib.suppress(BrokenPipeError):
            events.error(code, message)
        return 1
    return 0


def _names(content: Mapping[str, Any]) -> Optional[List[str]]:
    """The engines that a probe is for; None for all of boardbench's own. Raises JobRejected."""
    names = content.get("runtimes")
    if "runtime" in content:
        names = [content["runtime"]]
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise JobRejected(f"a probe is for runtimes by their names, not for {names!r}")
    return names


def _whose(content: Any) -> str:
    """What to do about a defect: whose it is to mend."""
    name = content.get("runtime") if isinstance(content, dict) else None
    if isinstance(name, str) and all(name != engine.name for engine in runtimes.ENGINES):
        from boardbench.agent.bench import plugins

        offer = plugins.find(name)
        if offer is not None:
            return f"tell the maker of {offer.distribution}"
    return "please report this"


def _explain(error: Exception, what_to_do: str) -> "tuple[str, str]":
    """Code and message of the error event for an exception."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, str(error)
    if out_of_memory(error):
        said = f" ({error})" if str(error) else ""
        return "out_of_memory", f"memory ran out in the worker{said}: use a smaller model, batch or input"
    if isinstance(error, ValueError) and isinstance(error, json.JSONDecodeError):
        return "internal", f"the job is not JSON: {error}"
    where = traceback.extract_tb(error.__traceback__)[-1]
    return (
        "internal",
        f"{type(error).__name__}: {error} (in {where.name}, line {where.lineno}): {what_to_do}",
    )


def _die_with_parent(parent: int, orders: StdinOrders) -> None:
    """Sees to it that this process never outlives ``parent``."""
    if sys.platform == "linux" and _ask_kernel_to_kill():
        if os.getppid() != parent:  # it died before the kernel was asked
            _end(1)
        return
    orders.listen()


def _ask_kernel_to_kill() -> bool:
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):
        return False
    return bool(prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) == 0)


def _go_first_when_memory_ends() -> None:
    """Makes the kernel's out-of-memory killer choose this process and not the agent."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def _end(code: int) -> NoReturn:
    """Ends at once: an engine's exit handlers may hang or crash, and everything has been said."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
