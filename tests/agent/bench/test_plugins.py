"""Engines from elsewhere as the bench process finds them, from metadata of distributions on its path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.bench import plugins, runtimes
from boardbench.agent.bench.runtime import RuntimeUnavailable
from boardbench.agent.bench.runtimes import CONTRACT, Engine
from boardbench.testkit import BenchChild

GOOD: dict[str, Any] = {
    "name": "good",
    "module": "good_engine",
    "type": "It",
    "formats": ("good",),
    "magic": b"good",
    "contract": CONTRACT,
}
ENGINE = """
class It:
    name = {name!r}
    formats = {formats!r}
    settings = {settings!r}
    options = {options!r}
    sys_root = None
    def version(self): {version}
    def devices(self): {devices}
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a distribution on the path: ``install("boardbench-good", good="module:ENGINE")``."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def put(name: str, version: str = "1.0", *, folder: Path | None = None, **points: str) -> Path:
        home = folder or tmp_path
        about = home / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = "".join(f"{point} = {value}\n" for point, value in points.items())
        (about / "entry_points.txt").write_text(f"[console_scripts]\nx = y:z\n[{plugins.GROUP}]\n{lines}")
        forget()
        return home

    forget()
    yield put
    forget()
    for module in set(sys.modules) - before:
        if module in ("good_engine", "declared"):
            del sys.modules[module]


def forget() -> None:
    plugins.find.cache_clear()
    plugins.declaration.cache_clear()


@pytest.fixture
def good(install: Callable[..., Path]) -> Callable[..., Path]:
    """Installs an engine that is right, but for what is given."""

    def put(
        *,
        declared: dict[str, Any] | None = None,
        version: str = "return 'good 1'",
        devices: str = "return ('cpu',)",
        **own: Any,
    ) -> Path:
        home = install("boardbench-good", good="declared:ENGINE")
        fields = {**GOOD, **(declared or {})}
        arguments = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        (home / "declared.py").write_text(
            f"from boardbench.agent.bench.runtimes import Engine\nENGINE = Engine({arguments})\n"
        )
        told = {"name": "good", "formats": ("good",), "settings": (), "options": {}, **own}
        (home / "good_engine.py").write_text(ENGINE.format(version=version, devices=devices, **told))
        return home

    return put


def reason(name: str = "good") -> str:
    with pytest.raises(RuntimeUnavailable) as raised:
        plugins.create(found(name))
    return str(raised.value)


def found(name: str = "good") -> plugins.Offer:
    offer = plugins.find(name)
    assert offer is not None
    return offer


def test_listing_imports_nothing(install: Callable[..., Path]) -> None:
    install("boardbench-good", good="declared:ENGINE")
    (offer,) = plugins.offers()
    assert (offer.name, offer.distribution, offer.problem) == ("good", "boardbench-good 1.0", "")
    assert "declared" not in sys.modules


def test_a_good_one_is_made(good: Callable[..., Path]) -> None:
    good()
    assert runtimes.create("good").name == "good"
    assert runtimes.full_version(runtimes.create("good")) == "good 1 (boardbench-good 1.0)"
    assert runtimes.profiler("good") is None


def test_a_version_that_is_the_distributions_is_told_once(good: Callable[..., Path]) -> None:
    good(version="return 'boardbench-good 1.0'")
    assert runtimes.full_version(runtimes.create("good")) == "boardbench-good 1.0"


