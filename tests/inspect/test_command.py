"""``boardbench inspect``: JSON, table, exit codes; and what the package may lean on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from google.protobuf import json_format

from boardbench.v1 import report_pb2

ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the program's own entry, in this process."""
    from boardbench.cli import main as program

    runner = CliRunner()
    codes: list[int] = []

    import click

    @click.command(context_settings={"ignore_unknown_options": True})
    def call() -> None:
        codes.append(int(program.main(["inspect", *map(str, arguments)])))

    result = runner.invoke(call, [])
    assert result.exception is None, result.exception
    return codes[0], result.stdout, result.stderr


@pytest.fixture
def pair(
    tmp_path: Path, conv_chain: Callable[..., bytes], compile_like: Callable[..., bytes]
) -> tuple[Path, Path]:
    """A compiled file and its original: two operations mapped, two on the CPU."""
    node = sys.modules[compile_like.__module__].Node
    original = conv_chain("CONV_2D", "RELU", "LEAKY_RELU", "CONV_2D")
    (tmp_path / "m.tflite").write_bytes(original)
    (tmp_path / "m_edgetpu.tflite").write_bytes(
        compile_like(original, [node((0, 1), cached=500, streamed=70)])
    )
    return tmp_path / "m_edgetpu.tflite", tmp_path / "m.tflite"


def test_json_is_a_model_report(pair: tuple[Path, Path]) -> None:
    code, out, err = _run(pair[0], "--original", pair[1], "--format", "json", "--fit", "1GB")
    assert (code, err) == (0, "")
    document = json.loads(out)
    report = json_format.ParseDict(document, report_pb2.ModelReport())
    assert document["placement"]["evidence"] == "EVIDENCE_STATIC"
    assert document["placement"]["accelerated_ops"] == 2
    assert document["placement"]["cpu_ops"] == 2
    assert document["placement"]["cpu_op_types"] == {"LEAKY_RELU": 1, "CONV_2D": 1}
    assert document["placement"]["accelerated_op_types"] == {"CONV_2D": 1, "RELU": 1}
    assert document["placement"]["units"] == [{"unit": "UNIT_CPU", "ops": 2}, {"unit": "UNIT_TPU", "ops": 2}]
    assert document["edgetpu"]["nodes"] == 1
    assert document["edgetpu"]["parameters_cached_bytes"] == "500"
    assert document["edgetpu"]["parameters_streamed_bytes"] == "70"
    assert document["edgetpu"]["min_runtime_version"] == 13
    assert [op.get("root_cause") for op in document["ops"]] == [None, None, True, False]
    assert document["ops"][2]["cause"].startswith("Operation not supported")
    assert "PRELU" in document["ops"][2]["remedy"]
    assert {"code": "parameters_streamed"}.items() <= document["warnings"][0].items()
    assert sum(use.size_bytes for use in report.bytes) == report.size_bytes
    assert report.original_sha256
    assert [fit.target for fit in report.fits] == ["1GB", "edgetpu-cache"]


def test_what_the_compiled_file_alone_cannot_tell_is_absent(pair: tuple[Path, Path]) -> None:
    code, out, _ = _run(pair[0], "--format", "json")
    assert code == 0
    document = json.loads(out)
    assert "accelerated_ops" not in document["placement"]
    assert "accelerated_op_types" not in document["placement"]
    assert document["placement"]["cpu_ops"] == 2
    assert "parameter_count" not in document
    assert "multiply_accumulates" not in document
    assert [op["type"] for op in document["ops"]] == ["edgetpu-custom-op", "LEAKY_RELU", "CONV_2D"]


def test_prediction_is_marked(pair: tuple[Path, Path]) -> None:
    code, out, _ = _run(pair[1], "--target", "edgetpu", "--format", "json")
    assert code == 0
    document = json.loads(out)
    assert document["placement"]["evidence"] == "EVIDENCE_PREDICTION"
    assert "edgetpu" not in document
    assert document["target"] == "edgetpu"
    code, out, _ = _run(pair[1], "--target", "edgetpu")
    assert "predicted, not evidence" in out
    assert "not_compiled" in out


def test_table_leads_with_the_placement(pair: tuple[Path, Path]) -> None:
    code, out, err = _run(pair[0], "--original", pair[1])
    assert (code, err) == (0, "")
    assert "PARTLY accelerated: 2 of 4 ops on the TPU, 2 on the CPU" in out
    assert "root cause: Operation not supported" in out
    order = [out.index(f"\n  {title}  ") for title in ("Placement", "Warnings", "Edge TPU", "Inputs")]
    assert order == sorted(order)
    # The one that stays because of itself comes before the one that only follows.
    assert out.index("LEAKY_RELU  root cause") < out.index("#3")
    code, whole, _ = _run(pair[0], "--original", pair[1], "--full")
    assert code == 0
    assert "All ops" in whole
    assert len(whole) > len(out)


def test_names_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    from boardbench.cli.tflite_build import ModelBuilder

    builder = ModelBuilder("evil \x1b[31mred")
    graph = builder.subgraph()
    first, out = graph.tensor("a\x1b]0;owned\x07", (1, 4), "int8"), graph.tensor("b", (1, 4), "int8")
    graph.operator("evil\x1b[2Jop", [first], [out])
    graph.inputs(first)
    graph.outputs(out)
    path = tmp_path / "m.tflite"
    path.write_bytes(builder.finish())
    for arguments in ([], ["--full"], ["--target", "edgetpu"]):
        code, text, _ = _run(path, *arguments)
        assert code == 0
        assert "\x1b" not in text
        assert "\x07" not in text


