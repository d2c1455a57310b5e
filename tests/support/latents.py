"""Small latents: ranks in turn, keys, pictures."""

from types import SimpleNamespace

import torch

from ddpm_hf.latents.table import digest
from tests.support.fixtures_pipeline import randn

CPU = torch.device("cpu")


def rank(number=0, world=1):
    """An accelerator of one of several processes; the test takes turns in their place."""
    return SimpleNamespace(
        process_index=number, num_processes=world, is_local_main_process=number == 0, is_main_process=number == 0,
        wait_for_everyone=lambda: None, device=CPU,
    )  # fmt: skip


# Tables


def keys_of(numbers) -> list[bytes]:
    """A key for each number."""
    return [digest(str(number).encode()) for number in numbers]


TENSORS = {shape: randn(20, *shape, seed=3) for shape in ((4,), (2, 3), (2, 3, 5), (1,))}
