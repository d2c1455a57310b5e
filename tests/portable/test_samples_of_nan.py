"""Samples that are NaN are reported: as pictures they are black."""

import logging
import math

import pytest

from tests.support.fixtures_pipeline import generators, tiny_pipeline

T = 20


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_samples_that_are_nan_are_reported(caplog):
    """Else a user stares at black pictures; a mean of single steps, in a chain with gaps, is the usual cause."""
    pipeline = tiny_pipeline(prediction_type="posterior_mean", num_train_timesteps=T)

    def spoilt(pipeline, index, timestep, tensors):
        x = tensors["latents"].clone()
        x[1, 0, 0, 0] = math.nan
        return {"latents": x}

    def said(steps=10, output_type="pil", callback=spoilt):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pipeline(3, generators(0, 1, 2), steps, output_type, callback_on_step_end=callback)
        return caplog.text

    assert not said(T, callback=None)
    for output_type in ("np", "pt", "latent", "preview"):  # `restore` and strips make pictures of tensors
        assert "1 of 3 samples" in said(output_type=output_type)
    assert "1 of 3 samples" in said()
    assert f"10 of {T} timesteps" in said()
    assert "1 of 3 samples" in said(T)
    assert "timesteps" not in said(T)
