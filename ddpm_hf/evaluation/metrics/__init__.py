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
    Metric("memorization", "copied samples", "%", True, "images+train", "memorization:memorization",
           summary_home="memorization:thumbnails"),
    Metric("nearest", "distance to training images", "of held-out", None, "pool+train", "nearest:nearest_training"),
    Metric("authpct", "AuthPct", "%", False, "pool+train", "authenticity:authpct"),
    Metric("ct", "C_T", "", None, "pool+train", "data_copying:data_copying"),
    Metric("colour", "colour shift", "levels", True, "images", "colour:colour_shift",
           summary_home="colour:colour_summary"),
    Metric("contrast", "contrast shift", "levels", True, "images", "colour:contrast_shift",
           summary_home="colour:colour_summary"),
)  # fmt: skip
METRICS: dict[str, Metric] = {row.name: row for row in ROWS}

_HOMES = {".frechet": ("frechet_distance",)}
__all__ = ["METRICS", "Figure", "Metric", *(name for names in _HOMES.values() for name in names)]

if not TYPE_CHECKING:  # else type checkers take any name for one of ours
    __getattr__, __dir__ = lazy_exports(__name__, _HOMES)
