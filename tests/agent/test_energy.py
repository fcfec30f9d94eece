"""Energy of a stretch, and of an inference: right to the edge, with bounds that hold the truth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from boardbench.agent.board import energy
from boardbench.agent.board.sampler import Mark, Sampler, Series
from boardbench.agent.board.sensor import Coverage, Reading
from boardbench.agent.board.sensors import find_all

BOARDS = Path(__file__).resolve().parent.parent / "boards"


def series(
    points: Iterable[tuple[float, float]],
    source: str = "VDD_IN",
    coverage: Coverage | None = Coverage.MODULE,
    *,
    counter: bool = False,
) -> Series:
    times, values = zip(*points, strict=True)
    quantity = "energy_joules" if counter else "power_watts"
    return Series(quantity, source, counter, coverage, times, values)


def rail(points: Iterable[tuple[float, float]], *, counter: bool = False) -> energy.Rail:
    return energy.Rail("VDD_IN", Coverage.MODULE, series(points, counter=counter))


def sampled(
    watts: Callable[[float], float], seconds: float, hertz: float = 10.0
) -> list[tuple[float, float]]:
    return [(at / hertz, watts(at / hertz)) for at in range(int(seconds * hertz) + 1)]


def keyed(*each: Series) -> dict[tuple[str, str], Series]:
    return {(one.quantity, one.source): one for one in each}


# --- a stretch


def test_constant_power() -> None:
    found = energy.over(rail(sampled(lambda _: 5.0, 20)), 3.03, 13.03)
    assert found is not None
    assert found.joules == pytest.approx(50.0)
    assert (found.low_joules, found.high_joules) == (pytest.approx(50.0), pytest.approx(50.0))
    assert (found.watts, found.samples) == (pytest.approx(5.0), 100)
    assert found.unchanged


def test_a_ramp_is_exact_also_between_samples() -> None:
    """Trapezoids are exact on a line, and so is the interpolation at the edges."""
    found = energy.over(rail(sampled(lambda t: 2.0 + 0.5 * t, 20)), 3.033, 13.077)
    assert found is not None
    exact = 2.0 * 10.044 + 0.25 * (13.077**2 - 3.033**2)
    assert found.joules == pytest.approx(exact, rel=1e-9)
    assert found.low_joules < exact < found.high_joules


def test_a_curve_is_nearly_so() -> None:
    found = energy.over(rail(sampled(lambda t: 6 + 2 * math.sin(t), 20)), 1.234, 15.678)
    assert found is not None
    exact = 6 * (15.678 - 1.234) - 2 * (math.cos(15.678) - math.cos(1.234))
    assert found.joules == pytest.approx(exact, rel=2e-4)


def test_samples_need_not_be_even() -> None:
    drawn = random.Random(3)
    at, points = 0.0, []
    while at < 30:
        points.append((at, 1.0 + 0.2 * at))
        at += drawn.uniform(0.02, 0.2)
    found = energy.over(rail(points), 2.0, 28.0)
    assert found is not None
    assert found.joules == pytest.approx(26 + 0.1 * (28**2 - 2**2), rel=1e-9)


def test_a_step_near_the_edge_is_within_the_bounds() -> None:
    """Idle at 2 W until 5 s, then 8 W. Where between two samples it rose is not known."""
    for offset in (0.0, 0.02, 0.05, 0.08):
        begin = 5.0 + offset
        points = sampled(lambda t, begin=begin: 8.0 if t >= begin else 2.0, 20)
        found = energy.over(rail(points), begin, begin + 10)
        assert found is not None
        assert found.low_joules <= 80.0 <= found.high_joules
        assert found.high_joules - found.low_joules < 2.0


def test_a_counter_is_its_difference() -> None:
    found = energy.over(rail(sampled(lambda t: 100 + 7.0 * t, 20), counter=True), 3.03, 13.03)
    assert found is not None
    assert found.joules == pytest.approx(70.0)
    assert found.low_joules == pytest.approx(7.0 * 9.9)
    assert found.high_joules == pytest.approx(7.0 * 10.1)
    assert not found.unchanged


def test_bounds_of_a_counter_are_certain() -> None:
    """Whatever the power does between samples."""
    drawn = random.Random(5)
    for _ in range(200):
        at, joules, points, exact = 0.0, 0.0, [], {}
        begin, end = drawn.uniform(1, 2), drawn.uniform(4, 5)
        while at < 6:
            # In steps of a millisecond, read now and then.
            joules += drawn.choice((0.001, 0.02))
            at = round(at + 0.001, 6)
            for edge in (begin, end):
                if edge <= at and edge not in exact:
                    exact[edge] = joules
            if drawn.random() < 0.02:
                points.append((at, joules))
        found = energy.over(rail(points, counter=True), begin, end)
        if found is None:
            continue
        assert found.low_joules - 0.02 <= exact[end] - exact[begin] <= found.high_joules + 0.02


@pytest.mark.parametrize(
    ("begin", "end"),
    [(5.0, 5.0), (6.0, 5.0), (5.01, 5.09), (-10.0, 5.0), (5.0, 40.0), (30.0, 40.0), (-5.0, -1.0)],
)
def test_what_was_not_watched_is_not_told(begin: float, end: float) -> None:
    points = sampled(lambda _: 5.0, 20)
    assert energy.over(rail(points), begin, end) is None
    assert energy.over(rail(points, counter=True), begin, end) is None


def test_an_edge_just_beyond_the_samples_is_taken_as_they_are() -> None:
    found = energy.over(rail(sampled(lambda _: 5.0, 20)), 10.0, 20.1)
    assert found is not None
    assert found.joules == pytest.approx(5 * 10.1)
    counted = energy.over(rail(sampled(lambda t: 5.0 * t, 20), counter=True), 10.0, 20.1)
    assert counted is not None
    assert counted.joules == pytest.approx(5 * 10.1)
    assert counted.low_joules == pytest.approx(50.0)
    assert counted.high_joules == pytest.approx(51.0)


def test_a_hole_in_the_samples_is_not_bridged_at_an_edge() -> None:
    points = [point for point in sampled(lambda _: 5.0, 20) if not 4.0 < point[0] < 8.0]
    assert energy.over(rail(points), 5.0, 15.0) is None
    assert energy.over(rail(points), 8.0, 15.0) is not None


@pytest.mark.parametrize("likeness", [0.0, 0.5, 0.9])
def test_bounds_hold_the_truth_as_often_as_they_say(likeness: float) -> None:
    """Noise around 5 W, neighbours alike: the interval of the mean holds 5 W in 95 of 100."""
    drawn = random.Random(int(likeness * 10) + 1)
    held = trials = 0
    for _ in range(400):
        noise, points = drawn.gauss(0, 1), []
        for at in range(301):
            noise = likeness * noise + math.sqrt(1 - likeness**2) * drawn.gauss(0, 1)
            points.append((at / 10, 5.0 + 0.5 * noise))
        found = energy.over(rail(points), 0.5, 29.5)
        assert found is not None
        trials += 1
        held += found.low_watts <= 5.0 <= found.high_watts
    assert held / trials >= 0.93


def test_more_samples_say_more() -> None:
    drawn = random.Random(9)
    points = sampled(lambda _: drawn.gauss(5, 0.5), 120)
    widths = []
    for end in (10.0, 100.0):
        found = energy.over(rail(points), 1.0, end)
        assert found is not None
        widths.append(found.high_watts - found.low_watts)
    assert widths[1] < widths[0] / 2


# --- which rail


def test_the_widest_rail_counts_and_of_equals_the_counter() -> None:
    points = [(0.0, 1.0), (1.0, 1.0)]
    found = energy.rails(
        keyed(
            series(points, "core", Coverage.RAIL, counter=True),
            series(points, "package-0", Coverage.CHIP, counter=True),
            series(points, "gpu0", Coverage.DEVICE),
            series(points, "psys", Coverage.BOARD, counter=True),
            series(points, "BAT0", Coverage.BOARD),
            Series("temperature_celsius", "cpu", False, None, [0.0], [50.0]),
        )
    )
    assert [each.name for each in found] == ["psys", "BAT0", "package-0", "gpu0", "core"]
    chosen = energy.choose(found)
    assert chosen is not None
    assert (chosen.name, chosen.counts) == ("psys", True)


def test_on_an_accelerator_its_own_supply_comes_before_the_processor() -> None:
    points = [(0.0, 1.0), (1.0, 1.0)]
    both = keyed(
        series(points, "package-0", Coverage.CHIP, counter=True), series(points, "gpu0", Coverage.DEVICE)
    )
    assert [each.name for each in energy.rails(both)] == ["package-0", "gpu0"]
    assert [each.name for each in energy.rails(both, on_accelerator=True)] == ["gpu0", "package-0"]
    both |= keyed(series(points, "powerz", Coverage.BOARD))
    assert energy.rails(both, on_accelerator=True)[0].name == "powerz"


def test_parts_are_never_taken_for_the_whole() -> None:
    points = [(0.0, 1.0), (1.0, 1.0)]
    one = energy.rails(keyed(series(points, "ina226", Coverage.RAIL)))
    assert energy.choose(one) == one[0]
    several = energy.rails(
        keyed(series(points, "ina226", Coverage.RAIL), series(points, "ina219", Coverage.RAIL))
    )
    assert energy.choose(several) is None
    assert energy.why_none(several).endswith("name the one that counts: ina219, ina226")
    named = energy.choose(several, "ina219")
    assert named is not None
    assert named.name == "ina219"
    assert energy.choose(several, "VDD_IN") is None
    assert "no rail 'VDD_IN' here; there are ina219, ina226" in energy.why_none(several, "VDD_IN")
    assert energy.choose([]) is None
    assert "nothing on this board" in energy.why_none([])


@pytest.mark.parametrize(
    ("tree", "name", "watts"),
    [
        ("jetson_orin_nano", "VDD_IN", 9.39),
        ("jetson_agx_orin", "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", 22.4038),
        ("jetson_nano", "POM_5V_IN", 3.648),
        ("raspberry_pi_5", "PMIC rails", 3.9178),
        ("mini_pc_usb_meter", "powerz", 10.0931),
        ("laptop_amd", "BAT1", 10.3929),
        ("laptop_intel", "psys", 0.0),
        ("server_two_sockets", "power_meter", 212.0),
        ("kvm_guest", None, None),
    ],
)
def test_the_rail_of_a_board(tree: str, name: str | None, watts: float | None) -> None:
    clock = [0.0]
    made = Sampler(find_all(BOARDS / tree), clock=lambda: clock[0], cost_share=0)
    made.begin()
    made.mark("measurement_begins")
    for _ in range(40):
        made.sample()
        clock[0] += 0.1
    made.mark("measurement_ends")
    found = energy.per_inference(made.series(), made.marks, 100)
    assert (found is None) == (name is None)
    if found is not None:
        assert found.run.rail.name == name
        assert found.run.watts == pytest.approx(watts, abs=1e-3)


# --- an inference


def marks(*each: tuple[float, str]) -> list[Mark]:
    return [Mark(seconds, label) for seconds, label in each]


WHOLE = marks(
    (1.0, "idle_begins"), (11.0, "idle_ends"), (15.0, "measurement_begins"), (35.0, "measurement_ends")
)


LATE = marks((50.0, "measurement_begins"), (60.0, "measurement_ends"))


def test_idle_is_subtracted() -> None:
    points = sampled(lambda t: 7.5 if 15.0 <= t < 35.0 else 3.0, 40)
    found = energy.per_inference(keyed(series(points)), WHOLE, 1000)
    assert found is not None
    assert found.joules is not None
    assert found.low_joules is not None
    assert found.high_joules is not None
    assert found.idle is not None
    assert found.joules == pytest.approx((7.5 - 3.0) * 20 / 1000, rel=0.01)
    assert found.low_joules <= 0.09 <= found.high_joules
    assert found.total_joules == pytest.approx(7.5 * 20 / 1000, rel=0.01)
    assert found.idle.watts == pytest.approx(3.0)
    assert found.method == (
        "the module without its carrier board, its power integrated over time, 201 samples; "
        "idle before the run subtracted (3 W over 10 s)"
    )


def test_without_idle_only_the_whole_is_told() -> None:
    points = sampled(lambda t: 100 + 7.5 * t, 40)
    found = energy.per_inference(keyed(series(points, counter=True)), WHOLE[2:], 1000)
    assert found is not None
    assert (found.joules, found.low_joules, found.high_joules, found.idle) == (None, None, None, None)
    assert found.total_joules == pytest.approx(0.15)
    assert found.method.endswith("difference of its energy counter, 201 samples; idle not measured")


@pytest.mark.parametrize("watts", [0.1, 9.39, 3.2170001])
def test_a_rail_that_stands_still_leaves_nothing_and_no_residue_of_rounding(watts: float) -> None:
    found = energy.per_inference(keyed(series(sampled(lambda _: watts, 40))), WHOLE, 7)
    assert found is not None
    assert (found.joules, found.low_joules, found.high_joules) == (0.0, 0.0, 0.0)


def test_noise_alone_is_no_energy() -> None:
    """A board that takes what it took idle: the bounds hold zero."""
    drawn = random.Random(1)
    held = 0
    for _ in range(200):
        points = sampled(lambda _: drawn.gauss(3.0, 0.2), 40)
        found = energy.per_inference(keyed(series(points)), WHOLE, 1000)
        assert found is not None
        assert found.low_joules is not None
        assert found.high_joules is not None
        held += found.low_joules <= 0.0 <= found.high_joules
    assert held >= 190


@pytest.mark.parametrize(
    ("data", "when", "inferences"),
    [
        ({}, WHOLE, 10),
        (keyed(series(sampled(lambda _: 1.0, 40))), WHOLE, 0),
        (keyed(series(sampled(lambda _: 1.0, 40))), WHOLE[:2], 10),
        (keyed(series(sampled(lambda _: 1.0, 40))), LATE, 10),
        (keyed(series(sampled(lambda _: 1.0, 40), coverage=None)), WHOLE, 10),
    ],
)  # fmt: skip
def test_what_can_not_be_told_is_none(
    data: dict[tuple[str, str], Series], when: list[Mark], inferences: int
) -> None:
    assert energy.per_inference(data, when, inferences) is None


def test_the_last_measurement_counts() -> None:
    several = marks(
        (0.0, "measurement_ends"), (1.0, "measurement_begins"), (2.0, "measurement_ends"),
        (3.0, "measurement_begins"), (4.0, "measurement_ends"), (5.0, "measurement_begins"),
    )  # fmt: skip
    assert energy.window(several, "measurement") == (3.0, 4.0)
    assert energy.window(several, "idle") is None


def test_a_thinned_series_tells_the_same() -> None:
    """From the sampler to the inference: an hour at ten a second, idle first."""
    clock = [0.0]

    class Meter:
        name = "meter"

        def read(self) -> Iterable[Reading]:
            busy = 600.0 <= clock[0] < 3600.0
            watts = 6.0 + math.sin(clock[0]) if busy else 2.0 + 0.1 * math.sin(clock[0])
            yield Reading("power_watts", "supply", watts, coverage=Coverage.BOARD)
            counted = 2.0 * clock[0] + (4.0 * (clock[0] - 600.0) if busy else 0.0)
            yield Reading("energy_joules", "counter", counted, True, Coverage.BOARD)

    made = Sampler([Meter()], clock=lambda: clock[0], cost_share=0, points=512)
    made.begin()
    for label, seconds in (("idle_begins", 600.0), ("measurement_begins", 3000.0)):
        made.mark(label)
        end = clock[0] + seconds
        while clock[0] < end - 0.05:
            made.sample()
            clock[0] = round(clock[0] + 0.1, 6)
        made.mark(label.replace("begins", "ends"))
    data = made.series()
    assert len(data["power_watts", "supply"].times) < 1100
    for wanted in ("supply", "counter"):
        found = energy.per_inference(data, made.marks, 10_000, wanted=wanted)
        assert found is not None
        assert found.joules is not None
        assert found.joules == pytest.approx(4.0 * 3000 / 10_000, rel=2e-3)
