"""A classifier of noised images, whose gradient guides sampling (Dhariwal & Nichol 2021)."""

from ..portable.networks_ddpm_hf import AttentionPool as AttentionPool
from ..portable.networks_ddpm_hf import NoisyClassifier as NoisyClassifier
