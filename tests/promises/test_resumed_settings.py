"""What becomes of each setting where a run is resumed: applied and recorded, refused, or taken from the run itself."""

import contextlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

import train_text2image
import train_unconditional
from ddpm_hf.cli.classifier_flags import CLASSIFIER, parse_classifier_flags
from ddpm_hf.common.arguments import APPLIED, FIXED, FREE, SECRET_FLAGS, START, flags_by_resume
from ddpm_hf.common.errors import UsageError
from ddpm_hf.training.flags import TrainingFlags
from ddpm_hf.training.run import Resumed, Run
from ddpm_hf.training.setup.claiming import check_resumable, check_unchanged
from ddpm_hf.training.setup.optimizer import make_lr_scheduler, make_optimizer
from ddpm_hf.training.setup.settings import settings_that_go_on
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_text import run_text_script, write_captioned, write_text_unet
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import changed, defaults, parse, run_script, words

LATEST = {"resume_from_checkpoint": "latest"}
CHECKPOINTS = ("checkpoint-2", "checkpoint-3")
PROGRAMS = {"unconditional": train_unconditional.PROGRAM, "text": train_text2image.PROGRAM, "classifier": CLASSIFIER}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The flags of a run, and its folder after two steps of four."""
    root = tmp_path_factory.mktemp("begun")
    write_rows(root / "images", [encoded(pixels) for pixels in random_pixels(8)])
    write_unet(root / "unet")
    flags = {
        "train_data_dir": root / "images", "model_config_name_or_path": root / "unet", "output_dir": root / "run",
        "train_batch_size": 4, "max_train_steps": 2, "eval_batch_size": 1, "ddpm_num_inference_steps": 1, "seed": 5,
        "cpu_threads": 1, "logger": "none", "logging_steps": 1, "use_ema": True, "learning_rate": 1e-2,
        "lr_warmup_steps": 8, "adam_weight_decay": 0.25, "random_flip": True, "checkpointing_steps": 1,
    }  # fmt: skip
    run = run_script(words(flags), root / "run")
    assert run.code == 0, run.err
    return SimpleNamespace(flags=flags, folder=root / "run")


@pytest.fixture
def resume(begun, tmp_path):
    """Resumes a copy of the run, up to its third step, with some flags changed or left out."""
    folder = tmp_path / "run"
    shutil.copytree(begun.folder, folder)

    def run(**changed):
        flags = {**begun.flags, "output_dir": folder, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
        return run_script(words({**flags, **changed}), folder)

    return run


# Applied


OF_THE_OPTIMIZER = {
    "learning_rate": 1e-5, "scale_lr": True, "lr_scheduler": "linear", "lr_warmup_steps": 1, "adam_beta1": 0.5,
    "adam_beta2": 0.6, "adam_weight_decay": 0.5, "adam_epsilon": 1e-3,
}  # fmt: skip


def test_the_optimizer_takes_the_new_settings(begun, resume):
    """Else a run trains with the old learning rate while log, card and settings state the new one."""
    run = resume(**OF_THE_OPTIMIZER)
    assert run.code == 0, run.err
    changed = {**begun.flags, "max_train_steps": 3, **OF_THE_OPTIMIZER}
    config, rates = parse(words(changed)), []
    optimizer = make_optimizer(config[TrainingFlags], tiny_unet(), world=1)
    schedule = make_lr_scheduler(config[TrainingFlags], optimizer, total_steps=3)
    for _ in range(3):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    checkpoint = torch.load(run.folder / "checkpoint-3" / "optimizer.bin", weights_only=True)
    want, got = ({**one["param_groups"][0], "params": None} for one in (optimizer.state_dict(), checkpoint))
    assert got == {**want, "lr": pytest.approx(rates[-1]), "initial_lr": pytest.approx(want["initial_lr"])}
    assert run.records()[-1]["lr"] == pytest.approx(rates[-1])
    before = parse(words(begun.flags))
    for flag, value in OF_THE_OPTIMIZER.items():
        assert run.json("training_config.json")[flag] == value
        assert f"{flag} was {getattr(before, flag)} and is {value}" in run.err


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("flag", "value", "key"),
    [
        ("ema_max_decay", 0.5, "decay"),
        ("ema_min_decay", 0.9, "min_decay"),
        ("ema_power", 0.1, "power"),
        ("ema_inv_gamma", 3.0, "inv_gamma"),
    ],
)
def test_the_average_takes_the_new_decay(flag, value, key, resume):
    """Else the average that is sampled and saved decays as before, whatever is recorded."""
    run = resume(**{flag: value})
    assert run.code == 0, run.err
    ema = run.json("checkpoint-3/unet_ema/config.json")
    assert (ema[key], ema["optimization_step"]) == (value, 3)
    other = resume(resume_from_checkpoint="checkpoint-2", **{flag: value * 0.5})
    assert other.json("checkpoint-3/unet_ema/config.json")[key] == value * 0.5


def test_the_first_step_has_the_new_rate_too(resume):
    """Else the first step after a divergence is taken with the rate that it diverged at."""
    run = resume(learning_rate=1e-30)
    assert run.code == 0, run.err
    before, after = (run.folder / name / "unet/diffusion_pytorch_model.safetensors" for name in CHECKPOINTS)
    assert after.read_bytes() == before.read_bytes()


def test_a_run_that_diverged_does_what_its_error_says(begun, resume, monkeypatch):
    """Else the advice of the error, a lower learning rate, changes nothing."""
    compute_loss = train_unconditional.compute_loss

    def diverges(*args, run, **options):
        losses = compute_loss(*args, run=run, **options)
        return losses._replace(losses=losses.losses / (run.flags.learning_rate < 1e-3))

    monkeypatch.setattr(train_unconditional, "compute_loss", diverges)
    run = resume(max_train_steps=6, max_nonfinite_steps=2)
    assert run.code == 2
    assert "go on from there with --resume_from_checkpoint latest and a lower --learning_rate" in run.error()
    run = run_script(words({"output_dir": run.folder, **LATEST, "learning_rate": 1e-4}), run.folder)
    assert run.code == 0, run.err
    assert [record["step"] for record in run.records()] == [1, 2, 3, 4, 5, 6]
    assert all(record["lr"] <= 1e-4 for record in run.records()[2:])


# Other data


def test_a_card_names_all_the_data_of_its_sessions(begun, resume, tmp_path):
    """Else a card's advice on privacy, and its statement of the data, are of the wrong images."""
    write_rows(tmp_path / "others", [encoded(pixels) for pixels in random_pixels(6, seed=9)])
    run = resume(train_data_dir=tmp_path / "others")
    assert run.code == 0, run.err
    card = (run.folder / "README.md").read_text()
    assert "| dataset | images, 8 images; others, 6 images |" in card
    assert "The model knows images and others and nothing else" in card
    assert "With 14 images it may reproduce" in card
    assert "| steps | date | took | hardware | dataset |" in card
    started = {"pretrained_model_name_or_path": run.folder, "model_config_name_or_path": None, "max_train_steps": 1}
    flags = {**begun.flags, **started, "train_data_dir": tmp_path / "others", "output_dir": tmp_path / "next"}
    run = run_script(words(flags), tmp_path / "next")
    assert run.code == 0, run.err
    card = (run.folder / "README.md").read_text()
    assert "fine-tuned from the local model run" in card
    assert "The model knows images and others and nothing else" in card
    assert "| dataset | others, 6 images |" in card


