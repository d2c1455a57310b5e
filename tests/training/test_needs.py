"""A flag that has no effect because of the others is said to have none, in each program that has it."""

import shlex
from typing import NamedTuple
from unittest import mock

import pytest

import train_text2image
import train_unconditional
from ddpm_hf.cli import classifier_training as classifier
from ddpm_hf.cli.classifier_flags import CLASSIFIER, parse_classifier_flags
from ddpm_hf.common.errors import DataError, UsageError
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.data.reading import load_rows
from ddpm_hf.training.flags import GridFlags
from ddpm_hf.training.needs import needs_of, without_effect
from ddpm_hf.training.setup.settings import save_settings
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import changed, defaults, run_script, words

PROGRAMS = {
    "unconditional": (train_unconditional.PROGRAM, train_unconditional.parse),
    "text2image": (train_text2image.PROGRAM, train_text2image.parse),
    "classifier": (CLASSIFIER, parse_classifier_flags),
}
DATA, NO_GRIDS = "--train_data_dir x", "--save_images_epochs 0"
CHECKPOINT, FOLDER = "--pretrained_model_name_or_path user/model", "--pretrained_model_name_or_path ."
EMA, HYBRID = "--use_ema", "--variance_type learned_range --objective hybrid"


class Row(NamedTuple):
    """A flag, other flags with which it has no effect and what the line says of them, and flags with which it has."""

    flag: str
    useless: str
    says: str
    useful: str
    programs: tuple[str, ...] = tuple(PROGRAMS)
    data: str = DATA
    device: str = "cpu"


UNCONDITIONAL, TEXT, CLASSIFIER = (("unconditional",), ("text2image",), ("classifier",))
PIPELINES = UNCONDITIONAL + TEXT
NO_EMA = "--use_ema False"
ROWS = [
    Row("--num_epochs 3", "--max_train_steps 5", "--max_train_steps 5", ""),
    Row("--eval_batch_size 3", NO_GRIDS, "--validation_steps", NO_GRIDS + " --validation_steps 5", UNCONDITIONAL),
    Row("--eval_batch_size 3", "", "--validation_steps", "--validation_steps 5", CLASSIFIER),
    *[Row(f"--save_{name}_epochs 3", "--streaming --max_train_steps 5", "--streaming", "", programs)
      for name, programs in (("images", PIPELINES), ("model", tuple(PROGRAMS)))],
    Row("--lr_warmup_steps 3", "--lr_scheduler constant", "--lr_scheduler constant", "--lr_scheduler linear"),
    *[Row(f"--{name}", NO_EMA, "without --use_ema", EMA) for name in (
        "ema_inv_gamma 2", "ema_power 0.5", "ema_max_decay 0.5", "ema_min_decay 0.1", "foreach_ema False",
        "ema_max_decay 0.9999",  # its default, which was asked for all the same
    )],
    Row("--offload_ema", NO_EMA, "--use_ema", EMA, device="cuda"),
    Row("--allow_tf32", "", "CUDA", "", device="cuda"),
    Row("--logging_dir curves", "--logger none", "--logger none", "--logger tensorboard"),
    Row("--logging_dir curves", "--logger wandb", "--logger wandb", "--logger tensorboard"),
    Row("--tracker_project_name mine", "--logger none", "--logger none", "--logger wandb"),
    Row("--hub_token hf_secret", "", "--dataset_name", "--dataset_name imagefolder"),
    *[Row(f"--evaluation_{given}", "", "--evaluation_epochs", "--evaluation_epochs 1", PIPELINES) for given in (
        "samples 5", "metrics kid", "features clip", "features_weights w.pt", "protocol edm2", "sampler ddpm",
        "steps 7",
    )],
    Row("--hub_best_metric fid", "", "--hub_strategy end", "--hub_strategy best", PIPELINES),
    Row("--save_images_epochs 3", "--save_images_steps 5", "--save_images_steps", "", PIPELINES),
    *[Row(f"--{name}", "", "uploads nothing without --push_to_hub", "--push_to_hub", PIPELINES) for name in (
        "hub_model_id me/it", "hub_private_repo", "hub_revision v1",
    )],
    Row("--validation_split 0.5", "", "--validation_steps", "--validation_steps 5"),
    Row("--cache_dir c", "", "digits", DATA, UNCONDITIONAL + CLASSIFIER, data=""),
    Row("--cache_dir c", "--cache_latents False", "digits", "--cache_latents", TEXT, data=""),
    Row("--revision v1", FOLDER, "folder", CHECKPOINT, TEXT),
    Row("--non_ema_revision v1", FOLDER, "folder", CHECKPOINT, TEXT),
    Row("--vlb_weight 0.5", "", "--objective simple", HYBRID, UNCONDITIONAL),
    Row("--ddpm_num_inference_steps 5", NO_GRIDS, "sample grids", "", UNCONDITIONAL),
    Row("--class_dropout 0.5", "", "--label_column", "--label_column label", UNCONDITIONAL),
    *[Row(f"--conditioning_{given}", useless, f"--conditioning {task}", f"--conditioning {task}", UNCONDITIONAL)
      for given, useless, task in (
        ("factor 3", "", "super-resolution"), ("filter average", "--conditioning deblur", "super-resolution"),
        ("enlarge bilinear", "", "super-resolution"), ("masks half", "", "inpaint"), ("blur_size 2", "", "deblur"),
    )],
    Row("--conditioning_noise 0.2", "", "--conditioning", "--conditioning deblur", UNCONDITIONAL),
    *[Row(f"--{name}", given, "no autoencoder is trained", "", TEXT) for given in (
        CHECKPOINT, "--vae_name_or_path v") for name in (
        "vae_train_steps 5", "vae_learning_rate 0.1", "vae_kl_weight 0.1", "vae_latent_channels 3", "vae_widths 8,16",
    )],
    Row("--train_text_encoder", "", "in any case", CHECKPOINT, TEXT),
    Row("--dream_detail_preservation 2", "", "--dream_training", "--dream_training", TEXT),
    Row("--validation_prompts a b", NO_GRIDS, "not sampled", "", TEXT),
    Row("--num_inference_steps 5", NO_GRIDS, "sample grids", "", TEXT),
    Row("--ddpm_num_steps 50", CHECKPOINT, "the checkpoint's", "", TEXT),
    Row("--ddpm_beta_schedule cosine", CHECKPOINT, "the checkpoint's", "", TEXT),
]  # fmt: skip
# Flags that are a start's in one program; a row of the parser cannot show them, for they name a folder that is read
APART = {("unconditional", "revision"), ("text2image", "eval_batch_size")}


