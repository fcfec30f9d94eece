"""The file, the environment and flags become one frozen configuration, or an error that names the mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from boardbench.agent.config import AgentConfig, RuntimeConfig, default_data_dir, load, parse_address
from boardbench.agent.errors import ConfigurationError

WHOLE = """
listen = "0.0.0.0:7000"
data_dir = "/data"
collector = "collector.lab:7342"
address = "pi.local:7000"
device_id = "pi-1"
sys_root = "/host"

[labels]
lab = "zurich"

[store]
limit_bytes = 1000
free_floor_bytes = 10

[spool]
limit_bytes = 2000
free_share = 0.5

[runs]
waiting_limit = 3

[deadlines]
create_seconds = 5

[spec]
duration_seconds = 1.5

[runtimes.tflite]
python = "/opt/tflite/bin/python"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_path_is_taken_from_where_the_agent_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(None, {"BOARDBENCH_AGENT_SYS_ROOT": "tree"}, {"data_dir": Path("data")})
    assert (config.data_dir, config.sys_root) == (tmp_path / "data", tmp_path / "tree")


def test_file(tmp_path: Path) -> None:
    config = load(written(tmp_path, WHOLE), {})
    assert config.listen == "0.0.0.0:7000"
    assert config.data_dir == Path("/data")
    assert config.sys_root == Path("/host")
    assert config.labels == {"lab": "zurich"}
    assert (config.store.limit_bytes, config.store.free_floor_bytes) == (1000, 10)
    assert config.spool.free_share == 0.5
    assert config.runs.waiting_limit == 3
    assert config.deadlines.create_seconds == 5.0
    assert config.spec.duration_seconds == 1.5
    assert config.runtimes == {"tflite": RuntimeConfig("/opt/tflite/bin/python")}


def test_without_anything_it_is_safe_on_a_laptop() -> None:
    config = load(None, {})
    assert config.listen == "127.0.0.1:7341"
    assert config.collector == ""
    assert config == load(None, {}, {})