def test_an_unknown_name_is_refused_with_all_there_are(good: Callable[..., Path]) -> None:
    good()
    with pytest.raises(RuntimeUnavailable, match=r"no runtime 'nosuch'; boardbench knows tflite, .*, good"):
        runtimes.create("nosuch")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"contract": 0}, "contract 0 and this boardbench has contract 1"),
        ({"contract": "1"}, "contract '1'"),
        ({"name": "better"}, "called 'better' and its entry point 'good'"),
        ({"module": "good engine"}, "module is 'good engine'"),
        ({"type": ""}, "type is ''"),
        ({"profiler": "1+1"}, "profiler is '1+1'"),
        ({"formats": ()}, "formats is ()"),
        ({"formats": ["good"]}, "formats is ['good']"),
        ({"formats": ("Good",)}, "'Good' is no name of a format"),
        ({"formats": ("npz",)}, "npz is for inputs"),
        ({"formats": ("good", "better")}, "only the first format can be its own"),
        ({"formats": ("onnx",)}, "onnx is boardbench's"),
        ({"magic": b""}, "nobody can tell a file of its format good"),
        ({"magic": "good"}, "magic is 'good'"),
        ({"magic": bytes(65)}, "at most 64 bytes"),
        ({"suffixes": ".good"}, "suffixes is '.good'"),
        ({"suffixes": ("good",)}, "suffixes is ('good',)"),
        ({"more_devices": "x" * 501}, "more_devices"),
        ({"environment": "HOME"}, "environment"),
    ],
)
def test_a_wrong_declaration_says_what_is_wrong(
    good: Callable[..., Path], wrong: dict[str, Any], told: str
) -> None:
    good(declared=wrong)
    assert told in reason()
    assert "tell the maker of boardbench-good 1.0" in reason()


@pytest.mark.parametrize("raised", ["SystemExit('no licence')", "ImportError('no licence')"])
def test_a_declaration_that_can_not_be_imported_ends_nothing_else(
    good: Callable[..., Path], raised: str
) -> None:
    (good() / "declared.py").write_text(f"raise {raised}\n")
    assert f"can't be imported in {sys.executable} ({raised.partition('(')[0]}: no licence)" in reason()
    assert "pip uninstall boardbench-good" in reason()


@pytest.mark.parametrize(
    "right",
    [
        {"formats": ("good", "onnx", "tflite")},
        {"formats": ("onnx",), "magic": b""},
        {"magic": b"", "suffixes": (".good", ".gd2")},
    ],
)
def test_formats_of_boardbench_and_one_of_its_own(good: Callable[..., Path], right: dict[str, Any]) -> None:
    good(declared=right, formats=right.get("formats", ("good",)))
    assert plugins.create(found()).formats == right.get("formats", ("good",))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"name": "another"}, "says that it is 'another'"),
        ({"formats": ("onnx",)}, "for onnx, and is declared as 'good' for good"),
        ({"settings": ("speed",)}, "it has ['speed']"),
        ({"options": {"x": 1}}, "options is {'x': 1}"),
        ({"options": None}, "can't be made (AttributeError"),
    ],
)
def test_an_engine_that_is_not_as_declared_is_refused(
    good: Callable[..., Path], wrong: dict[str, Any], told: str
) -> None:
    good(**wrong)
    assert told in reason()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"version": "raise ZeroDivisionError('no')"}, "ZeroDivisionError: no"),
        ({"version": "raise SystemExit"}, "SystemExit"),
        ({"version": "return None"}, "the version None"),
        ({"devices": "return ()"}, "the devices ()"),
        ({"devices": "return (1,)"}, "the devices (1,)"),
    ],
)
def test_an_engine_that_fails_when_asked_is_not_available(
    good: Callable[..., Path], wrong: dict[str, Any], told: str
) -> None:
    good(**wrong)
    with pytest.raises(RuntimeUnavailable) as raised:
        plugins.asked(found(), plugins.create(found()))
    assert told in str(raised.value)
    assert "boardbench-good 1.0" in str(raised.value)


def test_its_own_reason_is_left_as_it_is(good: Callable[..., Path]) -> None:
    good(
        version="from boardbench.agent.bench.runtime import RuntimeUnavailable; "
        "raise RuntimeUnavailable('no /dev/good0: modprobe good')"
    )
    from boardbench.agent.bench import probe

    (status,) = probe.probe(["good"]).runtimes
    assert (status.available, status.plugin) == (False, "boardbench-good 1.0")
    assert status.reason == "boardbench-good 1.0: no /dev/good0: modprobe good"
    assert status.formats == ("good",)


