"""PyTorch: its two interpreters, what they take, what they say about operations, a real model.

PyTorch has an environment of its own (gigabytes): `make test-engines` runs these inside it.
"""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import inputs
from boardbench.agent.bench.options import NATIVE_MODELS
from boardbench.agent.bench.runtime import (
    InputsRejected,
    ModelRejected,
    NoProfile,
    OptionRejected,
    ProfileRequest,
)
from boardbench.agent.bench.runtimes import torch as engine
from boardbench.agent.domain import Evidence, Unit, Verdict
from boardbench.testkit.child import BRIEF

from . import torch_models

torch: Any = pytest.importorskip(
    "torch", reason="PyTorch lives in an environment of its own: make test-engines runs this there"
)

SHAPE = torch_models.EXAMPLES["between"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model in every form, without suffixes, as a board stores them."""
    folder = tmp_path_factory.mktemp("torch")
    for name, make in (
        ("between", torch_models.between),
        ("several", torch_models.several),
        ("affine", torch_models.affine),
    ):
        for form, arguments in (
            ("full", {"lite": False}),
            ("lite", {"lite": True}),
            ("flat", {"lite": True, "flat": True}),
        ):
            (folder / f"{name}.{form}").write_bytes(torch_models.script(make(), **arguments))
    (folder / "bundled").write_bytes(torch_models.script(torch_models.affine(), lite=False, bundled=(1, 4)))
    (folder / "bundled.flat").write_bytes(
        torch_models.script(torch_models.affine(), lite=True, flat=True, bundled=(1, 4))
    )
    return folder


@pytest.fixture
def load(files: Path) -> Callable[..., Any]:
    def begin(name: str, **changes: Any) -> Any:
        arguments = {"device": "cpu", "threads": None, "options": {}, "shapes": {}, **changes}
        return engine.TorchRuntime().load(files / name, **arguments)

    return begin


def ran(model: Any, seed: int = 0) -> dict[str, Any]:
    return dict(model.fetch(model.bind(inputs.seeded(model.inputs, seed))()))


@pytest.mark.parametrize("form", ["full", "lite", "flat"])
def test_every_form_computes_what_eager_does(load: Any, form: str) -> None:
    model = load(f"between.{form}", shapes={"input0": SHAPE})
    assert model.lite is (form != "full")
    feeds = inputs.seeded(model.inputs, 3)
    (found,) = model.fetch(model.bind(feeds)()).values()
    (feed,) = feeds.values()
    with torch.no_grad():
        wanted = torch_models.between()(torch.from_numpy(feed)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_file_for_the_lite_interpreter_runs_in_the_full_one_when_asked(load: Any) -> None:
    shapes = {"x": SHAPE}
    lite = load("between.lite", shapes=shapes)
    full = load("between.lite", shapes=shapes, options={"interpreter": "full"})
    assert (lite.lite, full.lite) == (True, False)
    np.testing.assert_allclose(ran(full)["output0"], ran(lite)["output0"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["freeze", "inference"])
def test_optimised_it_computes_the_same(load: Any, how: str) -> None:
    plain = load("between.full", shapes={"x": SHAPE})
    other = load("between.full", shapes={"x": SHAPE}, options={"optimize": how})
    np.testing.assert_allclose(ran(other)["output0"], ran(plain)["output0"], rtol=1e-4, atol=1e-4)
    assert other.options["optimize"] == how


@pytest.mark.parametrize("form", ["full", "lite"])
def test_numbers_are_arguments_and_outputs_are_named_by_their_place(load: Any, form: str) -> None:
    model = load(f"several.{form}", shapes={"x": (2, 3), "arr_1": (2, 3)}, options={"argument.rate": "2"})
    assert [tensor.name for tensor in model.inputs] == ["x", "mask"]
    feeds = {name: np.full((2, 3), 4, np.float32) for name in ("x", "mask")}
    found = model.fetch(model.bind(feeds)())
    # Halved twice; the scale has a default.
    assert {name: float(array[0, 0]) for name, array in found.items()} == {
        "output0": 1.0,
        "output1.masked": 4.0,
        "output1.twice": 2.0,
    }
    assert [(tensor.name, tensor.shape) for tensor in model.outputs] == [(name, (2, 3)) for name in found]


def test_the_type_of_an_input_can_be_given(load: Any) -> None:
    shapes = {"x": (1, 4)}
    assert load("affine.full", shapes=shapes).inputs[0].dtype == "float32"
    assert load("affine.full", shapes=shapes, options={"input_type": "int64"}).inputs[0].dtype == "int64"
    options = {"input_type": "int64", "input_type.x": "float64"}
    model = load("affine.full", shapes=shapes, options=options)
    assert (model.inputs[0].dtype, ran(model)["output0"].dtype.name) == ("float64", "float64")


@pytest.mark.parametrize("name", ["bundled", "bundled.flat"])
def test_a_bundled_input_tells_sizes_and_a_given_one_is_preferred(load: Any, name: str) -> None:
    assert [(tensor.name, tensor.shape) for tensor in load(name).inputs] == [("x", (1, 4))]
    assert [op.type.partition(".")[0] for op in load(name).placement().ops] == ["aten::relu", "aten::add"]
    assert load(name, shapes={"arr_0": (5, 7)}).inputs[0].shape == (5, 7)
    assert ran(load(name, shapes={"*": (3,)}))["output0"].shape == (3, 4)


@pytest.mark.parametrize("form", ["full", "lite", "flat"])
def test_without_shapes_it_says_what_to_give(load: Any, form: str) -> None:
    with pytest.raises(InputsRejected) as caught:
        load(f"several.{form}", shapes={"x": (2, 3)})
    told = str(caught.value)
    assert "its inputs (x, mask)" in told
    assert "give that of mask, for example --shape 'mask=1,3,224,224'" in told
    assert "--inputs FILE.npz" in told and "input_type.mask=int64" in told


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({}, InputsRejected, r"takes the int rate.*--option argument\.rate=VALUE"),
        ({"options": {"argument.rate": "fast"}}, OptionRejected, "of the type int"),
        ({"options": {"argument.nosuch": "1"}}, OptionRejected, r"it has rate \(int\), scale \(float\)"),
        ({"options": {"input_type.x": "int4"}}, OptionRejected, "not 'int4'"),
        (
            {"options": {"input_type.rate": "int64"}},
            InputsRejected,
            "no input 'rate'; its inputs are x, mask",
        ),
        ({"shapes": {"x": (1,), "arr_0": (1,)}}, InputsRejected, "given twice"),
        ({"shapes": {"x": (0, 3), "mask": (2, 3)}}, InputsRejected, "does not fit"),
    ],
)
def test_what_does_not_fit_its_arguments_is_refused(
    load: Any, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        load("several.full", **{"shapes": {"x": (2, 3), "mask": (2, 3)}, **changes})


def test_the_lite_interpreter_optimises_nothing(load: Any) -> None:
    with pytest.raises(OptionRejected, match="give interpreter=full as well"):
        load("between.lite", shapes={"x": SHAPE}, options={"optimize": "freeze"})


@pytest.mark.parametrize(
    "form",
    ["full", "lite", "flat"],
)
def test_operations_are_listed_and_all_on_the_cpu(load: Any, form: str) -> None:
    types = ["aten::conv2d", "aten::relu", "aten::cumsum", "aten::conv2d"]
    found = load(f"between.{form}", shapes={"x": SHAPE}).placement()
    assert [op.type for op in found.ops] == types
    assert {op.unit for op in found.ops} == {Unit.CPU}
    assert (found.evidence, found.verdict) == (Evidence.PARTITION, Verdict.NOT_ACCELERATED)
    assert "2 aten::conv2d" in found.detail


def test_what_only_counts_and_compares_is_no_operation(load: Any) -> None:
    shapes = {"x": (2, 3), "mask": (2, 3)}
    for form in ("full", "lite"):
        model = load(f"several.{form}", shapes=shapes, options={"argument.rate": "2"})
        kinds = [op.type.partition(".")[0] for op in model.placement().ops]
        assert kinds == ["aten::relu", "aten::mul", "aten::mul", "aten::add"]


def test_the_lite_interpreter_itself_lists_the_same(load: Any, files: Path) -> None:
    from torch.jit.mobile import _get_model_ops_and_info

    model = load("between.lite", shapes={"x": SHAPE})
    assert set(model.operators()) == set(_get_model_ops_and_info(str(files / "between.lite")))


def request(path: Path, **changes: Any) -> ProfileRequest:
    arguments: dict[str, Any] = {
        "model_path": path,
        "device": "cpu",
        "threads": None,
        "options": {},
        "shapes": {"x": SHAPE},
        "allow_fallback": False,
        "feeds": lambda tensors: inputs.seeded(tensors, 0),
        "trying": lambda _method: None,
        **changes,
    }
    return ProfileRequest(**arguments)


@pytest.mark.parametrize("form", ["full", "lite", "flat"])
def test_every_operation_has_a_time_of_its_own(files: Path, form: str) -> None:
    found = engine.profile(engine.TorchRuntime(), request(files / f"between.{form}"), lambda: range(5))
    assert set(found.op_seconds) == {0, 1, 2, 3}
    assert all(0 < seconds < max(found.whole_seconds) for seconds in found.op_seconds.values())
    assert sum(found.op_seconds.values()) < 1.2 * max(found.whole_seconds)
    assert "4 of 4 operations have a time of their own; mean of an inference: aten::" in found.detail


def test_what_runs_in_a_loop_has_none(files: Path) -> None:
    found = engine.profile(
        engine.TorchRuntime(),
        request(
            files / "several.lite",
            shapes={"x": (2, 3), "mask": (2, 3)},
            options={"argument.rate": "3"},
        ),
        lambda: range(3),
    )
    assert set(found.op_seconds) == {3}, "the addition alone runs as often as it is written"
    assert "1 of 4 operations" in found.detail


def test_a_profiler_that_ended_the_process_is_left_alone(files: Path) -> None:
    with pytest.raises(NoProfile):
        engine.profile(
            engine.TorchRuntime(), request(files / "between.lite", avoid=(engine.METHOD,)), lambda: range(3)
        )


def test_threads_are_those_asked_for(load: Any) -> None:
    before = torch.get_num_threads()
    try:
        assert load("affine.full", shapes={"x": (1, 4)}, threads=3).threads == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_weights_alone_are_told_apart_from_a_program(load: Any, files: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, files / "weights")
    with pytest.raises(ModelRejected, match=r"weights \(torch\.save\) and no program"):
        load("weights")


def test_a_program_that_is_not_for_the_lite_interpreter_is_told(load: Any) -> None:
    with pytest.raises(ModelRejected, match="not for the lite interpreter"):
        load("between.full", options={"interpreter": "lite"})


def test_a_damaged_file_is_refused(load: Any, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NATIVE_MODELS, raising=False)
    (files / "cut").write_bytes((files / "between.full").read_bytes()[:-40])
    with pytest.raises(ModelRejected, match=r"cut can't be looked through .* the file is truncated"):
        load("cut")
    monkeypatch.setenv(NATIVE_MODELS, "1")
    for form in ("full", "lite"):
        content = (files / f"between.{form}").read_bytes()
        (files / "cut").write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelRejected, match="PyTorch refuses cut: the archive is cut off"):
            load("cut")


def test_the_worker_runs_it_and_takes_shapes_from_the_data(worker: Any, files: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, x=np.ones(SHAPE, np.float32))
    job = {"kind": "run", "runtime": "torch", "format": "torchscript", "device": "cpu", "threads": 1,
           "model_path": str(files / "between.lite"), "inputs_path": str(data)}  # fmt: skip
    outcome = worker.run({**job, **BRIEF, "profile_runs": 5})
    assert outcome.exit_code == 0, outcome.output
    result = outcome.result
    assert result["inputs"] == [{"name": "x", "dtype": "float32", "shape": list(SHAPE)}]
    assert result["outputs"] == [{"name": "output0", "dtype": "float32", "shape": [1, 4, 28, 28]}]
    assert result["placement"]["cpu_ops"] == 4
    (profile,) = outcome.of("profile")
    assert all(op["seconds"] > 0 for op in profile["placement"]["ops"])


def test_a_real_model_runs(worker: Any) -> None:
    """Silero's voice detection: TorchScript with branches, a state, and a number for an argument."""
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or spec.origin is None:
        pytest.skip("the package silero-vad, which holds the model, is not in this environment")
    job = {"kind": "run", "runtime": "torch", "format": "torchscript", "device": "cpu",
           "model_path": str(Path(spec.origin).parent / "data" / "silero_vad.jit")}  # fmt: skip
    refused = worker.run({**job, **BRIEF})
    assert refused.error["code"] == "inputs_rejected"
    assert "--shape 'x=" in refused.error["message"]
    shapes = {"x": [1, 512]}
    outcome = worker.run({**job, **BRIEF, "shapes": shapes, "options": {"argument.sr": "16000"}})
    assert outcome.exit_code == 0, outcome.output
    assert outcome.result["outputs"] == [{"name": "output0", "dtype": "float32", "shape": [1, 1]}]
    types = outcome.result["placement"]["cpu_op_types"]
    assert types["aten::conv1d"] == 12 and types["aten::lstm_cell"] == 4


@pytest.mark.parametrize("form", ["full", "lite", "flat"])
@pytest.mark.parametrize("how", ["save", "from_file", "setstate"])
def test_a_program_that_reaches_files_is_not_run_unasked(
    load: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, form: str
) -> None:
    """It is a real one: told that it may, it does write the file, or make it."""
    target = tmp_path / "written"
    program = torch_models.reaching(str(target), how)
    (files / "reaching").write_bytes(torch_models.script(program, lite=form != "full", flat=form == "flat"))
    monkeypatch.delenv(NATIVE_MODELS, raising=False)
    with pytest.raises(
        ModelRejected, match=f"reaching is not run: .*; to run it all the same, set {NATIVE_MODELS}=1"
    ):
        load("reaching", shapes={"x": (4,)})
    assert not target.exists()
    monkeypatch.setenv(NATIVE_MODELS, "1")
    ran(load("reaching", shapes={"x": (4,)}))
    assert target.exists()


def test_code_that_looks_an_operator_up_by_name_is_not_run_unasked(
    load: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that PyTorch itself would never write, and takes."""
    target = tmp_path / "written"
    plain = torch_models.script(torch_models.affine(), lite=False)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(plain)) as source, zipfile.ZipFile(packed, "w") as made:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith(".py"):
                text = content.decode()
                line = f'    getattr(torch, "sa" "\\166e")(x, "{target}")\n    return'
                assert text.count("    return") == 1
                content = text.replace("    return", line).encode()
            made.writestr(entry.filename, content)
    (files / "disguised").write_bytes(packed.getvalue())
    monkeypatch.delenv(NATIVE_MODELS, raising=False)
    with pytest.raises(ModelRejected, match="uses 'save', an operator that reaches files"):
        load("disguised", shapes={"x": (4,)})
    monkeypatch.setenv(NATIVE_MODELS, "1")
    ran(load("disguised", shapes={"x": (4,)}))
    assert target.exists()


def test_a_flatbuffer_in_the_full_interpreter_is_not_run_unasked(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NATIVE_MODELS, raising=False)
    with pytest.raises(ModelRejected, match="leave interpreter=full out"):
        load("between.flat", shapes={"x": SHAPE}, options={"interpreter": "full"})
