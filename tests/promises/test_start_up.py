"""What is imported at each point of a start: help comes at once, and training and sampling begin within seconds."""

import os
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_hf import DDPMPipeline, DDPMScheduler
from tests.support import ROOT

# Libraries that take more than a twentieth of a second
HEAVY = {
    "IPython", "accelerate", "datasets", "diffusers", "huggingface_hub", "matplotlib", "numpy", "pandas", "pyarrow",
    "scipy", "sklearn", "tensorboard", "torch", "torchvision", "transformers", "typer",
}  # fmt: skip
# What Diffusers' models import; torchvision where it is installed
DIFFUSERS = {"accelerate", "diffusers", "huggingface_hub", "numpy", "scipy", "torch", "torchvision", "transformers"}
SCRIPTS = ["train_unconditional.py", "train_text2image.py"]
HELP = {"numpy", "typer"}
COMMANDS = [
    "ablate",
    "sample",
    "train",
    "train-text2image",
    "train-classifier",
    "push",
    "push-space",
    "info",
    "presets",
    "restore",
]

# Ends where the point is reached, and shows the modules
POINT = """
import os, runpy, sys

def reached(*arguments, **options):
    print("REACHED", *sorted({name.partition(".")[0] for name in sys.modules}), flush=True)
    os._exit(0)

"""
SCRIPT = "sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nfinally: reached()"
COMMAND = "sys.argv[0] = 'ddpm-hf'\ntry: runpy.run_module('ddpm_hf', run_name='__main__')\nfinally: reached()"
TRAINING = """
import train_unconditional, ddpm_hf.training.loop as loop
loop.take_step = reached
train_unconditional.main()
"""
SAMPLING = """
from ddpm_hf.portable.sampling_ddpm_hf import SamplingMixin
SamplingMixin.denoise = reached
from ddpm_hf.cli import main
main()
"""


def loaded(code: str, *words: object) -> set[str]:
    """The heavy libraries that a program has imported at its point, and what it says before."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", POINT + code, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    before, reached, names = done.stdout.partition("REACHED ")
    assert reached, done.stdout + done.stderr
    assert "--help" not in words or len(before.splitlines()) > 8
    return HEAVY & set(names.split())


def test_importing_the_package_imports_no_heavy_library():
    # Breaks if `import ddpm_hf`, and every use of the command, waits for a library.
    assert loaded("import ddpm_hf; reached()") == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script_waits_for_no_library(script):
    # Breaks if a module on the way to the flags imports torch, or all of transformers: seconds before the answer.
    assert loaded(SCRIPT, script, "--help") <= HELP


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_waits_for_no_library(command):
    # Breaks if a command's module imports what only its run needs.
    assert loaded(COMMAND, command, "--help") <= HELP


def test_training_begins_without_what_its_end_needs(tmp_path):
    # Breaks if plots, trackers or the Hub's libraries are waited for before the first step.
    flags = ["--output_dir", tmp_path / "run", "--logger", "none", "--save_images_epochs", 0, "--cpu_threads", 1]
    assert loaded(TRAINING, *flags, "--max_train_samples", 64, "--train_batch_size", 2) <= DIFFUSERS | {
        "datasets", "pandas", "pyarrow", "sklearn",
    }  # fmt: skip


def test_sampling_begins_without_what_training_needs(tmp_path):
    # Breaks if datasets, or plots, are waited for before the first image is sampled.
    torch.manual_seed(0)
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), norm_num_groups=4)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(10)).save_pretrained(tmp_path / "model")
    words = ["sample", tmp_path / "model", "--num-images", 1, "--steps", 2, "--out", tmp_path / "out"]
    assert loaded(SAMPLING, *words) <= DIFFUSERS | HELP
