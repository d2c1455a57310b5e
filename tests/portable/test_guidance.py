"""Guidance: classifier-free and by a classifier's gradient, against plain loops, closed forms and Bayes' rule."""

import math

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.portable.guidance_ddpm_hf import ClassifierGuidance, classifier_free_guidance
from tests.support.fixtures_pipeline import GaussianNetwork, generators, randn, tiny_unet, tiny_vae

NAMES = {0: "cat", 1: "dog", 2: "owl"}
STEPS = 6
LEARNED = ("learned", "learned_range")
# samplers that cannot re-derive the direction from a clipped x̂_0, as DDIM can
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def finished(pipeline, sampler=None, **config):
    """The pipeline without a progress bar, and with another sampler if one is named."""
    pipeline.set_progress_bar_config(disable=True)
    if sampler is not None:
        pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config, **config)
    return pipeline


def by_class(channels=1, vae=None, sampler=None, null=True, size=8, **config):
    """Three classes, and the null class if there is one; untrained, so that x̂_0 is clipped often."""
    scheduler = DDPMScheduler(num_train_timesteps=60, **config)
    outputs = 2 * channels if scheduler.variance_type in LEARNED else channels
    unet = tiny_unet(channels, outputs, size, num_class_embeds=len(NAMES) + null)
    return finished(ClassConditionalDDPMPipeline(unet, scheduler, NAMES, vae), sampler)


def unconditional(channels=1, sampler=None, **config):
    scheduler = DDPMScheduler(num_train_timesteps=60, **config)
    outputs = 2 * channels if scheduler.variance_type in LEARNED else channels
    return finished(DDPMPipeline(tiny_unet(channels, outputs), scheduler), sampler)


def draw(pipeline, labels, guidance_scale=1.0, **options):
    """x_0 for each label, image i from the seed i."""
    count = len(labels) if isinstance(labels, (list, tuple, torch.Tensor)) else 1
    usual = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generators(*range(count))}
    return pipeline(labels, guidance_scale, **{**usual, **options}).images


@torch.no_grad()
def by_hand(pipeline, count, predict, shift=None, **step_arguments):
    """The chain as it is written in the papers: x_T, then `step` on what `predict(x_t, t)` says."""
    scheduler, own = pipeline.scheduler, generators(*range(count))
    scheduler.set_timesteps(STEPS)
    x = torch.cat([torch.randn(1, *pipeline.sample_shape, generator=generator) for generator in own])  # [N, C, H, W]
    for t in scheduler.timesteps:
        output = predict(x, t)
        step = scheduler.step(output, int(t), x, generator=own, **step_arguments).prev_sample
        x = step if shift is None else shift(step, output, x, t)
    return x


def conditional(pipeline, ids, channels=None):
    """The network of a class, for `by_hand`; `channels` cuts off a learned variance."""
    return lambda x, t: pipeline.unet(x, t, class_labels=torch.tensor(ids)).sample[:, :channels]


class Calls:
    """(images in the batch, t, class labels) of each call of a model, while the context lasts."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __enter__(self):
        def note(module, inputs, more):
            labels = more.get("class_labels")
            self.seen.append((len(inputs[0]), int(inputs[1]), None if labels is None else labels.tolist()))

        self.handle = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self.seen

    def __exit__(self, *exception):
        self.handle.remove()


# Classifier-free guidance: which networks run


@pytest.mark.parametrize("sampler", [None, "DDIMScheduler"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_scale_one_is_the_conditional_model_in_one_pass(variance_type, sampler):
    """Else a user without guidance pays for two passes, or gets other images than the model's own."""
    pipeline = by_class(2, sampler=sampler, variance_type=variance_type)
    with Calls(pipeline.unet) as calls:
        drawn = draw(pipeline, [2, 0, 1])
    assert [(count, labels) for count, _, labels in calls] == [(3, [2, 0, 1])] * STEPS
    assert torch.equal(drawn, by_hand(pipeline, 3, conditional(pipeline, [2, 0, 1], 2 if sampler else None)))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.5, 8.0])
def test_other_scales_run_class_and_null_class_in_one_batch(scale):
    """Else guidance takes more calls than one a step, or the null half is given a class."""
    pipeline = by_class()
    with Calls(pipeline.unet) as calls:
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
    with Calls(pipeline.unet) as calls:
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
    with Calls(pipeline.unet) as calls:
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
    with Calls(pipeline.unet) as calls:
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


# Classifier guidance: the two algorithms of Dhariwal & Nichol 2021


