"""Every benchmark, or some: `python -m benchmarks.run --only=block,products --out=results.json`."""

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from benchmarks import attention, hyperlayer, kernels, modules, report, sort_speed, sparse


def torch_rivals(small: bool) -> Iterator[dict[str, Any] | str]:
    """`benchmarks.torch_rivals`, where there is PyTorch."""
    if importlib.util.find_spec("torch") is None:
        yield "torch is not installed: none of its functions was timed"
    else:
        yield from importlib.import_module("benchmarks.torch_rivals").cases(small)


if __name__ == "__main__":
    report.main(
        redistribution=hyperlayer.cases,
        products=kernels.cases,
        gathered=attention.gathered,
        block=attention.block,
        modules=modules.cases,
        sort=sort_speed.cases,
        sparse=sparse.cases,
        torch=torch_rivals,
    )
