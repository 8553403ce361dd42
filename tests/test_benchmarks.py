"""The figures that benchmarks report, the rule, the table, and the parts of the two commands."""

import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import accuracy, contenders, device, known, report, table, timing
from benchmarks.contenders import PLAIN, Contender

ROOT = pathlib.Path(__file__).parents[1]
FIELDS = {"name", "ms", "rival", "rival_ms", "speedup", "max_difference", "floor_ms"}


def fail(x):
    raise NotImplementedError("there is no such sum")


def test_a_case_for_each_rival():
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    every = {
        "sum": Contender(lambda x: x.sum(-1), (x,)),
        "dot": Contender(lambda x: x @ jnp.ones(3), (x,)),
        "the same": Contender(lambda x: x.sum(-1), (x,), implementation=PLAIN[0]),
        "more": Contender(lambda x: x.sum(-1) + 1e-3, (x,), implementation="fast"),
        "host": Contender(lambda x: [row.sum() + 1 for row in x], (x,), on_host=True),
        "broken": Contender(fail, (x,)),
    }
    expected = accuracy.in_float32(every["sum"])
    cases = {case["rival"]: case for case in timing.compare("rows", every, expected=expected)}
    assert list(cases) == list(every)[1:]
    for case in cases.values():
        assert case.keys() >= FIELDS and case["max_difference"] == 0
        assert case["relative_errors"] == [0] and case["same_bits"]
    assert cases["dot"]["speedup"] == pytest.approx(cases["dot"]["rival_ms"] / cases["dot"]["ms"])
    assert cases["the same"]["speedup"] == 1
    assert 1e-5 < cases["more"]["rival_relative_errors"][0] < 1e-3
    assert [name for name, case in cases.items() if "rival_passes" in case] == ["more"]
    assert cases["more"]["rival_passes"] is False
    assert cases["broken"]["rival_error"].startswith("NotImplementedError: there is no such sum")
    (case,) = timing.compare("none", {"broken": Contender(fail, (x,)), "sum": every["sum"]})
    assert case["ms"] is None and "no such sum" in case["error"]


def test_without_what_is_expected_results_are_compared_with_those_of_rivals():
    x = jnp.ones((2, 3))
    every = {
        "sum": Contender(lambda x: x.sum(-1), (x,)),
        "host": Contender(lambda x: [row.sum() + 1 for row in x], (x,), on_host=True),
        "other": Contender(lambda x: x, (x,), same=False),
    }
    differences = [case["max_difference"] for case in timing.compare("rows", every)]
    assert differences == [1, None]


def test_value_and_gradients_in_some_arguments():
    run = contenders.value_and_gradients(lambda n, x, y: n * x * y, 1, 2)
    out, (dx, dy) = run(*(jnp.asarray(x) for x in (2.0, 3.0, 5.0)))
    assert (out, dx, dy) == (30, 30 * 10, 30 * 6)


def test_other_bits_and_large_errors_do_not_agree():
    good, bad = jnp.ones(4), jnp.ones(4).at[2].set(1.001)
    steady = accuracy.agreement(lambda n: good, good, good)
    assert steady == {"relative_errors": [0], "same_bits": True}
    assert accuracy.agrees(steady, "float32", "fast")
    race = accuracy.agreement(lambda n: bad if n == 10 else good, good, good)
    assert not race["same_bits"] and not accuracy.agrees(race, "float32", "fast")
    wrong = accuracy.agreement(lambda n: bad, bad, good)
    assert wrong["same_bits"] and not accuracy.agrees(wrong, "float32", "fast")
    assert accuracy.agrees(wrong, "bfloat16", "fast")
    nan = accuracy.agreement(lambda n: good * jnp.nan, good * jnp.nan, good)
    assert nan["same_bits"] and not accuracy.agrees(nan, "bfloat16", "fast")


def test_kernels_of_a_gpu_are_added_up_by_name(monkeypatch):
    each = [("sum", 0.5), ("sort", 2.0), ("sum", 0.25)]
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing.profiler, "measure", lambda f, aggregate: lambda *a: (f(*a), each))
    assert timing.kernel_times(jnp.sin, (jnp.ones(2),)) == {
        "kernel_ms": 2.75,
        "kernels": 3,
        "longest": {"sort": [1, 2.0], "sum": [2, 0.75]},
    }
    assert timing.kernel_times(fail, (jnp.ones(2),))["kernel_error"].startswith("NotImplemented")


