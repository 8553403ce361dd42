"""Measured block sizes by device kind, kernel and shape class: `python -m benchmarks.tune`."""

TABLE = {}