def name_of(row) -> str:
    """The name of a row's flag."""
    return row.flag.split()[0][2:]


def lines_of(program: str, row: Row, more: str, device: str) -> list[str]:
    """What is said of a command line."""
    _, parse = PROGRAMS[program]
    config = parse(shlex.split(f"{row.data} {more} {row.flag}"))
    return without_effect(config, device)


CASES = [(row, program) for row in ROWS for program in row.programs]


def test_every_need_has_a_row():
    """Else a flag is said to need another, and nobody has seen that it is."""
    needed = {(program, name) for program, (one, _) in PROGRAMS.items() for name in needs_of(one.flags)}
    assert needed == {(program, name_of(row)) for row, program in CASES} | APART
    for program, name in needed:
        assert name in defaults(PROGRAMS[program][0]).values()


@pytest.mark.parametrize(("row", "program"), CASES, ids=lambda one: one if isinstance(one, str) else one.flag)
def test_a_flag_without_effect_is_named_with_what_it_needs(row, program):
    """Else a setting is accepted, recorded and never used; or a useful one is said to have no effect."""
    (line,) = [one for one in lines_of(program, row, row.useless, "cpu") if one.startswith(f"--{name_of(row)} ")]
    assert row.says in line
    assert "hf_secret" not in line
    assert not [one for one in lines_of(program, row, row.useful, row.device) if one.startswith(f"--{name_of(row)} ")]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("flags", [
    "", "--use_ema False", "--lr_scheduler constant --lr_warmup_steps 0", "--ema_min_decay 0 --use_ema False",
    "--validation_split 0", "--logger none", "--max_train_steps 5",
])  # fmt: skip
def test_what_asks_for_nothing_needs_nothing(program, flags):
    """Else a recipe that a user turns off in part, or a zero, is answered with warnings about flags never given."""
    assert without_effect(PROGRAMS[program][1](shlex.split(f"{DATA} {flags}")), "cpu") == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_that_is_repeated_from_its_settings_says_nothing(program, tmp_path):
    """Else `--config training_config.json`, which lists all flags, is answered with a page of warnings."""
    _, parse = PROGRAMS[program]
    config = parse(["--train_data_dir", "x", "--output_dir", str(tmp_path)])
    save_settings(config)
    assert without_effect(parse(["--config", str(tmp_path / "training_config.json")]), "cpu") == []


@pytest.mark.parametrize("flags", ["--use_ema False", "--lr_scheduler constant", NO_GRIDS])
@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_recipe_set_asks_for_nothing_in_a_runs_settings_either(program, flags, tmp_path):
    """Else a run whose recipe was turned off in part is answered with warnings about flags that nobody gave."""
    declared, parse = PROGRAMS[program]
    if flags == NO_GRIDS and GridFlags not in declared.flags:
        pytest.skip("a classifier samples no grids")
    config = parse(["--output_dir", str(tmp_path), *shlex.split(flags)])  # the embedded digits, which have a recipe
    assert without_effect(config, "cpu") == []
    save_settings(config)
    assert without_effect(parse(["--config", str(tmp_path / "training_config.json")]), "cpu") == []


TOKEN = "hf_secret"
UNCONDITIONAL_MAIN, TEXT_MAIN = train_unconditional.main, train_text2image.main


