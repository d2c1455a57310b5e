"""Classifier-free guidance against plain loops, closed forms and Gaussians."""

import math

import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMScheduler
from ddpm_hf.portable.guidance_ddpm_hf import classifier_free_guidance
from tests.support.fixtures_pipeline import GaussianNetwork, finished, generators, randn, tiny_unet, tiny_vae
from tests.support.guidance import (
    MULTISTEP,
    STEPS,
    LinearClassifier,
    by_class,
    by_hand,
    conditional,
    draw,
    labelled_calls,
    unconditional,
)

# Classifier-free guidance: which networks run


@pytest.mark.parametrize("sampler", [None, "DDIMScheduler"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_scale_one_is_the_conditional_model_in_one_pass(variance_type, sampler):
    """Else a user without guidance pays for two passes, or gets other images than the model's own."""
    pipeline = by_class(2, sampler=sampler, variance_type=variance_type)
    with labelled_calls(pipeline.unet) as calls:
        drawn = draw(pipeline, [2, 0, 1])
    assert [(count, labels) for count, _, labels in calls] == [(3, [2, 0, 1])] * STEPS
    assert torch.equal(drawn, by_hand(pipeline, 3, conditional(pipeline, [2, 0, 1], 2 if sampler else None)))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.5, 8.0])
def test_other_scales_run_class_and_null_class_in_one_batch(scale):
    """Else guidance takes more calls than one a step, or the null half is given a class."""
    pipeline = by_class()
    with labelled_calls(pipeline.unet) as calls:
        draw(pipeline, [2, 0], scale)
    assert [(count, labels) for count, _, labels in calls] == [(4, [2, 0, 3, 3])] * STEPS


@pytest.mark.parametrize("sampler", [None, "DDIMScheduler", *MULTISTEP])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_scale_zero_is_the_model_of_no_class(variance_type, sampler):
    """Else scale 0 still leans to the class, or None draws of some class."""
    pipeline = by_class(2, sampler=sampler, variance_type=variance_type)
    drawn, without = draw(pipeline, [0, 1], 0.0), draw(pipeline, [None, None])
    torch.testing.assert_close(drawn, without, rtol=0, atol=1e-4)
    assert (drawn - draw(pipeline, [0, 1])).abs().max() > 0.01


@pytest.mark.parametrize("sampler", [None, "DDIMScheduler", *MULTISTEP])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_every_sampler_is_guided(variance_type, sampler):
    """Else a scale has no effect with some sampler, or ends in an argument that it does not take."""
    pipeline = by_class(2, sampler=sampler, variance_type=variance_type)
    guided = draw(pipeline, [0, 1], 3.0)
    assert guided.shape == (2, 2, 8, 8)
    assert torch.isfinite(guided).all()
    assert (guided - draw(pipeline, [0, 1])).abs().max() > 0.01


# Labels


def test_names_ids_and_none_mix():
    """Else a label means another class by its name than by its id, or the order of a batch is lost."""
    pipeline = by_class()
    assert pipeline.class_ids(["dog", 0, None, "owl", 1]).tolist() == [1, 0, 3, 2, 1]
    assert pipeline.class_ids(torch.tensor([[2], [0]])).tolist() == [2, 0]
    assert [pipeline.class_ids(label).tolist() for label in ("owl", 2, None, range(3))] == [[2], [2], [3], [0, 1, 2]]
    mixed = draw(pipeline, ["dog", 0, None, "owl"], 2.0)
    with labelled_calls(pipeline.unet) as calls:
        assert torch.equal(mixed, draw(pipeline, [1, "cat", None, 2], 2.0))
    assert calls[0][2] == [1, 0, 3, 2, 3, 3, 3, 3]
    assert torch.equal(draw(pipeline, torch.tensor([2, 0])), draw(pipeline, ["owl", "cat"]))
    assert torch.equal(draw(pipeline, "owl", 2.0), draw(pipeline, [2], 2.0))
    assert torch.equal(draw(pipeline, None, generator=generators(0, 1, 2)), draw(pipeline, ["cat", "dog", "owl"]))


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_an_image_depends_on_its_own_label_and_generator_alone(variance_type, scale):
    """Else an image changes with its neighbours in the batch, and cannot be drawn again."""
    pipeline, labels = by_class(variance_type=variance_type), ["owl", None, 0]
    together = draw(pipeline, labels, scale)
    for index, label in enumerate(labels):
        alone = draw(pipeline, [label], scale, generator=generators(index))
        torch.testing.assert_close(alone, together[index : index + 1], rtol=0, atol=2e-4)
    other = draw(pipeline, ["cat", None, 0], scale)
    assert (other[0] - together[0]).abs().max() > 0.01
    torch.testing.assert_close(other[1:], together[1:], rtol=0, atol=2e-4)


