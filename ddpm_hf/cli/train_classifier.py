"""`ddpm-hf train-classifier`: train a classifier of noised images."""

import typer


def train_classifier(context: typer.Context) -> None:
    """Train a classifier of noised images, to guide sampling; its --help lists the flags."""
    from .classifier_flags import parse_classifier_flags

    flags = parse_classifier_flags(context.args)  # before torch is imported, so that --help is quick
    from .classifier_training import run

    run(flags)
