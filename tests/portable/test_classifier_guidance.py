"""Guidance by a classifier's gradient, against the papers' algorithms and Bayes' rule."""

import math

import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.portable.guidance_ddpm_hf import ClassifierGuidance
from tests.support.fixtures_pipeline import GaussianNetwork, finished, generators, randn
from tests.support.guidance import (
    LEARNED,
    MULTISTEP,
    STEPS,
    LinearClassifier,
    by_class,
    by_hand,
    conditional,
    draw,
    unconditional,
)


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