# The interval


def test_ddim_outside_the_interval_is_the_conditional_model():
    """Else steps that nothing guides are not stock's."""
    pipeline = by_class(sampler="DDIMScheduler")
    assert torch.equal(draw(pipeline, [0, 1], 4.0, guidance_interval=(1, 9)), draw(pipeline, [0, 1]))


def test_guidance_outside_its_interval_is_the_conditional_model():
    """Else the interval guides where it should not, or pays for two passes there."""
    pipeline = by_class()
    with labelled_calls(pipeline.unet) as calls:
        outside = draw(pipeline, [0, 1], 4.0, guidance_interval=(1, 9))
    assert [count for count, _, _ in calls] == [2] * STEPS
    assert torch.equal(outside, draw(pipeline, [0, 1]))


@pytest.mark.parametrize("sampler", [None, "DDIMScheduler"])
def test_an_interval_that_holds_the_chain_is_none(sampler):
    """Else an end of the interval is left out, or guiding depends on an interval being there."""
    pipeline = by_class(sampler=sampler)
    assert torch.equal(draw(pipeline, [0, 1], 4.0, guidance_interval=(0, 50)), draw(pipeline, [0, 1], 4.0))


def test_the_interval_holds_timesteps_and_its_ends():
    """Else it counts steps rather than timesteps, or one end is shut out."""
    pipeline = by_class()
    with labelled_calls(pipeline.unet) as calls:
        guided = draw(pipeline, [0, 1], 4.0, guidance_interval=(10, 30))
    assert [(t, count) for count, t, _ in calls] == [(50, 2), (40, 2), (30, 4), (20, 4), (10, 4), (0, 2)]
    assert (guided - draw(pipeline, [0, 1])).abs().max() > 0.01
    assert (guided - draw(pipeline, [0, 1], 4.0)).abs().max() > 0.01


# The formula


def test_the_guided_output_is_linear_in_the_scale():
    """Ho & Salimans 2022, Eq. 6; else a scale of a paper means another one here."""
    c, u = randn(3, 2, 8, 8, seed=0).double(), randn(3, 2, 8, 8, seed=1).double()
    for scale in (-2.0, 0.0, 0.3, 1.0, 1.7, 40.0):
        w = scale - 1
        torch.testing.assert_close(classifier_free_guidance(c, u, scale, 0.0, 2), (1 + w) * c - w * u)
    assert torch.equal(classifier_free_guidance(c, u, 1.0, 0.0, 2), c)
    assert torch.equal(classifier_free_guidance(c, u, 0.0, 0.0, 2), u)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 12.0])
def test_rescaling_brings_back_the_conditional_deviation(scale):
    """Lin et al. 2023, sec. 3.4, for each image by itself; else high scales stay over-exposed."""
    c = randn(3, 2, 8, 8, seed=0).double() * torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1, 1)
    u = randn(3, 2, 8, 8, seed=1).double()
    guided, rescaled = (classifier_free_guidance(c, u, scale, share, 2) for share in (0.0, 1.0))
    torch.testing.assert_close(rescaled.flatten(1).std(dim=1), c.flatten(1).std(dim=1))
    ratio = (rescaled / guided).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))  # nothing but the scale of an image changes
    for share in (0.25, 0.7):
        between = classifier_free_guidance(c, u, scale, share, 2)
        torch.testing.assert_close(between, (1 - share) * guided + share * rescaled)