def test_a_probe_tells_how_its_files_are_known(good: Callable[..., Path]) -> None:
    good(declared={"suffixes": (".good",), "more_devices": "plug one in"}, options={"x": "what x does"})
    from boardbench.agent.bench import probe

    answer = probe.probe(["good"])
    (status,) = answer.runtimes
    assert (status.available, status.devices, status.options) == (True, ("cpu",), {"x": "what x does"})
    (mark,) = answer.marks
    assert (mark.format, mark.runtime, mark.plugin) == ("good", "good", "boardbench-good 1.0")
    assert (bytes.fromhex(mark.magic), mark.suffixes) == (b"good", (".good",))
    assert answer.more_devices == {"good": "plug one in"}
    # Asked for nothing, it is listed and not imported.
    assert [offer.name for offer in probe.probe([]).offers] == ["good"]
    assert probe.probe([]).runtimes == ()


def test_names_of_boardbench_are_its_own(install: Callable[..., Path]) -> None:
    points = {engine.name: "declared:ENGINE" for engine in runtimes.ENGINES}
    install("Squat.ter", **points)
    assert {offer.name for offer in plugins.offers()} == {f"Squat.ter:{name}" for name in points}
    assert type(runtimes.create("tflite")).__name__ == "TfliteRuntime"
    assert "which boardbench has itself" in reason("Squat.ter:tflite")


def test_of_two_of_one_name_neither_is_taken(install: Callable[..., Path]) -> None:
    install("boardbench-one", both="declared:ENGINE")
    install("boardbench-two", both="declared:ENGINE")
    (offer,) = plugins.offers()
    assert "boardbench-one 1.0" in offer.problem and "boardbench-two 1.0" in offer.problem
    assert reason("both") == offer.problem
    assert "-m pip uninstall boardbench-" in offer.problem


def test_of_one_distribution_twice_the_first_on_the_path_is_meant(
    install: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("boardbench-good", "1.0", good="declared:ENGINE")
    later = tmp_path / "later"
    install("Boardbench_Good", "2.0", folder=later, good="declared:ENGINE")
    monkeypatch.setattr(sys, "path", [*sys.path, str(later)])
    forget()
    (offer,) = plugins.offers()
    assert offer.distribution == "boardbench-good 1.0"


def test_what_metadata_hold_is_shown_printable_and_short(install: Callable[..., Path]) -> None:
    install("boardbench-" + "x" * 200, "1.0\x1b[2J", **{"\x1b[31mred" + "y" * 200: "declared:ENGINE"})
    (offer,) = plugins.offers()
    for text in (offer.name, offer.distribution, offer.problem):
        assert text.isprintable()
        assert len(text) < 500


def test_an_unreadable_distribution_hides_nothing(install: Callable[..., Path], tmp_path: Path) -> None:
    install("boardbench-good", good="declared:ENGINE")
    for name, content in {"a-1.dist-info": b"\xff\xfe\0", "b-1.dist-info": b"[x\n= = =\n[[[\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "entry_points.txt").write_bytes(content)
    forget()
    assert [offer.name for offer in plugins.offers()] == ["good"]


def test_a_defect_of_it_is_told_to_its_maker(good: Callable[..., Path]) -> None:
    home = good()
    with (home / "good_engine.py").open("a") as file:
        file.write("    def load(self, model, **asked): return {}['what is not there']\n")
    (home / "model.good").write_bytes(b"good")
    job = {
        "kind": "run",
        "runtime": "good",
        "format": "good",
        "model_path": str(home / "model.good"),
    }
    child = BenchChild({"PYTHONPATH": str(home)})
    error = child.run(job).error
    assert error["code"] == "internal"
    assert "KeyError" in error["message"]
    assert error["message"].endswith("tell the maker of boardbench-good 1.0")


def test_no_engine_of_boardbench_needs_what_plugins_declare() -> None:
    for engine in runtimes.ENGINES:
        assert (engine.suffixes, engine.contract) == ((), 0)
    assert Engine("a", "b", "C", ("d",)).contract != CONTRACT, "a plugin has to say what it is made for"