class LinearClassifier(torch.nn.Module):
    """Logits that are linear in x_t, with another slope at each t: the gradient is known."""

    def __init__(self, classes=3, shape=(1, 8, 8), seed=0):
        super().__init__()
        self.slopes, self.seen = randn(classes, *shape, seed=seed), []

    def weights(self, t):
        return self.slopes * (0.2 + t / 60)

    def forward(self, x_t, timesteps):
        """x_t [N, C, H, W], t [N] -> [N, K]."""
        self.seen.append((x_t.detach().clone(), timesteps.tolist()))
        return torch.einsum("nchw,kchw->nk", x_t, self.weights(float(timesteps[0])).to(x_t.dtype))

    def gradient(self, x_t, t, labels):
        """∇ log p(y | x_t) = w_y - Σ_k p(k | x_t) w_k, of the softmax of linear logits."""
        weights = self.weights(float(t)).to(x_t.dtype)
        p = torch.einsum("nchw,kchw->nk", x_t, weights).softmax(dim=1)
        return weights[labels] - torch.einsum("nk,kchw->nchw", p, weights)


def variance_by_betas(scheduler, t, s, output):
    """Σ of p(x_s | x_t), from the betas alone (Ho et al., Eq. 7; Nichol & Dhariwal, Eq. 15)."""
    alpha_bars = torch.cumprod(1 - scheduler.exact_tables.betas, 0)
    alpha_bar, before = float(alpha_bars[t]), float(alpha_bars[s])
    large = 1 - alpha_bar / before
    small = (1 - before) / (1 - alpha_bar) * large
    if scheduler.variance_type == "learned":
        return output[:, 1:].exp()
    if scheduler.variance_type == "learned_range":
        share = (output[:, 1:] + 1) / 2
        return (share * math.log(large) + (1 - share) * math.log(small)).exp()
    return large if scheduler.variance_type == "fixed_large" else small


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", *LEARNED])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "posterior_mean"])
@pytest.mark.parametrize("steps", [60, 12])
def test_ancestral_steps_move_by_the_variance_times_the_gradient(steps, prediction_type, variance_type):
    """Algorithm 1: Σ s ∇ log p(y | x_t), whatever the model predicts; else the scale means something else."""
    scheduler = DDPMScheduler(60, prediction_type=prediction_type, variance_type=variance_type)
    scheduler.set_timesteps(steps)
    classifier, labels, stride = LinearClassifier(), torch.tensor([2, 0, 1]), 60 // steps
    guidance = ClassifierGuidance(classifier, labels, 1.7)
    x_t, output = randn(3, 1, 8, 8), 0.3 * randn(3, 2 if variance_type in LEARNED else 1, 8, 8, seed=1)
    for t in (60 - stride, 30, stride):
        plain = scheduler.step(output, t, x_t, generators(0, 1, 2)).prev_sample
        shifted = guidance.shift_sample(scheduler, plain, output, x_t, torch.tensor(t))
        expected = variance_by_betas(scheduler, t, t - stride, output) * 1.7 * classifier.gradient(x_t, t, labels)
        torch.testing.assert_close(shifted, plain + expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_outputs_move_as_epsilon_does(prediction_type):
    """Algorithm 2: ε - √(1-ᾱ) s ∇ log p(y | x_t), whatever the model predicts; else DDIM is guided for ε alone."""
    scheduler = DDPMScheduler(60, prediction_type=prediction_type, beta_schedule="squaredcos_cap_v2")
    classifier, labels = LinearClassifier(), torch.tensor([2, 0, 1])
    guidance = ClassifierGuidance(classifier, labels, 1.7)
    x_t, output = randn(3, 1, 8, 8).double(), randn(3, 1, 8, 8, seed=1).double()
    for t in (55, 30, 1, 0):
        alpha_bar = float(torch.cumprod(1 - scheduler.exact_tables.betas, 0)[t])
        a, b = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        epsilon = {
            "epsilon": lambda out: out,
            "sample": lambda out, a=a, b=b: (x_t - a * out) / b,
            "v_prediction": lambda out, a=a, b=b: a * out + b * x_t,
        }[prediction_type]
        shifted = epsilon(guidance.shift_output(scheduler, output, x_t, torch.tensor(t)))
        expected = epsilon(output) - b * 1.7 * classifier.gradient(x_t, t, labels)
        torch.testing.assert_close(shifted, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("sampler", [None, "DDIMScheduler", *MULTISTEP])
def test_both_pipelines_guide_each_step_once(sampler, variance_type):
    """Else the classifier sees another x_t than the model, other timesteps, or the gradient's graph is kept."""
    classifier = LinearClassifier(shape=(2, 8, 8))
    for pipeline in (
        unconditional(2, sampler, variance_type=variance_type),
        by_class(2, None, sampler, variance_type=variance_type),
    ):
        classifier.seen.clear()
        inputs, options = [], {"num_inference_steps": STEPS, "output_type": "latent", "generator": generators(0, 1)}
        handle = pipeline.unet.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0].clone()))
        if isinstance(pipeline, DDPMPipeline):
            drawn = pipeline(2, classifier=classifier, class_labels=[2, 0], **options).images
        else:
            drawn = pipeline(["owl", 0], classifier=classifier, **options).images
        handle.remove()
        assert not drawn.requires_grad
        assert torch.isfinite(drawn).all()
        assert [t for _, t in classifier.seen] == [[t, t] for t in pipeline.scheduler.timesteps.tolist()]
        for (x_t, _), seen in zip(classifier.seen, inputs, strict=True):
            assert torch.equal(x_t, seen)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_ancestral_chains_are_algorithm_1(variance_type):
    """Else the whole chain is guided otherwise than its steps, or a label is taken for another's."""
    classifier, labels = LinearClassifier(), torch.tensor([2, 0])
    guidance = ClassifierGuidance(classifier, labels, 1.5)
    plain, own = unconditional(variance_type=variance_type), by_class(variance_type=variance_type)
    options = {"num_inference_steps": STEPS, "output_type": "latent"}
    options |= {"classifier": classifier, "classifier_scale": 1.5}
    drawn = plain(2, generators(0, 1), class_labels=labels, **options).images
    own_drawn = own(["owl", "cat"], generator=generators(0, 1), **options).images
    for pipeline, images, predict in (
        (plain, drawn, lambda x, t: plain.unet(x, t).sample),
        (own, own_drawn, conditional(own, [2, 0])),
    ):

        def shift(step, output, x, t, scheduler=pipeline.scheduler):
            return guidance.shift_sample(scheduler, step, output, x, t)

        assert torch.equal(images, by_hand(pipeline, 2, predict, shift))
    again = plain(2, generators(0, 1), class_labels=[2, 0], **options).images
    assert torch.equal(drawn, again)
    other = plain(2, generators(0, 1), class_labels=[1, 0], **options).images
    assert (other[0] - drawn[0]).abs().max() > 0.01
    torch.testing.assert_close(other[1], drawn[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_a_classifier_at_scale_zero_guides_nothing(variance_type):
    """Else a classifier changes images, or the noise they are made of, by being there."""
    classifier = LinearClassifier()
    options = {"num_inference_steps": STEPS, "output_type": "latent"}
    idle = {"classifier": classifier, "classifier_scale": 0.0}
    pipeline = unconditional(variance_type=variance_type)
    assert torch.equal(
        pipeline(2, generators(0, 1), class_labels=[2, 0], **idle, **options).images,
        pipeline(2, generators(0, 1), **options).images,
    )
    pipeline = by_class(variance_type=variance_type)
    for scale in (1.0, 2.0):
        assert torch.equal(draw(pipeline, [2, 0], scale, **idle), draw(pipeline, [2, 0], scale))
    pipeline = by_class(variance_type=variance_type, clip_sample=False, sampler="DDIMScheduler")
    drawn, unguided = draw(pipeline, [2, 0], **idle), draw(pipeline, [2, 0])
    torch.testing.assert_close(drawn, unguided, rtol=1e-4, atol=1e-4)


# Bayes' rule: p(x_t | y) ∝ p(x_t) p(y | x_t)


class TwoGaussians(ModelMixin, ConfigMixin):
    """The exact network without a class for images that are N(m, v) or N(-m, v) as a whole, equally often."""

    @register_to_config
    def __init__(self, scheduler_config: dict, mean: float, variance: float, sample_size=8, in_channels=1):
        super().__init__()
        self.plus = GaussianNetwork(scheduler_config, mean, variance, sample_size, in_channels)
        self.minus = GaussianNetwork(scheduler_config, -mean, variance, sample_size, in_channels)
        self.register_to_config(out_channels=in_channels)

    def classify(self, x_t, timesteps):
        """The exact logits of p(y | x_t): N(±√ᾱ m, ᾱ v + 1 - ᾱ) in each pixel; their difference is a sigmoid's."""
        alpha_bar = torch.cumprod(1 - self.plus.betas, 0)[timesteps.long()].reshape(-1, 1, 1, 1)
        spread = alpha_bar * self.config.variance + 1 - alpha_bar
        logit = (alpha_bar.sqrt() * self.config.mean * x_t / spread).flatten(1).sum(dim=1)
        return torch.stack([logit, -logit], dim=1)  # [N, 2]

    def forward(self, sample, timestep):
        """The outputs of both classes, averaged by p(y | x_t), as every E[· | x_t] is."""
        p = self.classify(sample.double(), timestep.expand(len(sample))).softmax(dim=1).reshape(-1, 2, 1, 1, 1)
        both = [network(sample.double(), timestep).sample for network in (self.plus, self.minus)]
        return UNet2DOutput(sample=(p[:, 0] * both[0] + p[:, 1] * both[1]).to(sample.dtype))


BAYES = {"mean": 0.15, "variance": 0.04, "sample_size": 4}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_classifiers_gradient_turns_the_score_into_the_classs(prediction_type):
    """Bayes' rule at every t; else scale 1 does not sample from p(x | y)."""
    scheduler = DDPMScheduler(60, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    network = TwoGaussians(dict(scheduler.config), **BAYES)
    guidance = ClassifierGuidance(network.classify, torch.tensor([0, 1, 0, 1]), 1.0)
    differs = False
    for t in range(59):  # at 59 nothing is left of the image
        x_t = randn(4, 1, 4, 4, seed=t).double()
        timestep = torch.tensor(t)
        with torch.no_grad():
            blind = network(x_t, timestep).sample
            wanted = torch.stack([(network.plus, network.minus)[i % 2](x_t, t).sample[i] for i in range(4)])
        guided = guidance.shift_output(scheduler, blind, x_t, timestep)
        torch.testing.assert_close(guided, wanted, rtol=1e-4, atol=1e-4)
        differs |= bool((blind - wanted).abs().max() > 0.05)
    assert differs


def test_ancestral_shifts_are_bayes_rule_to_first_order():
    """β ∇ log p(y | x_t) is √α times what the class moves the mean by: Algorithm 1 is exact as β goes to 0."""
    scheduler = DDPMScheduler(60, variance_type="fixed_large", clip_sample=False)
    network = TwoGaussians(dict(scheduler.config), **BAYES)
    guidance = ClassifierGuidance(network.classify, torch.tensor([0, 0]), 1.0)
    for t in (59, 30, 5, 1):
        x_t, timestep = randn(2, 1, 4, 4, seed=t).double(), torch.tensor(t)
        with torch.no_grad():
            blind, wanted = network(x_t, timestep).sample, network.plus(x_t, t).sample
        means = [scheduler.p_mean_variance(output, t, x_t).mean for output in (blind, wanted)]
        shifted = guidance.shift_sample(scheduler, means[0], blind, x_t, timestep)
        by_bayes = (means[1] - means[0]) * math.sqrt(1 - float(scheduler.exact_tables.betas[t]))
        torch.testing.assert_close(shifted - means[0], by_bayes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", *MULTISTEP])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_guided_blind_model_draws_what_the_class_model_draws(prediction_type, sampler):
    """Else a sampler is given the guided output on another scale than its own."""
    scheduler = DDPMScheduler(
        60, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False
    )
    network = TwoGaussians(dict(scheduler.config), **BAYES)
    options = {"num_inference_steps": STEPS, "output_type": "latent"}
    blind = finished(DDPMPipeline(network, scheduler), sampler, timestep_spacing="leading")
    unguided = blind(1, generators(3), **options).images
    for label, exact in enumerate((network.plus, network.minus)):
        guided = blind(1, generators(3), classifier=network.classify, class_labels=[label], **options).images
        by_label = finished(DDPMPipeline(exact, scheduler), sampler, timestep_spacing="leading")
        wanted = by_label(1, generators(3), **options).images
        torch.testing.assert_close(guided, wanted, rtol=0, atol=1e-3)
    assert (wanted - unguided).abs().max() > 0.1


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("sampler", [None, "DDIMScheduler"])
def test_zero_terminal_snr_is_guided(sampler, prediction_type):
    """At ᾱ_T = 0 the output's factor divides by zero, and x_T tells no class: else every image is NaN."""
    config = {"prediction_type": prediction_type, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    classifier = LinearClassifier()
    pipeline = by_class(**config)
    finished(pipeline, sampler, timestep_spacing="trailing")
    drawn = draw(pipeline, [2, 0], 2.0, classifier=classifier)
    assert int(pipeline.scheduler.timesteps[0]) == 59
    assert torch.isfinite(drawn).all()
    assert (drawn - draw(pipeline, [2, 0], 2.0)).abs().max() > 0.01
    own = DDPMScheduler(60, **config)
    output, x_t = randn(2, 1, 8, 8, seed=1), randn(2, 1, 8, 8)
    guidance = ClassifierGuidance(classifier, torch.tensor([2, 0]), 1.0)
    assert torch.equal(guidance.shift_output(own, output, x_t, torch.tensor(59)), output)


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
    with Calls(pipeline.unet) as calls, pytest.raises(ValueError, match=says):
        draw(pipeline, label)
    assert calls == []


def test_guidance_without_a_null_class_names_the_way_out():
    """Else the guided image is made of noise, or of an index error."""
    pipeline = by_class(null=False)
    for call in (lambda: draw(pipeline, [0], 2.0), lambda: draw(pipeline, [0], 0.0)):
        with Calls(pipeline.unet) as calls, pytest.raises(ValueError, match=r"--class_dropout.*guidance_scale=1"):
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
    with Calls(pipeline.unet) as calls, pytest.raises(ValueError, match=rf"requires 2 class_labels \(got {count}\)"):
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