@pytest.mark.parametrize("share", [None, 0.25])
def test_held_out_images_that_were_trained_on_are_said_and_not_published(share, begun, resume, tmp_path):
    """Else the loss of images that the model was trained on stands in the card as held out."""
    held_out = {"validation_split": 0.25, "validation_steps": 1}
    if share is None:  # held out from now on
        run = resume(**held_out)
    else:  # the split of a folder with one more image
        folder, flags = tmp_path / "first", {**begun.flags, **held_out}
        run = run_script(words({**flags, "output_dir": folder}), folder)
        assert "held-out loss" in (folder / "README.md").read_text()
        write_rows(tmp_path / "more", [encoded(pixels) for pixels in random_pixels(9)])
        more = {"output_dir": folder, "train_data_dir": tmp_path / "more", "max_train_steps": 3, **LATEST}
        run = run_script(words({**flags, **more}), folder)
    assert run.code == 0, run.err
    assert "this run was trained on some of them" in run.err
    assert "validation_loss" in run.records()[-1]
    assert "held-out loss |" not in (run.folder / "README.md").read_text()
    again = {"output_dir": run.folder, "max_train_steps": 4, **LATEST}  # once seen, always seen
    run = run_script(words(again), run.folder)
    assert run.code == 0, run.err
    assert "held-out loss |" not in (run.folder / "README.md").read_text()