def test_unusable_files_end_with_2(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    empty = tmp_path / "empty.tflite"
    empty.touch()
    half = tmp_path / "half.tflite"
    half.write_bytes(pair[1].read_bytes()[:200])
    for arguments, words in (
        ([tmp_path / "missing"], "No such file"),
        ([text], "not a model format"),
        ([empty], "the file is empty"),
        ([half], "truncated"),
        ([pair[1], "--original", pair[0]], "not compiled"),
        ([pair[0], "--fit", "toaster"], "neither a board nor a size"),
        ([pair[0], "--target", "hal"], "no rules are known"),
    ):
        code, out, err = _run(*arguments)
        assert code == 2, arguments
        assert out == ""
        assert words in err


def test_requirements_decide_the_exit_code(pair: tuple[Path, Path]) -> None:
    wanted = ("--original", pair[1], "--format", "json", "--require")
    code, out, err = _run(pair[0], *wanted, "accelerated_ops>=50%")
    assert code == 0
    json.loads(out)
    assert "held" in err
    code, out, err = _run(pair[0], *wanted, "no-fallback")
    assert code == 1
    json.loads(out)
    assert "NOT HELD" in err
    assert err.index("#2 LEAKY_RELU") < err.index("#3 CONV_2D")
    # Without the original nobody knows, and what is not known does not hold.
    assert _run(pair[0], "--require", "accelerated_ops>=1")[0] == 1
    assert _run(pair[0], "--require", "p50<=5ms")[0] == 2


def test_unknown_options_end_with_2(pair: tuple[Path, Path]) -> None:
    assert _run(pair[0], "--frobnicate")[0] == 2
    assert _run()[0] == 2


# ---- what the package leans on ---------------------------------------------------------------------------


def _isolated(python: str, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the code with nothing but the standard library and the agent's folder."""
    prelude = (
        "import sys, types\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "package = types.ModuleType('boardbench')\n"
        f"package.__path__ = [{str(ROOT / 'agent' / 'boardbench')!r}]\n"
        "sys.modules['boardbench'] = package\n"
    )
    return subprocess.run(
        [python, "-I", "-c", prelude + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ.get("PATH", "")},
    )


ALL = (
    "from pathlib import Path\n"
    "from boardbench.inspect import analyse, sniff\n"
    "for name in sys.argv[1:]:\n"
    "    report = analyse.inspect(Path(name), target='edgetpu' if name.endswith('.tflite') else '')\n"
    "    assert sum(use.size_bytes for use in report.bytes) == report.size_bytes\n"
    "    assert sniff.check(Path(name), report.format) is None\n"
    "    print(report.format, report.op_count)\n"
    "heavy = ('numpy', 'google', 'flatbuffers', 'onnx', 'torch')\n"
    "outside = [m for m in sys.modules if m.split('.')[0] in heavy]\n"
    "assert not outside, outside\n"
)


def test_the_standard_library_is_enough(files: Path, pair: tuple[Path, Path]) -> None:
    done = _isolated(sys.executable, ALL, *pair, *_samples(files))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[::2].count("tflite") == 2


def test_the_oldest_python_is_enough(files: Path, pair: tuple[Path, Path]) -> None:
    # A pyenv has a python3.9 on the path that starts nothing until a version is chosen.
    kept = sorted((Path.home() / ".pyenv" / "versions").glob("3.9.*/bin/python"))
    candidates = [os.environ.get("BOARDBENCH_PYTHON39"), shutil.which("python3.9"), *map(str, kept)]
    python = next((each for each in candidates if each and _isolated(each, "").returncode == 0), None)
    if python is None:
        pytest.skip("there is no python3.9 that starts (set BOARDBENCH_PYTHON39)")
    done = _isolated(python, ALL, *pair, *_samples(files))
    assert done.returncode == 0, done.stderr


def _samples(files: Path) -> list[Path]:
    names = ("small.xml", "portable.pte", "small.pt", "small.ptl", "small.mlmodel", "small.mlpackage")
    return [files / name for name in (*names, "mobile_flatbuffer.ptl")]


@pytest.mark.parametrize("form", ["table", "json"])
def test_only_what_is_needed_is_loaded(pair: tuple[Path, Path], form: str) -> None:
    code = (
        "import sys\n"
        "from boardbench.cli.main import main\n"
        f"assert main(['inspect', {str(pair[1])!r}, '--format', {form!r}]) == 0\n"
        "parts = ('edgetpu', 'darwinn', 'onnx', 'openvino', 'coreml', 'executorch', 'torchscript')\n"
        "slow = {'google', 'rich', 'grpc', 'boardbench.v1', 'boardbench.cli.require', 'decimal'}\n"
        "slow |= {f'boardbench.inspect.{part}' for part in parts}\n"
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


def test_help_of_the_program_loads_no_reader() -> None:
    code = (
        "import sys\n"
        "from boardbench.cli.main import main\n"
        "main(['--help'])\n"
        "assert not [m for m in sys.modules if m.startswith('boardbench.inspect')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout
