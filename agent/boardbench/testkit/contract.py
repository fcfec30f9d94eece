"""The contract of an engine, as tests that are inherited; see ``boardbench.agent.bench.runtime``."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest

from boardbench.agent.bench import inputs, runtimes
from boardbench.agent.bench.events import to_json
from boardbench.agent.bench.runtime import (
    SETTINGS,
    THREADS,
    InputsRejected,
    LoadedModel,
    ModelRejected,
    OptionRejected,
    ProfileRequest,
    Runtime,
    RuntimeUnavailable,
)
from boardbench.agent.bench.runtimes import Engine
from boardbench.agent.domain import Evidence, Unit, Verdict
from boardbench.testkit.child import BRIEF, BenchChild

Array = np.ndarray[Any, np.dtype[Any]]

_Test = TypeVar("_Test", bound=Callable[..., Any])
_Runtime = TypeVar("_Runtime", bound=Runtime)
_RESTRICTION = "_boardbench_restriction"

# What takes long to import, and has to wait until the engine is asked for its version.
_HEAVY = ("numpy", "torch", "tensorflow", "onnxruntime", "ai_edge_litert", "tflite_runtime", "openvino")


@dataclass(frozen=True)
class Subject:
    """An engine, and a small model for it: one input and one output of one type and shape.

    ``closed`` makes the bytes of a model file whose sizes are settled, ``open`` those of one that leaves the
    first dimension open; leave that out where files of the engine never do.
    """

    name: str
    """What the engine is called."""
    suffix: str
    """How names of its files end."""
    closed: Callable[[], bytes]
    open: Callable[[], bytes] | None = None
    ops: int = 2
    """Operations of the model, as the engine counts them where it tells how it divides them."""
    shape: tuple[int, ...] = (1, 4)
    dtype: str = "float32"
    threads: bool = True
    """Whether it can be told a number of threads."""
    device: str = "cpu"
    """The default, which is the first that it names."""
    computes: Callable[[Array], Array] | None = None
    """What the model computes; None only for an engine whose outputs mean nothing."""
    tolerance: float = 0.0
    """How far outputs may be from that, absolutely: 0 where the engine computes as NumPy does."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that have to be set for it."""
    standin: Callable[[pytest.MonkeyPatch], None] | None = None
    """Puts a stand-in in the place of an engine that does not run on this machine."""


def _restricted(fits: Callable[[Subject], bool], why: str) -> Callable[[_Test], _Test]:
    """A test is for the subjects that fit; ``why`` is what the others lack."""

    def mark(test: _Test) -> _Test:
        setattr(test, _RESTRICTION, (fits, why))
        return test

    return mark


_with_open_sizes = _restricted(lambda subject: subject.open is not None, "no model with an open size")
_computing = _restricted(lambda subject: subject.computes is not None, "no word on what the model computes")
_in_the_child = _restricted(
    lambda subject: subject.standin is None, "no engine but a stand-in in this process"
)


def available(runtime: _Runtime) -> _Runtime:
    """The engine; skips the test, with the engine's own reason, where it can't run."""
    try:
        runtime.version()
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
    return runtime