def test_it_can_not_be_changed(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(written(tmp_path, ""), {}).listen = "x"  # type: ignore[misc]


def test_what_is_named_later_wins(tmp_path: Path) -> None:
    path = written(tmp_path, 'device_id = "file"\n[store]\nlimit_bytes = 1\nfree_floor_bytes = 1\n')
    environment = {
        "BOARDBENCH_AGENT_CONFIG": str(path),
        "BOARDBENCH_AGENT_DEVICE_ID": "environment",
        "BOARDBENCH_AGENT_STORE_LIMIT_BYTES": "2",
        "BOARDBENCH_AGENT_LABELS": "lab=zurich, rack=2",
        "BOARDBENCH_OTHER": "is not ours",
    }
    config = load(None, environment, {"device_id": "flag", "data_dir": Path("/flag")})
    assert config.device_id == "flag"
    assert config.data_dir == Path("/flag")
    assert (config.store.limit_bytes, config.store.free_floor_bytes) == (2, 1)
    assert config.labels == {"lab": "zurich", "rack": "2"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 1", ["agent.toml", "'colour'", "the top level", "listen"]),
        ("[store]\nlimit = 1", ["agent.toml", "'limit'", "[store]", "limit_bytes"]),
        ("[runtimes.tflite]\npath = '/x'", ["agent.toml", "'path'", "[runtimes.tflite]", "python"]),
        ("store = 1", ["agent.toml", "store must be a table"]),
        ("labels = 1", ["agent.toml", "labels must be a table"]),
        ("listen = 7341", ["agent.toml", "listen must be text", "7341"]),
        ("[store]\nlimit_bytes = 1.5", ["agent.toml", "store.limit_bytes must be a whole number"]),
        ("[store]\nlimit_bytes = -1", ["agent.toml", "store.limit_bytes", "-1"]),
        ("[store]\nlimit_bytes = true", ["agent.toml", "store.limit_bytes", "True"]),
        ("[spec]\nduration_seconds = nan", ["agent.toml", "spec.duration_seconds", "nan"]),
        ("[spec]\nmin_runs = 9\nmax_runs = 8", ["agent.toml", "spec.min_runs", "9", "8"]),
        ("data_dir = ''", ["agent.toml", "data_dir must be a path"]),
        ("listen = 'here'", ["agent.toml", "listen", "'here' is not HOST:PORT"]),
        ("listen = '::1:80'", ["agent.toml", "brackets"]),
        ('device_id = "a\\u0007b"', ["agent.toml", "device_id", "printable"]),
        ("[labels]\na = 1", ["agent.toml", "labels.a must be text"]),
        ("listen = ", ["agent.toml", "not TOML"]),
        ("[sensors]\nwithout = 'nvidia,sundial'", ["agent.toml", "sensors.without", "'sundial'", "thermal"]),
        (
            "[validity]\nload_doubtful = 0.3\nload_invalid = 0.2",
            ["agent.toml", "validity.load_doubtful", "0.3", "validity.load_invalid", "0.2"],
        ),
        ("[validity]\nsteal_doubtful = 'much'", ["agent.toml", "validity.steal_doubtful", "'much'"]),
        ("[validity.severity]\nloud = 'note'", ["agent.toml", "validity.severity", "'loud'", "high_load"]),
        (
            "[validity.severity]\nhigh_load = 'fine'",
            ["agent.toml", "validity.severity", "high_load", "'fine'", "note, doubtful, invalid"],
        ),
        (
            "[validity.severity]\nfew_samples = 3",
            ["agent.toml", "validity.severity.few_samples must be text"],
        ),
    ],
)
def test_mistake_in_the_file_names_file_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load(written(tmp_path, text), {})
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (
            "BOARDBENCH_AGENT_LISTENS",
            "x",
            ["BOARDBENCH_AGENT_LISTENS", "no such setting", "BOARDBENCH_AGENT_LISTEN,"],
        ),
        (
            "BOARDBENCH_AGENT_LISTEN",
            "x",
            ["environment variable BOARDBENCH_AGENT_LISTEN: 'x' is not HOST:PORT"],
        ),
        ("BOARDBENCH_AGENT_SPOOL_LIMIT_BYTES", "1k", ["BOARDBENCH_AGENT_SPOOL_LIMIT_BYTES", "'1k'"]),
        ("BOARDBENCH_AGENT_LABELS", "lab", ["BOARDBENCH_AGENT_LABELS", "name=value"]),
    ],
)
def test_mistake_in_the_environment_names_the_variable(variable: str, value: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load(None, {variable: value})
    for word in words:
        assert word in str(raised.value)


def test_mistake_in_a_severity_names_its_variable() -> None:
    environment = {"BOARDBENCH_AGENT_VALIDITY_SEVERITY": "high_load=fine"}
    with pytest.raises(ConfigurationError, match=r"BOARDBENCH_AGENT_VALIDITY_SEVERITY.*'fine'"):
        load(None, environment)


def test_severities_are_a_table_of_their_own(tmp_path: Path) -> None:
    text = "[validity]\nload_doubtful = 0.2\n[validity.severity]\ngovernor = 'doubtful'\nemulated = 'note'\n"
    found = load(written(tmp_path, text), {}).validity
    assert found.load_doubtful == 0.2
    assert found.severity == {"governor": "doubtful", "emulated": "note"}


def test_mistake_in_a_flag_names_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"^--listen: 'x' is not HOST:PORT"):
        load(None, {}, {"listen": "x"})


def test_use_of_caches_is_one_that_there_is() -> None:
    with pytest.raises(ConfigurationError, match=r"spec\.cache is 'warm'; it must be none or keep"):
        load(None, {"BOARDBENCH_AGENT_SPEC_CACHE": "warm"})


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.toml: can't be read: No such file"):
        load(tmp_path / "none.toml", {})


