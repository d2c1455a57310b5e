"""A tiny classifier, and runs of its training."""

from unittest import mock

import torch

from ddpm_hf import DDPMScheduler, cli
from ddpm_hf.models.classifier import NoisyClassifier
from tests.support.fixtures_pipeline import tiny_unet_config

NAMES = ("cat", "dog", "owl")


STEPS = 20  # T


WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_classifier(channels=1, size=8, classes=3, seed=0, **more):
    """An untrained classifier whose logits are far from equal, so that its gradient shows."""
    torch.manual_seed(seed)
    unet = {**tiny_unet_config(channels, size=size), **more}
    betas = DDPMScheduler(STEPS, beta_schedule="cosine").exact_tables.betas.tolist()
    names = {str(number): name for number, name in enumerate(NAMES[:classes])}
    model = NoisyClassifier(
        unet=unet, num_classes=classes, num_train_timesteps=STEPS, trained_betas=betas, id2label=names
    ).eval()
    with torch.no_grad():
        model.head.weight.mul_(8)
    return model


def train_classifier(argv: list[str]) -> None:
    """`ddpm-hf train-classifier`."""
    with mock.patch("sys.argv", ["ddpm-hf", "train-classifier", *argv]):
        cli.main()
