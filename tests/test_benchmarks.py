"""The figures that the benchmarks report, and the table made from them."""

import subprocess
import sys

import jax.numpy as jnp
import pytest

from benchmarks import table, timing
from benchmarks.timing import Contender

FIELDS = {"name", "ms", "rival", "rival_ms", "speedup", "max_difference", "floor_ms"}


def test_a_case_for_each_rival():
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    contenders = {
        "sum": Contender(lambda x: x.sum(-1), (x,)),
        "dot": Contender(lambda x: x @ jnp.ones(3), (x,)),
        "host": Contender(lambda x: [row.sum() + 1 for row in x], (x,), on_host=True),
    }
    cases = list(timing.compare("sum of rows", contenders))
    assert [case["rival"] for case in cases] == ["dot", "host"]
    assert [case["max_difference"] for case in cases] == [0, 1]
    for case in cases:
        assert case.keys() >= FIELDS
        assert case["speedup"] == pytest.approx(case["rival_ms"] / case["ms"])


def test_value_and_gradients_in_some_arguments():
    run = timing.value_and_gradients(lambda n, x, y: n * x * y, 1, 2)
    out, (dx, dy) = run(*(jnp.asarray(x) for x in (2.0, 3.0, 5.0)))
    assert (out, dx, dy) == (30, 10, 6)


@pytest.mark.skipif(sys.platform != "linux", reason="no such option of the C library")
def test_what_is_freed_stays_with_the_process():
    """A second array of 128 MB meets the pages of the first one, already cleared."""
    code = """
import resource, numpy as np
from benchmarks import timing

def faults():
    np.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

timing._keep_memory()
print(-faults() + faults())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100


def test_the_table_replaces_what_stands_between_the_comments():
    case = {"name": "a", "ms": 1.5, "rival": "b", "rival_ms": None, "speedup": None}
    report = {
        "cases": [case | {"max_difference": 1e-6}],
        "statements": ["a is faster"],
        "command": "python -m benchmarks.run",
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "date": "2026-11-23",
    }
    page = "top\n<!-- benchmarks cpu -->\nold\n<!-- end of benchmarks cpu -->\nend\n"
    written = table.insert(page, "cpu", table.table(report))
    assert "| a | 1.5 | b | - | - | 1e-06 |" in written
    assert "old" not in written and written.startswith("top\n") and written.endswith("\nend\n")
    assert table.insert(written, "cpu", table.table(report)) == written
    with pytest.raises(ValueError, match="got no <!-- benchmarks h200 -->"):
        table.insert(page, "h200", "")
