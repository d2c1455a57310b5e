"""Tiny models that are guided, and the guided chain by hand."""

import torch

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMScheduler
from tests.support.fixtures_pipeline import calls_of, finished, generators, randn, tiny_pipeline, tiny_unet

NAMES = {0: "cat", 1: "dog", 2: "owl"}
STEPS = 6
LEARNED = ("learned", "learned_range")
# samplers that cannot re-derive the direction from a clipped x̂_0, as DDIM can
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def by_class(channels=1, vae=None, sampler=None, null=True, size=8, **config):
    """Three classes, and the null class if there is one; untrained, so that x̂_0 is clipped often."""
    scheduler = DDPMScheduler(num_train_timesteps=60, **config)
    outputs = 2 * channels if scheduler.variance_type in LEARNED else channels
    unet = tiny_unet(channels, outputs, size, num_class_embeds=len(NAMES) + null)
    return finished(ClassConditionalDDPMPipeline(unet, scheduler, NAMES, vae), sampler)


def unconditional(channels=1, sampler=None, **config):
    return finished(tiny_pipeline(channels, num_train_timesteps=60, **config), sampler)


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


def labelled_calls(model):
    """(images in the batch, t, class labels) of each call of a model, while the context lasts."""

    def call(inputs, more):
        labels = more.get("class_labels")
        return len(inputs[0]), int(inputs[1]), None if labels is None else labels.tolist()

    return calls_of(model, call)


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
