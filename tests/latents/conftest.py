"""An autoencoder whose latents are shifted and scaled, and both ways to read a table."""

from types import SimpleNamespace

import psutil
import pytest

from tests.support.fixtures_pipeline import tiny_vae
from tests.support.pictures import quiet


@pytest.fixture(autouse=True)
def _no_bars():
    """Without the progress bars of what is written."""
    with quiet():
        yield


@pytest.fixture(scope="module")
def vae():
    """Whose latents are shifted and scaled."""
    return tiny_vae(scaling_factor=0.7, shift_factor=0.3).requires_grad_(False)


@pytest.fixture(params=["in memory", "on disk"])
def memory(request, monkeypatch):
    """Both ways that a table is read: all at once, and from the disk where memory is short."""
    if request.param == "on disk":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    return request.param
