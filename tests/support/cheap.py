"""What a process of the tests does once, or not at all, where a user's does it for each run."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer.main

from ddpm_hf.publishing.card import illustrations, sections
from ddpm_hf.training import parsing


def without_waiting_for_disks() -> None:
    """Tests kill processes, and never the machine: no file has to reach the disk, a tenth of a tiny run's time."""
    os.fsync = lambda handle: None


def without_onednn() -> None:
    """Networks of a few channels spend half of their time in oneDNN's preparations; `make test-isa` has them."""
    if not os.environ.get("ONEDNN"):
        torch.backends.mkldnn.enabled = False


def one_card() -> Iterator[tuple[Any, str, Callable]]:
    """What a card shows is made once: for each tiny run anew, it would be a third of its time. (module, name, new)."""
    plot, usable, known = illustrations.loss_curve, sections.usable_samplers, {}

    @functools.cache
    def plotted() -> bytes:
        return plot([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])

    def usable_once(pipeline) -> dict[str, int]:
        scheduler = pipeline.scheduler
        key = type(scheduler), scheduler.to_json_string(), pipeline.unet.config.out_channels
        if key not in known:
            known[key] = usable(pipeline)
        return known[key]

    yield illustrations, "loss_curve", lambda metrics: plotted()
    yield sections, "usable_samplers", usable_once


def one_parser() -> Iterator[tuple[Any, str, Callable]]:
    """A program's parser, and the command's, are made once: that takes longer than to parse. (module, name, new)."""
    make, made = parsing.OneLineParser, {}

    def parser_once(program: parsing.Program) -> parsing.OneLineParser:
        key = program.name, program.flags
        if key not in made:
            made[key] = make(program)
        parser = made[key]
        parser.source, parser.prog = "", program.name or Path(sys.argv[0]).name  # those of the command line before
        return parser

    yield parsing, "OneLineParser", parser_once
    yield typer.main, "get_command", functools.cache(typer.main.get_command)


def install() -> None:
    """All of it, in a process of its own."""
    without_waiting_for_disks()
    without_onednn()
    for place, name, new in [*one_card(), *one_parser()]:
        setattr(place, name, new)
