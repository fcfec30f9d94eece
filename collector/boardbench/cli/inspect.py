"""``boardbench inspect``: what is in a model file and where it would run, without running it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from boardbench.cli.errors import ExitCode, WrongUse
from boardbench.cli.require_option import require_option
from boardbench.cli.terminal import full_option, output_from, output_options

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from boardbench.cli.require import Requirement
    from boardbench.v1 import report_pb2

_Message = TypeVar("_Message", bound="Message")


@click.command(
    epilog="\b\nExamples:\n"
    "  boardbench inspect model.tflite\n"
    "  boardbench inspect model.tflite --target edgetpu\n"
    "  boardbench inspect model_edgetpu.tflite --original model.tflite\n"
    "  boardbench inspect model.onnx --fit raspberrypi4-1gb --format json\n"
    "  boardbench inspect model_edgetpu.tflite --original model.tflite --require no-fallback\n"
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--original",
    type=click.Path(path_type=Path),
    help="The file that FILE was compiled from: tells what became of every op, and why.",
)
@click.option(
    "--target",
    default="",
    metavar="NAME",
    help="Accelerator that the placement is asked for: edgetpu. For a file that is not compiled it is a "
    "prediction by the compiler's documented rules.",
)
@click.option(
    "--fit",
    "fits",
    multiple=True,
    metavar="BOARD|BYTES",
    help="Say whether it fits: a board (raspberrypi4-1gb, coral-dev-board, …), a size (512MiB) or "
    "edgetpu-cache. May be given again.",
)
@require_option(file=True)
@full_option
@output_options
def inspect(
    file: Path,
    original: Path | None,
    target: str,
    fits: tuple[str, ...],
    require: tuple[Requirement, ...],
    **options: Any,
) -> ExitCode:
    """Say what is in a model file, without running it.

    Inputs and outputs, ops, parameters, where the bytes go, and for files compiled for the Edge TPU what
    the compiler did. FILE is .tflite, .onnx, OpenVINO .xml, .pte, .ptl, .pt, .mlmodel or .mlpackage; the
    bytes tell which, not the name. No engine is needed.
    """
    # Everything is imported where it is needed: a model is read in less time than protobuf and Rich.
    from boardbench.inspect import analyse
    from boardbench.inspect.errors import InspectError

    output = output_from(options)
    try:
        found = analyse.inspect(file, original=original, target=target, fits=fits)
    except InspectError as error:
        raise WrongUse(str(error)) from error
    if output.json:
        from boardbench.inspect import document

        ascii_only = (sys.stdout.encoding or "ascii").lower().replace("-", "") != "utf8"
        sys.stdout.write(document.text(found, ascii_only=ascii_only) + "\n")
    else:
        from boardbench.cli import grid
        from boardbench.cli.inspect_page import inspect_page

        grid.write(inspect_page(found, grid.room(sys.stdout), whole=output.full), sys.stdout)
    if not require:
        return ExitCode.DONE
    from boardbench.cli.require import holds
    from boardbench.cli.require_names import Subject

    return (
        ExitCode.DONE if holds(require, Subject.of_report(report_message(found)), output) else ExitCode.FAILED
    )


def report_message(report: object) -> report_pb2.ModelReport:
    """The report as it goes over the wire."""
    from boardbench.v1 import report_pb2

    return fill(report_pb2.ModelReport(), report)


def fill(message: _Message, value: object) -> _Message:
    """``message`` with the fields of a dataclass whose names are the message's; None stays absent."""
    import dataclasses
    import enum
    from collections.abc import Mapping

    assert dataclasses.is_dataclass(value)
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if content is None:
            continue
        if dataclasses.is_dataclass(content):
            target = getattr(message, field.name)
            target.SetInParent()
            fill(target, content)
        elif isinstance(content, Mapping):
            getattr(message, field.name).update(content)
        elif isinstance(content, tuple):
            repeated = getattr(message, field.name)
            for item in content:
                if dataclasses.is_dataclass(item):
                    fill(repeated.add(), item)
                else:
                    repeated.append(item)
        elif isinstance(content, enum.Enum):
            kind = message.DESCRIPTOR.fields_by_name[field.name].enum_type
            assert kind is not None
            setattr(message, field.name, kind.values_by_name[content.value].number)
        else:
            setattr(message, field.name, content)
    return message
