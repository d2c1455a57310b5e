"""Small models for the tests of the pipelines: a tiny UNet, a tiny VAE, and a network that is exact."""

import contextlib
import math

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDPMPipeline, DDPMScheduler


def tiny_unet_config(channels=1, out_channels=None, size=8, **more):
    """The arguments of a UNet of two levels that runs in a millisecond."""
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": out_channels or channels,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        **more,
    }


def tiny_unet(channels=1, out_channels=None, size=8, seed=0, **more):
    """An untrained UNet in eval mode: its outputs are of no use, and depend on x_t and t."""
    torch.manual_seed(seed)
    return UNet2DModel(**tiny_unet_config(channels, out_channels, size, **more)).eval()


def tiny_vae(channels=4, seed=0, **more):
    """An untrained autoencoder that halves RGB images once."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=channels,
        norm_num_groups=2,
        **more,
    ).eval()


def finished(pipeline, sampler=None, **config):
    """The pipeline without a progress bar, and with another sampler if one is named."""
    pipeline.set_progress_bar_config(disable=True)
    if sampler is not None:
        pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config, **config)
    return pipeline


def tiny_pipeline(channels=1, vae=None, size=8, unet=None, **config):
    """An unconditional pipeline without a progress bar, with the channels that its scheduler asks for."""
    scheduler = DDPMScheduler(**config)
    if unet is None:
        learned = scheduler.variance_type in ("learned", "learned_range")
        unet = tiny_unet(channels, 2 * channels if learned else channels, size)
    return finished(DDPMPipeline(unet, scheduler, vae))


@contextlib.contextmanager
def calls_of(model, what):
    """A list of `what(inputs, keyword arguments)` of each call of a model, while the context lasts."""
    seen = []
    handle = model.register_forward_pre_hook(lambda _, inputs, more: seen.append(what(inputs, more)), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def generators(*seeds):
    """One generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def randn(*shape, seed=0):
    """Normal noise that is the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class GaussianNetwork(ModelMixin, ConfigMixin):
    """What the best network outputs where every pixel of the data is drawn from N(mean, variance).

    It states Bayes' rule in the betas alone, for the scheduler's `prediction_type` and `variance_type`.
    """

    @register_to_config
    def __init__(self, scheduler_config: dict, mean=0.0, variance=1.0, sample_size=8, in_channels=1):
        super().__init__()
        scheduler = DDPMScheduler.from_config(scheduler_config)
        self.register_buffer("betas", scheduler.exact_tables.betas.clone())
        self.prediction_type = scheduler.config.prediction_type
        self.variance_type = scheduler.config.variance_type
        learned = self.variance_type in ("learned", "learned_range")
        self.register_to_config(out_channels=in_channels * (2 if learned else 1))
        self.weight = torch.nn.Parameter(torch.zeros(()))  # whose dtype and device the pipeline asks for

    def forward(self, sample, timestep):
        """x_t [N, C, H, W] and t to the output [N, C or 2C, H, W]."""
        t = int(timestep)
        alpha_bars = torch.cumprod(1 - self.betas, 0)
        alpha_bar, beta = float(alpha_bars[t]), float(self.betas[t])
        before = float(alpha_bars[t - 1]) if t else 1.0  # ᾱ_{t-1}
        m, v = self.config.mean, self.config.variance
        gain = math.sqrt(alpha_bar) * v / (alpha_bar * v + 1 - alpha_bar)
        x = sample.double()
        x0 = m + gain * (x - math.sqrt(alpha_bar) * m)  # E[x_0 | x_t]
        x0_variance = v * (1 - alpha_bar) / (alpha_bar * v + 1 - alpha_bar)
        epsilon = (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)
        from_x0 = math.sqrt(before) * beta / (1 - alpha_bar)
        from_x_t = math.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)
        output = {
            "epsilon": epsilon,
            "sample": x0,
            "v_prediction": math.sqrt(alpha_bar) * epsilon - math.sqrt(1 - alpha_bar) * x0,
            "posterior_mean": from_x0 * x0 + from_x_t * x,
        }[self.prediction_type]
        if self.variance_type in ("learned", "learned_range"):
            small = (1 - before) / (1 - alpha_bar) * beta
            log_variance = math.log(small + from_x0**2 * x0_variance)  # of q(x_{t-1} | x_t)
            if self.variance_type == "learned_range":  # the share of the way from log β̃ to log β, as -1..1
                small = small or (1 - alpha_bar) / (1 - float(alpha_bars[1])) * float(self.betas[1])
                share = (log_variance - math.log(small)) / (math.log(beta) - math.log(small))
                log_variance = 2 * share - 1
            output = torch.cat([output, torch.full_like(output, log_variance)], dim=1)
        return UNet2DOutput(sample=output.to(sample.dtype))
