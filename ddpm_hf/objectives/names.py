"""The choices of flags, without importing torch, so that `--help` is quick.

A test compares them with the tables of `portable.scheduling_ddpm_hf` and `objectives`, which define them.
"""

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "posterior_mean")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log", "learned", "learned_range")
OBJECTIVES = ("simple", "vlb", "hybrid")
LOSS_TYPES = ("l2", "l1", "huber")
LOSS_WEIGHTINGS = ("min_snr", "soft_min_snr", "p2", "debiased")
TRAINED_BETAS = "trained_betas"  # of --ddpm_beta_schedule: a list in the model's scheduler, which no name stands for
TIMESTEP_SAMPLERS = ("uniform", "loss_second_moment")