def test_the_file_itself_counts_before_those_beside_it(tmp_path: Path) -> None:
    beside = tmp_path / "agent.d"
    beside.mkdir()
    (beside / "50-flash.toml").write_text('listen = "0.0.0.0:1"\n[labels]\nlab = "bern"\nrack = "2"\n')
    (beside / "90-late.toml").write_text('collector = "late:2"\n')
    (beside / "note.txt").write_text("no TOML")
    path = tmp_path / "agent.toml"
    path.write_text('[labels]\nlab = "zurich"\n')
    config = load(path, {})
    assert (config.listen, config.collector) == ("0.0.0.0:1", "late:2")
    assert config.labels == {"lab": "zurich", "rack": "2"}


def test_a_mistake_beside_the_file_is_told_as_one_there(tmp_path: Path) -> None:
    beside = tmp_path / "agent.d"
    beside.mkdir()
    (beside / "50-flash.toml").write_text("listen = 7\n")
    path = tmp_path / "agent.toml"
    path.write_text('listen = "127.0.0.1:1"\n')
    with pytest.raises(ConfigurationError, match=r"50-flash\.toml: listen must be text"):
        load(path, {})


def test_every_key_has_a_variable() -> None:
    """Each one is taken, with a value of its type."""
    samples = {bool: "false", int: "7", float: "7.5", str: "7", Path: "/7"}
    # What is held to the names that there are.
    named = {
        ("sensors", "without"): "nvidia, rapl",
        ("metrics", "listen"): "127.0.0.1:7344",
        ("spec", "cache"): "keep",
        ("update", "root"): "/7",
        ("validity", "severity"): "high_load=note",
        ("validity", "thresholds"): "variation_ratio=0.2, clock_reads=50",
    }
    environment = {}
    for field in dataclasses.fields(AgentConfig):
        value = getattr(AgentConfig(), field.name)
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                sample = named.get((field.name, inner.name)) or samples[type(getattr(value, inner.name))]
                environment[f"BOARDBENCH_AGENT_{field.name}_{inner.name}".upper()] = sample
    config = load(None, environment)
    assert config.deadlines.start_seconds == 7.5
    assert config.runs.kept_limit == 7
    assert config.spec.cache == "keep"
    assert config.sensors.without_kinds == ("nvidia", "rapl")
    assert config.validity.severity == {"high_load": "note"}
    assert config.validity.thresholds == {"variation_ratio": 0.2, "clock_reads": 50.0}


def test_as_many_jobs_as_a_heartbeat_can_name() -> None:
    assert load(None, {"BOARDBENCH_AGENT_JOBS_OPEN_LIMIT": "32"}).jobs.open_limit == 32
    for limit in ("0", "33"):
        with pytest.raises(ConfigurationError, match=r"OPEN_LIMIT: .* is not from 1 to 32"):
            load(None, {"BOARDBENCH_AGENT_JOBS_OPEN_LIMIT": limit})


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "XDG_STATE_HOME": "/x"}, Path("/var/lib/a")),
        ({"XDG_STATE_HOME": "/x"}, Path("/x/boardbench")),
        ({}, Path.home() / ".local/state/boardbench"),
    ],
)
def test_data_folder(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: Path) -> None:
    # Whoever runs the tests may be root: the system's folder is then the one.
    monkeypatch.setattr("boardbench.agent.config.SYSTEM_DATA_DIR", Path("/proc/nowhere/boardbench"))
    assert default_data_dir(environment) == folder


def test_data_folder_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("boardbench.agent.config.SYSTEM_DATA_DIR", tmp_path / "boardbench")
    assert default_data_dir({}) == tmp_path / "boardbench"


def test_address() -> None:
    assert parse_address("[::1]:0", "listen") == ("[::1]", 0)
    assert parse_address("pi.local:7341", "listen") == ("pi.local", 7341)