@pytest.mark.parametrize(
    ("main", "flags", "reader"),
    [
        (UNCONDITIONAL_MAIN, "--vae_name_or_path user/it", "diffusers.AutoencoderKL.load_config"),
        (UNCONDITIONAL_MAIN, "--model_config_name_or_path user/it", "diffusers.UNet2DModel.load_config"),
        (classifier.main, "--model_config_name_or_path user/it", "diffusers.UNet2DModel.load_config"),
        (TEXT_MAIN, CHECKPOINT, "ddpm_hf.TextToImageDDPMPipeline.from_pretrained"),
        (TEXT_MAIN, "--vae_name_or_path user/it", "diffusers.AutoencoderKL.load_config"),
        (TEXT_MAIN, "--text_encoder_name_or_path user/it", "transformers.CLIPTokenizer.from_pretrained"),
        (TEXT_MAIN, "--model_config_name_or_path user/it", "diffusers.UNet2DConditionModel.load_config"),
    ],
    ids=lambda one: one if isinstance(one, str) else one.__module__,
)
def test_the_token_reads_whatever_is_on_the_hub(main, flags, reader, tmp_path, capsys):
    """Else a private model is not found although the token that reads it was given."""
    argv = shlex.split(f"{flags} --hub_token {TOKEN} --logger none --cpu_threads 1 --output_dir {tmp_path / 'run'}")
    with mock.patch(reader, side_effect=OSError("not found")) as read, pytest.raises(SystemExit) as end:
        main(argv)
    said = capsys.readouterr()
    assert end.value.code == 2, said.err
    assert [call.kwargs.get("token") for call in read.call_args_list] == [TOKEN] * read.call_count
    assert "has no effect" not in said.err
    assert TOKEN not in said.err + said.out


def test_a_file_asks_as_the_command_line_does(tmp_path):
    """Else what a file sets in vain is not said."""
    file = tmp_path / "run.yaml"
    file.write_text("train_data_dir: x\nema_max_decay: 0.5\nema_power: 0.75\n")
    (line,) = without_effect(train_unconditional.parse(["--config", str(file)]), "cpu")
    assert line == "--ema_max_decay 0.5 has no effect without --use_ema"


def test_a_revision_of_a_folder_is_none(tmp_path):
    """Else who names a revision of a model on disk trains from whatever lies there."""
    config = defaults(train_unconditional.PROGRAM, pretrained_model_name_or_path=str(tmp_path), revision="v1")
    config.given = frozenset({"revision"})
    assert without_effect(config, "cpu") == [
        f"--revision v1 has no effect on {tmp_path}, which is a folder on this machine"
    ]
    config = changed(config, pretrained_model_name_or_path="user/model")
    assert without_effect(config, "cpu") == []


@pytest.mark.parametrize("flag", ["revision", "variant", "non_ema_revision"])
def test_text_to_image_refuses_parts_of_a_checkpoint_without_one(flag):
    """Else a revision is recorded of a model that is trained from scratch."""
    config = train_text2image.parse(["--train_data_dir", "x", f"--{flag}", "v1"])
    with pytest.raises(UsageError, match=f"--{flag} .* --pretrained_model_name_or_path"):
        config.check()


def test_the_embedded_digits_have_one_column_of_images_and_are_split_as_asked():
    """Else --image_column and --validation_split are recorded, and others are used."""
    with pytest.raises(DataError, match="--image_column label"):
        load_rows(DataFlags(image_column="label"), 0)
    rows, held_out = load_rows(DataFlags(resolution="16", validation_split=0.25), 0, validate=True)
    assert (len(rows.dataset), len(held_out.dataset)) == (3000, 1000)
    rows, test = load_rows(DataFlags(resolution="16"), 0, validate=True)
    assert (len(rows.dataset), len(test.dataset)) == (4000, 1000)
    assert held_out.fingerprint() != test.fingerprint()


@pytest.mark.parametrize("argv", [["--dataset_split", "test"], ["--dataset_config_name", "large"]])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_embedded_digits_have_no_splits(program, argv):
    """Else the digits are trained on whatever split was asked for."""
    with pytest.raises(ValueError, match=argv[0]):
        PROGRAMS[program][1](argv).check()


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_a_run_says_it_once(dry, tmp_path):
    """Else the lines are made, and nobody reads them."""
    write_rows(tmp_path / "photos", [encoded(pixels) for pixels in random_pixels(4)])
    flags = {
        "train_data_dir": tmp_path / "photos", "model_config_name_or_path": write_unet(tmp_path / "tiny"),
        "output_dir": tmp_path / "run", "max_train_steps": 1, "train_batch_size": 4, "cpu_threads": 1,
        "logger": "none", "save_images_epochs": 0, "ema_power": 0.5, "hub_private_repo": True,
    }  # fmt: skip
    run = run_script([*words(flags), *dry], tmp_path / "run")
    assert run.code == 0, run.err
    assert run.err.count("warning: --ema_power 0.5 has no effect without --use_ema\n") == 1
    assert run.err.count("warning: --hub_private_repo uploads nothing without --push_to_hub\n") == 1
