"""What a model is trained to minimise: the variational bound, the simple loss, and timesteps to train at.

The names are imported when they are first used, so that `--help`, which needs the flags alone, is quick.
"""

from typing import TYPE_CHECKING

from ..common.lazy import lazy_exports

if TYPE_CHECKING:
    from .bound import VariationalTerms as VariationalTerms
    from .bound import prior_bpd as prior_bpd
    from .bound import vb_terms_bpd as vb_terms_bpd
    from .losses import LOSS_TYPES as LOSS_TYPES
    from .losses import OBJECTIVES as OBJECTIVES
    from .losses import LossOptions as LossOptions
    from .losses import check_objective as check_objective
    from .losses import simple_losses as simple_losses
    from .losses import training_losses as training_losses
    from .timestep_samplers import TIMESTEP_SAMPLERS as TIMESTEP_SAMPLERS
    from .timestep_samplers import LossSecondMomentSampler as LossSecondMomentSampler
    from .timestep_samplers import UniformTimestepSampler as UniformTimestepSampler
    from .weightings import LOSS_WEIGHTINGS as LOSS_WEIGHTINGS
    from .weightings import loss_weights as loss_weights
    from .weightings import min_snr_weights as min_snr_weights

_HOMES = {
    ".bound": (
        "VariationalTerms",
        "prior_bpd",
        "vb_terms_bpd",
    ),
    ".losses": (
        "LOSS_TYPES",
        "OBJECTIVES",
        "LossOptions",
        "check_objective",
        "simple_losses",
        "training_losses",
    ),
    ".timestep_samplers": (
        "TIMESTEP_SAMPLERS",
        "LossSecondMomentSampler",
        "UniformTimestepSampler",
    ),
    ".weightings": (
        "LOSS_WEIGHTINGS",
        "loss_weights",
        "min_snr_weights",
    ),
}
__all__ = [name for names in _HOMES.values() for name in names]

if not TYPE_CHECKING:  # else type checkers take any name for one of ours
    __getattr__, __dir__ = lazy_exports(__name__, _HOMES)