@pytest.mark.skipif(sys.platform != "linux", reason="no such option of the C library")
def test_what_is_freed_stays_with_the_process():
    """A second array of 128 MB meets the pages of the first one, already cleared."""
    code = """
import resource, numpy as np
from benchmarks import report

def faults():
    np.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

report._keep_memory()
print(-faults() + faults())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100


def case(name="sum", passes=None, **figures):
    row = {"name": name, "ms": 1.5, "rival": "b", "rival_ms": None, "speedup": None}
    row |= {"max_difference": 1e-6, "floor_fraction": 0.1} | figures
    return row if passes is None else row | {"rival_passes": passes}


def suite(small):
    assert small
    yield case("sum of 4", True)
    yield case("sum of 8", True)
    raise FloatingPointError("after two cases")


def test_rows_are_kept_as_they_come(tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.json"
    failures = report._report({"sums": suite, "more": suite}, True, out, rows, None)
    assert failures == 2
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["part"] for row in kept] == ["sums"] * 3 + ["more"] * 3 + ["rule"]
    assert kept[2]["statement"] == "sums: failed with FloatingPointError: after two cases"
    assert kept[-1]["statement"] == "rule: b passes for sum (4 of 4 cases)"
    read = table.read(rows)
    whole = json.loads(out.read_text())
    assert whole == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in read["cases"]] == [row["name"] for row in whole["cases"]]
    assert read["statements"] == whole["statements"]


def test_the_report_is_there_as_it_grows_and_a_full_disk_ends_nothing(tmp_path, capsys):
    seen, out = [], tmp_path / "out.json"

    def growing(small):
        yield case("first")
        seen.append(json.loads(out.read_text())["cases"])
        out.unlink()
        out.mkdir()
        yield case("second")

    assert report._report({"sums": growing}, True, out, None, None) == 1
    assert [row["name"] for row in seen[0]] == ["first"]
    captured = capsys.readouterr()
    assert len(json.loads(captured.out.splitlines()[-1])["cases"]) == 2
    assert str(out) in captured.err and "Traceback" not in captured.err


def test_bad_lines_are_one_line_and_leave_nothing():
    """What `ordeals.py` has of them, for the commands that start soon."""
    ordeals = [sys.executable, str(ROOT / "tests" / "ordeals.py"), "lines"]
    names = ["benchmarks.run", "benchmarks.table", "benchmarks.device"]
    run = subprocess.run([*ordeals, *names], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_chips_send_one_another_is_read_off_the_program():
    scale = pytest.importorskip("benchmarks.scale", reason="launchers need the extra train")
    program = """
  %k = bf16[4,1024,4,64]{3,1,2,0:T(8,128)} all-gather(%a), channel_id=1, dimensions={1}
  %s = (f32[2,8]{1,0}, f32[16]{0}) all-reduce(%b, %c), to_apply=%sum
  %p = (f32[4,64]{1,0}, f32[4,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%d)
  %q = f32[4,64]{1,0} collective-permute-done(%p)
  %g = (f32[256]{0}, f32[1024]{0}) all-gather-start(%e), dimensions={0}
"""
    assert scale.communication(program) == {
        "all_gathers": [2, round(2 + 4096 / 2**20, 2)],
        "all_reduces": [1, 0.0],
        "collective_permutes": [1, 0.0],
    }


def test_a_part_out_of_time_begins_no_case(tmp_path, monkeypatch):
    """What it has begun it ends, with a row for each rival."""
    x = jnp.ones(2)
    every = {name: Contender(jnp.sin, (x,)) for name in ("sin", "a", "b")}

    def two(small):
        yield from timing.compare("first", every)
        timing.end_after(-1)
        yield from timing.compare("second", every)

    monkeypatch.setattr(timing, "_deadline", timing.math.inf)
    rows = tmp_path / "rows.jsonl"
    assert report._report({"two": two}, False, None, rows, 600) == 0
    read = table.read(rows)
    assert [(row["name"], row["rival"]) for row in read["cases"]] == [
        ("first", "a"),
        ("first", "b"),
    ]
    assert read["statements"] == ["two: out of time after 600 s"]


def test_a_lack_of_memory_is_no_failure():
    def failed(error):
        return report._failed(case(rival_error=error))

    assert failed("ValueError: d") and report._failed({"name": "real", "ok": False})
    assert not failed("JaxRuntimeError: RESOURCE_EXHAUSTED") and not report._failed(case())
    assert not failed("NotImplementedError: implementation: got 'mosaic_gpu', but")


def test_the_table_replaces_what_stands_between_the_comments():
    report = {
        "cases": [case("a", kernel_ms=0.75)],
        "statements": ["a is faster"],
        "command": "python -m benchmarks.run",
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "date": "2026-11-23",
    }
    page = "top\n<!-- benchmarks cpu -->\nold\n<!-- end of benchmarks cpu -->\nend\n"
    written = table.insert(page, "cpu", table.table(report))
    assert "| a | 1.5 (0.75) | b | - | - | 1e-06 |" in written
    assert "old" not in written and written.startswith("top\n") and written.endswith("\nend\n")
    assert table.insert(written, "cpu", table.table(report)) == written
    with pytest.raises(ValueError, match="got no <!-- benchmarks h200 -->"):
        table.insert(page, "h200", "")


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_the_page_of_a_device_shows_its_results(card):
    page = (ROOT / "docs" / "gpu.md").read_text()
    results = table.read(ROOT / "benchmarks" / "results" / f"{card}.json")
    assert table.insert(page, card, table.table(results)) == page


@pytest.mark.parametrize("lost", ["missing", "a file", "broken"])
def test_a_lost_link_to_the_kernels_is_made_again(lost, tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "hyperlayer_jax").mkdir()
    link = tmp_path / "hyperlayer_jax" / "kernels"
    if lost == "a file":
        link.write_text("../kernels")
    elif lost == "broken":
        link.symlink_to("nowhere")
    monkeypatch.setattr(device, "_ROOT", tmp_path)
    for _ in range(2):
        device.link()
        assert (link / "__init__.py").exists()


def test_a_part_that_hangs_is_ended_and_its_output_kept(tmp_path):
    log, start = tmp_path / "log.txt", time.monotonic()
    code = "print('measured', flush=True); import time; time.sleep(60)"
    assert device.run([sys.executable, "-c", code], log, 1) is None
    assert time.monotonic() - start < 20 and log.read_text().startswith("measured")
    assert device.run([sys.executable, "-c", "raise SystemExit(3)"], log, 20) == 3


@pytest.mark.parametrize("bed", [known.needles, known.words])
def test_a_few_of_ten_thousand_inputs_are_found(bed):
    with jax.numpy_dtype_promotion("standard"):
        result = known.run(bed(0, 10_000, 10), 0, steps=200, every=4)
    assert result["found"] == result["of"] == 100 and result["error"] < 1e-3
