"""`~` is the home folder wherever a path is given, as in a shell."""

import sys

import pytest

import train_text2image
import train_unconditional
from ddpm_hf import cli
from ddpm_hf.cli.classifier_flags import CLASSIFIER
from ddpm_hf.training.parsing import OneLineParser, parse_flags

PROGRAMS = {"unconditional": train_unconditional.PROGRAM, "text": train_text2image.PROGRAM, "classifier": CLASSIFIER}
PATHS = {"output_dir", "logging_dir", "cache_dir", "train_data_dir", "dataset_name", "resume_from_checkpoint"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home folder."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_knows_the_home_folder(program, home):
    """Else --flag=~/data, which no shell expands, is a folder named ~ in the current one."""
    parser = OneLineParser(PROGRAMS[program])
    texts = [one.name for one in parser.fields.values() if one.type in (str, str | None) and one.init]
    texts = [name for name in texts if parser._option_string_actions[f"--{name}"].choices is None]
    assert set(texts) >= PATHS
    for name in texts:
        for argv in ([f"--{name}=~/a b"], [f"--{name}", "~/a b"]):
            assert getattr(parser.parse(argv), name) == str(home / "a b")


def test_a_config_file_knows_the_home_folder(home):
    """Else a path in --config, or the path of it, is looked for in a folder named ~."""
    (home / "run.yaml").write_text("output_dir: ~/runs\ncache_dir: ~\n")
    for argv in (["--config=~/run.yaml"], ["--config", "~/run.yaml"]):
        config = parse_flags(CLASSIFIER._replace(weaker_layers=lambda flags: []), argv)
        assert config.output_dir == str(home / "runs")
        assert config.cache_dir is None  # ~ alone is YAML's null


@pytest.mark.parametrize("words", [["sample"], ["push"], ["push-space"], ["train-classifier", "--train_data_dir"]])
def test_every_command_knows_the_home_folder(words, home, monkeypatch, capsys):
    """Else `ddpm-hf sample ~/model` works in a shell, and in a notebook or a script it does not."""
    monkeypatch.setattr(sys, "argv", ["ddpm-hf", *words, "~/no-such-thing"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert str(home / "no-such-thing") in capsys.readouterr().err