class EngineContract:
    """Every test of the contract, for each of ``subjects``. Inherit, and name them."""

    subjects: ClassVar[Sequence[Subject]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Each test runs for each subject that it fits."""
        if "subject" not in metafunc.fixturenames:
            return
        fits, why = getattr(metafunc.function, _RESTRICTION, (lambda _: True, ""))
        chosen: list[Any] = [subject for subject in self.subjects if fits(subject)]
        ids = [subject.name for subject in chosen]
        if not chosen:
            names = ", ".join(subject.name for subject in self.subjects)
            chosen = [pytest.param(None, marks=pytest.mark.skip(reason=f"{names}: {why}"))]
            ids = ["none"]
        metafunc.parametrize("subject", chosen, ids=ids, indirect=True)

    @pytest.fixture
    def subject(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Subject:
        """The engine under test, with what it needs set."""
        found: Subject = request.param
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        if found.standin is not None:
            found.standin(monkeypatch)
        return found

    @pytest.fixture
    def runtime(self, subject: Subject) -> Runtime:
        """The engine; skips, with its own reason, where it can't run."""
        return available(runtimes.create(subject.name))

    @pytest.fixture
    def file(self, subject: Subject, tmp_path: Path) -> Path:
        """The model whose sizes are settled."""
        path = tmp_path / f"closed{subject.suffix}"
        path.write_bytes(subject.closed())
        return path

    @pytest.fixture
    def open_file(self, subject: Subject, tmp_path: Path) -> Path:
        """The model that leaves its first dimension open."""
        assert subject.open is not None, "a test with this is for those with open sizes"
        path = tmp_path / f"open{subject.suffix}"
        path.write_bytes(subject.open())
        return path

    @pytest.fixture
    def model(self, runtime: Runtime, file: Path) -> Iterator[LoadedModel]:
        """The model whose sizes are settled, loaded."""
        loaded = _load(runtime, file)
        yield loaded
        loaded.close()

    # What it says of itself.

    def test_it_names_itself_as_it_is_declared(self, runtime: Runtime, subject: Subject) -> None:
        engine = _declared(subject)
        assert (runtime.name, runtime.formats) == (engine.name, engine.formats)

    def test_its_version_is_package_and_number(self, runtime: Runtime) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9-]+ \d[\w.+-]*", runtime.version())
        assert runtime.version() == runtime.version()

    def test_it_has_its_default_first(self, runtime: Runtime, subject: Subject) -> None:
        devices = runtime.devices()
        assert devices[0] == subject.device
        assert len(set(devices)) == len(devices)
        assert all(device == device.lower() for device in devices)

    def test_it_says_which_settings_and_options_it_takes(self, runtime: Runtime, subject: Subject) -> None:
        assert set(runtime.settings) <= set(SETTINGS)
        assert (THREADS in runtime.settings) == subject.threads
        assert all(text.strip() and "\n" not in text for text in runtime.options.values())

    @_in_the_child
    def test_nothing_heavy_is_imported_before_it_is_asked(self, runtime: Runtime, subject: Subject) -> None:
        assert runtime.name == subject.name
        program = (
            "import sys; from boardbench.agent.bench import runtimes; "
            f"runtimes.create({subject.name!r}); print(sorted(set({_HEAVY!r}) & set(sys.modules)))"
        )
        assert _python(program, subject) == "[]"

    # What it makes of a model.

    def test_tensors_are_told_whole(self, model: LoadedModel, subject: Subject) -> None:
        for tensors in (model.inputs, model.outputs):
            names = [tensor.name for tensor in tensors]
            assert all(names)
            assert len(set(names)) == len(names)
            for tensor in tensors:
                assert np.dtype(tensor.dtype).name == tensor.dtype == subject.dtype
                assert tensor.shape == subject.shape

    def test_outputs_are_as_they_were_announced(self, model: LoadedModel) -> None:
        outputs = _ran(model)
        assert set(outputs) == {tensor.name for tensor in model.outputs}
        for tensor in model.outputs:
            assert outputs[tensor.name].dtype.name == tensor.dtype
            assert outputs[tensor.name].shape == tensor.shape

    @_computing
    def test_it_computes(self, model: LoadedModel, subject: Subject) -> None:
        assert subject.computes is not None
        (tensor,) = model.inputs
        feed = np.resize(np.array([-2.0, -1.0, 0.5, 3.0]), tensor.shape).astype(tensor.dtype)
        (output,) = model.fetch(model.bind({tensor.name: feed})()).values()
        wanted = subject.computes(feed)
        if subject.tolerance:
            assert np.allclose(output, wanted, rtol=0.0, atol=subject.tolerance)
        else:
            assert np.array_equal(output, wanted)

    def test_equal_feeds_give_equal_outputs_call_after_call(self, model: LoadedModel) -> None:
        call = model.bind(inputs.seeded(model.inputs, 1))
        first = dict(model.fetch(call()))
        for _ in range(3):
            again = model.fetch(call())
            assert all(np.array_equal(first[name], again[name]) for name in first)

    def test_fetch_is_of_the_latest_inference(self, model: LoadedModel) -> None:
        first, second = _ran(model, seed=1), _ran(model, seed=2)
        assert not all(np.array_equal(first[name], second[name]) for name in first)

    def test_what_was_fetched_is_a_copy(self, model: LoadedModel) -> None:
        call = model.bind(inputs.seeded(model.inputs, 1))
        returned = call()
        first = dict(model.fetch(returned))
        kept = {name: array.copy() for name, array in first.items()}
        for array in first.values():
            array.fill(7)
        again = model.fetch(returned)
        assert all(np.array_equal(kept[name], again[name]) for name in kept)

    def test_feeds_are_not_changed(self, model: LoadedModel) -> None:
        feeds = inputs.seeded(model.inputs, 1)
        before = {name: array.copy() for name, array in feeds.items()}
        model.bind(feeds)()
        assert all(np.array_equal(before[name], feeds[name]) for name in feeds)

    def test_two_models_do_not_disturb_each_other(self, runtime: Runtime, file: Path) -> None:
        one, other = _load(runtime, file), _load(runtime, file)
        call_one = one.bind(inputs.seeded(one.inputs, 1))
        call_other = other.bind(inputs.seeded(other.inputs, 2))
        alone = dict(one.fetch(call_one()))
        returned = call_one()
        call_other()
        together = one.fetch(returned)
        assert all(np.array_equal(alone[name], together[name]) for name in alone)
        one.close()
        assert other.fetch(call_other())
        other.close()

    def test_closing_twice_is_closing_once(self, runtime: Runtime, file: Path) -> None:
        loaded = _load(runtime, file)
        _ran(loaded)
        loaded.close()
        loaded.close()

    # Where it runs.

    def test_the_placement_adds_up(self, model: LoadedModel, subject: Subject) -> None:
        _ran(model)
        found = model.placement()
        assert found.detail
        if found.evidence is Evidence.UNSPECIFIED:
            assert (found.ops, found.units, found.accelerated_ops, found.cpu_ops) == ((), (), None, None)
            assert found.verdict is Verdict.UNSPECIFIED
            return
        assert found.evidence in (Evidence.PARTITION, Evidence.PROFILED)
        assert [op.index for op in found.ops] == list(range(len(found.ops)))
        assert all(op.type for op in found.ops)
        if found.evidence is Evidence.PARTITION:
            assert len(found.ops) == subject.ops
        units = Counter(op.unit for op in found.ops)
        assert {count.unit: count.ops for count in found.units} == units
        assert found.cpu_ops == units[Unit.CPU] + units[Unit.CPU_DELEGATE]
        assert found.accelerated_ops == len(found.ops) - (found.cpu_ops or 0) - units[Unit.UNSPECIFIED]
        assert sum(found.cpu_op_types.values()) == found.cpu_ops
        assert sum(found.accelerated_op_types.values()) == found.accelerated_ops
        assert all(
            (op.delegate == "") == (op.unit in (Unit.CPU, Unit.UNSPECIFIED)) or found.standin
            for op in found.ops
        )
        assert to_json(found)["evidence"] == found.evidence.value

    def test_a_placement_is_the_same_when_asked_again(self, model: LoadedModel) -> None:
        _ran(model)
        assert model.placement() == model.placement()

    def test_the_cpu_is_no_device_to_fall_back_from(self, model: LoadedModel, subject: Subject) -> None:
        assert bool(model.wanted) == (subject.device != "cpu")
        assert model.device_fallback == ""

    def test_a_profile_is_of_the_operations_of_the_placement(
        self, runtime: Runtime, subject: Subject, file: Path
    ) -> None:
        loaded = _load(runtime, file)
        profiles = loaded.profiles
        _ran(loaded)
        units = tuple(op.unit for op in loaded.placement().ops)
        loaded.close()
        profiler = runtimes.profiler(subject.name)
        if not profiles:
            return
        assert profiler is not None
        tried: list[str] = []
        request = ProfileRequest(
            model_path=file,
            device=subject.device,
            threads=None,
            options={},
            shapes={},
            allow_fallback=False,
            feeds=lambda tensors: inputs.seeded(tensors, 0),
            trying=tried.append,
        )
        found = profiler(runtime, request, lambda: range(7))
        assert found.units == units
        assert len(found.whole_seconds) == 7
        assert all(seconds > 0 for seconds in found.whole_seconds)
        # Of the CPU there is nothing to fall back from, and here everything is where it was asked to be.
        assert found.fallback_seconds == (() if subject.device == "cpu" else (0.0,) * 7)
        assert set(found.op_seconds) <= set(range(len(units)))
        assert all(seconds >= 0 for seconds in found.op_seconds.values())
        assert found.method
        assert found.detail
        assert tried  # before each step that may end the process

    # Sizes that the model leaves open.

    @_with_open_sizes
    def test_an_open_size_that_nobody_settled_is_listed_with_its_option(
        self, runtime: Runtime, subject: Subject, open_file: Path
    ) -> None:
        sizes = "".join(f", {size}" for size in subject.shape[1:])
        example = ",".join(map(str, (1, *subject.shape[1:])))
        message = rf"{subject.dtype} \[\?{sizes}\]; give them, for example --shape '.+={example}'"
        with pytest.raises(InputsRejected, match=message):
            _load(runtime, open_file)

    @_with_open_sizes
    def test_an_open_size_is_settled_by_name_or_position(
        self, runtime: Runtime, subject: Subject, open_file: Path, file: Path
    ) -> None:
        shape = (3, *subject.shape[1:])
        closed = _load(runtime, file)
        (name,) = (tensor.name for tensor in closed.inputs)
        closed.close()
        for key in (name, "arr_0"):
            loaded = _load(runtime, open_file, shapes={key: shape})
            assert [tensor.shape for tensor in loaded.inputs] == [shape]
            (output,) = _ran(loaded).values()
            assert output.shape == shape
            loaded.close()

    @pytest.mark.parametrize("kind", ["unknown name", "another size", "fewer dimensions", "another position"])
    @_with_open_sizes
    def test_shapes_that_do_not_fit_are_refused(
        self, runtime: Runtime, subject: Subject, open_file: Path, kind: str
    ) -> None:
        shape = subject.shape
        shapes = {
            "unknown name": {"nosuch": shape},
            "another size": {"arr_0": (*shape[:-1], shape[-1] + 1)},
            "fewer dimensions": {"arr_0": shape[1:]},
            "another position": {"arr_1": shape},
        }
        with pytest.raises(InputsRejected):
            _load(runtime, open_file, shapes=shapes[kind])

    @_with_open_sizes
    def test_a_shape_of_more_memory_than_there_is_is_refused(
        self, runtime: Runtime, subject: Subject, open_file: Path
    ) -> None:
        with pytest.raises(InputsRejected, match="bytes of memory are available"):
            _load(runtime, open_file, shapes={"arr_0": (2**31 - 1, *subject.shape[1:])})

    # What it refuses.

    def test_an_unknown_option_is_refused_by_name(self, runtime: Runtime, file: Path) -> None:
        with pytest.raises(OptionRejected, match="no option no_such_option; it takes"):
            _load(runtime, file, options={"no_such_option": "1"})

    def test_an_unknown_device_is_refused_with_those_that_there_are(
        self, runtime: Runtime, file: Path, subject: Subject
    ) -> None:
        with pytest.raises(OptionRejected, match=f"no device 'no-such-device'; it has {subject.device}"):
            _load(runtime, file, device="no-such-device")

    def test_options_in_force_can_be_given_again(self, runtime: Runtime, file: Path) -> None:
        first = _load(runtime, file)
        options = dict(first.options)
        first.close()
        assert options
        again = _load(runtime, file, options=options)
        assert again.options == options
        again.close()

    def test_threads_are_recorded(self, runtime: Runtime, file: Path, subject: Subject) -> None:
        if not subject.threads:
            with pytest.raises(OptionRejected, match="threads"):
                _load(runtime, file, threads=2)
            return
        loaded = _load(runtime, file, threads=2)
        assert loaded.threads == 2
        loaded.close()

    @pytest.mark.parametrize("content", [b"", b"no model at all", b"\0" * 64, bytes(range(256))])
    def test_what_is_no_model_is_refused_by_its_name(
        self, runtime: Runtime, tmp_path: Path, content: bytes
    ) -> None:
        file = tmp_path / "nonsense.bin"
        file.write_bytes(content)
        with pytest.raises(ModelRejected, match=r"nonsense\.bin"):
            _load(runtime, file)

    def test_a_file_that_is_not_there_is_refused_by_its_name(self, runtime: Runtime, tmp_path: Path) -> None:
        with pytest.raises(ModelRejected, match=r"absent\.bin"):
            _load(runtime, tmp_path / "absent.bin")

    # In the process that an agent starts.

    @_in_the_child
    def test_a_probe_finds_it(self, runtime: Runtime, subject: Subject) -> None:
        answer = BenchChild(subject.environment).run({"kind": "probe", "runtimes": [subject.name]})
        ((status,),) = (event["runtimes"] for event in answer.of("probe"))
        assert (status["name"], status["available"]) == (subject.name, True), status
        assert status["version"].startswith(runtime.version())
        assert tuple(status["devices"]) == runtime.devices()
        assert tuple(status["formats"]) == runtime.formats
        assert status["options"] == dict(runtime.options)

    @_in_the_child
    def test_a_run_comes_to_its_end_and_a_profile_after_it(
        self, model: LoadedModel, subject: Subject, file: Path
    ) -> None:
        job = {
            "kind": "run",
            "runtime": subject.name,
            "format": _format_of(file, subject),
            "model_path": str(file),
            "device": subject.device,
            **BRIEF,
            "profile_runs": 10,
        }
        answer = BenchChild(subject.environment).run(job)
        result = answer.result
        assert answer.exit_code == 0, answer.output
        assert result["runtime"]["version"].startswith(_declared_version(subject))
        assert result["latency"]["count"] >= BRIEF["min_runs"]
        assert set(result["output_sha256"]) == {tensor.name for tensor in model.outputs}
        assert bool(answer.of("profile")) == model.profiles

    @_in_the_child
    def test_what_is_no_model_is_refused_by_its_process(
        self, runtime: Runtime, subject: Subject, tmp_path: Path
    ) -> None:
        file = tmp_path / f"nonsense{subject.suffix}"
        file.write_bytes(b"no model at all")
        job = {
            "kind": "run",
            "runtime": runtime.name,
            "format": runtime.formats[0],
            "model_path": str(file),
            "device": subject.device,
            **BRIEF,
        }
        answer = BenchChild(subject.environment).run(job)
        assert answer.error["code"] == "model_rejected", answer.error
        assert answer.exit_code == 1


