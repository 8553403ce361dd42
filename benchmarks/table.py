"""Writes the results of `benchmarks.run` into a page, between two comments that name the file.

`python -m benchmarks.table benchmarks/results/cpu.json README.md` replaces what stands between
`<!-- benchmarks cpu -->` and `<!-- end of benchmarks cpu -->`.
"""

import json
import pathlib
import re
from typing import Any

from absl import app


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: its cases, its statements, and how it was made."""
    lines = ["| case | ms | rival | ms | speedup | differs by |", "|---|---|---|---|---|---|"]
    for case in report["cases"]:
        cells = [
            case["name"],
            _number(case["ms"], ".3g"),
            case["rival"],
            _number(case["rival_ms"], ".3g"),
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


def _number(value, form):
    return "-" if value is None else format(value, form)


def _main(arguments):
    if len(arguments) != 3:
        raise app.UsageError("Want a file of results and a page: results.json README.md")
    results, page = map(pathlib.Path, arguments[1:])
    text = table(json.loads(results.read_text()))
    page.write_text(insert(page.read_text(), results.stem, text))


if __name__ == "__main__":
    app.run(_main)