def test_a_learned_variance_is_never_extrapolated():
    """Else high scales draw with variances that no model predicted, or rescaling changes the noise."""
    c, u = randn(3, 4, 8, 8, seed=0).double(), randn(3, 4, 8, 8, seed=1).double()
    for scale, share in [(-3.0, 0.0), (0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (1.1, 1.0), (9.0, 1.0)]:
        for rescale in (0.0, 0.7):
            guided = classifier_free_guidance(c, u, scale, rescale, 2)
            torch.testing.assert_close(guided[:, 2:], (1 - share) * u[:, 2:] + share * c[:, 2:])
            assert torch.equal(guided[:, :2], classifier_free_guidance(c[:, :2], u[:, :2], scale, rescale, 2))


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize(("scale", "rescale"), [(3.0, 0.0), (3.0, 0.6), (0.5, 0.6)])
def test_the_pipeline_steps_on_the_guided_output(scale, rescale, variance_type):
    """Else the pipeline mixes up the two halves, or loses guidance_rescale on the way."""
    pipeline, ids = by_class(2, variance_type=variance_type), torch.tensor([2, 0])

    def guided(x, t):
        both = [pipeline.unet(x, t, class_labels=labels).sample for labels in (ids, torch.full_like(ids, 3))]
        return classifier_free_guidance(*both, scale, rescale, 2)

    drawn = draw(pipeline, [2, 0], scale, guidance_rescale=rescale)
    torch.testing.assert_close(drawn, by_hand(pipeline, 2, guided), rtol=0, atol=1e-3)
    if rescale:
        assert (drawn - draw(pipeline, [2, 0], scale)).abs().max() > 0.01


# DDIM


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize(("scale", "rederived"), [(0.0, False), (0.5, False), (1.0, False), (1.5, True), (6.0, True)])
def test_ddim_is_stocks_loop(scale, rederived, variance_type):
    """Else images of DDIM are not stock's; or, guided, each step adds what clipping took off."""
    pipeline, ids = by_class(2, sampler="DDIMScheduler", variance_type=variance_type), torch.tensor([2, 0])

    def guided(x, t):
        if scale == 1.0:
            return conditional(pipeline, [2, 0], 2)(x, t)
        labels = torch.cat([ids, torch.full_like(ids, 3)])
        both = pipeline.unet(torch.cat([x, x]), t, class_labels=labels).sample[:, :2]
        return classifier_free_guidance(*both.chunk(2), scale, 0.0, 2)

    drawn = draw(pipeline, [2, 0], scale)
    assert torch.equal(drawn, by_hand(pipeline, 2, guided, use_clipped_model_output=rederived))
    other = by_hand(pipeline, 2, guided, use_clipped_model_output=not rederived)
    assert (drawn - other).abs().max() > 0.01  # x̂_0 was clipped


# Guided Gaussians: the distribution is known


class ClassGaussianNetwork(ModelMixin, ConfigMixin):
    """The exact network for classes N(means[y], variances[y]); the last is the null class."""

    @register_to_config
    def __init__(self, scheduler_config: dict, means: list, variances: list, sample_size=8, in_channels=1):
        super().__init__()
        self.networks = torch.nn.ModuleList(
            GaussianNetwork(scheduler_config, mean, variance, sample_size, in_channels)
            for mean, variance in zip(means, variances)
        )
        self.register_to_config(out_channels=self.networks[0].config.out_channels, num_class_embeds=len(means))

    def forward(self, sample, timestep, class_labels):
        """x_t [N, C, H, W], t and y [N] to the output."""
        rows = [self.networks[y](x[None], timestep).sample for x, y in zip(sample, class_labels.tolist())]
        return UNet2DOutput(sample=torch.cat(rows))


def gaussian_classes(means, variances, size=8, sampler=None, **config):
    scheduler = DDPMScheduler(clip_sample=False, **{"num_train_timesteps": 60, **config})
    network = ClassGaussianNetwork(dict(scheduler.config), means, variances, size)
    names = {number: str(number) for number in range(len(means) - 1)}
    return finished(ClassConditionalDDPMPipeline(network, scheduler, names), sampler)


@pytest.mark.parametrize("sampler", [None, "DDIMScheduler", *MULTISTEP])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_guiding_gaussians_of_one_width_draws_the_extrapolated_gaussian(prediction_type, sampler):
    """N(m_∅, v) guided to N(m_y, v) is N(m_∅ + s(m_y - m_∅), v); else guidance moves too far, or off that line."""
    config = {"prediction_type": prediction_type, "beta_schedule": "squaredcos_cap_v2"}
    pipeline = gaussian_classes([0.2, -0.3, 0.1], [0.04] * 3, sampler=sampler, **config)
    for scale in (0.0, 0.5, 3.0):
        drawn = draw(pipeline, [0, 1], scale)
        for index, mean in enumerate((0.2, -0.3)):
            moved = 0.1 + scale * (mean - 0.1)
            exact = gaussian_classes([moved, 0.0], [0.04] * 2, sampler=sampler, **config)
            expected = draw(exact, [0], generator=generators(index))
            torch.testing.assert_close(drawn[index : index + 1], expected, rtol=0, atol=1e-3)


def affine_x0(alpha_bar, scale, means, variances):
    """(A, B) of the guided x̂_0 = A x_t + B for N(means, variances) of the class and of no class."""
    slopes = [math.sqrt(alpha_bar) * v / (alpha_bar * v + 1 - alpha_bar) for v in variances]
    shifts = [m * (1 - slope * math.sqrt(alpha_bar)) for m, slope in zip(means, slopes)]
    return tuple(u + scale * (c - u) for c, u in (slopes, shifts))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guided_ancestral_samples_have_the_moments_of_the_affine_chain(scale):
    """Propagating mean and variance through Eq. 7; and the guided mean lies beyond the class's, as guidance is for."""
    means, variances = (0.5, 0.0), (0.1, 1.0)
    pipeline = gaussian_classes(means, variances, size=64, beta_schedule="squaredcos_cap_v2")
    drawn = draw(pipeline, [0] * 4, scale, num_inference_steps=None)
    mean, variance = 0.0, 1.0
    alpha_bars = torch.cumprod(1 - pipeline.scheduler.exact_tables.betas, 0).tolist()
    for t in range(59, -1, -1):
        alpha_bar, before = alpha_bars[t], alpha_bars[t - 1] if t else 1.0
        beta = 1 - alpha_bar / before
        from_x0 = math.sqrt(before) * beta / (1 - alpha_bar)
        from_x_t = math.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)
        slope, shift = affine_x0(alpha_bar, scale, means, variances)
        mean = from_x0 * (slope * mean + shift) + from_x_t * mean
        variance = (from_x0 * slope + from_x_t) ** 2 * variance + (1 - before) / (1 - alpha_bar) * beta
    assert drawn.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / drawn.numel()))
    assert drawn.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / drawn.numel()))
    if scale > 1:
        assert drawn.mean() > 0.52  # the class's is 0.5


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guided_ddim_is_the_affine_map_of_x_T(scale):
    """Song et al. 2021, Eq. 12 without noise, pixel by pixel; else DDIM guides by another formula than the chain."""
    means, variances = (0.5, 0.0), (0.1, 1.0)
    pipeline = gaussian_classes(means, variances, sampler="DDIMScheduler", beta_schedule="squaredcos_cap_v2")
    x_T = randn(2, 1, 8, 8)
    drawn = draw(pipeline, [0, 0], scale, latents=x_T)
    alpha_bars, x = torch.cumprod(1 - pipeline.scheduler.betas.double(), 0).tolist(), x_T.double()
    for t in range(50, -1, -10):
        alpha_bar, before = alpha_bars[t], alpha_bars[t - 10] if t else 1.0
        slope, shift = affine_x0(alpha_bar, scale, means, variances)
        x0 = slope * x + shift
        x = math.sqrt(before) * x0 + math.sqrt((1 - before) / (1 - alpha_bar)) * (x - math.sqrt(alpha_bar) * x0)
    torch.testing.assert_close(drawn.double(), x, rtol=0, atol=1e-3)


