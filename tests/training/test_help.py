"""`--help` shows each flag once, in groups; a word that is no flag is answered with the flag it means."""

import dataclasses
import re
from typing import ClassVar

import pytest

import train_text2image
import train_unconditional
from ddpm_hf import objectives
from ddpm_hf.cli.classifier_flags import CLASSIFIER
from ddpm_hf.common.errors import UsageError
from ddpm_hf.objectives import names
from ddpm_hf.portable import scheduling_ddpm_hf
from ddpm_hf.training.parsing import OneLineParser, Program

PROGRAMS = {
    "train_unconditional": train_unconditional.PROGRAM,
    "train_text2image": train_text2image.PROGRAM,
    "train-classifier": CLASSIFIER,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_each_flag_once_and_in_a_group(program):
    # Breaks if a flag is missing from --help, is there twice, or stands under no title.
    parser = OneLineParser(PROGRAMS[program])
    text = parser.format_help()
    shown = re.findall(r"^  (--?\w\S*)", text, re.MULTILINE)
    fields = list(parser.fields)
    assert sorted(one.strip(",") for one in shown) == sorted(["-h", *(f"--{name}" for name in fields)])
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert len(titles) == len(set(titles)) > 8
    assert "Other" not in titles
    assert not re.search(r"--\w+-\w+", re.sub(r"--flag\S*", "", text))  # the hyphened spellings are said once


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_flag_has_one_owner(program):
    # Breaks if dataclasses of flags inherit from one another, so that one instance is passed as two things.
    kinds = PROGRAMS[program].flags
    assert all(kind.__bases__ == (object,) for kind in kinds)
    names = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names)) > 60
    assert PROGRAMS[program].defaults.keys() | PROGRAMS[program].helps.keys() <= set(names)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_states_the_defaults_and_nothing_of_those_that_say_nothing(program):
    # Breaks if a default is no longer shown, or "(default: None)" and "(default: False)" fill the page again.
    text = " ".join(OneLineParser(PROGRAMS[program]).format_help().split())
    assert "Optimizer steps between checkpoints (checkpoint-N/). (default: 500)" in text
    assert "--foreach_ema, --no_foreach_ema Update the EMA in a few fused operations. (default: on)" in text
    assert "default: None" not in text
    assert "default: False" not in text


def test_a_percent_sign_in_a_help_text_is_shown_as_it_is():
    # Breaks if a flag whose help speaks of train[:80%] takes down --help of the program.
    @dataclasses.dataclass
    class Flags:
        title: ClassVar[str] = "Data"
        split: str = dataclasses.field(default="train", metadata={"help": "Such as train[:80%]."})

    assert (
        "Such as train[:80%]. (default: train)" in OneLineParser(Program((Flags,), lambda flags: [], "")).format_help()
    )


def test_the_names_that_help_lists_are_those_of_the_tables():
    # Breaks if a schedule, objective or sampler is added to its table and its flag refuses it.
    assert names.PREDICTION_TYPES == scheduling_ddpm_hf.PREDICTION_TYPES
    assert names.VARIANCE_TYPES == scheduling_ddpm_hf.VARIANCE_TYPES
    assert tuple(objectives.OBJECTIVES) == names.OBJECTIVES
    assert tuple(objectives.LOSS_TYPES) == names.LOSS_TYPES
    assert tuple(objectives.TIMESTEP_SAMPLERS) == names.TIMESTEP_SAMPLERS


def error_of(parser: OneLineParser, argv: list[str], capsys) -> str:
    """The line with which a command line is refused."""
    with pytest.raises(SystemExit) as end:
        parser.parse(argv)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


MEANT = {
    "--batch_size": "--train_batch_size",
    "--batch-size=4": "--train_batch_size",
    "--lr": "--learning_rate",
    "--epochs": "--num_epochs",
    "--steps": "--max_train_steps",
    "--train_num_steps": "--max_train_steps",
    "--lr_anneal_steps": "--max_train_steps with --lr_scheduler linear --lr_warmup_steps 0",
    "--data_dir": "--train_data_dir",
    "--dataset": "--dataset_name",
    "--image_size": "--resolution",
    "--output": "--output_dir",
    "--results_folder": "--output_dir",
    "--timesteps": "--ddpm_num_steps",
    "--diffusion_steps": "--ddpm_num_steps",
    "--noise_schedule": "--ddpm_beta_schedule",
    "--learn_sigma": "--variance_type learned_range --objective hybrid",
    "--fp16": "--mixed_precision fp16",
    "--bf16": "--mixed_precision bf16",
    "--ema": "--use_ema",
    "--ema_rate": "--use_ema --ema_max_decay",
    "--wandb": "--logger wandb",
    "--resume": "--resume_from_checkpoint latest",
    "--gpus": "accelerate launch --num_processes N",
    "--workers": "--dataloader_num_workers",
    "--microbatch": "--gradient_accumulation_steps with a smaller --train_batch_size",
    "--save_interval": "--checkpointing_steps",
    "--class_cond": "--label_column label",
    "--num_channels": "--model_preset or --model_config_name_or_path (a UNet2DModel config)",
    "--learning_rat": "--learning_rate",
    "--Learning-Rate": "--learning_rate",
    "photos": "--train_data_dir photos",
}


@pytest.mark.parametrize("word", MEANT)
def test_an_unknown_flag_is_answered_with_the_one_that_it_means(word, capsys):
    # Breaks if a user of another program is sent to read a hundred flags for one that is only called otherwise.
    parser = OneLineParser(train_unconditional.PROGRAM)
    line = error_of(parser, [word], capsys)
    assert f"(did you mean {MEANT[word]}? see --help)" in line
    if word.startswith("-"):
        name = word.lstrip("-").partition("=")[0]
        with pytest.raises(UsageError, match=re.escape(MEANT[word].removeprefix("--"))):
            parser.tokens({name: 1}, "--config run.yaml")


def test_a_word_that_means_nothing_gets_no_suggestion(capsys):
    # Breaks if --zoom is taken for whatever flag comes nearest.
    assert "did you mean" not in error_of(OneLineParser(train_unconditional.PROGRAM), ["--zoom"], capsys)


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_suggestion_is_a_flag_and_a_value_that_the_program_takes(program):
    # Breaks if a flag is renamed and another program's name for it still leads to the old one.
    parser = OneLineParser(PROGRAMS[program])
    for name, instead in parser.meanings.items():
        if instead.startswith("accelerate launch"):
            continue
        flags = re.findall(r"--(\w+)(?: ([\w-]+))?", instead)
        assert flags, instead
        for flag, value in flags:
            assert flag in parser.flags() | {"config"}, f"{name}: {instead}"
            action = parser._option_string_actions[f"--{flag}"]
            assert not action.choices or value in ("", *action.choices), f"{name}: {instead}"
        assert name not in parser.flags() or name == "config", f"{name} is a flag"


@pytest.mark.parametrize("spelling", ["dataset-image-column-name", "dataset_image_column_name", "image-column"])
def test_hyphens_and_underscores_are_the_same(spelling, tmp_path):
    # Breaks if only some of a flag's spellings take hyphens, on the command line or in a config file.
    parser = OneLineParser(train_unconditional.PROGRAM)
    assert parser.parse([f"--{spelling}", "photo"]).image_column == "photo"
    assert parser.parse([f"--{spelling}=photo-of"]).image_column == "photo-of"
    assert parser.tokens({spelling: "photo"}, "--config run.yaml")[0].endswith("=photo")
