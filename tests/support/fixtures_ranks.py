"""Two processes on the CPU by torchrun, in which something happens; run as a script, one of those processes."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

from tests.support import ROOT, warm


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def torchrun(*words, ranks: int = 2, timeout: float = 400, **environment: str) -> subprocess.CompletedProcess:
    """A program and its words in so many processes, which can import what lies here."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def ranks_by_themselves(*words, ranks: int = 2) -> subprocess.CompletedProcess:
    """The same without the launcher: the processes that it would begin, with the environment that it would give."""
    everyone = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
    everyone["MASTER_PORT"] = str(free_port())
    environments = ({**everyone, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks))
    return warm.run(*words, resident=True, ranks=tuple(environments))


def launch(happening: str, argv: list[str], folder: Path):
    """Train by two ranks, in which one of `HAPPENINGS` happens: (exit code of the launcher, stderr)."""
    done = torchrun(__file__, happening, *argv, NOTES=str(folder))
    return done.returncode, done.stderr


def errors(err: str) -> list[str]:
    """The scripts' own lines of error."""
    return re.findall(r"^train_unconditional\.py: error: .*$", err, flags=re.MULTILINE)


def note(name: str, **what) -> None:
    """Leave a line of what this rank did."""
    path = Path(os.environ["NOTES"]) / f"{name}-{os.environ['RANK']}.jsonl"
    with contextlib.suppress(OSError), open(path, "a") as file:  # where the disk is full, this is not what is watched
        file.write(json.dumps(what) + "\n")


def on_rank(rank: int) -> bool:
    """Whether this process is that rank."""
    return os.environ["RANK"] == str(rank)


def break_data(module):
    """Rank 1 can read no image any more."""
    from ddpm_hf.data import ImageTransform
    from ddpm_hf.data.errors import broken_image

    ImageTransform.resize = mock.Mock(side_effect=broken_image("cat.png", "it is gone"))


def fill_disk(module):
    """No file of rank 1's can grow until the next step."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def free_disk(module):
    """It can again."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)


# What happens to rank 1, by the step (from 1) whose loss it computes
HAPPENINGS = {
    "nothing": {},
    "killed": {3: lambda module: os.kill(os.getpid(), signal.SIGKILL)},
    "terminated": {3: lambda module: os.kill(os.getpid(), signal.SIGTERM)},
    "data": {3: break_data},
    "disk": {3: fill_disk, 4: free_disk},
    "nan": {3: lambda module: "nan"},
    "sharded": {},
    "nan for ever": {step: lambda module: "nan" for step in range(3, 9)},
}


def shard(script) -> None:
    """Have FSDP2, which Accelerate leaves out on CPUs."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from ddpm_hf.training.setup import accelerator as setup

    def accelerator(**options):
        made = Accelerator(**options)
        made.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as Accelerate does with a GPU
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["ResnetBlock2D"],
            cpu_ram_efficient_loading=False,
        )
        return made

    setup.Accelerator = accelerator


def main(happening: str, argv: list[str]) -> None:
    """One of the processes: the script, watched, and what happens to it."""
    import train_unconditional as script
    from ddpm_hf.portable.pipeline_ddpm_hf import DDPMPipeline

    compute_loss, validation_loss, call = script.compute_loss, script.validation_loss, DDPMPipeline.__call__

    def compute(model, batch, keys, **more):
        result = compute_loss(model, batch, keys, **more)
        act = HAPPENINGS[happening].get(keys.step + 1)
        if act and on_rank(1) and act(script) == "nan":
            result.losses[0] *= float("nan")
            note("nan", row=int(batch["index"][0]))
        return result

    def validate(model, *, held_out, **more):
        read = held_out.__getitems__
        with mock.patch.object(
            type(held_out), "__getitems__", lambda self, keys: note("held out", n=len(keys)) or read(keys)
        ):
            return validation_loss(model, held_out=held_out, **more)

    def sample(self, batch_size=1, *args, **kwargs):
        note("drawn", n=batch_size)
        return call(self, batch_size, *args, **kwargs)

    if happening == "sharded":
        shard(script)
    script.compute_loss, script.validation_loss, DDPMPipeline.__call__ = compute, validate, sample
    script.main(argv)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
