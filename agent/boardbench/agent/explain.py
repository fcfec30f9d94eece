"""What keeps this board from more, for a person: sensors, permissions, the collector, and what mends each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

from boardbench.agent.board.check import View, told
from boardbench.agent.board.checks import accelerators
from boardbench.agent.board.sensors import KINDS
from boardbench.agent.config import AgentConfig
from boardbench.agent.enrolment import Enrolment
from boardbench.agent.errors import StorageError
from boardbench.v1 import agent_pb2

_DOUBTS = (agent_pb2.FINDING_STATE_DOUBTFUL, agent_pb2.FINDING_STATE_INVALID)
_SHOWN = 4


def page(config: AgentConfig, described: agent_pb2.DescribeResponse) -> str:
    """The lines behind the board and its engines."""
    lines = ["sensors", *_sensors(config)]
    lines += ["", "accelerators and their permissions", *_accelerators(config, described)]
    lines += ["", "collector", *_collector(config)]
    return "\n".join(lines)


def _sensors(config: AgentConfig) -> Iterator[str]:
    """Each kind that the board has: how many, and what does not answer."""
    found = False
    for kind in KINDS:
        if kind in config.sensors.without_kinds:
            yield f"  - {kind}: left out by sensors.without"
            continue
        try:
            sensors = importlib.import_module(f"boardbench.agent.board.sensors.{kind}").find(config.sys_root)
        except OSError as error:
            yield f"  ! {kind}: {told(error)}"
            continue
        if not sensors:
            continue
        found = True
        names: list[str] = []
        faults: list[str] = []
        for sensor in sensors:
            try:
                list(sensor.read())
                names.append(sensor.name)
            except OSError as error:
                faults.append(told(error))
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"  ✓ {kind}: {', '.join(names[:_SHOWN])}{more}"
        for fault in dict.fromkeys(faults):
            yield f"  ! {kind}: {fault}"
    if not found:
        yield "  - none that boardbench knows: neither temperature nor power goes with results"


def _accelerators(config: AgentConfig, described: agent_pb2.DescribeResponse) -> Iterator[str]:
    view = View(
        root=config.sys_root,
        board=described.board,
        limits=config.validity,
        runtimes=described.runtimes,
        data_dir=config.data_dir,
    )
    for check in accelerators.CHECKS:
        finding = check.look(view)
        mark = "!" if finding.state in _DOUBTS else "✓"
        if finding.state == agent_pb2.FINDING_STATE_ABSENT:
            mark = "-"
        yield f"  {mark} {finding.message}"
        if finding.fix and mark == "!":
            yield f"      {finding.fix}"


def _collector(config: AgentConfig) -> Iterator[str]:
    try:
        enrolment = Enrolment(config.data_dir)
        address = enrolment.apply(replace(config)).collector
    except StorageError as error:
        # The service's folder, looked at by somebody else.
        yield f"  ? {error}; try with sudo"
        return
    if enrolment.enrolled:
        yield f"  ✓ enrolled at {enrolment.collector}"
    elif address and enrolment.collector:
        yield f"  - a token waits to be shown to {address}"
    elif address:
        yield f"  ✓ results go to {address}; this board was not enrolled there"
    else:
        yield "  - none: results stay on this board"
        yield "      sudo boardbench-agent enroll --collector HOST:7342 --token TOKEN"
        yield "      (on the collector: boardbench-collector token create)"
