"""Requirements: the language, the judge, and the commands that take them."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from boardbench.cli.require import judge, parse
from boardbench.cli.require_names import FLAGS, NAMES, Subject
from boardbench.v1 import placement_pb2, report_pb2, result_pb2


def verdict_on(text, subject):
    if isinstance(subject, report_pb2.ModelReport):
        return judge(parse(text, file=True), Subject.of_report(subject))
    return judge(parse(text), Subject.of_result(subject))


def held(text, subject):
    return verdict_on(text, subject).held


def words(text, subject):
    return verdict_on(text, subject).words


def counted(accelerated, on_cpu, unknown=0, **placement):
    result = result_pb2.RunResult()
    found = result.placement
    found.evidence = placement.pop("evidence", placement_pb2.EVIDENCE_PARTITION)
    verdict = placement_pb2.PLACEMENT_VERDICT_PARTLY
    if not accelerated:
        verdict = placement_pb2.PLACEMENT_VERDICT_NOT_ACCELERATED
    elif not on_cpu:
        verdict = placement_pb2.PLACEMENT_VERDICT_ACCELERATED
    found.verdict = placement.pop("verdict", verdict)
    found.accelerated_ops, found.cpu_ops = accelerated, on_cpu
    for unit, ops in ((1, on_cpu), (4, accelerated), (0, unknown)):
        if ops:
            found.units.add(unit=unit, ops=ops)
    return result


# The language


@pytest.mark.parametrize(
    "text",
    [
        "accelerated_ops>=95%",
        "accelerated_ops==64",
        " cpu_ops <= 8 ",
        "cpu-ops<=8",
        "no-fallback",
        "NO_FALLBACK",
        "verdict==accelerated",
        "verdict != not-accelerated",
        "p50<=5ms",
        "p99.9<5s",
        "p50_high<=5.5 ms",
        "p50<=1e-3s",
        "peak_rss<=200MiB",
        "peak_rss<=209715200",
        "fallback_share<10%",
        "fallback_share<0.1",
        "crossings<=2",
        "warnings=0",
        "no-standin",
    ],
)
def test_what_can_be_asked(text):
    assert parse(text).text == text.strip()


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ("", "is no requirement"),
        (">=5", "is no requirement"),
        ("p50<=", "compares with nothing"),
        ("p50", "compares with nothing"),
        ("p50<=5", "a time with its unit"),
        ("p50<=5MiB", "a time with its unit"),
        ("p50<=-5ms", "a time with its unit"),
        ("p50<=5ms or 6ms", "a time with its unit"),
        ("p0<=5ms", "there is no 'p0'"),
        ("accelerated_op>=5", "did you mean 'accelerated_ops'"),
        ("latency<=5ms", "There are no-fallback, no-standin, valid, not-invalid, accelerated_ops"),
        ("latency<=5ms", "p50, p90, p99.9"),
        ("accelerated_ops>=101%", "a number (64), or with % (95%)"),
        ("accelerated_ops>=many", "a number (64)"),
        ("peak_rss<=5ms", "a size"),
        ("fallback_share<10", "a share with % (10%), or from 0 to 1"),
        ("verdict==fast", "one of accelerated, partly, not_accelerated, contradicted"),
        ("verdict==unknown", "one of accelerated"),
        ("verdict>=partly", "neither more nor less"),
        ("no-fallback==1", "stands by itself"),
        ("fallback", "did you mean"),
    ],
)
def test_what_can_not_be_asked_is_told_with_what_can(text, say):
    with pytest.raises(ValueError) as raised:
        parse(text)
    assert say in str(raised.value)


@pytest.mark.parametrize("text", ["p50<=5ms", "peak_rss<=5MiB", "fallback_share<1%", "no-standin"])
def test_a_file_is_not_asked_what_only_a_run_tells(text):
    with pytest.raises(ValueError, match=r"for a file|no_standin"):
        parse(text, file=True)


@given(st.text(max_size=40))
@example("p50<=" + "9" * 400 + "ms")
@example("p50<=1e99ms")
@example("p" + "9" * 40 + "<=1ms")
@example("\x00p50<=1ms")
def test_any_text_is_taken_or_refused(text):
    try:
        requirement = parse(text)
    except ValueError:
        return
    judge(requirement, Subject.of_result(result_pb2.RunResult()))


def test_names_are_told_apart():
    every = [flag.name for flag in FLAGS] + [name.name for name in NAMES]
    assert len(every) == len(set(every))


# The judge


@pytest.mark.parametrize(
    ("text", "accelerated", "on_cpu", "holds"),
    [
        ("accelerated_ops>=95%", 95, 5, True),
        ("accelerated_ops>=95%", 949, 51, False),
        ("accelerated_ops>=95%", 9499999, 500001, False),
        ("accelerated_ops>95%", 95, 5, False),
        ("accelerated_ops==64", 64, 1, True),
        ("accelerated_ops!=64", 64, 1, False),
        ("accelerated_ops!=63", 64, 1, True),
        ("accelerated_ops=100%", 64, 0, True),
        ("cpu_ops<=8", 64, 8, True),
        ("cpu_ops<8", 64, 8, False),
        ("cpu_ops<=10%", 90, 10, True),
        ("no-fallback", 64, 0, True),
        ("no-fallback", 64, 1, False),
        ("no-fallback", 0, 64, False),
        ("verdict==accelerated", 64, 0, True),
        ("verdict==partly", 64, 1, True),
        ("verdict!=partly", 64, 1, False),
        ("verdict!=not_accelerated", 64, 1, True),
        ("fallback_share<10%", 64, 0, True),
        ("fallback_time<=0ms", 64, 0, True),
    ],
)
def test_ops_are_counted(text, accelerated, on_cpu, holds):
    assert held(text, counted(accelerated, on_cpu)) is holds


@pytest.mark.parametrize(
    "text",
    [
        *("accelerated_ops>=0", "accelerated_ops!=5", "cpu_ops<=99999", "cpu_ops>=0%", "no-fallback"),
        *("verdict==partly", "verdict!=partly", "fallback_share<=100%", "fallback_share_high<=1"),
        *("crossings>=0", "crossing_bytes>=0", "p50<=1000s", "p50_low>=0s", "mean<=1min", "stdev>=0s"),
        *("first_inference<=9min", "create<=9s", "import<=9s", "peak_rss<=9TB", "model_rss>=0", "min>=0s"),
        *("model_size>=0", "parameters_cached>=0", "parameters_streamed<=9TB", "max<=9min"),
    ],
)
def test_what_is_not_known_holds_nothing(text):
    for result in (result_pb2.RunResult(), counted(5, 5, evidence=placement_pb2.EVIDENCE_PREDICTION)):
        verdict = verdict_on(text, result)
        assert not verdict.held
        assert "not known, and so it does not hold" in verdict.words


@pytest.mark.parametrize("text", ["accelerated_ops>=1", "cpu_ops==0", "no-fallback", "fallback_share<10%"])
def test_what_the_evidence_denies_holds_nothing(text):
    result = counted(31, 0, verdict=placement_pb2.PLACEMENT_VERDICT_CONTRADICTED)
    assert not held(text, result)
    assert "contradicts itself" in words(text, result)
    assert held("verdict==contradicted", result)


def test_ops_of_no_known_unit_count_against_every_claim():
    result = counted(90, 6, unknown=4)
    assert held("accelerated_ops>=90%", result)
    assert not held("accelerated_ops>=91%", result), "94 % at most, but 90 % is all that is known"
    assert not held("cpu_ops<=6", result)
    assert held("cpu_ops<=10", result)
    assert not held("cpu_ops!=8", result)
    assert held("cpu_ops!=11", result)
    assert words("cpu_ops<=6", result) == "6 to 10 of 100 ops (6 to 10 %)"
    assert not held("no-fallback", counted(90, 0, unknown=4))


def test_a_bound_is_exact_where_doubles_are_not():
    result = result_pb2.RunResult()
    result.latency.count = 100
    result.latency.percentiles.add(percentile=50, seconds=0.005, low_seconds=0.0049, high_seconds=0.0051)
    result.latency.percentiles.add(percentile=99.9, seconds=0.3, low_seconds=0.1, high_seconds=0.7)
    assert held("p50<=5ms", result)
    assert held("p50>=5000us", result)
    assert held("p50==0.005s", result)
    assert not held("p50<5ms", result)
    assert not held("p50_high<=5ms", result)
    assert held("p50_low<5000µs", result)
    assert held("p99.9<=0.3s", result)
    assert words("p50<4.9ms", result) == "5.00000 ms"
    assert "100 inferences tell p50, p99.9" in words("p99<=1s", result)


def test_memory_is_measured_in_any_unit():
    result = result_pb2.RunResult()
    result.memory.peak_rss_bytes = 200 << 20
    assert held("peak_rss<=200MiB", result)
    assert held("peak_rss<=209.7152MB", result)
    assert not held("peak_rss<200mib", result)
    assert "200.0 MiB (209,715,200 bytes)" in words("peak_rss<1kB", result)


def test_a_figure_that_is_no_number_holds_nothing():
    result = counted(64, 8)
    result.placement.fallback_cost.share = float("nan")
    assert not held("fallback_share<=100%", result)


def test_cost_and_crossings_are_read(sample):
    result = sample("tpu_partly")
    assert held("fallback_share<=34%", result)
    assert not held("fallback_share<34%", result)
    assert not held("fallback_share_high<=0.36", result)
    assert held("fallback_time<=4.1ms", result)
    assert held("crossings==2", result)
    assert held("crossing_bytes<=108KiB", result)
    assert held("parameters_streamed<=2368", result)
    assert held("warnings==0", result)
    assert "where a compiled subgraph counts as one" in words("accelerated_ops>=95%", result)


def test_a_compiled_file_does_not_tell_how_many_ops_it_took():
    report = report_pb2.ModelReport(size_bytes=10)
    report.placement.evidence = placement_pb2.EVIDENCE_STATIC
    report.placement.verdict = placement_pb2.PLACEMENT_VERDICT_PARTLY
    report.placement.cpu_ops = 8
    assert held("cpu_ops<=8", report)
    assert held("model_size<=10B", report)
    assert not held("accelerated_ops>=1", report)
    assert "--original" in words("accelerated_ops>=1", report)
    assert not held("cpu_ops<=50%", report)
    assert not held("no-fallback", report)
    report.placement.cpu_ops = 0
    report.placement.verdict = placement_pb2.PLACEMENT_VERDICT_ACCELERATED
    assert held("no-fallback", report)
    report.edgetpu.parameters_streamed_bytes = 5
    assert held("parameters_streamed<=5", report)


def test_a_prediction_counts_for_a_file_and_says_what_it_is(capsys):
    from boardbench.cli.require import holds
    from boardbench.cli.terminal import Output

    report = report_pb2.ModelReport()
    report.placement.evidence = placement_pb2.EVIDENCE_PREDICTION
    report.placement.verdict = placement_pb2.PLACEMENT_VERDICT_ACCELERATED
    report.placement.accelerated_ops, report.placement.cpu_ops = 31, 0
    requirements = [parse("no-fallback", file=True), parse("accelerated_ops==31", file=True)]
    assert holds(requirements, Subject.of_report(report), Output(json=False, quiet=False))
    assert capsys.readouterr().err.count("(predicted by rule, not seen)") == 2


# The commands


def test_a_push_that_holds_is_0_and_says_so(board, boardbench, model_file):
    done = boardbench(
        "push", model_file, "--to", f"127.0.0.1:{board.port}", "--format", "json",
        "--require", "p50<=5ms", "--require", "peak_rss<=200MiB",
    )  # fmt: skip
    assert done.code == 0
    assert json.loads(done.out)["status"] == "RUN_STATUS_SUCCEEDED", "stdout is the same as without"
    assert done.err.splitlines() == [
        "boardbench: required p50<=5ms: held: 1.23400 ms",
        "boardbench: required peak_rss<=200MiB: held: 48.3 MiB (50,690,777 bytes)",
    ]
    quiet = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}", "-q", "--require", "p50<=5ms")
    assert (quiet.code, quiet.err) == (0, "")


def test_a_push_that_does_not_hold_is_1_with_the_ops_to_blame(board, boardbench, model_file, sample):
    board.script = lambda board, run: run.finish(sample("tpu_partly"))
    done = boardbench(
        "push", model_file, "--to", f"127.0.0.1:{board.port}", "--format", "json", "-q",
        "--require", "no-fallback", "--require", "p50<=5ms", "--require", "crossings<=2",
    )  # fmt: skip
    assert done.code == 1
    assert json.loads(done.out)["placement"]["cpu_ops"] == 4
    assert done.err.splitlines() == [
        "boardbench: required no-fallback: NOT HELD: 4 ops are on the CPU",
        "boardbench: required p50<=5ms: NOT HELD: 12.1000 ms",
        "  not on the accelerator, by profiled, root causes first:",
        "    #2 ARG_MAX  center  CPU  1.10000 ms  root cause: Operation is working on an unsupported data "
        "type (INT64 output)",
        "    #0 CAST  casted  CPU  120.000 µs  root cause: Operation is working on an unsupported data "
        "type (INT32)",
        "    #3 GATHER_ND  keypoints  CPU  2.90000 ms  because of another op",
        "    #4 MUL  scaled  CPU  because of another op: More than one subgraph is not supported",
    ]


def test_each_of_several_results_is_judged_by_itself(board, another_board, boardbench, model_file, sample):
    another_board.script = lambda board, run: run.finish(sample("tpu_partly"))
    done = boardbench(
        "push", model_file, "--to", f"127.0.0.1:{board.port}", "--to", f"127.0.0.1:{another_board.port}",
        "--require", "p50<=5ms",
    )  # fmt: skip
    assert done.code == 1
    assert "model.tflite on test-board: required p50<=5ms: held" in done.err
    assert "on pi5: required p50<=5ms: NOT HELD: 12.1000 ms" in done.err


def test_a_stand_in_is_named_with_every_judgement(board, boardbench, model_file, sample):
    board.script = lambda board, run: run.finish(sample("emulated_standin"))
    to = ("--to", f"127.0.0.1:{board.port}")
    done = boardbench("push", model_file, *to, "--require", "no-fallback", "--require", "no-standin")
    assert done.code == 1
    assert "no-fallback: held: nothing is on the CPU (by a stand-in or emulator, not by" in done.err
    assert "no-standin: NOT HELD: qemu-user, standin-edgetpu had a part in it\n" in done.err


def test_a_failed_run_holds_nothing(board, boardbench, model_file, sample):
    board.script = lambda board, run: run.finish(sample("failed_sigsegv"))
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}", "--require", "p50<=5ms")
    assert done.code == 1
    assert "NOT HELD: not known, and so it does not hold" in done.err


@pytest.mark.parametrize(
    ("command", "options", "say"),
    [
        ("push", ("--to", "127.0.0.1:1", "--require", "p50<=5"), "a time with its unit"),
        ("push", ("--to", "127.0.0.1:1", "--require", "speed>1"), "there is no 'speed'"),
        ("push", ("--to", "127.0.0.1:1", "--require", "p50<=5s", "--no-run"), "there will be none yet"),
        ("push", ("--to", "127.0.0.1:1", "--require", "p50<=5s", "--detach"), "`boardbench watch`"),
        ("run", ("--require", "no-such"), "there is no 'no_such'"),
    ],
)
def test_a_mistake_starts_nothing(boardbench, model_file, command, options, say):
    done = boardbench(command, model_file, *options)
    assert done.code == 2
    assert say in " ".join(done.err.split())


def test_a_run_that_is_followed_is_judged_too(board, boardbench, model_file):
    to = ("--to", f"127.0.0.1:{board.port}")
    assert boardbench("push", model_file, *to).code == 0
    (run_id,) = board.runs
    assert boardbench("watch", run_id, *to, "--require", "p50<=5ms").code == 0
    done = boardbench("watch", run_id, *to, "--require", "p50<=1ms")
    assert done.code == 1
    assert "NOT HELD: 1.23400 ms" in done.err


# What a measurement is worth


@pytest.mark.parametrize(
    ("validity", "valid", "not_invalid"),
    [
        ("VALIDITY_VALID", True, True),
        ("VALIDITY_DOUBTFUL", False, True),
        ("VALIDITY_INVALID", False, False),
        ("VALIDITY_UNSPECIFIED", False, False),
    ],
)
def test_a_gate_can_ask_what_the_measurement_is_worth(validity, valid, not_invalid):
    result = result_pb2.RunResult(validity=result_pb2.Validity.Value(validity))
    assert judge(parse("valid"), Subject.of_result(result)).held is valid
    assert judge(parse("not-invalid"), Subject.of_result(result)).held is not_invalid


def test_it_says_by_which_warnings_and_leaves_notes_out():
    result = result_pb2.RunResult(validity=result_pb2.VALIDITY_INVALID)
    result.warnings.add(code="throttled", severity=result_pb2.SEVERITY_INVALID)
    result.warnings.add(code="periodic_slow", severity=result_pb2.SEVERITY_NOTE)
    assert judge(parse("valid"), Subject.of_result(result)).words == "invalid (throttled)"
    assert judge(parse("warnings==1"), Subject.of_result(result)).held


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("energy<=6mJ", True),
        ("energy<5600uJ", False),
        ("energy_high<=0.0057J", True),
        ("throughput>=29.9", True),
        ("deadline_misses==3", True),
        ("slowdown<=1.05", False),
        ("interference<=1.25", True),
    ],
)
def test_energy_and_scenario_can_be_asked_for(text, held):
    result = result_pb2.RunResult()
    result.energy.energy_per_inference_joules = 0.0056
    result.energy.energy_per_inference_high_joules = 0.0057
    result.scenario.throughput_hertz = 29.98
    result.scenario.deadline_misses = 3
    result.scenario.slowdown_ratio = 1.31
    result.interference.slowdown_ratio = 1.246
    assert judge(parse(text), Subject.of_result(result)).held is held
    assert not judge(parse(text), Subject.of_result(result_pb2.RunResult())).held, "unknown holds nothing"


def test_an_energy_needs_its_unit():
    with pytest.raises(ValueError, match="an energy with its unit"):
        parse("energy<=5")
