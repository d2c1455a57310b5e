"""Which setting wins over which: command line, config files, recipes, defaults."""

import json
from pathlib import Path

import pytest
import yaml

from ddpm_hf.models.presets import MODEL_PRESETS
from ddpm_hf.training.setup.settings import public_settings
from tests.support.runs import parse

# Layers


def write_config(folder: Path, kind: str, **values) -> str:
    """A --config file."""
    path = folder / f"run.{kind}"
    path.write_text(json.dumps(values) if kind == "json" else yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("kind", ["yaml", "yml", "json"])
def test_the_stronger_layer_wins(kind, tmp_path):
    # Breaks if a setting that the user gave is overruled by a preset or a recipe, or a file beats the command line.
    preset = ["--model_preset", "ddpm-cifar10"]
    file = ["--config", write_config(tmp_path, kind, learning_rate=3e-4)]
    line = ["--learning_rate", "4e-4"]
    named = ["--train_data_dir", "x"]
    recipe = MODEL_PRESETS["ddpm-cifar10"].recipe["learning_rate"]
    assert parse(named).learning_rate == 1e-4  # the default
    embedded = parse([]).learning_rate
    assert embedded not in (1e-4, recipe)
    assert parse(preset).learning_rate == recipe  # over the embedded recipe
    assert parse(named + preset).learning_rate == recipe
    assert parse(preset + file).learning_rate == parse(named + file).learning_rate == 3e-4
    for order in (preset + file + line, line + file + preset, file + line + named):
        assert parse(order).learning_rate == 4e-4


def test_a_preset_named_in_a_file_brings_its_recipe(tmp_path):
    # Breaks if `model_preset: ddpm-cifar10` in a file means another training than --model_preset ddpm-cifar10.
    file = write_config(tmp_path, "yaml", model_preset="ddpm-cifar10", train_data_dir="x")
    line = ["--model_preset", "ddpm-cifar10", "--train_data_dir", "x"]
    assert public_settings(parse(["--config", file])) == {**public_settings(parse(line)), "config": file}


def test_a_switch_can_be_turned_off(tmp_path):
    # Breaks if what a recipe or a file switches on cannot be switched off by whoever is stronger.
    assert parse([]).use_ema
    off, on = (write_config(tmp_path, kind, use_ema=value) for kind, value in (("yaml", False), ("json", True)))
    assert not parse(["--config", off]).use_ema
    assert not parse(["--use_ema", "False"]).use_ema
    assert not parse(["--config", on, "--use_ema", "false"]).use_ema
    assert parse(["--config", off, "--use_ema"]).use_ema


def test_yaml_reads_as_people_write_it(tmp_path):
    # Breaks if YAML's own reading of a word (no is False, 1e-4 a string) turns a setting into an error.
    file = tmp_path / "run.yaml"
    file.write_text(
        "# a run\ntrain_data_dir: x\nmixed_precision: no\nlearning_rate: 1e-4\nresolution: 64\nuse_ema: yes\n"
        "center_crop: off\nhub_model_id: null\noutput_dir: 2024\n"
    )
    config = parse(["--config", str(file)])
    assert config.mixed_precision == "no"
    assert config.learning_rate == 1e-4
    assert config.resolution == "64"
    assert config.use_ema is True
    assert config.center_crop is False
    assert config.hub_model_id is None
    assert config.output_dir == "2024"


def test_an_empty_config_changes_nothing(tmp_path):
    # Breaks if a file of comments is an error, or a key that is null sets something.
    for text in ("", "# nothing\n", "learning_rate:\nseed: null\n"):
        (tmp_path / "run.yaml").write_text(text)
        config = parse(["--config", str(tmp_path / "run.yaml"), "--train_data_dir", "x"])
        assert config.values() == {**parse(["--train_data_dir", "x"]).values(), "config": str(tmp_path / "run.yaml")}


@pytest.mark.parametrize(("key", "meant"), [("learning_rat", "learning_rate"), ("num_epoch", "num_epochs")])
def test_an_unknown_key_is_refused_and_the_nearest_named(key, meant, tmp_path, capsys):
    # Breaks if a typo in a config file silently trains with the default.
    file = write_config(tmp_path, "yaml", **{key: 1})
    with pytest.raises(SystemExit) as end:
        parse(["--config", file])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert repr(key) in error
    assert repr(meant) in error
    assert file in error
