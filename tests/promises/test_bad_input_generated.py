"""Generated bad input: every flag of every command, alone and in pairs, and files of flags.

Whatever is given, a command either accepts it or refuses it with one line that names it, exit code 2 and nothing
written. Flags are enumerated from their declarations: a new one is tried by itself.
"""

import dataclasses
import json
import subprocess
import sys
import typing
from typing import NamedTuple
from unittest import mock

import datasets
import huggingface_hub.constants
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import train_text2image
import train_unconditional
from ddpm_hf.cli import classifier_training as classifier
from ddpm_hf.cli.classifier_flags import CLASSIFIER
from ddpm_hf.models.presets import MODEL_PRESETS
from ddpm_hf.objectives.losses import LOSS_TYPES, OBJECTIVES
from ddpm_hf.objectives.timestep_samplers import TIMESTEP_SAMPLERS
from ddpm_hf.portable.schedules_ddpm_hf import BETA_SCHEDULES
from ddpm_hf.portable.scheduling_ddpm_hf import PREDICTION_TYPES, VARIANCE_TYPES
from ddpm_hf.training import flags as configuration
from ddpm_hf.training import parsing, rehearsal
from tests.support.fixtures_generated import HOSTILE, TIMES, Tally, ended, files_below, generated, report
from tests.support.pictures import encoded, random_pixels
from tests.support.runs import BASE, Run, fill, run_script, words

PROGRAMS = {
    "train_unconditional": (train_unconditional, train_unconditional.PROGRAM),
    "train_text2image": (train_text2image, train_text2image.PROGRAM),
    "train-classifier": (classifier, CLASSIFIER),
}


class Flag(NamedTuple):
    """A flag of a program."""

    program: str
    name: str
    names: tuple[str, ...]  # by which a message may call it
    kind: typing.Any


FLAGS = [
    Flag(
        program,
        field.name,
        (field.name, *(alias[2:] for alias in field.metadata.get("aliases") or ())),
        typing.get_type_hints(kind)[field.name],
    )
    for program, (_, declared) in PROGRAMS.items()
    for kind in declared.flags
    for field in dataclasses.fields(kind)
]


@pytest.fixture(scope="module")
def tally(request):
    """How the cases of this file ended."""
    counted = Tally()
    yield counted
    report(request, counted, "flags and files of flags")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Without a Hub: names that are not folders are not looked up."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the cases run, in which nothing may appear."""
    return tmp_path_factory.mktemp("here")


def checked(program: str, argv: list[str], folder, tally, *names: str) -> bool:
    """Parse and check a command line as the program does; whether it was accepted. Nothing is written."""
    module = PROGRAMS[program][0]
    with mock.patch.object(module, "train", lambda config: config.check()):
        accepted = tally.check(ended(module.main, argv), *names)
    assert not list(folder.iterdir())
    return accepted


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: f"{flag.program}-{flag.name}")
def test_every_flag_takes_a_word_or_names_itself(flag, folder, tally, monkeypatch):
    """Else a slip in one flag is a traceback, a page, a line about something else, or a folder to clean up."""
    monkeypatch.chdir(folder)
    place = FLAGS.index(flag)
    for number, word in enumerate(HOSTILE):
        if TIMES > 1 or (number + place) % 5 == 0:  # a fifth of them, others for the next flag
            checked(flag.program, [f"--{flag.name}={word}"], folder, tally, *flag.names)


NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**40, 1e-323, 1e308]),
).map(str)
TEXTS = st.one_of(NUMBERS, st.text(max_size=20), st.sampled_from(HOSTILE), st.just("a/" * 3000))


@generated(350)
@given(flag=st.sampled_from(FLAGS), word=TEXTS)
def test_any_word_is_taken_or_named(flag, word, folder, tally):
    """Else there is a value that nobody thought of, and it ends in a traceback."""
    checked(flag.program, [f"--{flag.name}={word}"], folder, tally, *flag.names)


# Values that a flag could have: what is tried here is how two of them go together
NAMES = {
    "lr_scheduler": configuration.LR_SCHEDULERS,
    "ddpm_beta_schedule": BETA_SCHEDULES,
    "prediction_type": PREDICTION_TYPES,
    "variance_type": VARIANCE_TYPES,
    "objective": OBJECTIVES,
    "loss_type": LOSS_TYPES,
    "timestep_sampler": TIMESTEP_SAMPLERS,
    "model_preset": [name for name in MODEL_PRESETS if name.startswith("small")],
    "resolution": ("8", "16", "9", "8x16", "16x9"),
    "vae_widths": ("8", "8,16", "16,32,64", "8,8,8,8,8"),
}


