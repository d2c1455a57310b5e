"""Runs of train_unconditional.py whose flags are watched, and what is looked at."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel

import train_unconditional
from ddpm_hf.portable import acceleration_ddpm_hf
from ddpm_hf.publishing import hub as publishing
from ddpm_hf.publishing import publisher
from ddpm_hf.training import rehearsal
from tests.support.flag_rows import Seen, digest
from tests.support.runs import run_script, words


def observe(flags: dict, folder: Path) -> Seen:
    """Run the script with spies where it hands things on; an upload goes nowhere."""
    batches, calls = [], []

    def spying(name, target, result=None):
        def spy(*args, **kwargs):
            got = target(*args, **kwargs) if result is None else result(*args, **kwargs)
            calls.append((name, (args, kwargs, got)))
            return got

        return spy

    compute_loss = train_unconditional.compute_loss

    def watched_loss(model, batch, keys, **kwargs):
        if keys.validation:
            return compute_loss(model, batch, keys, **kwargs)
        batches.append(batch)
        calls.append(("precision", AcceleratorState().mixed_precision))
        calls.append(("threads", torch.get_num_threads()))
        calls.append(("tf32", torch.backends.cuda.matmul.allow_tf32))
        calls.append(("checkpointing", model.is_gradient_checkpointing))
        return compute_loss(model, batch, keys, **kwargs)

    spies = {
        "create": (publishing, "open_repository", lambda name, *a: name),
        "tags": (publishing, "check_tag", lambda *a: 0),
        "upload": (publishing, "push_files", lambda *a, **k: SimpleNamespace(address="https://hub/it")),
        "save": (publisher, "save_pipeline", None),
        "loader": (torch.utils.data.DataLoader, "__init__", None),
        "compile": (torch, "compile", lambda model, **k: model),
        "compile_blocks": (acceleration_ddpm_hf, "compile_blocks", lambda model: None),
        "xformers": (UNet2DModel, "enable_xformers_memory_efficient_attention", lambda *a, **k: 0),
    }
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    large = flags.get("dry_run") and not flags.get("model_config_name_or_path")
    if large:  # a hundred million parameters are counted, and neither initialized nor tried
        spies |= {
            "step": (rehearsal, "take_step", lambda *a: None),
            "linear": (torch.nn.Linear, "reset_parameters", lambda self: None),
            "convolution": (torch.nn.Conv2d, "reset_parameters", lambda self: None),
        }

    def unwatched_rehearsal(*args):
        if large:
            return args[3]
        seen = len(batches), len(calls)
        rehearsed = rehearse(*args)
        del batches[seen[0] :], calls[seen[1] :]
        return rehearsed

    rehearse = train_unconditional.rehearse
    with (
        mock.patch.object(train_unconditional, "compute_loss", watched_loss),
        mock.patch.object(train_unconditional, "rehearse", unwatched_rehearsal),
    ):
        patches = [
            mock.patch.object(place, name, spying(key, getattr(place, name), result))
            for key, (place, name, result) in spies.items()
        ]
        for patch in patches:
            patch.start()
        try:
            run = run_script(words({**flags, "output_dir": folder}), folder)
        finally:
            for patch in patches:
                patch.stop()
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    return Seen(run, batches, calls)


DRY = {"dry_run": True}
weights = digest("unet")


def json_of(base: dict) -> dict:
    """The UNet config that BASE names."""
    return json.loads((Path(base["model_config_name_or_path"]) / "config.json").read_text())
