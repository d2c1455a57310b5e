"""Metrics: one file each, one row each in `METRICS`; features of real and of generated images in, a figure out.

The functions are imported when they are first used, so that `--help`, which needs the table alone, is quick.
"""

from typing import TYPE_CHECKING

from ...common.lazy import lazy_exports
from .figures import Figure, Metric

if TYPE_CHECKING:
    from .frechet import frechet_distance as frechet_distance

ROWS = (
    Metric("fid", "FID", "", True, "pool", "frechet:fid"),
    Metric("sfid", "sFID", "", True, "spatial", "frechet:sfid"),
)
METRICS: dict[str, Metric] = {row.name: row for row in ROWS}

_HOMES = {".frechet": ("frechet_distance",)}
__all__ = ["METRICS", "Figure", "Metric", *(name for names in _HOMES.values() for name in names)]

if not TYPE_CHECKING:  # else type checkers take any name for one of ours
    __getattr__, __dir__ = lazy_exports(__name__, _HOMES)
