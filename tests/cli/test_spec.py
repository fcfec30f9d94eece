"""What to run, as options: what they mean on the wire, and what makes no sense."""

from __future__ import annotations

import json

import click
import pytest
from click.testing import CliRunner
from google.protobuf import json_format

from boardbench.agent.cli import parser
from boardbench.cli.spec import spec_from, spec_options
from boardbench.v1 import result_pb2


def parsed(*arguments):
    """The message that the options make. Raises click.UsageError."""
    found = []

    @click.command()
    @spec_options
    def command(**values):
        found.append(spec_from(values))

    command.main(arguments, standalone_mode=False)
    return found[0]


def test_nothing_asked_for_leaves_all_to_the_board():
    assert parsed().message() == result_pb2.BenchmarkSpec()


def test_precision_and_what_goes_with_it():
    spec = parsed(
        *("--precision", "p50=1%,p99=0.05", "--precision", "99.9=10%", "--confidence", "99%"),
        *("--max-duration", "60", "--processes", "5"),
    ).message()
    assert [(target.percentile, target.ratio) for target in spec.precision] == [
        (50, 0.01), (99, 0.05), (99.9, 0.1),
    ]  # fmt: skip
    assert (spec.confidence, spec.precision_seconds, spec.processes) == (0.99, 60, 5)


def test_a_camera():
    spec = parsed("--scenario", "periodic", "--rate", "29.97", "--deadline", "0.05").message()
    assert spec.scenario.kind == 3 and spec.scenario.rate_hertz == 29.97
    assert spec.scenario.deadline_seconds == 0.05


def test_what_surrounds_the_run():
    spec = parsed(
        *("--cool-to", "45", "--cool-for", "300", "--idle", "0", "--sample-rate", "10", "--tune")
    ).message()
    assert (spec.cool_down_celsius, spec.cool_down_seconds, spec.sample_hertz, spec.tune) == (
        45, 300, 10, True,
    )  # fmt: skip
    assert spec.HasField("idle_seconds") and spec.idle_seconds == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--precision", "p50"), "write percentile=share"),
        (("--precision", "p100=1%"), "write percentile=share"),
        (("--precision", "p50=0%"), "write percentile=share"),
        (("--precision", "p50=nan"), "write percentile=share"),
        (("--precision", "p50=1%,p50=2%"), "p50 is given twice"),
        (("--confidence", "95"), "is not from 50.0% to 99.9%"),
        (("--confidence", "much"), "is not a share"),
        (("--max-duration", "60"), "bounds --precision"),
        (("--processes", "0"), "is not from 1 to 100"),
        (("--scenario", "periodic"), "needs --rate"),
        (("--rate", "30"), "give --scenario periodic or poisson"),
        (("--scenario", "offline", "--rate", "30"), "--rate says nothing to offline"),
        (("--scenario", "poisson", "--rate", "nan"), "is not from"),
        (("--batch", "8"), "give --scenario offline"),
        (("--cool-for", "60"), "give --cool-to too"),
        (("--sample-rate", "1000"), "is not from 0 to 100"),
    ],
)
def test_what_makes_no_sense_is_told(arguments, told):
    with pytest.raises(click.UsageError) as error:
        parsed(*arguments)
    assert told in error.value.format_message()


def test_run_passes_everything_on_to_the_agent():
    spec = parsed(
        *("--runtime", "tflite", "--threads", "2", "--option", "xnnpack=off", "--shape", "in=1,2"),
        *("--precision", "p50=1%", "--scenario", "sustained", "--window", "30", "--strict"),
    )
    options = parser().parse_args(["run", *spec.arguments(), "--", "model.tflite"])
    assert json_format.Parse(options.spec, result_pb2.BenchmarkSpec()) == spec.message()


def test_the_help_shows_every_option():
    @click.command()
    @spec_options
    def command(**values):
        raise AssertionError("help ends it")

    told = CliRunner().invoke(command, ["--help"]).output
    for name in ("--precision", "--processes", "--scenario", "--rate", "--cool-to", "--tune", "--window"):
        assert name in told


def test_agents_own_options_win_over_its_spec(agent_run):
    spec = json.dumps({"threads": 2, "processes": 3, "options": {"a": "1"}})
    asked = agent_run("--spec", spec, "--threads", "4")
    assert (asked.threads, asked.processes, dict(asked.options)) == (4, 3, {"a": "1"})


@pytest.fixture
def agent_run():
    """What ``boardbench-agent run`` would ask for."""
    from boardbench.agent.cli import _spec

    return lambda *arguments: _spec(parser().parse_args(["run", *arguments, "m.tflite"]))


@pytest.mark.parametrize("text", ["{", "[]", '{"no_such": 1}', '{"threads": -1}'])
def test_a_spec_that_is_none_is_told(agent_run, text):
    from boardbench.agent.errors import InvalidRequest

    with pytest.raises(InvalidRequest, match="--spec"):
        agent_run("--spec", text)


def test_a_delegate_and_its_options_are_options_of_the_engine():
    spec = parsed(
        *(
            "--delegate",
            "libdelegate.so",
            "--delegate-option",
            "device=usb",
            "--delegate-option",
            "level=a=b",
        ),
        *("--option", "xnnpack=off"),
    )
    assert dict(spec.message().options) == {
        "xnnpack": "off",
        "delegate": "libdelegate.so",
        "delegate.device": "usb",
        "delegate.level": "a=b",
    }


def test_options_for_the_device_need_no_delegate():
    spec = parsed("--device", "edgetpu", "--delegate-option", "device=usb:0")
    assert dict(spec.message().options) == {"delegate.device": "usb:0"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--delegate", "a.so", "--option", "delegate=b.so"),
        ("--delegate-option", "device=usb", "--option", "delegate.device=pci"),
        ("--delegate-option", "device=usb", "--delegate-option", "device=pci"),
        ("--delegate-option", "device"),
        ("--delegate", ""),
    ],
)
def test_a_delegate_is_said_once(arguments):
    with pytest.raises(click.UsageError):
        parsed(*arguments)
