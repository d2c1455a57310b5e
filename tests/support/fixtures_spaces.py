"""What the tests of Spaces share: tiny models of each kind, on a Hub of our own, and processes without the package."""

from fnmatch import fnmatch
from pathlib import Path

import torch

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.common.randomness import keyed_seed
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_text import stable_diffusion_scheduler, tiny_text_pipeline
from tests.support.hub_server import LARGE, Blob, Hub, Repository

STEPS = 60  # T of the tiny models
CLASSES = {0: "cat", 1: "dog", 2: "none"}


def tiny_pipelines() -> dict[str, object]:
    """Untrained models of each kind, by name."""
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2")
    by_class = tiny_unet(channels=3, num_class_embeds=len(CLASSES) + 1)
    by_class.class_embedding.weight.data.mul_(20)  # else the class is hardly heard
    pipelines = {
        "plain": DDPMPipeline(tiny_unet(), scheduler),
        "by-class": ClassConditionalDDPMPipeline(by_class, scheduler, CLASSES),
        "text": tiny_text_pipeline(stable_diffusion_scheduler(num_train_timesteps=STEPS)),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def seeded(seed: int, count: int) -> list[torch.Generator]:
    """The generators of images 0.. of a seed."""
    return [torch.Generator().manual_seed(keyed_seed(seed, "sample", 0, index)) for index in range(count)]


def put(hub: Hub, name: str, folder: Path, private: bool = False) -> None:
    """Lay a folder's files into a Hub's repository, as if they had been uploaded."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    hub.repositories[name] = Repository(private)
    hub.repositories[name].commit(
        "main",
        {path: Blob(data, any(fnmatch(path, pattern) for pattern in LARGE)) for path, data in files.items()},
    )