# Latents, callbacks, frames


@pytest.mark.parametrize("guided", ["by no class", "by the classifier"])
def test_latent_models_are_guided_by_class(guided):
    """Else guidance works in pixels alone, or on the decoded image."""
    vae = tiny_vae(scaling_factor=0.2, shift_factor=0.1)
    pipeline = by_class(4, vae)
    options = {"classifier": LinearClassifier(3, (4, 8, 8))} if guided == "by the classifier" else {}
    scale = 1.0 if options else 2.5
    latents = draw(pipeline, ["owl", 0], scale, **options)
    decoded = draw(pipeline, ["owl", 0], scale, output_type="pt", **options)
    assert latents.shape == (2, 4, 8, 8)
    expected = vae.decode(latents / 0.2 + 0.1).sample.detach()
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1))
    images = draw(pipeline, ["owl", 0], scale, output_type="pil", **options)
    assert [(image.mode, image.size) for image in images] == [("RGB", (16, 16))] * 2
    assert (latents - draw(pipeline, ["owl", 0])).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"classifier": LinearClassifier()}], ids=["by no class", "by the classifier"])
def test_callbacks_see_the_guided_latents_once_a_step(options):
    """Else a callback sees the doubled batch or the step before its guidance, or what it returns is dropped."""
    pipeline, seen = by_class(), []
    drawn = draw(
        pipeline,
        [0, 2],
        2.0,
        callback_on_step_end=lambda *said: seen.append((*said[1:3], said[3]["latents"].clone())),
        **options,
    )
    assert [(index, int(t)) for index, t, _ in seen] == list(enumerate(range(50, -1, -10)))
    assert all(x.shape == (2, 1, 8, 8) for _, _, x in seen)
    assert torch.equal(seen[-1][2], drawn)
    assert torch.equal(drawn, draw(pipeline, [0, 2], 2.0, **options))
    ones = torch.ones(2, 1, 8, 8)
    kept = draw(pipeline, [0, 2], 2.0, callback_on_step_end=lambda *_: {"latents": ones}, **options)
    assert torch.equal(kept, ones)


