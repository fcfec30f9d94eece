"""What surrounds a run is read from trees of boards that change while it goes on."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.board.identify import identify
from boardbench.agent.board.sensor import Coverage, Reading, Sensor
from boardbench.agent.board.surroundings import Seen, Surroundings
from boardbench.agent.config import AgentConfig, SensorsConfig, ValidityConfig
from boardbench.agent.validity import DOUBTFUL, INVALID, NOTE
from boardbench.v1 import board_pb2, result_pb2, scenario_pb2

BOARDS = Path(__file__).parent.parent / "boards"

FIRMWARE = "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"
ALARM = "sys/class/hwmon/hwmon3/in0_lcrit_alarm"
ZONE = "sys/class/thermal/thermal_zone0/temp"
COOLING = "sys/class/thermal/cooling_device1/cur_state"
CPUFREQ = "sys/devices/system/cpu/cpu{}/cpufreq/{}"

WORKER = 77


def copied(name: str, tmp_path: Path) -> Path:
    """A tree that the test may change."""
    root = tmp_path / name
    shutil.copytree(BOARDS / name, root, symlinks=True)
    return root


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Watch:
    """Surroundings in which time is the test's; sampled only when the test says so."""

    def __init__(
        self,
        root: Path,
        sensors: list[Sensor] | None = None,
        settings: dict[str, Any] | None = None,
        **spec: Any,
    ) -> None:
        self.root = root
        self.clock = Clock()
        config = AgentConfig(sys_root=root, sensors=SensorsConfig(cost_share=0, **(settings or {})))
        machine = "x86_64" if "laptop" in root.name else "aarch64"
        found = identify(root, device_id="it", labels={}, architecture=machine)
        self.around = Surroundings(
            config,
            found,
            result_pb2.BenchmarkSpec(sample_hertz=0, **spec),
            sensors=sensors,
            clock=self.clock,
        )

    def begin(self) -> None:
        self.clock.now += 5
        processor_time(self.root, busy=1000, stolen=0, worker=100)
        self.around.measurement_begins(WORKER)

    def sample(self, seconds: float = 1.0) -> None:
        self.clock.now += seconds
        self.around.look()

    def end(self, seconds: float = 1.0, **report: Any) -> Seen:
        """Ends the measurement, in which the worker was the only one to work."""
        self.clock.now += seconds
        processor_time(self.root, busy=1200, stolen=0, worker=300)
        self.around.measurement_ends(WORKER)
        return self.around.end(result_pb2.RunResult(**report))


def processor_time(root: Path, *, busy: int, stolen: int, worker: int) -> None:
    """Hundredths of a second since boot, as /proc/stat and /proc/77/stat have them."""
    write(root, "proc/stat", f"cpu  {busy} 0 0 1000 5 0 0 {stolen} 0 0\ncpu0 0 0\n")
    # The name may hold spaces and parentheses.
    write(root, f"proc/{WORKER}/stat", f"77 (a) b) S 1 77 77 0 -1 0 0 0 0 0 {worker} 0 0 0\n")


def clock_of(root: Path, kilohertz: int, processors: Iterable[int] = range(4)) -> None:
    for number in processors:
        write(root, CPUFREQ.format(number, "scaling_cur_freq"), f"{kilohertz}\n")


def governed(root: Path, governor: str = "performance") -> Path:
    for path in root.glob("sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"):
        path.write_text(f"{governor}\n")
    return root


def codes(warnings: Iterable[result_pb2.Warning]) -> list[str]:
    return [warning.code for warning in warnings]


def only(seen: Seen, code: str) -> result_pb2.Warning:
    """The one warning of that code; others may be there."""
    (found,) = (warning for warning in seen.warnings if warning.code == code)
    return found


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    """A Raspberry Pi 5 that nothing is wrong with."""
    return governed(copied("raspberry_pi_5", tmp_path))


# --- a calm board


