"""Metrics: one file each, one row each in `METRICS`; features of real and of generated images in, a figure out.

The functions are imported when they are first used, so that `--help`, which needs the table alone, is quick.
"""

from typing import TYPE_CHECKING

from ...common.lazy import lazy_exports
from . import least
from .figures import Figure, Metric

if TYPE_CHECKING:
    from .fd_infinity import frechet_distance_infinity as frechet_distance_infinity
    from .frechet import frechet_distance as frechet_distance
    from .inception import inception_score as inception_score
    from .kernel import kernel_distance as kernel_distance
    from .mind import mind_distance as mind_distance
    from .neighbours import density_coverage as density_coverage
    from .neighbours import precision_recall as precision_recall
    from .vendi import vendi_score as vendi_score

ROWS = (
    Metric("fid", "FID", "", True, "pool", "frechet:fid"),
    Metric("sfid", "sFID", "", True, "spatial", "frechet:sfid"),
    Metric("kid", "KID", "", True, "pool", "kernel:kid", least.four),
    Metric("is", "Inception Score", "", False, "logits", "inception:inception", least.parts),
    Metric("precision", "Precision", "", False, "pool", "neighbours:precision", least.neighbours),
    Metric("recall", "Recall", "", False, "pool", "neighbours:recall", least.neighbours),
    Metric("density", "Density", "", False, "pool", "neighbours:density", least.neighbours),
    Metric("coverage", "Coverage", "", False, "pool", "neighbours:coverage", least.neighbours),
    Metric("fd-infinity", "FD∞", "", True, "pool", "fd_infinity:fd_infinity", least.ten_subsets),
    Metric("mind", "MIND", "", True, "pool", "mind:mind"),
    Metric("vendi", "Vendi score", "", None, "pool", "vendi:vendi"),
    Metric("memorization", "copied samples", "%", True, "images+train", "memorization:memorization", least.fifty,
           summary_home="memorization:thumbnails"),
    Metric("nearest", "distance to training images", "of held-out", None, "pool+train", "nearest:nearest_training"),
    Metric("authpct", "AuthPct", "%", False, "pool+train", "authenticity:authpct"),
    Metric("ct", "C_T", "", None, "pool+train", "data_copying:data_copying", least.cells),
    Metric("colour", "colour shift", "levels", True, "images", "colour:colour_shift",
           summary_home="colour:colour_summary", picture_home="colour:colour_picture"),
    Metric("contrast", "contrast shift", "levels", True, "images", "colour:contrast_shift",
           summary_home="colour:colour_summary"),
)  # fmt: skip
METRICS: dict[str, Metric] = {row.name: row for row in ROWS}

_HOMES = {
    ".fd_infinity": ("frechet_distance_infinity",),
    ".frechet": ("frechet_distance",),
    ".inception": ("inception_score",),
    ".kernel": ("kernel_distance",),
    ".mind": ("mind_distance",),
    ".neighbours": ("density_coverage", "precision_recall"),
    ".vendi": ("vendi_score",),
}
__all__ = ["METRICS", "Figure", "Metric", *(name for names in _HOMES.values() for name in names)]

if not TYPE_CHECKING:  # else type checkers take any name for one of ours
    __getattr__, __dir__ = lazy_exports(__name__, _HOMES)
