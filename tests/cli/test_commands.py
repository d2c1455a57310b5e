"""The commands around sampling: train, info, presets, push --dry-run; how each ends, and what the package declares."""

import ast
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import huggingface_hub
import pytest
import typer.main

import ddpm_hf
from ddpm_hf import ClassConditionalDDPMPipeline, DDPMScheduler, cli
from ddpm_hf.cli import exits, train
from ddpm_hf.inference import kinds
from ddpm_hf.models.presets import MODEL_PRESETS
from ddpm_hf.portable.hub_ddpm_hf import SAMPLED_BY
from ddpm_hf.publishing import files as published_folder
from ddpm_hf.publishing import hub as publishing
from ddpm_hf.publishing import spaces
from tests.support import ROOT
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_pipeline import tiny_unet

STEPS = 20  # T of the tiny model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of three classes, saved."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="cosine")
    pipeline = ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=4), scheduler, {0: "cat", 1: "dog", 2: "owl"})
    pipeline.save_pretrained(folder)
    return folder


# Training by the command


SCRIPTS = {"train": "train_unconditional.py", "train-text2image": "train_text2image.py"}


@pytest.mark.parametrize("command", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "of_launcher", "of_script"),
    [
        (["--train_data_dir", "a b", "--seed=1"], [], ["--train_data_dir", "a b", "--seed=1"]),
        (["--num_processes", "2", "--", "--seed", "1"], ["--num_processes", "2"], ["--seed", "1"]),
        (["--", "--seed", "1", "--", "x"], [], ["--seed", "1", "--", "x"]),
        ([], [], []),
    ],
    ids=["script", "both", "dashes", "none"],
)
def test_what_follows_the_command_goes_to_the_launcher(command, words, of_launcher, of_script, run, monkeypatch):
    # Breaks if a flag of the script is read by the launcher or by ours, or the script's exit code is lost.
    given = []
    monkeypatch.setattr(train, "accelerate_launch", lambda words: given.append(words) or 7)
    code, _, err = run(command, *words)
    assert (code, err) == (7, "")
    assert given == [[*of_launcher, str(ROOT / SCRIPTS[command]), *of_script]]
    assert (ROOT / SCRIPTS[command]).is_file()


def test_a_flag_of_the_launcher_without_dashes_is_answered_with_them(run, monkeypatch):
    # Breaks if --num_processes is refused by the script, which does not say where it belongs.
    given = []
    monkeypatch.setattr(train, "accelerate_launch", lambda words: given.append(words) or 0)
    result = run("train", "--num_processes", "2", "--train_data_dir", "photos")
    assert_one_line(result, "--num_processes", "accelerate launch")
    way_out = re.search(r"`ddpm-hf (.+?)`", result[2].split("as in")[1])[1]
    assert run(*way_out.split())[0] == 0
    assert given == [["--num_processes", "2", str(ROOT / "train_unconditional.py"), "--train_data_dir", "photos"]]