def test_environment_of_a_calm_board(tmp_path: Path) -> None:
    root = copied("raspberry_pi_5", tmp_path)
    write(root, "sys/devices/system/clocksource/clocksource0/current_clocksource", "arch_sys_counter\n")
    write(root, "proc/meminfo", "MemAvailable: 7340032 kB\nSwapTotal: 2000 kB\nSwapFree: 1500 kB\n")
    watch = Watch(root)
    for resource, total in ("cpu", 1_000_000), ("io", 0), ("memory", 5):
        write(root, f"proc/pressure/{resource}", f"some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\n")
    watch.begin()
    write(root, "proc/meminfo", "MemAvailable: 1000 kB\n")
    watch.sample()
    write(root, "proc/meminfo", "MemAvailable: 5000 kB\nSwapTotal: 2000 kB\nSwapFree: 1400 kB\n")
    write(root, "proc/pressure/cpu", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1050000\nfull total=9\n")
    watch.clock.now += 1
    processor_time(root, busy=1210, stolen=1, worker=300)
    watch.around.measurement_ends(WORKER)
    write(root, ZONE, "60100\n")
    write(root, "proc/loadavg", "1.02 0.31 0.20 1/180 2345\n")
    report = result_pb2.RunResult(environment=board_pb2.Environment(cpu_affinity=[0, 1]))
    seen = watch.around.end(report)
    assert seen.environment.other_cpu_seconds == pytest.approx(0.1)
    assert seen.environment.cpu_pressure_share == pytest.approx(0.025)
    for name in ("other_cpu_seconds", "cpu_pressure_share"):
        seen.environment.ClearField(name)
    assert seen.environment == board_pb2.Environment(
        load_average_before=0.42,
        load_average_after=1.02,
        cpu_governor="ondemand",
        cpu_frequency_hertz=1.5e9,
        cpu_frequency_least_hertz=1.5e9,
        temperature_before_celsius=52.35,
        temperature_after_celsius=60.1,
        memory_available_before_bytes=7340032 * 1024,
        memory_available_least_bytes=1000 * 1024,
        swap_used_before_bytes=500 * 1024,
        swap_used_after_bytes=600 * 1024,
        cpu_core_types=["Cortex-A76"],
        clock_source="arch_sys_counter",
        io_pressure_share=0.0,
        memory_pressure_share=0.0,
        throttling_readable=True,
    )
    assert codes(seen.warnings) == ["governor"]
    assert only(seen, "governor").severity == NOTE
    assert seen.memory.available_drop_bytes == (7340032 - 1000) * 1024
    assert seen.telemetry is None, "no samples were wanted"
    assert seen.sample_hertz == 0


def test_board_that_is_fit_gives_no_doubt(pi: Path) -> None:
    watch = Watch(pi)
    watch.begin()
    watch.sample()
    assert watch.end().warnings == []


def test_run_that_was_not_measured_is_not_doubted(pi: Path) -> None:
    write(pi, FIRMWARE, "f000f\n")
    watch = Watch(governed(pi, "powersave"))
    watch.sample()
    seen = watch.around.end(None)
    assert seen.warnings == []
    assert list(seen.environment.throttled_before) == [
        "under-voltage",
        "frequency capped",
        "throttled",
        "soft temperature limit",
    ]
    assert seen.energy is None


# --- load


def test_other_work_and_a_greedy_host_are_told(pi: Path) -> None:
    watch = Watch(pi)
    watch.begin()
    watch.clock.now += 2
    processor_time(pi, busy=1400, stolen=40, worker=300)
    watch.around.measurement_ends(WORKER)
    warnings = watch.around.end().warnings
    assert codes(warnings) == ["high_load", "cpu_steal"]
    assert "1.00 of 4 processors" in warnings[0].message
    assert "5.0%" in warnings[1].message
    assert dict(warnings[0].evidence) == {
        "load_share": pytest.approx(0.25),
        "load_doubtful_share": 0.10,
        "load_invalid_share": 0.25,
    }
    assert [warning.severity for warning in warnings] == [DOUBTFUL, DOUBTFUL]


@pytest.mark.parametrize(
    ("others", "stolen", "severities"),
    [
        (79, 7, {}),
        (81, 9, {"high_load": DOUBTFUL, "cpu_steal": DOUBTFUL}),
        (201, 81, {"high_load": INVALID, "cpu_steal": INVALID}),
    ],
)
def test_load_weighs_by_its_share(pi: Path, others: int, stolen: int, severities: dict[str, int]) -> None:
    """Of 800 ticks in two seconds on four processors."""
    watch = Watch(pi)
    watch.begin()
    watch.clock.now += 2
    processor_time(pi, busy=1200 + others, stolen=stolen, worker=300)
    watch.around.measurement_ends(WORKER)
    assert {warning.code: warning.severity for warning in watch.around.end().warnings} == severities


def test_too_short_a_measurement_is_not_judged(pi: Path) -> None:
    watch = Watch(pi)
    watch.begin()
    write(pi, "proc/pressure/cpu", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n")
    watch.clock.now += 0.1
    processor_time(pi, busy=1400, stolen=40, worker=100)
    watch.around.measurement_ends(WORKER)
    assert codes(watch.around.end().warnings) == []


def test_work_of_those_that_are_measured_too_is_nobodys_fault(pi: Path) -> None:
    peer = 78
    found = identify(pi, device_id="it", labels={}, architecture="aarch64")
    clock = Clock()
    config = AgentConfig(sys_root=pi, sensors=SensorsConfig(cost_share=0))
    spec = result_pb2.BenchmarkSpec(sample_hertz=0)
    around = Surroundings(config, found, spec, clock=clock, peers=lambda: [peer, WORKER])
    processor_time(pi, busy=1000, stolen=0, worker=100)
    write(pi, "proc/pressure/cpu", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    write(pi, f"proc/{peer}/stat", "78 (b) S 1 77 77 0 -1 0 0 0 0 0 50 0 0 0\n")
    clock.now += 1
    around.measurement_begins(WORKER)
    clock.now += 2
    processor_time(pi, busy=1402, stolen=0, worker=300)
    write(pi, "proc/pressure/cpu", "some avg10=0.00 avg60=0.00 avg300=0.00 total=2000000\n")
    write(pi, f"proc/{peer}/stat", "78 (b) S 1 77 77 0 -1 0 0 0 0 0 250 0 0 0\n")
    around.measurement_ends(WORKER)
    seen = around.end()
    assert seen.environment.cpu_pressure_share == 1.0
    assert codes(seen.warnings) == []
    assert seen.environment.other_cpu_seconds == pytest.approx(0.02)


def test_pressure_on_the_processors_is_told(pi: Path) -> None:
    watch = Watch(pi)
    write(pi, "proc/pressure/cpu", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1000000\n")
    watch.begin()
    write(pi, "proc/pressure/cpu", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\n")
    seen = watch.end(seconds=2.0)
    assert codes(seen.warnings) == ["cpu_pressure"]
    assert "25%" in seen.warnings[0].message
    assert seen.warnings[0].severity == DOUBTFUL


# --- throttling and supply


def test_throttling_in_between_is_told_though_it_is_over(pi: Path) -> None:
    watch = Watch(pi)
    watch.begin()
    write(pi, COOLING, "2\n")
    write(pi, ZONE, "79000\n")
    watch.sample()
    write(pi, COOLING, "0\n")
    watch.sample()
    seen = watch.end()
    assert codes(seen.warnings) == ["throttled"]
    (warning,) = seen.warnings
    assert "2 steps" in warning.message
    assert "79 °C" in warning.message
    assert warning.severity == INVALID
    assert warning.evidence["cooling_steps"] == 2
    assert warning.evidence["temperature_celsius"] == 79
    assert list(seen.environment.throttled_during) == ["cpufreq-cpu0 slowed down by 2 steps"]
    # Six seconds after the begin, of which five were before the measurement.
    assert warning.time.ToNanoseconds() - watch.around._began_nanoseconds == pytest.approx(6e9)


def test_throttling_before_and_after_the_measurement_is_none_of_it(pi: Path) -> None:
    watch = Watch(pi)
    write(pi, COOLING, "3\n")
    watch.sample()
    write(pi, COOLING, "0\n")
    watch.sample()
    watch.begin()
    watch.sample()
    processor_time(pi, busy=1200, stolen=0, worker=300)
    watch.clock.now += 1
    watch.around.measurement_ends(WORKER)
    write(pi, COOLING, "3\n")
    watch.sample()
    assert codes(watch.around.end().warnings) == []


@pytest.mark.parametrize(
    ("word", "code", "words"),
    [
        ("1", "undervoltage", ["under-voltage"]),
        ("2", "throttled", ["frequency capped"]),
        ("4", "throttled", ["throttled"]),
        ("8", "throttled", ["soft temperature limit"]),
        ("6", "throttled", ["frequency capped", "throttled"]),
        # Only since boot: it came and went between two samples.
        ("10000", "undervoltage", ["under-voltage"]),
        ("40000", "throttled", ["throttled"]),
        ("40004", "throttled", ["throttled"]),
    ],
)
def test_what_the_firmware_does_during_the_measurement_is_told(
    pi: Path, word: str, code: str, words: list[str]
) -> None:
    watch = Watch(pi)
    watch.begin()
    write(pi, FIRMWARE, f"{word}\n")
    watch.sample()
    write(pi, FIRMWARE, f"{int(word, 16) & 0xF0000:x}\n")
    watch.sample()
    seen = watch.end()
    assert codes(seen.warnings) == [code]
    assert list(seen.environment.throttled_during) == words
    assert seen.warnings[0].severity == INVALID
    assert list(seen.environment.throttled_before) == []


def test_supply_that_fails_when_the_measurement_ends_is_seen(pi: Path) -> None:
    watch = Watch(pi)
    watch.begin()
    write(pi, ALARM, "1\n")
    assert codes(watch.end().warnings) == ["undervoltage"]


def test_what_happened_before_the_run_is_only_noted(pi: Path) -> None:
    write(pi, FIRMWARE, "50000\n")
    watch = Watch(pi)
    watch.begin()
    watch.sample()
    seen = watch.end()
    assert codes(seen.warnings) == ["throttled_before"]
    assert seen.warnings[0].severity == NOTE
    assert "under-voltage, throttled" in seen.warnings[0].message
    assert list(seen.environment.throttled_before) == ["under-voltage", "throttled"]
    assert list(seen.environment.throttled_during) == []


def test_board_that_is_throttled_all_the_time_is_told(tmp_path: Path) -> None:
    watch = Watch(copied("raspberry_pi_4_throttled", tmp_path))
    watch.begin()
    seen = watch.end()
    assert [only(seen, code).severity for code in ("throttled", "undervoltage")] == [INVALID, INVALID]
    assert "near_throttling" not in codes(seen.warnings), "it is past that"


def test_sustained_run_shows_throttling_and_is_not_invalid_for_it(pi: Path) -> None:
    watch = Watch(pi, scenario=scenario_pb2.Scenario(kind=scenario_pb2.SCENARIO_KIND_SUSTAINED))
    watch.begin()
    for _ in range(5):
        watch.sample()
    write(pi, FIRMWARE, "4\n")
    write(pi, ZONE, "85000\n")
    clock_of(pi, 900_000)
    for _ in range(5):
        watch.sample()
    windows = [
        scenario_pb2.Window(begin_seconds=begin, end_seconds=begin + 5, count=10) for begin in (0.5, 5.5)
    ]
    seen = watch.end(scenario=scenario_pb2.ScenarioResult(windows=windows))
    assert {warning.code: warning.severity for warning in seen.warnings} == {
        "throttled": NOTE,
        "clock_moved": NOTE,
    }
    cool, hot = seen.windows
    assert (cool.throttled, hot.throttled) == (False, True)
    assert (cool.temperature_celsius, hot.temperature_celsius) == (pytest.approx(52.35), pytest.approx(85))
    assert (cool.cpu_frequency_hertz, hot.cpu_frequency_hertz) == (1.5e9, 0.9e9)
    assert cool.power_watts == pytest.approx(3.917754), "the rails of the power chip"


def test_supply_that_fails_makes_a_sustained_run_invalid_too(pi: Path) -> None:
    watch = Watch(pi, scenario=scenario_pb2.Scenario(kind=scenario_pb2.SCENARIO_KIND_SUSTAINED))
    watch.begin()
    write(pi, FIRMWARE, "1\n")
    watch.sample()
    assert only(watch.end(), "undervoltage").severity == INVALID


def test_counter_of_an_x86_processor_is_compared_with_what_it_was(tmp_path: Path) -> None:
    root = governed(copied("laptop_intel", tmp_path))
    write(root, "sys/class/thermal/cooling_device1/cur_state", "0\n")
    watch = Watch(root)
    watch.begin()
    watch.sample()
    seen = watch.end()
    assert codes(seen.warnings) == ["throttled_before"]
    assert "package-0 throttled 41 times" in seen.environment.throttled_before

    watch = Watch(root)
    watch.begin()
    for number in range(4):
        name = f"sys/devices/system/cpu/cpu{number}/thermal_throttle/package_throttle_count"
        write(root, name, "44\n")
    watch.sample()
    seen = watch.end()
    assert codes(seen.warnings) == ["throttled"]
    assert list(seen.environment.throttled_during) == ["package-0 throttled 3 times"]


def test_over_current_events_are_told(tmp_path: Path) -> None:
    root = copied("jetson_orin_nano", tmp_path)
    (counter,) = root.glob("sys/class/hwmon/hwmon*/oc3_event_cnt")
    watch = Watch(root)
    watch.begin()
    counter.write_text(f"{int(counter.read_text()) + 2}\n")
    watch.sample()
    seen = watch.end()
    warning = only(seen, "over_current")
    assert warning.severity == INVALID
    assert warning.evidence["over_current_events"] == 2
    assert "oc3 over-current 2 times" in seen.environment.throttled_during


class Card:
    """A graphics card that is at its power limit."""

    name = "gpu0"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def read(self) -> Iterable[Reading]:
        return [Reading(self.reason, "gpu0", 1.0)]


@pytest.mark.parametrize(
    ("device", "reason", "severity"),
    [
        ("cuda", "thermal_slowdown_now", INVALID),
        ("cuda", "power_capped_now", DOUBTFUL),
        ("cpu", "thermal_slowdown_now", None),
    ],
)
def test_accelerator_that_is_held_back_counts_where_it_is_measured(
    pi: Path, device: str, reason: str, severity: int | None
) -> None:
    watch = Watch(pi, sensors=[Card(reason)], device=device)
    watch.begin()
    found = watch.end().warnings
    assert [(warning.code, warning.severity) for warning in found if warning.code == "throttled"] == (
        [("throttled", severity)] if severity else []
    )


def test_heat_close_to_the_limit_is_noted(pi: Path) -> None:
    watch = Watch(pi)
    watch.begin()
    write(pi, ZONE, "76000\n")
    watch.sample()
    seen = watch.end()
    assert codes(seen.warnings) == ["near_throttling"]
    assert "76 °C" in seen.warnings[0].message
    assert "80 °C" in seen.warnings[0].message
    assert seen.warnings[0].severity == NOTE


def test_limit_of_a_zone_is_its_trip_point(tmp_path: Path) -> None:
    root = copied("raspberry_pi_5", tmp_path)
    write(root, "sys/firmware/devicetree/base/model", "Radxa ROCK 5B\0")
    (zone, *_) = sorted(root.glob("sys/class/thermal/thermal_zone*"))
    for number, (kind, celsius) in enumerate((("passive", -40), ("passive", 75), ("critical", 115))):
        (zone / f"trip_point_{number}_type").write_text(f"{kind}\n")
        (zone / f"trip_point_{number}_temp").write_text(f"{celsius * 1000}\n")
    (zone / "temp").write_text("71000\n")
    watch = Watch(root)
    watch.begin()
    assert only(watch.end(), "near_throttling").evidence["throttling_celsius"] == 75


# --- clocks


def test_cap_on_the_frequency_is_told(tmp_path: Path) -> None:
    root = copied("jetson_orin_nano", tmp_path)
    watch = Watch(root)
    watch.begin()
    warning = only(watch.end(), "frequency_capped")
    assert "1344 of 1728 MHz" in warning.message
    assert warning.severity == NOTE, "it is a setting"


def test_cap_that_moves_makes_it_doubtful(pi: Path) -> None:
    watch = Watch(pi)
    watch.begin()
    watch.sample()
    write(pi, CPUFREQ.format(0, "scaling_max_freq"), "1800000\n")
    watch.sample()
    warning = only(watch.end(), "frequency_capped")
    assert "1800 of 2400 MHz" in warning.message
    assert warning.severity == DOUBTFUL


@pytest.mark.parametrize(
    ("to_kilohertz", "spec", "severity"),
    [
        (1_460_000, {}, None),
        (1_400_000, {}, DOUBTFUL),
        (1_100_000, {}, INVALID),
        (1_100_000, {"device": "edgetpu"}, DOUBTFUL),
        (
            1_100_000,
            {"scenario": scenario_pb2.Scenario(kind=scenario_pb2.SCENARIO_KIND_PERIODIC)},
            DOUBTFUL,
        ),
    ],
)
def test_clock_that_drops_is_told_by_how_much(
    pi: Path, to_kilohertz: int, spec: dict[str, Any], severity: int | None
) -> None:
    watch = Watch(pi, **spec)
    watch.begin()
    for _ in range(10):
        watch.sample(0.1)
    clock_of(pi, to_kilohertz)
    for _ in range(10):
        watch.sample(0.1)
    seen = watch.end(0.1)
    if severity is None:
        assert codes(seen.warnings) == []
        return
    (warning,) = seen.warnings
    assert (warning.code, warning.severity) == ("clock_moved", severity)
    assert warning.evidence["slowest_hertz"] == to_kilohertz * 1e3
    assert warning.evidence["fastest_hertz"] == 1.5e9
    assert seen.environment.cpu_frequency_least_hertz == to_kilohertz * 1e3


def test_single_odd_reading_of_the_clock_is_no_drop(pi: Path) -> None:
    watch = Watch(pi)
    watch.begin()
    for sample in range(60):
        clock_of(pi, 1_200_000 if sample == 30 else 1_500_000)
        watch.sample(0.1)
    assert codes(watch.end().warnings) == []


def test_core_that_rests_is_no_drop_while_another_works(pi: Path) -> None:
    """One thread moves from core to core, and the others sink to the lowest clock."""
    watch = Watch(pi)
    watch.begin()
    for sample in range(40):
        clock_of(pi, 600_000)
        clock_of(pi, 1_500_000, [sample // 10])
        watch.sample(0.1)
    assert codes(watch.end().warnings) == []


def test_core_that_the_worker_may_not_use_does_not_count(pi: Path) -> None:
    watch = Watch(pi)
    watch.begin()
    for sample in range(20):
        clock_of(pi, 1_500_000, [2, 3])
        clock_of(pi, 1_500_000 if sample < 10 else 600_000, [0, 1])
        watch.sample(0.1)
    seen = watch.end(0.1, environment=board_pb2.Environment(cpu_affinity=[0, 1]))
    assert only(seen, "clock_moved").evidence["slowest_hertz"] == 600e6


def test_governor_weighs_more_where_no_clock_can_be_read(pi: Path) -> None:
    governed(pi, "schedutil")
    for path in pi.glob("sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"):
        path.unlink()
    watch = Watch(pi)
    watch.begin()
    seen = watch.end()
    assert codes(seen.warnings) == ["governor"]
    assert seen.warnings[0].severity == DOUBTFUL
    assert "schedutil" in seen.warnings[0].message


def test_power_mode_that_changes_is_told(tmp_path: Path) -> None:
    root = governed(copied("jetson_orin_nano", tmp_path))
    watch = Watch(root)
    before = watch.around._power_mode
    assert before
    watch.begin()
    status = root / "var/lib/nvpmodel/status"
    other = "pmode:0001" if "0001" not in status.read_text() else "pmode:0000"
    status.write_text(other + "\n")
    seen = watch.end()
    warning = only(seen, "power_mode_moved")
    assert warning.severity == INVALID
    assert before in warning.message
    assert seen.environment.power_mode in warning.message


def test_profile_of_the_platform_is_its_power_mode(pi: Path) -> None:
    write(pi, "sys/firmware/acpi/platform_profile", "balanced\n")
    assert Watch(pi).around.end().environment.power_mode == "balanced"


# --- memory


def test_memory_that_runs_low_is_told(pi: Path) -> None:
    watch = Watch(pi)
    write(pi, "proc/meminfo", "MemTotal: 1000000 kB\nMemAvailable: 40000 kB\n")
    watch.sample()
    write(pi, "proc/meminfo", "MemTotal: 1000000 kB\nMemAvailable: 900000 kB\n")
    watch.begin()
    seen = watch.end()
    warning = only(seen, "memory_low")
    assert warning.severity == DOUBTFUL
    assert "39 of 977 MiB" in warning.message
    assert warning.HasField("time")


def test_tasks_that_wait_for_memory_are_told(pi: Path) -> None:
    watch = Watch(pi)
    write(pi, "proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    watch.begin()
    write(pi, "proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=100000\n")
    warning = only(watch.end(2.0), "memory_low")
    assert "5.0%" in warning.message


def test_swapping_is_told(pi: Path) -> None:
    watch = Watch(pi)
    write(pi, "proc/vmstat", "pswpin 100\npswpout 7\n")
    write(pi, f"proc/{WORKER}/status", "VmRSS:\t 20480 kB\nVmSwap:\t 0 kB\n")
    watch.begin()
    write(pi, f"proc/{WORKER}/status", "VmRSS:\t 10240 kB\nVmSwap:\t 8192 kB\n")
    watch.sample()
    write(pi, "proc/vmstat", "pswpin 612\npswpout 7\n")
    seen = watch.end()
    warning = only(seen, "swapped")
    assert warning.severity == DOUBTFUL
    assert "8 MiB of the worker were swapped out, and 2 MiB came back" in warning.message
    assert seen.memory.peak_swap_bytes == 8 * 1024 * 1024


def test_memory_of_the_accelerator_is_the_workers_own(tmp_path: Path) -> None:
    root = copied("jetson_orin_nano", tmp_path)
    clients = root / "sys/kernel/debug/nvmap/iovmm/clients"
    line = "user    python3    {}    {}K\n"
    clients.write_text(
        "CLIENT PROCESS PID SIZE\n" + line.format(WORKER, 1000) + line.format(5, 9) + "total 1009K\n"
    )
    watch = Watch(root)
    watch.begin()
    clients.write_text("CLIENT PROCESS PID SIZE\n" + line.format(WORKER, 500) + "total 500K\n")
    watch.sample()
    seen = watch.end()
    assert seen.memory.accelerator_bytes == 1000 * 1024
    assert seen.memory.accelerator_source == "nvmap"


# --- what the board is


def test_emulator_is_told() -> None:
    seen = Watch(BOARDS / "qemu_user").around.end()
    assert codes(seen.warnings) == ["emulated"]
    assert seen.warnings[0].severity == INVALID


class Failing:
    """A sensor that breaks."""

    name = "broken"

    def read(self) -> Iterable[Reading]:
        raise OSError(errno.EIO, "broken")


def test_broken_sensor_ends_no_run(tmp_path: Path) -> None:
    found = identify(tmp_path, device_id="it", labels={}, architecture="aarch64")
    spec = result_pb2.BenchmarkSpec(sample_hertz=0)
    around = Surroundings(AgentConfig(sys_root=tmp_path), found, spec, sensors=[Failing()])
    around.look()
    around.measurement_begins(WORKER)
    around.measurement_ends(WORKER)
    seen = around.end()
    assert seen.environment == board_pb2.Environment(throttling_readable=False)
    assert codes(seen.warnings) == []


@pytest.mark.parametrize("tree", sorted(path.name for path in BOARDS.iterdir() if path.is_dir()))
def test_every_board_can_be_watched(tree: str) -> None:
    """From its begin to its end, in the sampler's own thread."""
    found = identify(BOARDS / tree, device_id="it", labels={}, architecture="aarch64")
    around = Surroundings(AgentConfig(sys_root=BOARDS / tree), found)
    around.sample()
    around.idle_begins()
    around.idle_ends()
    around.worker_started(WORKER)
    around.measurement_begins(WORKER)
    around.measurement_ends(WORKER)
    seen = around.end(result_pb2.RunResult())
    assert seen.telemetry is not None
    assert [mark.label for mark in seen.telemetry.marks] == [
        "idle_begins",
        "idle_ends",
        "measurement_begins",
        "measurement_ends",
    ]
    end = seen.telemetry.marks[-1].time_seconds
    for series in seen.telemetry.series:
        assert len(series.times_seconds) == len(series.values) >= 1
        assert list(series.times_seconds) == sorted(series.times_seconds)
    sampled = {series.quantity: series.times_seconds[-1] for series in seen.telemetry.series}
    if "memory_available_bytes" in sampled:
        assert sampled["memory_available_bytes"] >= end, "the end of the measurement has its sample"
    assert seen.telemetry.cpu_seconds > 0
    assert seen.sample_hertz == seen.telemetry.rate_hertz == 10


def test_kinds_that_are_not_to_be_read_are_not(pi: Path) -> None:
    watch = Watch(pi, settings={"without": "raspberry_pi, thermal"})
    watch.begin()
    seen = watch.end()
    assert not seen.environment.throttling_readable
    assert not seen.environment.HasField("temperature_after_celsius")


def test_sensors_that_cost_too_much_are_told(pi: Path) -> None:
    """The CPU time of the sampler is real here, and the time that passes is not."""

    class Busy:
        name = "busy"
        child_cpu_seconds = 0.0

        def read(self) -> Iterable[Reading]:
            self.child_cpu_seconds += 0.5
            return []

    watch = Watch(pi, sensors=[Busy()])
    watch.begin()
    watch.sample()
    seen = watch.end()
    warning = only(seen, "sensors_costly")
    assert warning.severity == DOUBTFUL
    assert warning.evidence["cpu_share"] > 0.2


# --- power and idle


class Meter:
    """A rail at the board's input."""

    name = "meter"

    def __init__(self, clock: Clock, watts: float = 2.0, coverage: Coverage = Coverage.BOARD) -> None:
        self.watts = watts
        self.coverage = coverage

    def read(self) -> Iterable[Reading]:
        return [Reading("power_watts", "VDD_IN", self.watts, coverage=self.coverage)]


def test_energy_of_an_inference_is_what_the_idle_board_would_not_have_taken(pi: Path) -> None:
    meter = Meter(Clock())
    watch = Watch(pi, sensors=[meter])
    around = watch.around
    around._hertz = 10.0
    assert around.has_rail
    around._hertz = 0.0
    watch.clock.now += 1
    around.idle_begins()
    for _ in range(5):
        watch.sample()
    watch.clock.now += 1
    assert around.idle_ends() is None
    meter.watts = 6.0
    watch.begin()
    for _ in range(9):
        watch.sample()
    seen = watch.end(latency={"count": 100})
    assert seen.energy is not None
    assert seen.energy.rail == "VDD_IN"
    assert "the whole board" in seen.energy.method
    assert seen.energy.mean_watts == pytest.approx(6)
    assert seen.energy.idle_watts == pytest.approx(2)
    assert seen.energy.energy_joules == pytest.approx(60)
    assert seen.energy.energy_per_inference_joules == pytest.approx(0.4)
    assert seen.energy.total_energy_per_inference_joules == pytest.approx(0.6)
    low, high = seen.energy.energy_per_inference_low_joules, seen.energy.energy_per_inference_high_joules
    assert low <= 0.4 <= high
    assert seen.energy.inferences == 100


def test_samples_of_a_batch_each_have_their_energy(pi: Path) -> None:
    watch = Watch(pi, sensors=[Meter(Clock())])
    watch.begin()
    for _ in range(4):
        watch.sample()
    seen = watch.end(
        latency={"count": 10},
        environment=board_pb2.Environment(wall_seconds=5.0),
        scenario=scenario_pb2.ScenarioResult(throughput_hertz=16.0),
    )
    assert seen.energy is not None
    assert seen.energy.inferences == 80
    assert not seen.energy.HasField("energy_per_inference_joules"), "idle was not measured"


@pytest.mark.parametrize(("device", "has_energy"), [("cpu", False), ("edgetpu", False), ("cuda", True)])
def test_power_of_a_graphics_card_counts_only_where_it_has_a_part(
    pi: Path, device: str, has_energy: bool
) -> None:
    watch = Watch(pi, sensors=[Meter(Clock(), coverage=Coverage.DEVICE)], device=device)
    watch.begin()
    for _ in range(4):
        watch.sample()
    assert (watch.end(latency={"count": 10}).energy is not None) == has_energy


def test_idle_board_that_is_busy_is_noted(pi: Path) -> None:
    watch = Watch(pi)
    processor_time(pi, busy=1000, stolen=0, worker=0)
    watch.around.idle_begins()
    watch.clock.now += 3
    processor_time(pi, busy=1090, stolen=0, worker=0)
    warning = watch.around.idle_ends()
    assert warning is not None
    assert (warning.code, warning.severity) == ("idle_disturbed", NOTE)
    assert "0.30 of 4 processors" in warning.message


def test_thresholds_are_the_configurations(pi: Path) -> None:
    found = identify(pi, device_id="it", labels={}, architecture="aarch64")
    clock = Clock()
    config = AgentConfig(sys_root=pi, validity=ValidityConfig(load_doubtful=0.001, load_invalid=0.002))
    around = Surroundings(config, found, result_pb2.BenchmarkSpec(sample_hertz=0), clock=clock)
    processor_time(pi, busy=1000, stolen=0, worker=100)
    around.measurement_begins(WORKER)
    clock.now += 2
    processor_time(pi, busy=1202, stolen=0, worker=300)
    around.measurement_ends(WORKER)
    (warning,) = around.end().warnings
    assert (warning.code, warning.severity) == ("high_load", INVALID)
    assert warning.evidence["load_invalid_share"] == 0.002


def test_agent_that_waits_has_no_sensors_in_memory() -> None:
    """They are loaded when the first run begins."""
    program = (
        "import sys, boardbench.agent.serve\n"
        "names = ('surroundings', 'sampler', 'energy', 'sensors', 'doubts', 'timeline')\n"
        "print([name for name in names if 'boardbench.agent.board.' + name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