def plausible(flag: Flag) -> list[str]:
    """Words that are of the flag's type."""
    kinds = typing.get_args(flag.kind) or (flag.kind,)
    if flag.name in NAMES:
        return list(NAMES[flag.name])
    if typing.get_origin(flag.kind) is typing.Literal:
        return [str(choice) for choice in kinds]
    if bool in kinds:
        return ["true", "false"]
    if int in kinds:
        return ["0", "1", "2", "3", "7", "16", "1000"]
    if float in kinds:
        return ["0", "0.001", "0.1", "0.5", "0.999", "1", "5"]
    return ["label", "text", "image", "latest", "train", "elsewhere"]


SETTABLE = [flag for flag in FLAGS if flag.name not in ("config", "dry_run")]
CHOICES = {name: [flag for flag in SETTABLE if flag.program == name] for name in PROGRAMS}
WORDS = {flag: plausible(flag) for flag in SETTABLE}


@st.composite
def pairs(draw) -> tuple[str, list[str], list[str]]:
    """Two different flags of a program with a word for each: (program, words, names)."""
    program = draw(st.sampled_from(sorted(PROGRAMS)))
    chosen = draw(st.lists(st.sampled_from(CHOICES[program]), min_size=2, max_size=2, unique=True))
    argv = [f"--{flag.name}={draw(st.sampled_from(WORDS[flag]))}" for flag in chosen]
    return program, argv, [name for flag in chosen for name in flag.names]


@generated(500)
@given(pair=pairs())
def test_any_two_flags_go_together_or_one_is_named(pair, folder, tally):
    """Else two flags that exclude each other end in a traceback, or in a line about neither."""
    program, argv, names = pair
    checked(program, argv, folder, tally, *names)


# Dry runs, which read data and models and say what would happen


@pytest.fixture
def unmeasured(monkeypatch):
    """Dry runs that take no steps: models of any size are planned here."""
    monkeypatch.setattr(rehearsal, "_pass", lambda *_: None)
    monkeypatch.setattr(rehearsal, "take_step", lambda *_: None)


DRY = {
    "train_unconditional": BASE,
    "train_text2image": {
        "train_data_dir": "{shop}/photos", "pretrained_model_name_or_path": "{shop}/stable", "resolution": 16,
        "train_batch_size": 4, "num_epochs": 1, "eval_batch_size": 1, "cpu_threads": 1, "seed": 0, "logger": "none",
    },
    "train-classifier": {
        **{name: value for name, value in BASE.items() if name != "ddpm_num_inference_steps"}, "label_column": "label",
    },
}  # fmt: skip


def dry_run(program: str, shop, folder, tally, *argv: str) -> None:
    """The command with --dry_run on top of what works: it prints its plan, or refuses in one line."""
    flags = fill({**DRY[program], "output_dir": folder / "run"}, shop)
    before = files_below(shop)
    run = run_script([*words(flags), "--dry_run", *argv], folder / "run", PROGRAMS[program][0].main)
    if tally.check(run):
        assert "steps" in run.out
    assert not list(folder.iterdir())
    assert files_below(shop) == before


@pytest.mark.usefixtures("unmeasured")
@generated(50)
@given(pair=pairs())
def test_what_is_accepted_prints_its_plan(pair, shop, folder, tally, monkeypatch):
    """Else a command line passes the checks, and ends in a traceback as soon as data and model are read."""
    monkeypatch.chdir(folder)
    dry_run(pair[0], shop, folder, tally, *pair[1])


@pytest.mark.usefixtures("unmeasured")
@generated(40)
@given(flag=st.sampled_from(SETTABLE), word=st.sampled_from(HOSTILE))
def test_a_dry_run_of_any_word_is_a_plan_or_one_line(flag, word, shop, folder, tally, monkeypatch):
    """Else a name of a file, a column or a model that is none is found out by a traceback."""
    monkeypatch.chdir(folder)
    dry_run(flag.program, shop, folder, tally, f"--{flag.name}={word}")


