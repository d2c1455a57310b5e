"""`ddpm-hf presets`: the UNets that `--model_preset` names."""

import textwrap
from typing import Any

import typer

EPILOG = "Example: ddpm-hf train --model_preset small-64 --train_data_dir photos"


def presets() -> None:
    """List the models that `--model_preset` builds: resolution, parameters, and the training flags that they set."""
    from ..models.presets import MODEL_PRESETS

    lines = []
    for name, preset in MODEL_PRESETS.items():
        size = f"{preset.unet['sample_size']}×{preset.unet['sample_size']}"
        lines.append(f"{name:<17} {size:>7} {preset.parameters:>11,} parameters  {preset.description}")
        recipe = " ".join(f"--{flag}={flag_value(value)}" for flag, value in preset.recipe.items())
        if recipe:
            lines += textwrap.wrap(
                recipe, 110, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
            )
    typer.echo("\n".join(lines))


def flag_value(value: Any) -> str:
    """A flag's value, as written on a command line.

    >>> flag_value(0.00002), flag_value(True), flag_value(800_000)
    ('2e-05', 'true', '800000')
    """
    return str(value).lower() if isinstance(value, bool) else str(value)