def test_frames_and_latents_and_tuples_are_as_without_classes():
    """Else the chain of a model by class cannot be shown or begun where it was, as an unconditional one's can."""
    pipeline = by_class()
    options = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 2.0}
    drawn = pipeline([0, 2], generator=generators(0, 1), num_frames=6, **options)
    assert [frame.timestep for frame in drawn.frames] == [50, 40, 30, 20, 10, 0]
    assert torch.equal(drawn.frames[-1].sample, drawn.images)
    torch.testing.assert_close(drawn.frames[-1].prediction, drawn.images, rtol=0, atol=1e-6)
    own = generators(0, 1)
    x_T = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in own])
    (again,) = pipeline([0, 2], generator=own, latents=x_T, return_dict=False, **options)
    assert torch.equal(again, drawn.images)
    options |= {"num_inference_steps": None, "timesteps": [50, 40, 30, 20, 10, 0]}
    assert torch.equal(pipeline([0, 2], generator=generators(0, 1), **options).images, drawn.images)


# What is refused, and the way out


@pytest.mark.parametrize("label", [3, -1, "wolf", True, 1.5, "0", torch.tensor([0, 9]), [0, "wolf"]], ids=str)
def test_an_unknown_class_is_named_with_those_there_are(label):
    """Else a typing mistake draws the null class, another class, or ends in an index error."""
    pipeline = by_class()
    says = r"class .* must be one of the model's 3.*'cat', 'dog', 'owl'"
    with labelled_calls(pipeline.unet) as calls, pytest.raises(ValueError, match=says):
        draw(pipeline, label)
    assert calls == []


