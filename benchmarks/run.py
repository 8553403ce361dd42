"""Every benchmark: `python -m benchmarks.run --out=results.json`."""

from benchmarks import attention, hyperlayer, kernels
from benchmarks.timing import main

if __name__ == "__main__":
    main(hyperlayer.cases, kernels.cases, attention.cases)