@pytest.mark.slow
@pytest.mark.parametrize("flag", FLAGS[::25], ids=lambda flag: f"{flag.program}-{flag.name}")
def test_a_process_of_its_own_says_the_same(flag, tmp_path):
    """Else what is one line within a test is more to a user, for whom imports and launchers speak too."""
    script = [sys.executable, PROGRAMS[flag.program][0].__file__]
    if flag.program == "train-classifier":
        script = [sys.executable, "-m", "ddpm_hf.cli", "train-classifier"]
    argv = [f"--{flag.name}=", "--learning_rate=-1"]
    end = subprocess.run([*script, *argv], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    Tally().check(Run(end.returncode, end.stdout, end.stderr, tmp_path))
    assert end.returncode == 2
    assert not list(tmp_path.iterdir())


# Files of flags


LAUGHS = "a: &a0 [x]\n" + "".join(f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
FILES = {
    "aliases without end": LAUGHS,
    "aliases in a flag that takes several": LAUGHS.replace("b29:", "validation_prompts:"),
    "nested without end": "[" * 600,
    "nested mappings": "a: " + "{a: " * 600,
    "an impossible date": "seed: 2020-13-45",
    "an endless number": "seed: " + "9" * 5000,
    "a key twice": "seed: 1\nseed: 2",
    "a merged mapping": "<<: {seed: 1}",
    "a call": "seed: !!python/object/apply:os.mkdir ['called']",
    "an object": "!!python/object/new:os.mkdir ['called']",
    "a module": "seed: !!python/module:antigravity",
    "a set": "!!set {a}",
    "a mapping of itself": "&a {seed: *a}",
    "two documents": "seed: 1\n---\nseed: 2",
    "a zero byte": 'output_dir: "\\0"',
    "an escape": '"\\e[31m": 1',
    "a flag among prompts": "validation_prompts: ['--learning_rate', '-1']",
    "too long": "# " + "x" * 2**20 + "\nseed: 1",
    "a token": "hub_tokn: hf_notForAnyLog1",
    "tokens": "hub_token: [hf_notForAnyLog1]",
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_used_names_itself(name, program, folder, tmp_path, tally, monkeypatch):
    """Else a file is executed, fills the memory, or silently decides something else than it says."""
    monkeypatch.chdir(folder)
    (tmp_path / "run.yaml").write_text(FILES[name])
    names = ("run.yaml", "output_dir", "hub_tok") if name != "an endless number" else ("seed", "run.yaml")
    assert not checked(program, ["--config", str(tmp_path / "run.yaml")], folder, tally, *names)


BYTES = {"zeros": bytes(100), "a picture": encoded(random_pixels(1)[0]), "UTF-16": "seed: 1".encode("utf-16")}


@pytest.mark.parametrize("ending", ["yaml", "json"])
@pytest.mark.parametrize("name", BYTES)
def test_a_file_that_is_no_text_names_itself(name, ending, folder, tmp_path, tally):
    """Else a picture given by mistake is a traceback."""
    file = tmp_path / f"run.{ending}"
    file.write_bytes(BYTES[name])
    assert not checked("train_unconditional", ["--config", str(file)], folder, tally, file.name)


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self", ".", "a\0b", "nowhere.json"])
def test_a_file_that_is_none_names_itself(path, folder, tally):
    """Else a device is read for ever, or a folder is a traceback."""
    assert not checked("train_unconditional", ["--config", path], folder, tally, "config")


TWICE = '{"seed": 1, "seed": 2}'


@pytest.mark.parametrize("text", [TWICE, "[" * 100_000, '{"seed": ' + "9" * 5000 + "}", "{'seed': 1}", "NaN"])
def test_json_that_cannot_be_used_names_itself(text, folder, tmp_path, tally):
    """Else JSON is checked less than YAML."""
    (tmp_path / "run.json").write_text(text)
    assert not checked("train_unconditional", ["--config", str(tmp_path / "run.json")], folder, tally, "run.json")


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.sampled_from(HOSTILE[:14])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=6
)
KEYS = st.one_of(st.sampled_from(sorted({flag.name for flag in FLAGS} - {"config"})), st.text(max_size=8))


@generated(150)
@given(
    settings=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3) | VALUES,
    program=st.sampled_from(sorted(PROGRAMS)),
    ending=st.sampled_from(["yaml", "json"]),
)
def test_any_file_is_taken_or_named(settings, program, ending, folder, tally, tmp_path_factory):
    """Else there is a file that nobody thought of, and it ends in a traceback."""
    file = tmp_path_factory.getbasetemp() / f"any.{ending}"
    text = json.dumps(settings) if ending == "json" else yaml.safe_dump(settings)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    names = [str(key) for key in settings] if isinstance(settings, dict) else []
    names += [name for flag in FLAGS if flag.name in names for name in flag.names]
    checked(program, ["--config", str(file)], folder, tally, file.name, *names)


@generated(75)
@given(damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), cut=st.booleans())
def test_a_damaged_file_is_taken_or_named(damage, cut, folder, tally, tmp_path_factory):
    """Else a file that was saved halfway, or got a stray byte, ends in a traceback."""
    lines = ["seed: 3", "learning_rate: 1e-4", "use_ema: true", "output_dir: 'somewhere'", "resolution: 64x96"]
    data = bytearray("\n".join(lines).encode())
    for place, byte in damage:
        data[place % len(data)] = byte
    file = tmp_path_factory.getbasetemp() / "damaged.yaml"
    file.write_bytes(data[: damage[0][0] % len(data)] if cut else data)
    names = ["seed", "learning_rate", "use_ema", "output_dir", "resolution", file.name]
    checked("train_unconditional", ["--config", str(file)], folder, tally, *names)


def test_no_flag_is_left_out():
    """Else a flag is declared where these tests do not look."""
    for program, (_, cls) in PROGRAMS.items():
        parser = parsing.OneLineParser(cls)
        declared = {action.dest for action in parser._actions} - {"help"}
        own = {flag.name for flag in FLAGS if flag.program == program}
        assert declared == own
    assert len(FLAGS) > 200