def test_guidance_without_a_null_class_names_the_way_out():
    """Else the guided image is made of noise, or of an index error."""
    pipeline = by_class(null=False)
    for call in (lambda: draw(pipeline, [0], 2.0), lambda: draw(pipeline, [0], 0.0)):
        with (
            labelled_calls(pipeline.unet) as calls,
            pytest.raises(ValueError, match=r"--class_dropout.*guidance_scale=1"),
        ):
            call()
        assert calls == []
    with pytest.raises(ValueError, match="None"):
        draw(pipeline, [None])
    assert torch.isfinite(draw(pipeline, [0])).all()  # the ways out that it names
    assert torch.isfinite(draw(pipeline, [0], classifier=LinearClassifier())).all()


@pytest.mark.parametrize(("labels", "count"), [(None, 0), ([], 0), ([1], 1), ([0, 1, 2], 3), (1, 1)], ids=str)
def test_a_classifier_wants_a_class_for_each_image(labels, count):
    """Else an unconditional model is guided nowhere, or one label is spread over images that were not asked for."""
    pipeline = unconditional()
    with (
        labelled_calls(pipeline.unet) as calls,
        pytest.raises(ValueError, match=rf"requires 2 class_labels \(got {count}\)"),
    ):
        pipeline(2, generators(0, 1), STEPS, classifier=LinearClassifier(), class_labels=labels)
    assert calls == []


@pytest.mark.parametrize("labels", [[0, 9], [-1, 0], [0.5, 1.0], ["a", "b"], [True, False], [None, 0]], ids=str)
def test_labels_that_a_classifier_does_not_know_are_named(labels):
    """Else the user sees an index error of torch, or the wrong class is drawn."""
    pipeline = finished(unconditional())
    with pytest.raises(ValueError, match="class"):
        pipeline(2, class_labels=labels, classifier=LinearClassifier(), num_inference_steps=STEPS)


def test_labels_that_nothing_reads_are_refused():
    """Else a user believes that the class asked for was drawn."""
    with pytest.raises(ValueError, match="without a classifier"):
        finished(unconditional())(2, class_labels=[0, 1])
    with pytest.raises(ValueError, match="None"):
        draw(by_class(), [None, 0], classifier=LinearClassifier())


@pytest.mark.parametrize(
    "options", [{"guidance_scale": math.nan}, {"guidance_rescale": 1.5}, {"guidance_interval": (15, 5)}], ids=str
)
def test_guidance_that_is_none_is_refused(options):
    """Else images of NaN come out, or nothing is guided and nobody knows."""
    pipeline = by_class()
    with pytest.raises(ValueError, match=next(iter(options))):
        draw(pipeline, [0, 1], **{"guidance_scale": 2.0, **options})


def test_generators_are_one_for_each_label():
    """Else a list of generators of another length fails inside torch."""
    pipeline = by_class()
    with pytest.raises(ValueError, match="1 generators for batch_size=2"):
        draw(pipeline, [0, 1], generator=generators(0))
    with pytest.raises(ValueError, match="batch_size=0"):
        draw(pipeline, [])


def test_a_pipeline_by_class_wants_a_model_by_class_and_a_name_for_each():
    """Else names and embeddings are shifted against one another, and a label draws another class."""
    with pytest.raises(ValueError, match="DDPMPipeline"):
        ClassConditionalDDPMPipeline(tiny_unet(), DDPMScheduler())
    for names in ({0: "cat", 1: "dog"}, {0: "cat", 1: "dog", 3: "owl"}, dict(enumerate("abcde"))):
        with pytest.raises(ValueError, match=rf"names {len(names)} classes and the UNet embeds 4"):
            ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=4), DDPMScheduler(), names)
    unnamed = ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=4), DDPMScheduler())
    assert unnamed.labels == {"0": 0, "1": 1, "2": 2, "3": 3}
    assert unnamed.null_class is None
