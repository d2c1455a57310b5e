"""What Accelerate's launchers say is applied or refused; several runs in one process do not disturb each other."""

import contextlib
import io
import json
import logging
import signal

import diffusers
import pytest
import torch
import transformers
from accelerate import Accelerator, notebook_launcher
from accelerate.state import AcceleratorState, GradientState, PartialState

import train_unconditional
from ddpm_hf.cli.classifier_flags import parse_classifier_flags
from ddpm_hf.common import machine
from ddpm_hf.training.setup.begin import compiled
from tests.support import runs
from tests.support.fixtures_text import parse_text
from tests.support.pictures import encoded, quiet, random_pixels, write_rows, write_unet
from tests.support.runs import parse, run_script, words

PARSERS = {"unconditional": parse, "text": parse_text, "classifier": parse_classifier_flags}
DATA = ["--train_data_dir", "x"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of a run of two steps."""
    root = tmp_path_factory.mktemp("launched")
    write_rows(root / "images", [encoded(pixels) for pixels in random_pixels(8)])
    write_unet(root / "unet")
    return {
        "train_data_dir": root / "images", "model_config_name_or_path": root / "unet", "train_batch_size": 2,
        "max_train_steps": 2, "eval_batch_size": 1, "ddpm_num_inference_steps": 1, "seed": 5, "cpu_threads": 1,
        "logger": "none", "logging_steps": 1, "lr_warmup_steps": 0,
    }  # fmt: skip


@pytest.fixture
def train(flags, tmp_path):
    """Runs the script in a folder of its own, where it succeeds."""
    return lambda name="run", **more: runs.train(tmp_path, tmp_path / name, flags, **more)


def weights(run):
    """The trained weights, as bytes."""
    return (run.folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()


def precision(run):
    """What the last session computed in."""
    return run.json("run.json")["sessions"][-1]["precision"]


# Precision


@pytest.mark.parametrize("program", PARSERS)
def test_the_launchers_precision_is_the_default(program, monkeypatch, tmp_path):
    """Else `accelerate launch --mixed_precision bf16` trains in float32, at half the speed."""
    read = PARSERS[program]
    assert read(DATA).mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    (tmp_path / "run.yaml").write_text("mixed_precision: no\n")
    assert read(DATA).mixed_precision == "bf16"
    assert read([*DATA, "--mixed_precision", "no"]).mixed_precision == "no"
    assert read([*DATA, "--config", str(tmp_path / "run.yaml")]).mixed_precision == "no"


def test_a_launcher_wins_over_the_recipe_unless_it_says_nothing(monkeypatch):
    """Else the embedded digits train in another precision than asked for, or in float32 under any launcher."""
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: True)
    assert parse([]).mixed_precision == "bf16"
    for said, used in (("fp16", "fp16"), ("no", "bf16"), ("", "bf16")):  # `no` is what launchers say by default
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
        assert parse([]).mixed_precision == used


def test_what_is_launched_is_what_is_computed_and_recorded(train, monkeypatch):
    """Else the flag's value is changed, and the network computes as before."""
    by_flag = train("flag", mixed_precision="bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched = train("launched")
    assert weights(launched) == weights(by_flag)
    assert precision(launched) == launched.json("training_config.json")["mixed_precision"] == "bf16"
    overruled = train("overruled", mixed_precision="no")
    assert precision(overruled) == "no"
    assert "mixed precision no, as the run's settings say; not accelerate's --mixed_precision bf16" in overruled.err


@pytest.mark.parametrize(("name", "fragment"), [("fp16", "requires a GPU"), ("fp8", "fp8 is not supported")])
def test_a_precision_that_cannot_be_is_refused_by_its_source(name, fragment, flags, monkeypatch, tmp_path):
    """Else a launcher's setting ends in a traceback, or is blamed on a flag that nobody gave."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = run_script(words({**flags, "output_dir": tmp_path / "run"}), tmp_path / "run")
    assert run.code == 2
    assert f"accelerate's --mixed_precision {name}" in run.error()
    assert fragment in run.error()
    assert not (tmp_path / "run").exists()


def test_a_notebooks_launcher_sets_the_precision(flags, tmp_path):
    """Else `notebook_launcher(main, mixed_precision="bf16")` trains in float32: it tells its one process nothing."""
    argv = words({**flags, "output_dir": tmp_path})
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), quiet():
        notebook_launcher(train_unconditional.main, (argv,), num_processes=1, mixed_precision="bf16")
    assert json.loads((tmp_path / "run.json").read_text())["sessions"][-1]["precision"] == "bf16"


def test_a_resumed_run_keeps_its_precision_and_says_so(train, monkeypatch):
    """Else a run goes on in another precision wherever it is started with another configuration."""
    train(max_train_steps=1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = train(resume_from_checkpoint="latest")
    assert precision(run) == "no"
    assert "not accelerate's --mixed_precision bf16" in run.err
    assert "warning: mixed_precision" not in run.err


# Accumulation


def test_the_launchers_accumulation_is_the_flags_and_divides_once(train, monkeypatch):
    """Else every gradient is a quarter of itself, and the batch is not four times as large."""
    plain, accumulated = train("plain"), train("accumulated", gradient_accumulation_steps=4)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert weights(train("launched")) == weights(accumulated)
    overruled = train("overruled", gradient_accumulation_steps=1)
    assert weights(overruled) == weights(plain)
    assert [one["grad_norm"] for one in overruled.records()] == [one["grad_norm"] for one in plain.records()]


@pytest.mark.parametrize(
    ("name", "value"), [("ACCUMULATION_STEPS", "four"), ("ACCUMULATION_STEPS", "0"), ("CLIPPING", "x")]
)
def test_numbers_that_are_none_are_named(name, value, flags, monkeypatch, tmp_path):
    """Else a launcher's configuration ends in a traceback."""
    monkeypatch.setenv(f"ACCELERATE_GRADIENT_{name}", value)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    run = run_script(words({**flags, "output_dir": tmp_path / "run"}), tmp_path / "run")
    assert run.code == 2
    assert value in run.error()
    assert ("gradient_accumulation_steps" if name != "CLIPPING" else "max_grad_norm") in run.error()


def test_the_clipping_of_deepspeed_is_the_flags(monkeypatch):
    """Else DeepSpeed's configuration says another limit than is used, or one that is for DeepSpeed is used without."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.25")
    assert parse(DATA).max_grad_norm == 1.0
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert parse(DATA).max_grad_norm == 0.25
    assert parse([*DATA, "--max_grad_norm", "2"]).max_grad_norm == 2
    for unset in ("auto", "None"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", unset)
        assert parse(DATA).max_grad_norm == 1.0


# What else a launcher says


def test_a_launchers_compilation_is_applied_once(train, monkeypatch):
    """Else the model is compiled twice, or TF32 is switched on without a word."""
    plain = train("plain")
    compilations = []
    compile_model = torch.compile

    def counted(model, *args, **options):
        compilations.append(options.get("backend"))
        return compile_model(model, *args, **options)

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr("torch._dynamo.config.disable", True)  # what is compiled is not the question
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    run = train("compiled", compile=True)
    assert compilations == ["eager"]
    assert [one["loss"] for one in run.records()] == pytest.approx([one["loss"] for one in plain.records()], rel=1e-4)
    assert sorted(path.name for path in (run.folder / "unet").iterdir()) == sorted(
        path.name for path in (plain.folder / "unet").iterdir()
    )


def test_compiling_leaves_torchs_own_settings_alone():
    """Else a model that a notebook compiles later is laid out as ours needs it."""
    import torch._inductor.config as config

    before = config.layout_optimization
    model = compiled(torch.nn.Linear(2, 2))
    assert config.layout_optimization == before
    assert compiled(model) is model


@pytest.mark.parametrize(
    ("environment", "fragment"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "TP_SIZE 2 is not"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "4"}, "CP_SIZE 4 is not"),
    ],
)
def test_what_would_divide_the_batches_otherwise_is_refused(environment, fragment, flags, monkeypatch, tmp_path):
    """Else ranks that share a model train on different images, or a run ends in a traceback."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = run_script(words({**flags, "output_dir": tmp_path / "run"}), tmp_path / "run")
    assert run.code == 2
    assert fragment in run.error()


def test_a_setting_for_other_machines_is_said_to_have_no_effect(train, monkeypatch):
    """Else somebody relies on it."""
    monkeypatch.setenv("ACCELERATE_DOWNCAST_BF16", "true")
    assert "--downcast_bf16 is for TPUs and has no effect" in train().err


# Several runs in one process


def here(argv):
    """A run in this process as a notebook starts it; its exit code."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), quiet():
        try:
            train_unconditional.main(argv)
        except SystemExit as end:
            return end.code
    return 0


def process():
    """What of the process a run could leave changed."""
    tensorboard = logging.getLogger("torch.utils.tensorboard")
    return {
        "threads": torch.get_num_threads(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "diffusers": (diffusers.logging.get_verbosity(), diffusers.logging.is_progress_bar_enabled()),
        "transformers": (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()),
        "signals": [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)],
        "tensorboard": tensorboard.level,
        "random": torch.get_rng_state().tolist(),
        "accelerate": [dict(one._shared_state) for one in (AcceleratorState, PartialState, GradientState)],
    }


def test_a_process_is_after_a_run_as_before(flags, tmp_path):
    """Else the next run, or the rest of a notebook, computes with the threads, precision or logs of the last."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    before = process()
    changed = {"cpu_threads": before["threads"] + 1, "allow_tf32": True, "logger": "tensorboard"}
    argv = words({**flags, **changed, "output_dir": tmp_path / "one", "mixed_precision": "bf16"})
    assert here(argv) == 0
    assert process() == before
    assert here(argv) == 2  # the folder holds a run
    assert process() == before
    assert here(words({**flags, "output_dir": tmp_path / "two", "mixed_precision": "no"})) == 0
    assert process() == before


def test_an_accelerator_of_the_callers_stays_or_is_named(flags, tmp_path, monkeypatch):
    """Else a run takes the state from under an Accelerator that a notebook still uses, or ends in a traceback."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    theirs = Accelerator(cpu=True)
    try:
        assert here(words({**flags, "output_dir": tmp_path / "same"})) == 0
        assert (theirs.device.type, theirs.mixed_precision) == ("cpu", "no")
        said = []
        monkeypatch.setattr("builtins.print", lambda line, **_: said.append(line))
        assert here(words({**flags, "output_dir": tmp_path / "other", "mixed_precision": "bf16"})) == 2
        assert "--mixed_precision bf16: an Accelerator of this process computes in no already" in said[-1]
        assert theirs.mixed_precision == "no"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
