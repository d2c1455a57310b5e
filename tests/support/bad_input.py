"""Runs of train_unconditional.py that must be refused."""

from pathlib import Path

from tests.support.runs import Run, command, run_script

STEADY = {"checkpointing_steps": 1, "lr_scheduler": "constant"}  # whose rates do not depend on the steps to come
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def try_out(flags: dict, shop: Path, folder: Path, *argv: str) -> Run:
    """The script with flags on top of BASE, and words after them."""
    return run_script([*command(shop, folder, **flags), *argv], folder)


def check_refused(run: Run, *fragments) -> str:
    """The error's line, of a run that was refused before it began."""
    assert run.code == 2
    assert "Traceback" not in run.out + run.err
    assert len(run.err.splitlines()) == 1, run.err
    line = run.error()
    for fragment in fragments:
        assert str(fragment) in line
    assert not run.folder.is_dir() or not run.files()
    return line
