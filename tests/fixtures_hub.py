"""What the tests of publishing share: processes that talk to a Hub of our own, with and without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOKEN, STRANGERS, WRONG = "hf_OwnersSecretToken", "hf_AnotherUsersToken", "hf_TokenOfNobody"


def client_environment(hub, home, **environment):
    """The environment of a process that knows no Hub but this one, and has no login, cache or settings of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("PYTHON", "HF_"))}
    kept = {name: value for name, value in kept.items() if not name.upper().endswith("_PROXY")}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", **environment}
    home.mkdir(exist_ok=True)
    return kept


def run(hub, home, code, *arguments, isolated=False, **environment):
    """A fresh process, because the client reads its environment when imported; what `code` prints last, as JSON."""
    settings = client_environment(hub, home, **environment)
    command = [sys.executable, *["-I"] * isolated, "-c", code, *map(str, arguments)]
    where = home if isolated else ROOT
    done = subprocess.run(command, cwd=where, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for token in (TOKEN, STRANGERS, WRONG):
        assert token not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# What a process may begin with: each `attempt` loads a pipeline, draws from it, and notes all that was said meanwhile
DRAWING = '''
import contextlib, json, os, sys, tempfile, traceback, warnings
from pathlib import Path

import numpy as np
import torch
import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from transformers.utils import logging as transformers_logging

diffusers.StableDiffusionPipeline  # importing it warns where torchvision is missing, whatever is loaded
logging.disable_progress_bar()
transformers_logging.disable_progress_bar()
PROMPTS = ["a red square", "a blue square"]


@contextlib.contextmanager
def listening(record):
    """Keep what anyone writes to the standard error, Python's warnings included."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("always")
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            record["said"] = file.read().decode()


def draw(pipeline, **options):
    """Two images of 5 steps from the same noise: of two prompts, of two classes, or just two."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "output_type": "np", **options}
    if hasattr(pipeline, "tokenizer"):
        what, options = PROMPTS, {"guidance_scale": 3.0, **options}
    else:
        what = [0, 1] if hasattr(pipeline, "class_ids") else 2
    return pipeline(what, generator=torch.Generator().manual_seed(0), **options).images


def named(thing):
    return f"{type(thing).__module__}.{type(thing).__name__}"


def attempt(path, repository, cls=DiffusionPipeline, **options):
    """Load, and draw into a file: the record of both, and the pipeline (None if it would not load)."""
    record, pipeline = {}, None
    with listening(record):
        try:
            pipeline = cls.from_pretrained(repository, **options)
            np.save(path, draw(pipeline))
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"
    if pipeline is not None:
        record |= {"pipeline": named(pipeline), "scheduler": named(pipeline.scheduler)}
    return record, pipeline


def apart(function, *arguments):
    """What a function returns, in a process of its own that has imported all that this one has."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if not child:
            code = 1
            try:
                Path(file.name).write_text(json.dumps(function(*arguments)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        return json.loads(Path(file.name).read_text())
'''
WITHOUT = "import sys\nsys.modules['ddpm_hf'] = None  # as where it is not installed\n"
