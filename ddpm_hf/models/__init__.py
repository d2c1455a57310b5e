"""UNets: presets, trained weights to start from, classifiers, how they run, and how they are saved.

The names are imported when they are first used, so that `--help`, which needs the flags alone, is quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .acceleration import compiled as compiled
    from .presets import MODEL_PRESETS as MODEL_PRESETS
    from .presets import Preset as Preset
    from .presets import preset_unet_config as preset_unet_config
    from .unet import build_unet as build_unet
    from .unet import smallest_sample_side as smallest_sample_side
    from .unet import stock_unet_defaults as stock_unet_defaults
    from .unet import text_unet_config as text_unet_config
    from .unet import time_blindness as time_blindness

_HOMES = {
    "compiled": "acceleration",
    "MODEL_PRESETS": "presets",
    "Preset": "presets",
    "preset_unet_config": "presets",
    "build_unet": "unet",
    "smallest_sample_side": "unet",
    "stock_unet_defaults": "unet",
    "text_unet_config": "unet",
    "time_blindness": "unet",
}

__all__ = [*_HOMES]


if not TYPE_CHECKING:

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
