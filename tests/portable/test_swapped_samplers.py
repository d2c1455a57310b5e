"""Other samplers of Diffusers, swapped into each kind of pipeline for every beta schedule, and back."""

import functools

import diffusers
import pytest
import torch

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.portable.schedules_ddpm_hf import BETA_SCHEDULE_ALIASES, BETA_SCHEDULES
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_text import stable_diffusion_scheduler, stock_pipeline, tiny_text_pipeline

SAMPLERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
)
SCHEDULES = [name for name in BETA_SCHEDULES if name not in BETA_SCHEDULE_ALIASES and name != "jsd"]  # ᾱ_T > 0
STEPS = 4


def kinds_and_schedules(kinds):
    """All combinations; the unconditional models go through all schedules, and the slower ones through three."""
    quick = {"scaled_linear", "sigmoid", "laplace"}
    return [
        pytest.param(kind, schedule, marks=[] if "plain" in kind or schedule in quick else pytest.mark.slow)
        for kind in kinds
        for schedule in SCHEDULES
    ]


def plain(scheduler):
    """Our unconditional pipeline."""
    return DDPMPipeline(tiny_unet(), scheduler)


def by_class(scheduler):
    """Ours by class."""
    return ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=3), scheduler, {0: "cat", 1: "dog"})


def text_of_stock(scheduler):
    """Stable Diffusion's, around the same models as ours."""
    return stock_pipeline(tiny_text_pipeline(), scheduler)


OURS = {"plain": plain, "by-class": by_class, "text": tiny_text_pipeline}
STOCK = {"plain-stock": lambda scheduler: diffusers.DDPMPipeline(tiny_unet(), scheduler), "text-stock": text_of_stock}
# Stock's unconditional pipeline hands each sampler a generator, which these do not take, and scales no input for Euler
REFUSED_BY_STOCK = ("UniPCMultistepScheduler", "PNDMScheduler")


@functools.cache
def pipeline_of(kind):
    """A pipeline, made once; its scheduler is set by each test."""
    scheduler = (stable_diffusion_scheduler if "text" in kind else DDPMScheduler)(num_train_timesteps=50)
    if kind in STOCK:
        scheduler = diffusers.DDPMScheduler.from_config(scheduler.config)
    pipeline = (OURS | STOCK)[kind](scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_scheduler(kind, folder=None, **config):
    """The pipeline, with a scheduler as it was made or as it comes back from disk."""
    scheduler = (stable_diffusion_scheduler if "text" in kind else DDPMScheduler)(num_train_timesteps=50, **config)
    if folder is not None:
        scheduler.save_pretrained(folder)
        cls = diffusers.DDPMScheduler if kind in STOCK else DDPMScheduler
        scheduler = cls.from_pretrained(folder)
    pipeline = pipeline_of(kind)
    pipeline.scheduler = scheduler
    return pipeline


def draw(pipeline, **options):
    """Two images: latents, or in [0, 1]."""
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": STEPS, **options}
    if hasattr(pipeline, "tokenizer"):
        return pipeline("a red square", guidance_scale=3.0, output_type="latent", **options).images
    return torch.as_tensor(
        pipeline([0, 1] if hasattr(pipeline, "class_ids") else 2, output_type="np", **options).images
    )


def swap(pipeline, sampler):
    """Put a sampler into the pipeline, as the documentation of Diffusers does."""
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)


def settings(scheduler):
    """What a config says of the diffusion."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.every(5)
@pytest.mark.parametrize("place", [pytest.param("in memory", marks=pytest.mark.slow), "from disk"])
@pytest.mark.parametrize(("kind", "schedule"), kinds_and_schedules(OURS))
def test_every_sampler_draws_and_leads_back(kind, schedule, place, tmp_path):
    """Else a try with another sampler fails, draws at other noise levels, or spoils the model for the next draw."""
    pipeline = with_scheduler(kind, tmp_path if place == "from disk" else None, beta_schedule=schedule)
    own, before = pipeline.scheduler, draw(pipeline)
    assert torch.isfinite(before).all()
    for sampler in SAMPLERS:
        swap(pipeline, sampler)
        torch.testing.assert_close(
            pipeline.scheduler.alphas_cumprod.double(),
            own.exact_tables.alphas_cumprod,
            rtol=1e-4,
            atol=1e-6,
            msg=sampler,
        )
        drawn = draw(pipeline)
        assert drawn.shape == before.shape, sampler
        assert torch.isfinite(drawn).all(), sampler
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        assert settings(pipeline.scheduler) == settings(own), sampler
        assert torch.equal(draw(pipeline), before), sampler


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_sampler_after_another_leads_back(schedule):
    """Else what one sampler leaves in its config misleads the next."""
    pipeline = with_scheduler("plain", beta_schedule=schedule, prediction_type="v_prediction", clip_sample_range=2.0)
    own, before = pipeline.scheduler, draw(pipeline)
    for sampler in SAMPLERS:
        swap(pipeline, sampler)
        assert torch.isfinite(draw(pipeline)).all(), sampler
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert settings(pipeline.scheduler) == settings(own)
    assert torch.equal(draw(pipeline), before)


@pytest.mark.every(5)
@pytest.mark.parametrize(("kind", "schedule"), kinds_and_schedules(STOCK))
def test_stock_pipelines_swap_what_they_can(kind, schedule, tmp_path):
    """Else who has Diffusers alone cannot draw in fewer steps, or not with the model's own schedule again."""
    pipeline = with_scheduler(kind, tmp_path, beta_schedule=schedule)
    own, before = pipeline.scheduler, draw(pipeline)
    for sampler in SAMPLERS:
        swap(pipeline, sampler)
        torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, own.alphas_cumprod, msg=sampler)
        if kind == "plain-stock" and sampler in REFUSED_BY_STOCK:
            with pytest.raises(TypeError, match="generator"):
                draw(pipeline)
        else:
            assert torch.isfinite(draw(pipeline)).all(), sampler
        pipeline.scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
        assert settings(pipeline.scheduler).items() >= settings(own).items(), sampler
        assert torch.equal(draw(pipeline), before), sampler