def test_a_run_that_is_further_than_asked_says_so(resume):
    """Else it ends with the advice to train to a step that it has passed."""
    assert resume().code == 0
    run = resume(max_train_steps=1)
    assert run.code == 0, run.err
    assert "step 3 of 1: nothing is left to train" in run.err
    assert "--resume_from_checkpoint latest --max_train_steps 6" in run.out + run.err


# Each flag of each program


def other(config, name):
    """Another value than a flag has."""
    value = getattr(config, name)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [*value, "x"] if isinstance(value, list) else f"{value}-other"


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_flag_is_free_applied_or_fixed(program, tmp_path):
    """Else a flag that is added says nothing of resuming, and is ignored or breaks what it meets."""
    config, model, said = defaults(PROGRAMS[program]), tiny_unet(), []
    names, fields = set(config.values()), config.fields()
    assert names == {name for what in (START, FREE, APPLIED, FIXED) for name in flags_by_resume(fields, what)}
    facts = {"processes": 1, "global_batch": 4}
    before = {**facts, "settings": settings_that_go_on(config)}
    assert set(before["settings"]) == names - set(flags_by_resume(fields, START)) - set(SECRET_FLAGS)
    model.save_pretrained(tmp_path / "unet")
    for name in names - set(SECRET_FLAGS):
        another = changed(config, **{name: other(config, name)})
        if name in flags_by_resume(fields, FIXED):
            with pytest.raises(UsageError, match=f"--{name} .* was trained with .*; leave the flag out"):
                check_unchanged(another, before)
            continue
        check_unchanged(another, before)
        now = {**facts, "settings": settings_that_go_on(another)}
        run = Run(another[TrainingFlags], another, None, resumed=Resumed(tmp_path, before))
        run.log = said.append
        check_resumable(run, model, now, "unet")
        assert bool(said) == (name in flags_by_resume(fields, APPLIED)), (name, said)
        assert all(f"{name} was" in line or "held-out" in line for line in said)
        said.clear()


def test_a_part_that_was_moved_is_the_same_part(tmp_path):
    """Else a run is tied to the place of its autoencoder, or a path that is written otherwise is another model."""
    vae, moved = tmp_path / "vae", tmp_path / "moved"
    vae.mkdir()
    config = defaults(train_unconditional.PROGRAM, vae_name_or_path=str(vae))
    before = {"settings": settings_that_go_on(config)}
    check_unchanged(changed(config, vae_name_or_path=f"{tmp_path}/../{tmp_path.name}/vae"), before)
    shutil.copytree(vae, moved)
    elsewhere = changed(config, vae_name_or_path=str(moved))
    with pytest.raises(UsageError, match="vae_name_or_path"):
        check_unchanged(elsewhere, before)
    vae.rmdir()
    check_unchanged(elsewhere, before)


@pytest.mark.parametrize("was", ["vae", "./models/vae/", "models\\vae", "C:\\models\\vae", ".", ".."])
def test_a_relative_path_moves_with_the_folder_that_it_was_given_in(was, tmp_path, monkeypatch):
    """Else a run that was begun in another folder, or on Windows, cannot go on with the same autoencoder."""
    (tmp_path / "here").mkdir()
    (tmp_path / "models/vae").mkdir(parents=True)
    (tmp_path / "models/other").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    exists = os.path.exists
    gone = {was, os.path.abspath(was)}  # there was something else in its place where the run began
    monkeypatch.setattr(
        "ddpm_hf.training.setup.claiming.os.path.exists", lambda path: path not in gone and exists(path)
    )
    config = defaults(train_unconditional.PROGRAM, vae_name_or_path=was)
    before = {"settings": settings_that_go_on(config)}
    check_unchanged(changed(config, vae_name_or_path="../models/vae"), before)
    if not was.startswith((".", "C:")) or was.endswith("vae/"):
        with pytest.raises(UsageError, match="vae_name_or_path"):
            check_unchanged(changed(config, vae_name_or_path="../models/other"), before)


