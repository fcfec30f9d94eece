"""Engines that come from other distributions, from the command line to the result; broken ones beside them.

The example of such a distribution is built and installed as anybody would, without a network; its models are
made by its own code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "plugin-affine"
QUICK = ("--duration", "0.1", "--min-runs", "12", "--warm-up", "0.05")

# What is wrong with each: its module, and what its declaration's entry point says.
DECLARED = """
    from boardbench.agent.bench.runtimes import Engine
    ENGINE = Engine(
        name={name!r}, module="{module}", type="It", formats=({format!r},), magic=b"it", contract={contract}
    )
"""
BROKEN: dict[str, tuple[str, str, list[str]]] = {
    # name of the runtime: source of its module, entry point's name, what its reason says
    "lacking": (
        "import no_such_sdk",
        "lacking",
        ["can't be imported", "No module named 'no_such_sdk'", "pip"],
    ),
    "crashing": ("import os; os.abort()", "crashing", ["SIGABRT"]),
    "leaving": ("raise SystemExit(0)", "leaving", ["can't be imported", "SystemExit"]),
    "ending": ("import os; os._exit(0)", "ending", ["exited with 0"]),
    "other": ("ENGINE = {'name': 'other'}", "other", ["ENGINE is a dict", "tell the maker"]),
    "old": (DECLARED.format(name="old", module="old", format="old", contract=0), "old", ["contract 0"]),
    "renamed": (
        DECLARED.format(name="another", module="renamed", format="renamed", contract=1),
        "renamed",
        ["called 'another'", "entry point 'renamed'"],
    ),
    "greedy": (
        DECLARED.format(name="greedy", module="greedy", format="tflite", contract=1),
        "greedy",
        ["tflite is boardbench's"],
    ),
    "hollow": (
        DECLARED.format(name="hollow", module="hollow", format="hollow", contract=1),
        "hollow",
        ["hollow.It", "can't be made"],
    ),
    "boardbench-squatting:tflite": ("", "tflite", ["which boardbench has itself", "tell the maker"]),
    "boardbench-shouting:LOUD": ("", "LOUD", ["lower-case"]),
}


def distribution(site: Path, name: str, version: str, *, point: str, module: str, source: str) -> None:
    """Puts a distribution into a folder, as an installer leaves it there."""
    (site / f"{module}.py").write_text(textwrap.dedent(source))
    about = site / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "entry_points.txt").write_text(f"[boardbench.runtimes]\n{point} = {module}:ENGINE\n")


@pytest.fixture(scope="session")
def interpreter(affine_site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own with the example and NumPy, and nothing of boardbench."""
    home = tmp_path_factory.mktemp("affine-python") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True, timeout=170)
    (there,) = home.glob("lib/python3*/site-packages")
    here = Path(sysconfig.get_path("platlib"))
    for each in (*here.glob("numpy"), *here.glob("numpy.libs"), *here.glob("numpy-*.dist-info")):
        (there / each.name).symlink_to(each)
    for each in affine_site.iterdir():
        (there / each.name).symlink_to(each)
    return home / "bin" / "python"


