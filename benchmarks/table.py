"""Writes results of `benchmarks.run` or `benchmarks.device` into a page, between two comments.

`python -m benchmarks.table benchmarks/results/cpu.json docs/cpu.md` replaces what stands between
`<!-- benchmarks cpu -->` and `<!-- end of benchmarks cpu -->`. The results may be of any device: a
report, or its rows.
"""

import json
import pathlib
import re
import sys
from typing import Any

from benchmarks import command

_COLUMNS = ("case", "ms", "rival", "ms", "speedup", "differs by")


def read(path: pathlib.Path) -> dict[str, Any]:
    """A report, of a file that holds it, or of rows (`.jsonl`) that were written as they came."""
    if path.suffix != ".jsonl":
        return json.loads(path.read_text())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    report = {key: rows[0][key] for key in ("date", "device", "versions", "command")}
    return report | {
        "cases": [row for row in rows if "rival" in row],
        "statements": [row["statement"] for row in rows if "statement" in row],
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: its cases, its statements, and how it was made.

    Where the sums of kernel times are known they follow the wall times in brackets.
    """
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for case in report["cases"]:
        cells = [
            case["name"],
            _milliseconds(case, ""),
            case["rival"] or "-",
            _milliseconds(case, "rival_"),
            _number(case["speedup"], ".2g"),
            _number(case["max_difference"], ".0e"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    made = f"`{report['command']}`, {report['device']}, jax {report['versions']['jax']}, "
    statements = [f"- {statement}" for statement in report["statements"]]
    return "\n".join([*lines, "", *statements, "", f"Made with {made}{report['date']}."])


def insert(page: str, name: str, text: str) -> str:
    """Puts `text` between the two comments of `page` that carry `name`."""
    start, end = f"<!-- benchmarks {name} -->", f"<!-- end of benchmarks {name} -->"
    pattern = re.compile(f"{re.escape(start)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"page: got no {start} ... {end}, want both comments, in this order")
    return pattern.sub(lambda _: f"{start}\n{text}\n{end}", page)


def _milliseconds(case, whose):
    wall, kernels = case[f"{whose}ms"], case.get(f"{whose}kernel_ms")
    return _number(wall, ".3g") + (f" ({kernels:.3g})" if kernels is not None else "")


def _number(value, form):
    return "-" if value is None else format(value, form)


def _main(arguments):
    results, page = map(pathlib.Path, arguments[1:])
    try:
        report = read(results)
    except (ValueError, KeyError, IndexError) as error:
        sys.exit(f"{results}: got {error!r}, want a report of `benchmarks.run`, or its rows")
    try:
        inserted = insert(page.read_text(), results.stem, table(report))
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"{page}, {results}: {error!r}")
    page.write_text(inserted)


if __name__ == "__main__":
    command.run(_main, arguments=2)
