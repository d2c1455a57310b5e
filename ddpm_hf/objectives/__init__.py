"""What a model is trained to minimise: the variational bound, the simple loss, and timesteps to train at.

The names are imported when they are first used, so that `--help`, which needs the flags alone, is quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bound import VariationalTerms as VariationalTerms
    from .bound import prior_bpd as prior_bpd
    from .bound import vb_terms_bpd as vb_terms_bpd
    from .losses import LOSS_TYPES as LOSS_TYPES
    from .losses import OBJECTIVES as OBJECTIVES
    from .losses import LossOptions as LossOptions
    from .losses import check_objective as check_objective
    from .losses import min_snr_weights as min_snr_weights
    from .losses import simple_losses as simple_losses
    from .losses import training_losses as training_losses
    from .timestep_samplers import TIMESTEP_SAMPLERS as TIMESTEP_SAMPLERS
    from .timestep_samplers import LossSecondMomentSampler as LossSecondMomentSampler
    from .timestep_samplers import UniformTimestepSampler as UniformTimestepSampler

_HOMES = {
    "VariationalTerms": "bound",
    "prior_bpd": "bound",
    "vb_terms_bpd": "bound",
    "LOSS_TYPES": "losses",
    "OBJECTIVES": "losses",
    "LossOptions": "losses",
    "check_objective": "losses",
    "min_snr_weights": "losses",
    "simple_losses": "losses",
    "training_losses": "losses",
    "TIMESTEP_SAMPLERS": "timestep_samplers",
    "LossSecondMomentSampler": "timestep_samplers",
    "UniformTimestepSampler": "timestep_samplers",
}

__all__ = [*_HOMES]


if not TYPE_CHECKING:

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
