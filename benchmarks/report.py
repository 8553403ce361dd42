"""How every benchmark reports: lines for people, rows for scripts as they come, JSON at the end.

A suite is a function of the scale that yields rows, which are dictionaries, and statements, which
are strings. Its module ends with `report.main(name=suite)`.
"""

import ctypes
import datetime
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import app, flags

from benchmarks import command
from benchmarks.timing import OutOfTimeError, bytes_per_second, end_after, only_try

Suite = Callable[[bool], Iterator[dict[str, Any] | str]]

_HEAD = f"{'case':44} {'ms':>9}  {'rival':28} {'ms':>9} {'speedup':>8} {'differs':>8} {'floor':>6}"


def main(**suites: Suite) -> None:
    """Runs suites as a command.

    Args:
      **suites: by name; functions of whether the scale is small.
    """
    flags.DEFINE_string("out", None, "File to write the JSON to, besides standard output.")
    flags.DEFINE_string("rows", None, "File to add every row to as it comes, in JSON lines.")
    command.define_choices("only", list(suites), "Parts to run.")
    flags.DEFINE_enum("scale", "full", ["full", "small"], "small: only tries itself out.")
    flags.DEFINE_float(
        "budget_s", None, "Begins no case after so many seconds.", lower_bound=0, upper_bound=1e6
    )
    _keep_memory()

    def run(_):
        wanted = flags.FLAGS
        files = (command.check_file(name, wanted[name].value) for name in ("out", "rows"))
        chosen = {name: suites[name] for name in wanted.only}
        small = wanted.scale == "small"
        if small:
            only_try()
        if _report(chosen, small, *files, wanted.budget_s):
            sys.exit(1)

    command.run(run)


def made_with() -> dict[str, Any]:
    """Where, when and by which command results are made."""
    cores = f", {os.cpu_count()} cores" if jax.default_backend() == "cpu" else ""
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind + cores,
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        # `benchmarks.device` names itself in the environment of what it runs.
        "command": os.environ.get("BENCHMARKS_COMMAND", command.line()),
    }


def _keep_memory():
    """Has the C library of Linux keep what is freed, in one heap; others have no such option.

    Memory that a case has used stays with the process then, as it does in a training loop that is
    compiled as a whole. Linux would otherwise take large arrays back after every call and hand them
    out cleared, which is a fifth of the time of a layer.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        arena_max, mmap_max, trim_threshold = -8, -4, -1
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
            libc.mallopt(option, value)


def _report(
    suites: dict[str, Suite],
    small: bool,
    out: pathlib.Path | None,
    rows: pathlib.Path | None,
    budget: float | None,
) -> int:
    """Runs the suites; returns how much of them failed."""
    if budget is not None:
        end_after(budget)
    made, failures = made_with(), 0
    cases, statements = [], []
    found = made | {"cases": cases, "statements": statements}

    def keep(part, item):
        is_statement = isinstance(item, str)
        (statements if is_statement else cases).append(item)
        print(item if is_statement else _line(item), flush=True)
        row = {"statement": item} if is_statement else item
        _written(rows, json.dumps({"part": part, **made, **row}) + "\n", add=True)
        _written(out, json.dumps(found) + "\n")

    print(_HEAD, flush=True)
    for part, suite in suites.items():
        try:
            for item in suite(small):
                keep(part, item)
                failures += isinstance(item, dict) and _failed(item)
        except OutOfTimeError:
            keep(part, f"{part}: out of time after {budget:.0f} s")
        except app.UsageError:
            raise
        except Exception as error:
            traceback.print_exc()
            keep(part, f"{part}: failed with {type(error).__name__}: {str(error)[:300]}")
            failures += 1
    for statement in _rule(cases):
        keep("rule", statement)
    found["bytes_per_second"] = bytes_per_second()
    failures += not _written(out, json.dumps(found) + "\n")
    print(json.dumps(found))
    return failures


def _written(path: pathlib.Path | None, text: str, *, add: bool = False) -> bool:
    """Writes a file, if any, never half of it; on a disk that is full what is measured goes on."""
    if path is None:
        return True
    try:
        if add:
            with path.open("a") as file:
                file.write(text)
        else:
            hidden = path.with_name(f".{path.name}")
            hidden.write_text(text)
            os.replace(hidden, path)
    except OSError as error:
        print(f"{path}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _failed(row):
    """Whether a row holds an error other than a lack of memory, or of a kernel for the case."""
    errors = [row[key] for key in ("error", "rival_error", "expected_error") if key in row]
    accepted = ("RESOURCE_EXHAUSTED", "NotImplementedError")
    return row.get("ok") is False or any(
        not any(reason in error for reason in accepted) for error in errors
    )


def _rule(cases):
    """Which backends are right and faster than plain JAX in every case of an operation."""
    judged = {}
    for case in cases:
        if "rival_passes" in case:
            operation = case["name"].split()[0]
            judged.setdefault((operation, case["rival"]), []).append(case["rival_passes"])
    for (operation, backend), passes in judged.items():
        verdict = "passes" if all(passes) else "does not pass"
        yield f"rule: {backend} {verdict} for {operation} ({sum(passes)} of {len(passes)} cases)"


def _line(row):
    def number(key, form):
        value = row.get(key)
        return "-" if value is None else format(value, form)

    if "ok" in row:
        rest = {key: value for key, value in row.items() if key not in ("name", "ok")}
        figures = ", ".join(f"{key} {value}" for key, value in rest.items())
        return f"{'ok    ' if row['ok'] else 'FAILED'} {row['name']}: {figures}"
    line = (
        f"{row['name']:44} {number('ms', '.3f'):>9}  {row['rival'] or '-':28} "
        f"{number('rival_ms', '.3f'):>9} {number('speedup', '.2f'):>7}x "
        f"{number('max_difference', '.0e'):>8} {number('floor_fraction', '.0%'):>6}"
    )
    if "kernel_ms" in row:
        line += f"  kernels {row['kernel_ms']:.3f} ({row['kernels']})"
    return line + "".join(f"\n  {key}: {row[key]}" for key in row if key.endswith("error"))
