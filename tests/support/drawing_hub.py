"""Loading a pipeline and drawing from it, and what is said meanwhile: processes of the tests begin with this text."""

import contextlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from transformers.utils import logging as transformers_logging

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
    """The full name of a thing's class."""
    return f"{type(thing).__module__}.{type(thing).__name__}"


def attempt(path, repository, cls=DiffusionPipeline, **options):
    """Load, and draw into a file: the record of both, and the pipeline (None if it would not load)."""
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    assert diffusers.StableDiffusionPipeline  # imported only now, and then it warns where torchvision is missing
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
