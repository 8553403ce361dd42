"""From index tuples and points to the values of the points."""

from .api import duplicate_mask, materialize_points, redistribute

__all__ = ["duplicate_mask", "materialize_points", "redistribute"]
