"""suite.toml: what is multiplied, what is left out, what is wrong; and when a suite is due."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from boardbench.cli import schedule, suite, suite_file
from boardbench.cli.address import Address
from boardbench.cli.errors import ExitCode, WrongUse
from boardbench.cli.suite_file import read, request_id
from boardbench.cli.terminal import Output

HEAD = 'name = "s"\nmodels = ["a.tflite", "b.onnx"]\n'


@pytest.fixture
def write(tmp_path: Path):
    """Writes a suite beside two models."""
    for name in ("a.tflite", "b.onnx"):
        (tmp_path / name).write_bytes(b"model")

    def made(text: str, head: str = HEAD) -> Path:
        path = tmp_path / "s.toml"
        path.write_text(head + text)
        return path

    return made


def names(path: Path) -> list[str]:
    return [case.name for case in read(path).cases]


def test_everything_is_multiplied(write):
    path = write(
        """
        [defaults]
        duration = 2
        [runtimes.one]
        threads = 1
        [runtimes.four]
        threads = 4
        options = { delegate = "xnnpack" }
        [boards.pi5]
        on = ["board=pi5", "lab=zurich"]
        count = 2
        [boards.orin]
        on = "board=orin"
        [scenarios.burst]
        [scenarios.camera]
        scenario = "periodic"
        rate = 30
        duration = 9
        require = "deadline_misses<=4"
        """
    )
    cases = read(path).cases
    assert len(cases) == 2 * 2 * 2 * 2
    assert cases[0].name == "a.tflite one pi5 burst"
    last = cases[-1]
    assert last.name == "b.onnx four orin camera"
    spec = last.spec.message()
    assert (spec.threads, spec.duration_seconds, spec.scenario.rate_hertz) == (4, 9, 30)
    assert dict(spec.options) == {"delegate": "xnnpack"}
    assert cases[0].spec.message().duration_seconds == 2
    assert (cases[0].board.on, cases[0].board.count) == (("board=pi5", "lab=zurich"), 2)
    assert (last.require, cases[0].require) == (("deadline_misses<=4",), ())


def test_one_board_of_any_kind_is_the_default(write):
    (first, _) = read(write("")).cases
    assert (first.name, first.board.on, first.board.count) == ("a.tflite any", (), 1)


def test_combinations_are_left_out_and_added(write, tmp_path):
    (tmp_path / "large.onnx").write_bytes(b"model")
    path = write(
        """
        [runtimes.x]
        [runtimes.y]
        [boards.pi]
        on = "board=pi5"
        [boards.orin]
        on = "board=orin"
        [[exclude]]
        model = "*.tflite"
        runtime = "y"
        [[exclude]]
        board = "orin"
        runtime = "x"
        [[include]]
        model = "large.onnx"
        board = "orin"
        runtime = "x"
        """
    )
    assert names(path) == [
        "a.tflite x pi",
        "b.onnx x pi",
        "b.onnx y pi",
        "b.onnx y orin",
        "large.onnx x orin",
    ]


def test_patterns_name_models(write, tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("c.tflite", "d.tflite.part", ".hidden.tflite", "notes.txt"):
        (tmp_path / "deep" / name).write_bytes(b"model")
    path = write("", head='models = ["deep/*", "a.tflite", "*.tflite"]\n')
    assert names(path) == ["c.tflite any", "a.tflite any"]
    assert read(path).name == "s"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modles = []", "no key 'modles'"),
        ("[defaults]\ndurration = 1", "a run has no option 'durration'"),
        ("[defaults]\nduration = 'long'", "'long' is not a number of seconds"),
        ("[defaults]\nstrict = 'yes'", "strict must be true or false"),
        ("[runtimes.x]\nrate = 3", "--rate says nothing"),
        ("[boards.x]", "boards.x names no boards"),
        ("[boards.x]\non = 'pi5'", "'pi5' is not NAME=VALUE"),
        ("[boards.x]\non = 'board=pi5'\ncount = -1", "count must be a whole number from 0 on"),
        ("[[exclude]]\ncolour = 'red'", "no key 'colour'"),
        ("[[include]]\nboard = 'pi5'", "include needs a model"),
        ("[[include]]\nmodel = 'a.tflite'\nboard = 'x'", "include has the board 'x'; there are any"),
        ("require = ['p50<>1']", "require: "),
        ("[schedule]\ncron = '61 * * * *'", "cron is '61 * * * *'"),
        ("[schedule]\ncron = '0 3 * * *'\ntimezone = 'Zurich'", "timezone is 'Zurich'"),
        ("inputs = 'none.npz'", "inputs: "),
        ("[[exclude]]\nmodel = '*'", "it has no cases"),
        ("oops", "not TOML"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(write, text, words):
    with pytest.raises(WrongUse) as caught:
        read(write(text))
    assert words in str(caught.value)
    assert "s.toml" in str(caught.value)


def test_models_that_are_not_there_are_told(write):
    for models, words in ((["c.onnx"], "c.onnx is not there"), (["x/*"], "nothing is at x/*")):
        with pytest.raises(WrongUse, match=words.replace("*", r"\*")):
            read(write("", head=f"models = {json.dumps(models)}\n"))


def test_a_request_is_the_same_as_long_as_what_it_asks_for_is(write):
    one, other = read(write("[runtimes.x]\nthreads = 1")).cases
    base = request_id("s", one, "00", "", "t")
    assert request_id("s", read(write("[runtimes.x]\nthreads = 1")).cases[0], "00", "", "t") == base
    changed = read(write("[runtimes.x]\nthreads = 2")).cases[0]
    different = [
        request_id("s", other, "00", "", "t"),
        request_id("s2", one, "00", "", "t"),
        request_id("s", one, "01", "", "t"),
        request_id("s", one, "00", "02", "t"),
        request_id("s", one, "00", "", "u"),
        request_id("s", changed, "00", "", "t"),
    ]
    assert len({base, *different}) == 7


def test_the_suite_in_the_documentation_is_one(tmp_path):
    page = Path(__file__).parents[2] / "docs/jobs.md"
    (text,) = [part.partition("```")[0] for part in page.read_text().split("```toml\n") if "models =" in part]
    (tmp_path / "models").mkdir()
    for name in ("models/small.tflite", "large.onnx"):
        (tmp_path / name).write_bytes(b"model")
    path = tmp_path / "nightly.toml"
    path.write_text(text)
    suite = read(path)
    assert suite.name == "nightly"
    assert [case.name for case in suite.cases] == [
        "small.tflite one-thread pi5 plain",
        "small.tflite one-thread pi5 camera",
        "small.tflite all-threads pi5 plain",
        "small.tflite all-threads pi5 camera",
        "large.onnx one-thread pi5 plain",
        "large.onnx all-threads pi5 plain",
        "large.onnx one-thread pi5",
    ]
    assert suite.schedule.folders == (tmp_path / "incoming",)


# When.


def at(text: str, zone: str = "UTC") -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def test_the_next_round_is_by_the_time_of_the_place():
    now = at("2026-01-10T12:00")
    assert schedule.next_tick("0 3 * * *", "UTC", now) == at("2026-01-11T03:00")
    assert schedule.next_tick("0 3 * * *", "Europe/Zurich", now) == at("2026-01-11T02:00")
    assert schedule.next_tick("0 3 * * *", "Europe/Zurich", at("2026-07-10T12:00")) == at("2026-07-11T01:00")


def test_of_rounds_that_were_missed_the_latest_is_due():
    def due(now: str, since: str) -> float | None:
        return schedule.latest_tick("0 3 * * *", "UTC", at(now), at(since))

    assert due("2026-01-10T12:00", "2026-01-10T03:00") is None
    assert due("2026-01-11T03:00", "2026-01-10T03:00") == at("2026-01-11T03:00")
    assert due("2026-01-20T12:00", "2026-01-10T03:00") == at("2026-01-20T03:00")


def test_what_was_queued_is_remembered_by_the_next_start(tmp_path, write, monkeypatch):
    path = write("[schedule]\ncron = '* * * * *'\ntimezone = 'UTC'\nfolders = ['incoming']\nsettle = 0.001\n")
    (tmp_path / "incoming").mkdir()
    now, queued = [at("2026-01-10T12:00:30")], []
    monkeypatch.setattr(suite.time, "time", lambda: now[0])

    def submit(_watching, _cases, tick, _why):
        queued.append(tick)
        return ExitCode.DONE

    monkeypatch.setattr(suite.Watching, "_submit", submit)
    output = Output(json=False, quiet=True, full=False)

    def look() -> None:
        watching = suite.Watching(
            path, tmp_path / "state.json", Address("127.0.0.1", 1), "me", output, existing=False
        )
        watching.once()

    look()
    assert queued == [], "nothing was due since the first start"
    now[0] += 60
    for _ in range(2):
        look()
        assert [tick.partition(":")[0] for tick in queued] == ["cron"]
    (tmp_path / "incoming" / "c.tflite").write_bytes(b"model")
    for _ in range(2):
        look()
        assert [tick.partition(":")[0] for tick in queued] == ["cron", "file"]


def test_a_file_is_whole_when_it_rests(tmp_path):
    now = [0.0]
    folders = schedule.Folders([tmp_path, tmp_path / "none"], 2.0, monotonic=lambda: now[0])
    path = tmp_path / "m.tflite"
    path.write_bytes(b"half")
    assert folders.whole({}) == {}
    now[0] += 1.5
    path.write_bytes(b"half and more")
    assert folders.whole({}) == {}
    now[0] += 1.5
    assert folders.whole({}) == {}
    now[0] += 1.0
    (found,) = folders.whole({}).items()
    assert found[0] == path
    # What was queued is known, until it is another file.
    known = {str(path): list(found[1])}
    assert folders.whole(known) == {}
    path.write_bytes(b"another")
    os.utime(path, (1, 1))
    assert folders.whole(known) == {}
    now[0] += 3
    assert list(folders.whole(known)) == [path]


def test_what_is_on_its_way_or_empty_is_no_model(tmp_path):
    for name in ("a.tflite.part", ".b.tflite", "c.npz", "d.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "e.tflite").touch()
    (tmp_path / "folder").mkdir()
    folders = schedule.Folders([tmp_path], 0.0)
    folders.whole({})
    assert folders.whole({}) == {}


def test_cron_without_its_library_says_what_to_install(monkeypatch, write):
    monkeypatch.setitem(__import__("sys").modules, "cronsim", None)
    with pytest.raises(Exception, match=r"pip install 'boardbench\[suites\]'"):
        read(write("[schedule]\ncron = '0 3 * * *'"))
    assert suite_file.read(write("")).cases
