"""Text-to-image pipelines of each kind of scheduler, and what they draw."""

import diffusers
import torch

from tests.support.fixtures_pipeline import generators, tiny_vae
from tests.support.fixtures_text import CAPTIONS, stable_diffusion_scheduler, stock_pipeline, tiny_text_pipeline

RED, BLUE = CAPTIONS[0], CAPTIONS[2]


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


# a scheduler's class and config, what stock samples as ours does
V = {"prediction_type": "v_prediction"}


MODELS = {
    "plain": ("DDPMScheduler", {}),
    "v_prediction": ("DDPMScheduler", V),
    "sample": ("DDPMScheduler", {"prediction_type": "sample"}),
    "sigmoid": ("DDPMScheduler", {"beta_schedule": "sigmoid", **V}),  # which stock gets as trained_betas
    "zero_snr": ("DDPMScheduler", ZERO_SNR),
    "gray": ("DDPMScheduler", V),
    "ddim": ("DDIMScheduler", V),
    "ddim-zero_snr": ("DDIMScheduler", ZERO_SNR),
    "pndm": ("PNDMScheduler", V),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-v_prediction": ("DPMSolverMultistepScheduler", V),
    "euler": ("EulerDiscreteScheduler", V),
    "unipc": ("UniPCMultistepScheduler", V),
}


CALLS = {
    "scale 1": {"guidance_scale": 1.0},
    "scale 3": {"guidance_scale": 3.0},
    "scale 7.5": {},
    "negative": {"negative_prompt": ["a white square", "no square"], "guidance_scale": 3.0},
    "several": {"num_images_per_prompt": 2, "guidance_scale": 3.0},
    "rescaled": {"guidance_rescale": 0.7},
    "size": {"height": 24, "width": 32, "guidance_scale": 3.0},
}


def make_scheduler(name):
    cls, config = MODELS[name]
    if cls == "DDPMScheduler":
        return stable_diffusion_scheduler(**config)
    own = {"skip_prk_steps": True} if cls == "PNDMScheduler" else {}
    return getattr(diffusers, cls).from_config(stable_diffusion_scheduler(**config).config, **own)


def make_pipeline(name):
    vae = tiny_vae(scaling_factor=0.5, in_channels=1, out_channels=1) if name == "gray" else None
    return tiny_text_pipeline(make_scheduler(name), vae)


def draw(pipeline, call, **options):
    options = {"num_inference_steps": 5, "output_type": "np", **CALLS[call], **options}
    return pipeline([RED, BLUE], generator=torch.Generator().manual_seed(0), **options).images


def latents(pipeline, prompt=RED, *seeds, **options):
    """x_0 for one generator a seed."""
    options = {"num_inference_steps": 5, "output_type": "latent", "guidance_scale": 3.0, **options}
    return pipeline(prompt, generator=generators(*(seeds or (0,))), **options).images


# From stock


def make_stock(scheduler):
    return stock_pipeline(tiny_text_pipeline(), scheduler)