ENDINGS = {
    "done": ("pass", 0),
    "usage": ("raise SystemExit(2)", 2),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
    # the launcher gets the signal, as from a scheduler of jobs; the script saves and ends in its time
    "terminated": (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        " os.kill(os.getppid(), signal.SIGTERM); time.sleep(20)",
        143,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_exit_code_is_the_scripts(ending, run, tmp_path, monkeypatch):
    # Breaks if a scheduler of jobs takes a failed or stopped training for a finished one, or a traceback follows it.
    code, expected = ENDINGS[ending]
    (tmp_path / "train_unconditional.py").write_text(f"import sys\nprint('given', sys.argv[1:])\n{code}\n")
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    result = run("train", "--cpu", "--num_processes", "1", "--", "--seed", "1")
    assert result[0] == expected, result[2]
    assert "Traceback" not in result[2]
    assert ending in ("killed", "terminated") or "given ['--seed', '1']" in result[1]


# info and presets


def test_info_says_what_a_pipeline_is_and_its_lines_run(run, model, tmp_path):
    # Breaks if the description is of another model, or its command samples nothing.
    code, said, err = run("info", model)
    assert (code, err) == (0, "")
    parameters = sum(one.numel() for one in tiny_unet(num_class_embeds=4).parameters())
    for fact in ("ClassConditionalDDPMPipeline", "8×8, 1 channel", f"{parameters:,} parameters", "3: cat, dog, owl",
                 f"T = {STEPS}, squaredcos_cap_v2"):  # fmt: skip
        assert fact in said
    sample = re.search(r"^sample:  ddpm-hf (.+)$", said, re.MULTILINE)[1].split()
    assert run(*sample, "--out", tmp_path / "out", "--num-images", 1, "--steps", 1)[0] == 0
    load = re.search(r"^load:    (.+)$", said, re.MULTILINE)[1]
    assert type(eval(load, {"ddpm_hf": ddpm_hf})) is ClassConditionalDDPMPipeline


def test_info_names_the_class_that_loads():
    """Else `info` advises a class that refuses the folder: the kinds are also stated where diffusers is imported."""
    assert {name: name for name in kinds.KINDS} | SAMPLED_BY == kinds.SAMPLED_BY


@pytest.mark.parametrize(
    ("part", "config", "program"),
    [
        ("unet", {"_class_name": "UNet2DModel"}, "train"),
        ("unet", {"_class_name": "UNet2DConditionModel"}, "train-text2image"),
        ("classifier", {"_class_name": "NoisyClassifier"}, "train-classifier"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_info_of_a_run_without_a_model_yet_names_the_program_that_goes_on(part, config, program, run, tmp_path):
    # Breaks if a stopped run is told to go on with another program, which refuses its checkpoint.
    folder = tmp_path / "checkpoint-5"
    (folder / part).mkdir(parents=True)
    (folder / part / "config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"max_train_steps": 5}')  # flags of the user's, and no model's
    code, said, err = run("info", tmp_path)
    assert code == 0, err
    assert re.search(rf"^resume:  ddpm-hf {program} --output_dir ", said, re.MULTILINE)


def test_info_of_stocks_pipeline_of_another_sampler_names_what_loads_it(run, tmp_path):
    # Breaks if what `ddpm-hf sample` samples is called a stranger's.
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDIMPipeline"}))
    code, said, err = run("info", tmp_path)
    assert code == 0, err
    assert "unconditional (DDIMPipeline)" in said
    assert "ddpm_hf.DDPMPipeline.from_pretrained" in said


def test_info_of_what_is_no_model_is_one_line(run, tmp_path):
    # Breaks if a wrong folder is a traceback, or is described as an empty model.
    assert_one_line(run("info", tmp_path), tmp_path, "--output_dir")
    (tmp_path / "model_index.json").write_text("{")
    assert_one_line(run("info", tmp_path), "model_index.json")


def test_presets_lists_each_with_its_size(run):
    # Breaks if a preset is missing from the list, or is given the size of another.
    code, said, err = run("presets")
    assert (code, err) == (0, "")
    lines = [line.split() for line in said.splitlines() if not line.startswith(" ")]
    assert [line[0] for line in lines] == list(MODEL_PRESETS)
    for (_, size, count, *_), preset in zip(lines, MODEL_PRESETS.values()):
        assert size == f"{preset.unet['sample_size']}×{preset.unet['sample_size']}"
        assert count == f"{preset.parameters:,}"


# Stopped by a signal


SIGNALS = {signal.SIGINT: (130, "Ctrl-C"), signal.SIGTERM: (143, "SIGTERM")}


def assert_stopped(result, number: int, left: str) -> None:
    """The signal's exit code, and one line that says what is left."""
    code, name = SIGNALS[number]
    assert result[0] == code
    (line,) = [line for line in result[2].splitlines() if line.strip()]
    assert line.startswith(f"ddpm-hf: stopped by {name}")
    assert left in line


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_that_falls_into_a_destructor_is_not_lost(number, capfd):
    # Breaks if Ctrl-C now and then prints "Exception ignored in" and the command goes on.
    class Late:
        def __del__(self):
            signal.raise_signal(number)

    def command(words, standalone_mode):
        late = Late()
        del late  # Python drops what is raised here
        for _ in range(200):
            time.sleep(0.1)

    code = exits.run(command, [])
    assert_stopped((code, *capfd.readouterr()), number, "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stopped_sample_says_so(number, run, model, tmp_path, monkeypatch):
    # Breaks if a script that samples takes a stop for success, or leaves half the images without a word.
    monkeypatch.setattr(ClassConditionalDDPMPipeline, "__call__", lambda *_, **__: signal.raise_signal(number))
    before = signal.getsignal(signal.SIGTERM)
    assert_stopped(run("sample", model, "--out", tmp_path / "out"), number, "nothing was written")
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("at", "left"), [("open_repository", "nothing was uploaded"), ("push_folder", "all of it or nothing")]
)
def test_a_stopped_push_says_what_the_hub_has(number, at, left, run, model, monkeypatch):
    # Breaks if the user cannot tell whether the model is published.
    monkeypatch.setattr(publishing, "open_repository", lambda name, *_: f"user/{name}")
    monkeypatch.setattr(published_folder, "sample_missing_pictures", lambda *_: None)
    monkeypatch.setattr(publishing, at, lambda *_, **__: signal.raise_signal(number))
    assert_stopped(run("push", model, "--token", "hf_some"), number, left)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stopped_push_space_says_what_the_hub_has(number, run, model, monkeypatch):
    monkeypatch.setattr(spaces, "look_up", lambda name, *_: spaces.Model(str(name), "https://hub/user/name"))
    monkeypatch.setattr(spaces, "push_space", lambda *_: signal.raise_signal(number))
    assert_stopped(run("push-space", "user/name", "--token", "hf_some"), number, "all of it or nothing")


@pytest.mark.parametrize("words", [["presets"], ["--help"], ["sample", "--help"], ["info", "MODEL"], ["--version"]])
def test_a_reader_that_has_gone_ends_a_command_in_silence(words, model, monkeypatch, capfd):
    # Breaks if `ddpm-hf presets | head -1` ends in a traceback, now or when the interpreter closes its output.
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["ddpm-hf", *(str(model) if word == "MODEL" else word for word in words)])
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as end:
            cli.main()
        sys.stdout.flush()  # as at the interpreter's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())
    assert end.value.code == 1
    assert capfd.readouterr().err == ""


def test_head_of_the_help_is_the_first_line_alone():
    # Breaks where only a real pipe does: the interpreter's own last flush.
    command = f"{sys.executable} -m ddpm_hf --help | head -1; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


# Dry runs and tokens of push and push-space


class FakeHub:
    """Answers who asks, keeps the tokens that it was asked with, and refuses every change."""

    def __init__(self, monkeypatch):
        self.tokens = []
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        for name in dir(huggingface_hub.HfApi):
            if name.startswith(("create_", "upload_", "delete_", "move_", "update_", "preupload_", "add_", "super_")):
                monkeypatch.setattr(huggingface_hub.HfApi, name, self.changed)
        monkeypatch.setattr(
            huggingface_hub.HfApi, "whoami", lambda api: self.tokens.append(api.token) or {"name": "me"}
        )
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", self.missing)

    def changed(self, *_, **__):
        raise AssertionError("a dry run changes the Hub")

    def missing(self, *_, **__):
        raise huggingface_hub.errors.RepositoryNotFoundError("no such repository", response=_Response())


class _Response:
    headers, request = {}, None


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files of a folder, with their times."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    "words",
    [["push"], ["push", "--variant", "fp16", "--license", "mit"], ["push-space"], ["push-space", "--out", "app"]],
    ids=" ".join,
)
def test_a_dry_run_writes_and_uploads_nothing(words, run, model, tmp_path, monkeypatch):
    # Breaks if --dry-run leaves pictures or a card in the folder, an app, or a repository on the Hub.
    FakeHub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    before = contents(model.parent)
    code, said, err = run(words[0], model, *words[1:], "--dry-run", "--token", "hf_some")
    assert code == 0, err
    assert "README.md" in said
    if words[0] == "push":
        assert "model: me/tiny does not exist, or this token has no access; it would be created" in said
        assert "unet/diffusion_pytorch_model.safetensors" in said
    assert contents(model.parent) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["--token", "HF_TOKEN"])
@pytest.mark.parametrize("ending", ["", "\n", " \r\n"], ids=["plain", "newline", "windows"])
def test_a_token_is_read_without_the_end_of_its_line(source, ending, run, model, monkeypatch):
    # Breaks if a token from a file, with its newline, is an error of the HTTP library that shows the token.
    hub = FakeHub(monkeypatch)
    if source == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", f"hf_secret{ending}")
    words = ["--token", f"hf_secret{ending}"] if source == "--token" else []
    code, said, err = run("push", model, "--dry-run", *words)
    assert (code, hub.tokens) == (0, ["hf_secret"]), err
    assert "token: valid, belongs to me" in said
    assert "hf_secret" not in said + err


def test_a_dry_run_without_a_token_says_so(run, model, monkeypatch):
    FakeHub(monkeypatch)
    code, said, err = run("push", model, "--dry-run")
    assert code == 0, err
    assert "token: none; log in with `hf auth login`, set HF_TOKEN, or give --token" in said


@pytest.mark.parametrize("way", ["hf auth login", "HF_TOKEN", "--token"])
def test_each_way_to_a_token_is_one(way, run, model, monkeypatch):
    # Breaks if an upload without a token says nothing, or advises what does not help.
    FakeHub(monkeypatch)
    assert_one_line(run("push", model), way)
    seen = []
    monkeypatch.setattr(publishing, "open_repository", lambda name, token, private: seen.append(token) or 1 / 0)
    if way == "hf auth login":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_login")
    elif way == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", "hf_login")
    run("push", model, *(["--token", "hf_login"] if way == "--token" else []))
    assert seen == ["hf_login"]


def test_a_token_that_cannot_be_one_is_not_shown(run, model, monkeypatch):
    FakeHub(monkeypatch)
    result = run("push", model, "--token", "hf_secret and more")
    assert_one_line(result, "token")
    assert "hf_secret" not in result[2]


# The package's address


@pytest.mark.parametrize("address", ["", "ddpm-hf-of-somebody", "git+https://git.example.org/ddpm_hf@v1"])
def test_a_card_names_the_package_only_where_it_is_to_be_had(address, run, model, monkeypatch):
    # Breaks if a card tells unlisted_files to install from an address that nobody has set.
    FakeHub(monkeypatch)
    monkeypatch.setenv("DDPM_HF_PACKAGE_URL", address)
    code, card, err = run("push", model, "--dry-run")
    assert code == 0, err
    assert re.findall(r"pip install '?([^'`]+)'?", card) == ([address] if address else [])
    assert "DiffusionPipeline.from_pretrained" in card  # works without the package


def test_an_address_that_cannot_be_one_is_refused(run, model, monkeypatch):
    # Breaks if a card has a command that a shell reads otherwise.
    FakeHub(monkeypatch)
    monkeypatch.setenv("DDPM_HF_PACKAGE_URL", "x'; rm -r ~ #")
    assert_one_line(run("push", model, "--dry-run"), "DDPM_HF_PACKAGE_URL")


@pytest.mark.parametrize("address", ["", "git+https://git.example.org/ddpm_hf@v1"])
def test_a_space_needs_no_address(address, model, tmp_path, monkeypatch):
    # Breaks if a Space's requirements name a package that no index has: it carries our code itself.
    monkeypatch.setenv("DDPM_HF_PACKAGE_URL", address)
    spaces.write_space(tmp_path / "app", spaces.look_up(str(model)))
    stated = (tmp_path / "app" / "requirements.txt").read_text().split()
    assert not any("ddpm" in line.lower() for line in stated)
    assert (tmp_path / "app" / spaces.CODE / "portable" / "pipeline_ddpm_hf.py").is_file()
    assert "import ddpm_hf\n" not in "".join(path.read_text() for path in (tmp_path / "app").rglob("*.py"))


def test_no_address_is_invented():
    # Breaks if setup.cfg or the package names a home page before there is one.
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert not {"url", "project_urls", "home_page", "download_url"} & set(parser["metadata"])


# Versions, and the ways to start


@pytest.mark.parametrize("script", ["train_unconditional.py", "train_text2image.py"])
def test_the_header_of_a_script_requires_what_the_package_does(script):
    # Breaks if `uv run train_unconditional.py` (PEP 723) lacks a library that the script imports.
    text = (ROOT / script).read_text(encoding="utf-8")
    (block,) = re.findall(r"(?ms)^# /// script$\n(.*?)^# ///$", text)
    assert all(line.startswith("# ") for line in block.splitlines())
    header = re.sub(r"(?m)^# ", "", block)
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    options, extras = parser["options"], parser["options.extras_require"]
    assert ast.literal_eval(re.search(r"(?m)^requires-python = (.+)$", header)[1]) == options["python_requires"]
    listed = ast.literal_eval(re.search(r"(?s)dependencies = (\[.*?\n\])", header)[1])
    assert listed == [*options["install_requires"].split(), *extras["demo"].split()]


def test_the_version(run):
    assert run("--version") == (0, f"ddpm-hf {ddpm_hf.__version__}\n", "")


@pytest.mark.parametrize("module", ["ddpm_hf", "ddpm_hf.cli"])
def test_the_package_runs_as_the_command(module, monkeypatch, capfd):
    # Breaks where the command is not on the PATH.
    monkeypatch.setattr(sys, "argv", ["ddpm-hf", "--version"])
    runpy.run_module(module, run_name="__main__", alter_sys=False)
    assert capfd.readouterr().out == f"ddpm-hf {ddpm_hf.__version__}\n"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (
            "ddpm-hf ",
            {
                "train",
                "train-text2image",
                "train-classifier",
                "sample",
                "push",
                "push-space",
                "info",
                "presets",
                "convert",
                "evaluate",
                "compare",
                "restore",
                "ablate",
                "ema",
                "fit-variance",
                "fit-timesteps",
            },
        ),
        ("ddpm-hf pu", {"push", "push-space"}),
        ("ddpm-hf sample --num", {"--num-images"}),
        ("ddpm-hf sample m --sampler dd", {"ddpm", "ddim"}),
    ],
)
def test_the_shell_completes(line, offered, capfd, monkeypatch):
    # Breaks if the completion that --show-completion installs offers nothing.
    monkeypatch.setenv("_DDPM_HF_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    monkeypatch.setattr(sys, "argv", ["ddpm-hf"])
    with pytest.raises(SystemExit) as end:
        typer.main.get_command(cli.app).main([], prog_name="ddpm-hf")
    assert not end.value.code
    assert set(capfd.readouterr().out.split()) == offered