def test_a_name_on_the_hub_is_no_folder_that_was_moved(tmp_path, monkeypatch):
    """Else a run that began with a model of the Hub is recorded to have begun with whatever folder is named."""
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    for program in (train_unconditional.PROGRAM, train_text2image.PROGRAM):
        config = defaults(program, pretrained_model_name_or_path="user/model")
        before = {"settings": settings_that_go_on(config)}
        check_unchanged(changed(config, pretrained_model_name_or_path=str(tmp_path / "model")), before)
        for other_one in (str(tmp_path / "other"), "user/other", None):
            with pytest.raises(UsageError, match=r"pretrained_model_name_or_path .* was trained with user/model"):
                check_unchanged(changed(config, pretrained_model_name_or_path=other_one), before)


@pytest.mark.parametrize(
    "changed",
    [
        {"ddpm_num_steps": 50},
        {"ddpm_beta_schedule": "cosine"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction"},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_what_the_weights_depend_on_is_refused(changed, resume, begun):
    """Else the rest of a run is trained on another diffusion, or is recorded to have begun with another model."""
    run = resume(**changed)
    assert run.code == 2
    assert "the run to resume was trained with" in run.error()
    assert any(f"--{name}" in run.error() for name in changed)
    assert not (run.folder / "checkpoint-3").exists()


# The run's own settings


def same_tensors(one, two):
    """Whether two checkpoints hold the same weights, averages and moments."""
    states = [torch.load(path / "optimizer.bin", weights_only=True)["state"] for path in (one, two)]
    moments = [[value for state in each.values() for value in state.values()] for each in states]
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    return all(map(torch.equal, *moments)) and all(
        (one / name).read_bytes() == (two / name).read_bytes() for name in files
    )


def test_a_run_goes_on_by_its_folder_alone(begun, tmp_path):
    """Else who resumes a run must remember its command line, or trains another model on other data."""
    whole, part, folder = tmp_path / "whole", tmp_path / "part", str(tmp_path / "part")
    assert run_script(words({**begun.flags, "max_train_steps": 4, "output_dir": whole}), whole).code == 0
    flags = {**begun.flags, "max_train_steps": 4, "output_dir": part, "max_train_hours": 1e-9, "seed": 5}
    assert run_script(words(flags), part).code == 0
    assert not (part / "checkpoint-4").exists()
    argv = ["--output_dir", folder, "--resume_from_checkpoint", "latest", "--max_train_hours", "1"]
    run = run_script(argv, part)
    assert run.code == 0, run.err
    assert "warning" not in run.err
    assert same_tensors(part / "checkpoint-4", whole / "checkpoint-4")
    assert (part / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    with_flags = run_script([*words({**flags, "max_train_hours": 1}), "--resume_from_checkpoint", "latest"], part)
    assert "warning" not in with_flags.err


def test_a_checkpoint_that_was_copied_alone_knows_its_settings(begun, tmp_path):
    """Else a run cannot go on on another machine unless all of its folder is copied."""
    shutil.copytree(begun.folder / "checkpoint-2", tmp_path / "checkpoint-2")
    for argv in (["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"],
                 ["--output_dir", "new", "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]):  # fmt: skip
        config = parse(argv)
        assert settings_that_go_on(config) == {**settings_that_go_on(parse(words(begun.flags))), "resolution": "8"}
        assert config.output_dir == argv[1]


def test_what_is_said_anew_wins(begun, tmp_path):
    """Else a flag or a --config given to a resumed run is overruled by what it was trained with before."""
    file = tmp_path / "more.yaml"
    file.write_text("adam_beta2: 0.5\nlearning_rate: 3e-3\n")
    argv = ["--output_dir", str(begun.folder), "--resume_from_checkpoint", "latest", "--config", str(file)]
    config = parse([*argv, "--learning_rate", "2e-3"])
    assert (config.learning_rate, config.adam_beta2, config.adam_weight_decay) == (2e-3, 0.5, 0.25)
    before = parse(words(begun.flags))
    changed = {"learning_rate": 2e-3, "adam_beta2": 0.5, "resolution": "8"}
    assert settings_that_go_on(config) == {**settings_that_go_on(before), **changed}


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        (["--num_epochs", "7"], "max_train_steps"),
        (["--dataset_name", "someone/pictures"], "train_data_dir"),
        (["--model_preset", "small-16"], "model_config_name_or_path"),
    ],
)
def test_one_way_of_saying_it_replaces_the_other(given, instead, begun):
    """Else --num_epochs is overruled by the --max_train_steps of before, or two datasets are named."""
    config = parse(["--output_dir", str(begun.folder), "--resume_from_checkpoint", "latest", *given])
    assert getattr(config, instead) is None
    assert str(getattr(config, given[0][2:])) == given[1]


def test_epochs_given_win_over_the_steps_of_a_preset_or_a_file(tmp_path):
    """Else --num_epochs is read and has no effect beside what a weaker layer says of the steps."""
    (tmp_path / "run.yaml").write_text("max_train_steps: 50\n")
    for weaker in (["--model_preset", "ddpm-cifar10"], ["--config", str(tmp_path / "run.yaml")]):
        assert parse(["--train_data_dir", "x", *weaker]).max_train_steps
        config = parse(["--train_data_dir", "x", "--num_epochs", "2", *weaker])
        assert (config.num_epochs, config.max_train_steps) == (2, None)


def test_without_a_checkpoint_the_flags_hold(tmp_path):
    """Else a command line that is started again and again fails, or loses its flags, the first time."""
    argv = ["--output_dir", str(tmp_path), "--train_data_dir", "x", "--learning_rate", "3e-3"]
    first, again = parse(argv), parse([*argv, "--resume_from_checkpoint", "latest"])
    assert again.values() == {**first.values(), "resume_from_checkpoint": "latest"}


@pytest.mark.parametrize("bad", [False, True])
def test_settings_that_are_none_end_in_one_line_at_most(bad, tmp_path, capsys):
    """Else a checkpoint of another version, or a stranger's, ends in a traceback before it is checked."""
    (tmp_path / "checkpoint-1").mkdir()
    argv = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
    values = [{"learning_rate": "fast"}, {"seed": {}}] if bad else [[], "text", None, {"gone_with_a_version": 1}]
    for settings in values:
        manifest = json.dumps({"settings": settings, "files": {}})
        (tmp_path / "checkpoint-1" / "manifest.json").write_text(manifest)
        with pytest.raises(SystemExit) if bad else contextlib.nullcontext():
            parse_classifier_flags(argv)
        assert len(capsys.readouterr().err.splitlines()) == bad


@pytest.mark.slow
def test_text_to_image_goes_on_by_its_folder_alone_at_any_stage(tmp_path):
    """Else a run that stopped within its autoencoder is trained on with other settings, or other captions."""
    write_captioned(tmp_path / "pictures", count=4)
    flags = {
        "train_data_dir": tmp_path / "pictures", "resolution": 16, "seed": 3, "cpu_threads": 1, "logger": "none",
        "model_config_name_or_path": write_text_unet(tmp_path / "unet"), "train_batch_size": 4, "eval_batch_size": 1,
        "vae_train_steps": 2, "vae_widths": "8,16", "vae_learning_rate": 2e-3, "learning_rate": 3e-3,
        "num_inference_steps": 1, "max_train_steps": 2, "caption_dropout": 0.5, "logging_steps": 1,
    }  # fmt: skip
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run_text_script(words({**flags, "output_dir": whole}), whole).code == 0
    stop, argv = ["--max_train_hours", "1e-9"], ["--output_dir", str(part), "--resume_from_checkpoint", "latest"]
    assert run_text_script([*words({**flags, "output_dir": part}), *stop], part).code == 0
    assert sorted(path.name for path in part.glob("*/checkpoint-*")) == ["checkpoint-1"]  # of the autoencoder
    early = run_text_script([*argv, "--vae_kl_weight", "5"], part)
    assert early.code == 2
    assert "--vae_kl_weight 5.0: the run to resume was trained with 0.0001" in early.error()
    for more in (stop, ["--max_train_hours", "1"]):
        run = run_text_script([*argv, *more], part)
        assert run.code == 0, run.err
        assert "warning" not in run.err
    assert same_tensors(part / "checkpoint-2", whole / "checkpoint-2")
    late = run_text_script([*argv, "--vae_learning_rate", "1"], part)
    assert late.code == 2
    assert "--vae_learning_rate 1.0: the run to resume was trained with 0.002" in late.error()