def _declared(subject: Subject) -> Engine:
    """The engine's line in boardbench's own table, or what its distribution declares."""
    for engine in runtimes.ENGINES:
        if engine.name == subject.name:
            return engine
    from boardbench.agent.bench import plugins

    offer = plugins.find(subject.name)
    assert offer is not None, (
        f"no distribution in {sys.executable} offers a runtime {subject.name!r} by an entry point of the "
        f"group {plugins.GROUP}: is yours installed here (pip install -e .)?"
    )
    return plugins.declaration(offer)


def _declared_version(subject: Subject) -> str:
    return runtimes.full_version(runtimes.create(subject.name))


def _format_of(file: Path, subject: Subject) -> str:
    """The format as an agent tells it: by the bytes, else by what the engine declares."""
    from boardbench.inspect import sniff

    engine = _declared(subject)
    if engine.magic:
        head = file.read_bytes()[: len(engine.magic)]
        assert head == engine.magic, f"the model begins with {head!r} and not with the magic {engine.magic!r}"
        return engine.formats[0]
    found = sniff.sniff(file)
    if not found and engine.suffixes:
        assert file.name.endswith(engine.suffixes), f"{file.name} has none of the endings {engine.suffixes}"
        return engine.formats[0]
    assert found in engine.formats, f"an agent takes the model for {found or 'no format'}"
    return found


def _python(program: str, subject: Subject) -> str:
    """What a fresh Python prints, with this one's path."""
    import os
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}"],
        capture_output=True,
        text=True,
        env={**os.environ, **subject.environment},
        check=True,
    )
    return done.stdout.strip()


def _load(runtime: Runtime, file: Path, **changes: Any) -> LoadedModel:
    device = runtime.devices()[0]
    arguments: dict[str, Any] = {"device": device, "threads": None, "options": {}, "shapes": {}, **changes}
    return runtime.load(file, **arguments)


def _ran(model: LoadedModel, seed: int = 0) -> dict[str, Array]:
    return dict(model.fetch(model.bind(inputs.seeded(model.inputs, seed))()))