# What is refused, and the way out

ZERO = [{"beta_schedule": "jsd"}, {"rescale_betas_zero_snr": True}]


@pytest.mark.parametrize("place", ["in memory", "from disk"])
@pytest.mark.parametrize("config", ZERO, ids=str)
@pytest.mark.parametrize("kind", OURS)
def test_noise_prediction_where_nothing_is_left_is_refused_by_every_sampler(kind, config, place, tmp_path):
    """x̂_0 would divide by zero: else every image is NaN, which is shown as black."""
    folder = tmp_path if place == "from disk" else None
    pipeline = with_scheduler(kind, folder, timestep_spacing="trailing", **config)
    ways_out = r"prediction_type='v_prediction'|DDPMScheduler or DDIMScheduler"
    with pytest.raises(ValueError, match="prediction_type='v_prediction'"):
        draw(pipeline)
    for sampler in SAMPLERS:
        pipeline.scheduler = getattr(diffusers, sampler).from_config(
            pipeline.scheduler.config, timestep_spacing="trailing"
        )
        with pytest.raises(ValueError, match=ways_out):
            draw(pipeline)


@pytest.mark.every(5)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("config", ZERO, ids=str)
@pytest.mark.parametrize("kind", OURS)
def test_with_nothing_left_samplers_draw_rightly_or_name_the_way_out(kind, config, spacing, tmp_path):
    """Else log-SNR is -inf somewhere, or a sampler that does not know the setting denoises at other noise levels."""
    config = {"prediction_type": "v_prediction", "timestep_spacing": spacing, **config}
    pipeline = with_scheduler(kind, tmp_path, **config)
    own, before = pipeline.scheduler, draw(pipeline)
    for sampler in SAMPLERS:
        pipeline.scheduler = getattr(diffusers, sampler).from_config(own.config, timestep_spacing=spacing)
        error = (pipeline.scheduler.alphas_cumprod.double() - own.exact_tables.alphas_cumprod).abs().max()
        if sampler == "DDIMScheduler" or (spacing == "leading" and error < 1e-6):
            assert torch.isfinite(draw(pipeline)).all(), sampler
        else:
            with pytest.raises(ValueError, match="sample with DDPMScheduler or DDIMScheduler"):
                draw(pipeline)
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)  # the way out that it names
        assert torch.equal(draw(pipeline), before), sampler


@pytest.mark.parametrize(
    "sampler",
    ["IPNDMScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "DDIMInverseScheduler",
     "FlowMatchEulerDiscreteScheduler"],
)  # fmt: skip
def test_samplers_of_other_kinds_of_models_are_refused(sampler):
    """Else they visit timesteps near 1, or from 0 upwards, and make wrong images without a word."""
    pipeline = with_scheduler("plain", None)
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    way_out = "use_multistep" if sampler == "IPNDMScheduler" else "sample with DDPMScheduler"
    with pytest.raises(ValueError, match=way_out):
        draw(pipeline)


@pytest.mark.parametrize("place", ["in memory", "from disk"])
@pytest.mark.parametrize("kind", OURS)
def test_a_predicted_mean_is_refused_by_every_sampler(kind, place, tmp_path):
    """They would take μ̃ for a noise; the way out that the error names must restore the images."""
    folder = tmp_path if place == "from disk" else None
    pipeline = with_scheduler(kind, folder, prediction_type="posterior_mean")
    before = draw(pipeline)
    for sampler in SAMPLERS:
        swap(pipeline, sampler)
        with pytest.raises(ValueError, match=r"DDPMScheduler\.from_config\(pipe\.scheduler\.config\)"):
            draw(pipeline)
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        assert torch.equal(draw(pipeline), before), sampler
