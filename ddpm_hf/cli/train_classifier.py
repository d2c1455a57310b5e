"""`ddpm-hf train-classifier`: train a classifier of noised images."""

import typer


def train_classifier(context: typer.Context) -> None:
    """Train a classifier of noised images, to guide sampling; its --help lists the flags."""
    from ..classifier import main as train

    train(context.args)
