"""UNets: presets, trained weights to start from, classifiers, how they run, and how they are saved.

The names are imported when they are first used, so that `--help`, which needs the flags alone, is quick.
"""

from typing import TYPE_CHECKING

from ..common.lazy import lazy_exports

if TYPE_CHECKING:
    from .presets import MODEL_PRESETS as MODEL_PRESETS
    from .unet import build_unet as build_unet

_HOMES = {
    ".presets": ("MODEL_PRESETS",),
    ".unet": ("build_unet",),
}
__all__ = [name for names in _HOMES.values() for name in names]

if not TYPE_CHECKING:  # else type checkers take any name for one of ours
    __getattr__, __dir__ = lazy_exports(__name__, _HOMES)