@pytest.fixture(scope="session")
def affine(affine_site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the example's own format: two layers."""
    path = tmp_path_factory.mktemp("affine-models") / "net.affine"
    program = """
        import sys, numpy
        from boardbench_affine import graph
        random = numpy.random.default_rng(7)
        layers = [
            {"type": "dense", "name": "hidden", "of": ["x"],
             "weights": random.standard_normal((16, 32)), "bias": numpy.zeros(32)},
            {"type": "relu", "name": "act", "of": ["hidden"]},
            {"type": "dense", "name": "last", "of": ["act"],
             "weights": random.standard_normal((32, 4)), "bias": numpy.zeros(4)},
        ]
        sys.stdout.buffer.write(graph.write(shape=(1, 16), operations=layers, output="last"))
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(affine_site), str(REPOSITORY / "agent")))}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    path.write_bytes(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    return path


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Environment of an agent whose configuration names these interpreters."""

    def make(**pythons: Path | str) -> dict[str, str]:
        path = tmp_path / "agent.toml"
        path.write_text("".join(f'[runtimes.{name}]\npython = "{to}"\n' for name, to in pythons.items()))
        return {"BOARDBENCH_AGENT_CONFIG": str(path)}

    return make


def statuses(programs: Any, agent: Any) -> dict[str, Any]:
    described = programs.client("devices", "--to", agent.address, "--format", "json").json
    return {status["name"]: status for status in described["runtimes"]}


def push(programs: Any, agent: Any, *arguments: object, code: int | None = 0) -> Any:
    return programs.client("push", *arguments, "--to", agent.address, "--format", "json", *QUICK, code=code)


def test_it_runs_under_its_own_interpreter(
    programs: Any,
    configured: Callable[..., dict[str, str]],
    interpreter: Path,
    affine: Path,
    demo_onnx: Path,
    eventually: Any,
) -> None:
    collector = programs.collector()
    agent = programs.agent(environment=configured(affine=interpreter), collector=collector.address)
    result = push(programs, agent, affine).json
    assert result["status"] == "RUN_STATUS_SUCCEEDED", result
    assert result["model"]["format"] == "affine"
    used = result["runtime"]
    assert (used["name"], used["device"]) == ("affine", "cpu")
    assert used["version"].startswith("numpy ")
    assert used["version"].endswith(" (boardbench-affine 1.0.0)")
    assert used["interpreter"]["path"] == str(interpreter)
    assert [op["type"] for op in result["placement"]["ops"]] == ["dense", "relu", "dense"]
    assert all(op["seconds"] > 0 for op in result["placement"]["ops"]), "the profiler of the plugin ran"

    status = statuses(programs, agent)["affine"]
    assert status["available"]
    assert status["plugin"] == "boardbench-affine 1.0.0"
    assert "accumulate" in status["options"]
    # Its own options are refused and taken as those of any engine.
    other = push(programs, agent, affine, "--option", "accumulate=float64").json
    assert other["runtime"]["options"] == {"accumulate": "float64"}
    assert other["output_sha256"].keys() == {"y"}
    refused = push(programs, agent, affine, "--threads", "2", code=1)
    assert "affine takes no threads" in refused.err
    wrong = push(programs, agent, affine, "--device", "npu", code=None)
    assert "affine has no device 'npu'" in wrong.err
    assert "NumPy computes on the CPU" in wrong.err, "the plugin's own word on its devices"
    # The others are where they were.
    assert push(programs, agent, demo_onnx).json["runtime"]["name"] == "onnxruntime"
    eventually(
        "the collector has a result of it",
        lambda: "affine" in [each["runtime"]["name"] for each in collector.results()],
    )


def test_broken_ones_take_nothing_along(
    programs: Any, affine_site: Path, affine: Path, demo_onnx: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, (source, point, _) in BROKEN.items():
        distributed = name.partition(":")[0] if ":" in name else f"boardbench-{name}"
        module = distributed.removeprefix("boardbench-")
        distribution(broken, distributed, "0.1", point=point, module=module, source=source)
    for name in ("twin", "other-twin"):
        distribution(broken, name, "1", point="both", module=name.replace("-", "_"), source="")
    # What can't be read offers nothing, and hides nothing.
    (broken / "garbage-1.dist-info").mkdir()
    (broken / "garbage-1.dist-info" / "entry_points.txt").write_bytes(
        b"[boardbench.runtimes\n\xff\xfe = = =\n"
    )
    agent = programs.agent(environment={"PYTHONPATH": os.pathsep.join((str(affine_site), str(broken)))})

    found = statuses(programs, agent)
    for name, (_, _, reason) in BROKEN.items():
        status = found[name]
        assert not status.get("available"), name
        assert status["plugin"].endswith(" 0.1"), status
        assert not [part for part in [*reason, status["plugin"]] if part not in status["reason"]], status
    assert "twin 1" in found["both"]["reason"] and "other-twin 1" in found["both"]["reason"]
    assert found["affine"]["available"], found["affine"]
    assert found["affine"]["interpreter"]["path"] == sys.executable
    assert found["tflite"]["available"], "what squats on its name takes nothing of it"
    assert not found["tflite"].get("plugin")
    assert [name for name in found if name in ("tflite", "onnxruntime")] == list(found)[:2]
    # And one that is broken can't be asked for, with the reason.
    answer = push(programs, agent, affine, "--runtime", "lacking", code=None)
    assert "no_such_sdk" in answer.err
    assert push(programs, agent, affine).json["status"] == "RUN_STATUS_SUCCEEDED"
    assert push(programs, agent, demo_onnx).json["status"] == "RUN_STATUS_SUCCEEDED"


def test_one_that_hangs_is_waited_for_alone(
    programs: Any, affine_site: Path, affine: Path, tmp_path: Path
) -> None:
    distribution(
        tmp_path,
        "boardbench-hang",
        "0.1",
        point="hanging",
        module="hang",
        source="import time; time.sleep(1e6)",
    )
    agent = programs.agent(
        environment={
            "PYTHONPATH": os.pathsep.join((str(tmp_path), str(affine_site))),
            "BOARDBENCH_AGENT_DEADLINES_PROBE_SECONDS": "10",
        }
    )
    found = statuses(programs, agent)
    assert "boardbench-hang 0.1: importing it" in found["hanging"]["reason"]
    assert "not over after 10 s" in found["hanging"]["reason"]
    assert found["affine"]["available"]
    assert push(programs, agent, affine).json["status"] == "RUN_STATUS_SUCCEEDED"


def test_what_is_no_model_of_it_is_refused_with_what_there_is(
    programs: Any, configured: Callable[..., dict[str, str]], interpreter: Path, affine: Path, tmp_path: Path
) -> None:
    agent = programs.agent(environment=configured(affine=interpreter))
    wrong = tmp_path / "wrong.affine"
    wrong.write_bytes(b"nothing of the kind, whatever its name says")
    answer = push(programs, agent, wrong, code=None)
    assert answer.code != 0
    assert "the name says affine, a format of boardbench-affine 1.0.0" in answer.err
    unknown = tmp_path / "unknown.xyz"
    unknown.write_bytes(b"nothing of the kind")
    answer = push(programs, agent, unknown, code=None)
    assert answer.code != 0
    assert "affine by boardbench-affine 1.0.0" in answer.err
    cut = tmp_path / "cut.affine"
    cut.write_bytes(affine.read_bytes()[:-5])
    failed = push(programs, agent, cut, code=None).json
    assert failed["error"]["code"] == "model_rejected"
    assert "truncated" in failed["error"]["message"]
    # Its name does not matter, as with any format that its bytes tell.
    renamed = shutil.copy(affine, tmp_path / "model.bin")
    assert push(programs, agent, renamed).json["model"]["format"] == "affine"
    answer = programs.client("inspect", affine, code=None)
    assert answer.code != 0
    assert "not a model format that is known" in answer.err
    assert "a board may know it" in answer.err


def test_models_of_it_outlive_the_agent(
    programs: Any, configured: Callable[..., dict[str, str]], interpreter: Path, affine: Path
) -> None:
    environment = configured(affine=interpreter)
    agent = programs.agent(environment=environment)
    push(programs, agent, affine)
    assert agent.program.end() == 0
    # Before its first probe it knows nothing of the format, and what it has stays.
    again = programs.agent("again", environment=environment, data_dir=agent.data_dir)
    result = push(programs, again, affine).json
    assert result["status"] == "RUN_STATUS_SUCCEEDED"
    assert "no whole file" not in again.program.log()


def test_it_runs_without_an_agent(
    programs: Any, configured: Callable[..., dict[str, str]], interpreter: Path, affine: Path
) -> None:
    programs.client._environment.update(configured(affine=interpreter))
    for more in ((), ("--runtime", "affine")):
        result = programs.client("run", affine, *more, "--format", "json", *QUICK).json
        assert result["runtime"]["version"].endswith("(boardbench-affine 1.0.0)")


def test_two_engines_under_two_interpreters_from_one_agent(
    programs: Any, configured: Callable[..., dict[str, str]], demo_tflite: Path, demo_onnx: Path
) -> None:
    """One needs NumPy 1 and an old Python, the other a build of ONNX Runtime that replaces the usual one."""
    variables = {
        "tflite": "BOARDBENCH_TFLITE_RUNTIME_PYTHON",
        "onnxruntime": "BOARDBENCH_ORT_OPENVINO_PYTHON",
    }
    pythons = {name: os.environ.get(variable, "") for name, variable in variables.items()}
    if missing := [variables[name] for name, path in pythons.items() if not path]:
        pytest.skip(f"make test builds the environments that {' and '.join(missing)} name; they are not here")
    environment = configured(**pythons, tensorrt="/usr/bin/false", openvino="/nowhere/python")
    agent = programs.agent(environment=environment)
    answer = push(programs, agent, demo_tflite, demo_onnx)
    results = {each["runtime"]["name"]: each for each in answer.json}
    assert {name: result["status"] for name, result in results.items()} == dict.fromkeys(
        variables, "RUN_STATUS_SUCCEEDED"
    )
    assert {name: each["runtime"]["interpreter"]["path"] for name, each in results.items()} == pythons
    assert results["tflite"]["runtime"]["version"].startswith("tflite-runtime 2.")
    assert results["onnxruntime"]["runtime"]["version"].startswith("onnxruntime-openvino ")
    found = statuses(programs, agent)
    assert "/usr/bin/false is no Python" in found["tensorrt"]["reason"]
    assert "/nowhere/python can't be started" in found["openvino"]["reason"]
    # Those that no interpreter is named for are asked of the agent's own, where they are as ever.
    assert found["torch"]["interpreter"]["path"] == sys.executable
    # ONNX Runtime there has what the usual build does not.
    on_openvino = push(programs, agent, demo_onnx, "--device", "openvino").json
    assert on_openvino["placement"]["verdict"] != "VERDICT_UNSPECIFIED", json.dumps(on_openvino["placement"])


def test_it_is_found_in_an_interpreter_that_is_named_for_another_engine(
    programs: Any, configured: Callable[..., dict[str, str]], interpreter: Path, affine: Path
) -> None:
    """And it is one of all engines, where all are asked for."""
    agent = programs.agent(environment=configured(openvino=interpreter))
    found = statuses(programs, agent)
    assert not found["openvino"].get("available")
    assert f"no OpenVINO in {interpreter}" in found["openvino"]["reason"]
    assert f"{interpreter} -m pip install openvino" in found["openvino"]["reason"]
    assert found["affine"]["interpreter"]["path"] == str(interpreter)
    answer = push(programs, agent, affine, "--runtime", "all").json
    (result,) = answer["results"]
    assert result["runtime"]["name"] == "affine", answer
    assert result["status"] == "RUN_STATUS_SUCCEEDED"


def test_it_is_handed_out_by_a_collector_that_knows_nothing_of_it(
    programs: Any,
    configured: Callable[..., dict[str, str]],
    interpreter: Path,
    affine: Path,
    eventually: Any,
) -> None:
    collector = programs.collector()
    agent = programs.agent(environment=configured(affine=interpreter), collector=collector.address)
    eventually(
        "the board has reported",
        lambda: collector.metric("boardbench_device_up", device=agent.device_id),
        60.0,
    )
    answer = programs.client(
        "push", affine, "--via", collector.address, "--on", "runtime=affine", "--format", "json", *QUICK
    )
    assert "(boardbench-affine 1.0.0)" in answer.out, answer
    assert "RUN_STATUS_SUCCEEDED" in answer.out, answer
