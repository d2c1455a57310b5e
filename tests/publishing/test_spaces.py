"""Spaces: what their app draws, their files, and their upload by the real client to a Hub of our own."""

import json
import re
import sys
import threading
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from ddpm_hf.inference.kinds import load_pipeline
from ddpm_hf.inference.samplers import UNFITTED
from ddpm_hf.inference.studio import MOMENTS, MOST_IMAGES, SampleRequest, Studio, streamed
from ddpm_hf.publishing import spaces
from ddpm_hf.publishing.space.page import (
    EVERY_CLASS,
    NO_CLASS,
    ROWS,
    captions_of,
    chain_picture,
    request_of,
    thumbnail,
)
from tests.support import ROOT, warm
from tests.support.fixtures_hub import STRANGERS, TOKEN, WRONG, client_environment
from tests.support.fixtures_spaces import CLASSES, STEPS, put, seeded, tiny_pipelines
from tests.support.hub_server import Hub

KINDS = ("plain", "by-class", "text")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models, by kind."""
    root = tmp_path_factory.mktemp("models")
    for name, pipeline in tiny_pipelines().items():
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture(scope="module")
def studios(models):
    """What their apps draw with."""
    return {name: Studio(str(folder), device="cpu") for name, folder in models.items()}


def pixels(images):
    """PIL images as one array [N, ...]."""
    return np.stack([np.asarray(image).astype(int) for image in images])


# What the app draws

REQUESTS = {
    "plain": SampleRequest(3, "ddpm", 12, seed=5),
    "by-class": SampleRequest(5, "ddpm", 12, seed=5, class_labels=["dog", None], guidance_scale=3.0),
    "text": SampleRequest(2, "ddpm", 6, seed=5, prompt="a red square", negative_prompt="a dog", guidance_scale=4.0),
}


def by_hand(models, kind, count=None):
    """The images of `REQUESTS[kind]`, by the pipeline itself."""
    pipeline, request = load_pipeline(str(models[kind])), REQUESTS[kind]
    pipeline.set_progress_bar_config(disable=True)
    count = count or request.count
    options = {"generator": seeded(request.seed, count), "num_inference_steps": request.steps}
    if kind == "plain":
        return pixels(pipeline(count, **options).images)
    options["guidance_scale"] = request.guidance_scale
    if kind == "text":
        return pixels(pipeline([request.prompt] * count, negative_prompt=request.negative_prompt, **options).images)
    return pixels(pipeline((request.class_labels * count)[:count], **options).images)


@pytest.mark.parametrize("kind", KINDS)
def test_the_app_draws_what_the_pipeline_draws(kind, models, studios):
    """Else a control of the page does not reach the pipeline."""
    np.testing.assert_array_equal(pixels(studios[kind].sample(REQUESTS[kind])), by_hand(models, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_depends_on_the_seed_and_its_place_alone(kind, studios):
    """Else more images of a seed are others, and nobody can have one again."""
    request = REQUESTS[kind]
    many, few = (pixels(studios[kind].sample(request._replace(count=count))) for count in (6, 2))
    assert np.abs(many[:2] - few).max() <= 1
    other = pixels(studios[kind].sample(request._replace(count=2, seed=6)))
    assert np.abs(other - few).max() > 20
    assert np.abs(few[0] - few[1]).max() > 20


def test_without_a_class_all_are_drawn_in_turn(models, studios):
    """Else the page's first picture shows one class, or none."""
    request = SampleRequest(5, "ddpm", 12, seed=1)
    drawn = pixels(studios["by-class"].sample(request))
    names = list(CLASSES.values())
    for index, name in enumerate((names * 2)[:5]):
        own = pixels(studios["by-class"].sample(request._replace(class_labels=[name])))[index]
        assert np.abs(drawn[index] - own).max() <= 1


@pytest.mark.every(5)
@pytest.mark.parametrize("sampler", UNFITTED)
def test_a_sampler_leaves_nothing_behind_for_the_next(sampler, models, studios):
    """Else a visitor's images depend on what the one before chose."""
    studio = studios["plain"]
    request = SampleRequest(2, sampler, 10)
    fresh = Studio(str(models["plain"]), device="cpu")
    expected = pixels(fresh.sample(request))
    for other in UNFITTED:
        studio.sample(SampleRequest(1, other, 5))
    np.testing.assert_array_equal(pixels(studio.sample(request)), expected)


@pytest.mark.every(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", UNFITTED)
def test_every_sampler_offered_draws_with_its_usual_steps(sampler, kind, studios):
    """Else the page's defaults end in an error, or in NaN, which is black."""
    studio = studios[kind]
    assert 1 <= studio.samplers[sampler] <= STEPS
    assert np.ptp(pixels(studio.sample(SampleRequest(1, sampler, studio.samplers[sampler], prompt="a dog")))) > 20


def test_samplers_that_cannot_run_the_model_are_not_offered(tmp_path):
    """Else a visitor chooses what only ever ends in an error."""
    pipeline = tiny_pipelines()["plain"]
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type="posterior_mean"
    )
    pipeline.save_pretrained(tmp_path)
    assert list(Studio(str(tmp_path), device="cpu").samplers) == ["ddpm"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [4, 25])
def test_watching_hears_of_every_step_and_changes_nothing(kind, steps, models, studios):
    """Else the bar jumps, the chain is not that of the images, or looking changes them."""
    request, heard = REQUESTS[kind]._replace(steps=steps), []
    watched = pixels(studios[kind].sample(request, heard.append))
    np.testing.assert_array_equal(watched, pixels(studios[kind].sample(request)))
    assert [step.done for step in heard] == list(range(1, steps + 1))
    assert {step.total for step in heard} == {steps}
    timesteps = [step.timestep for step in heard]
    assert timesteps == sorted(timesteps, reverse=True)
    shown = [step for step in heard if step.predictions is not None]
    assert len(shown) == min(MOMENTS, steps)
    assert shown[0] is heard[0]
    assert shown[-1] is heard[-1]
    assert all(len(step.predictions) == request.count for step in shown)
    np.testing.assert_array_equal(pixels(shown[-1].predictions), watched)  # the last x̂_0 is x_0


def test_the_moments_are_those_of_the_pipelines_frames(models, studios):
    """Else the chain on the page is not what `num_frames` returns."""
    pipeline = load_pipeline(str(models["plain"]))
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(2, seeded(5, 2), num_inference_steps=MOMENTS, num_frames=MOMENTS).frames
    heard = []
    studios["plain"].sample(SampleRequest(2, "ddpm", MOMENTS, seed=5), heard.append)
    for frame, step in zip(frames, heard):
        assert frame.timestep == step.timestep
        np.testing.assert_array_equal(pixels(frame.prediction), pixels(step.predictions))


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("plain", {"count": 0}, "0 images"),
        ("plain", {"count": MOST_IMAGES + 1}, f"1 to {MOST_IMAGES}"),
        ("plain", {"steps": STEPS + 1}, f"from 1 to {STEPS}"),
        ("by-class", {"class_labels": ["cow"]}, "cow"),
        ("text", {"prompt": "  "}, "give a prompt"),
        ("plain", {"sampler": "dpm++", "steps": STEPS}, "twice"),
    ],
)
def test_what_cannot_be_drawn_is_said(kind, change, says, studios):
    """Else a visitor's request is a crash, or takes the machine for an hour."""
    with pytest.raises(ValueError, match=says):
        studios[kind].sample(REQUESTS[kind]._replace(**change))


def test_following_yields_what_is_heard_then_the_result():
    """Else the page shows no progress, or no images."""

    def draw(watch):
        for number in (0, 1, 2):
            watch(number)
        return "drawn"

    assert list(streamed(draw)) == [0, 1, 2, "drawn"]


def test_what_the_drawing_raises_is_raised_where_it_is_followed():
    """Else an error is silence, and the page waits for ever."""

    def draw(watch):
        watch(0)
        raise ValueError("no such class")

    following = streamed(draw)
    assert next(following) == 0
    with pytest.raises(ValueError, match="no such class"):
        next(following)


def test_who_stops_listening_stops_the_drawing():
    """Else a visitor who left keeps the next one waiting for a thousand steps."""
    words, ended = [], threading.Event()

    def draw(watch):
        try:
            for number in range(10**6):
                watch(number)
                words.append(number)
                threading.Event().wait(0.001)
        finally:
            ended.set()

    following = streamed(draw)
    assert next(following) == 0
    following.close()
    assert ended.is_set()
    assert len(words) < 10**5


# What the page makes of its controls


def test_the_controls_become_a_request(studios):
    """Else the page draws something else than it shows."""
    values = {"count": 3, "sampler": "ddim", "steps": 7, "random": False, "seed": 9, "class": "class none"}
    studio = studios["by-class"]
    request = request_of({**values, "guidance": 2.5}, studio)
    assert request == SampleRequest(3, "ddim", 7, 9, ["none"], guidance_scale=2.5)  # also a class of that name
    assert captions_of(request, studio) == ["none"] * 3
    request = request_of({**values, "class": NO_CLASS}, studio)
    assert request.class_labels == [None]
    assert captions_of(request, studio) == [None] * 3
    assert captions_of(request_of({**values, "class": EVERY_CLASS, "count": 4}, studio), studio) == [
        *CLASSES.values(),
        "cat",
    ]
    values = {"count": 1, "sampler": "ddpm", "steps": 2, "random": True, "seed": 9, "prompt": "x", "negative": "y"}
    requests = [request_of(values, studios["text"]) for _ in range(8)]
    assert len({request.seed for request in requests}) > 1
    assert {(request.prompt, request.negative_prompt) for request in requests} == {("x", "y")}


def test_the_chain_has_a_row_for_each_image_and_a_column_for_each_moment(studios):
    """Else chains are mixed up, or shift while they grow."""
    heard = []
    studios["plain"].sample(SampleRequest(2, "ddpm", 5), heard.append)
    moments = [(step.timestep, [thumbnail(image) for image in step.predictions]) for step in heard[:3]]
    found = re.findall(r'<img src="([^"]+)"|<span>([^<]*)</span>', chain_picture(moments, 5))
    cells = [image or text for image, text in found]
    assert cells[:5] == [str(timestep) for timestep, _ in moments] + ["", ""]
    for row in range(2):
        assert cells[5 * (row + 1) : 5 * (row + 2)] == [images[row] for _, images in moments] + ["", ""]
    assert len({*cells[5:8], *cells[10:13]}) == 6
    assert ROWS >= 1


# Its files


@pytest.fixture(scope="module")
def space(models, tmp_path_factory):
    """The folder of a Space for a model on the Hub."""
    folder = tmp_path_factory.mktemp("spaces") / "space"
    model = spaces.Model("user/text", "http://hub/user/text", license="mit")
    spaces.write_space(folder, model, ["a dog", "a cat"])
    return folder


def test_the_readme_tells_the_hub_how_to_run_it(space):
    """Else the Space does not start, or is not shown beside its model."""
    head = (space / "README.md").read_text().split("---\n")[1]
    card = yaml.safe_load(head)
    assert card["sdk"] == "gradio"
    assert card["models"] == ["user/text"]
    assert card["license"] == "mit"
    assert (space / card["app_file"]).is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+", card["sdk_version"])
    assert isinstance(card["python_version"], str)  # 3.10 would be a number


def test_the_version_of_gradio_is_the_tested_one():
    """Else Spaces run with another Gradio than the browser's tests do."""
    assert f"gradio=={spaces.GRADIO_VERSION}" in (ROOT / "constraints.txt").read_text().split()


def test_the_requirements_are_those_of_the_package(space):
    """Else a Space gets a library too old for the code in it."""
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    needed = set(parser["options"]["install_requires"].split())
    stated = set((space / "requirements.txt").read_text().split())
    assert stated <= needed
    imported = set()
    for path in space.rglob("*.py"):
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M))
    used = {name for name in imported if name not in sys.stdlib_module_names} - {spaces.CODE, "gradio", "PIL"}
    names = {re.split("[>=]", line)[0].replace("-", "_") for line in stated}
    assert used <= names


def test_every_file_is_a_copy_or_says_nothing_of_the_machine(space, models):
    """Else a Space lacks code, or publishes its owner's folders."""
    for pattern in ("portable/*.py", "publishing/space/*.py"):
        for path in (ROOT / "ddpm_hf").glob(pattern):
            copy = space / spaces.CODE / path.relative_to(ROOT / "ddpm_hf")
            assert copy.read_bytes() == path.read_bytes()
    for path in space.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert str(Path.home()) + "/" not in text
            assert str(space.parent) not in text
            assert not re.search(r"hf_[A-Za-z0-9]{8}", text)
    assert json.loads((space / "space.json").read_text())["examples"] == ["a dog", "a cat"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    """Else an app overwrites somebody's files."""
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        spaces.write_space(tmp_path, spaces.Model("user/text"))
    with pytest.raises(ValueError, match="not empty"):
        spaces.write_space(tmp_path / "mine", spaces.Model("user/text"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_taken_and_nothing_lies_beside(tmp_path, monkeypatch):
    """Else an interrupted writing leaves half an app, or scraps."""
    (tmp_path / "app").mkdir()
    with monkeypatch.context() as broken:
        broken.setattr(spaces, "space_files", lambda *_: {"app.py": "x", "b\0": "y"})  # the second cannot be written
        with pytest.raises(ValueError, match="null"):
            spaces.write_space(tmp_path / "app", spaces.Model("user/text"))
    assert list((tmp_path / "app").iterdir()) == []
    spaces.write_space(tmp_path / "app", spaces.Model("user/text"))
    assert (tmp_path / "app" / "app.py").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["app"]


# Its upload

COMMANDS = """
import contextlib, io, json, sys
from ddpm_hf import cli

results = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["ddpm-hf", "push-space", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
CARD = """---
title: My digits
sdk: gradio
sdk_version: 5.0.0
app_file: app.py
pinned: true
---

What I wrote.
"""


class World:
    """A Hub with models and Spaces, and what the command said, by the name of the call."""

    def __init__(self, root, hub, models):
        self.root, self.hub = root, hub
        (root / "other").mkdir()
        (root / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        (models["text"] / "README.md").write_text("---\nlicense: mit\n---\n\n# A card\n")
        for kind, folder in {**models, "other": root / "other", "cut": models["plain"]}.items():
            put(hub, f"user/{kind}", folder, private=kind == "by-class")
        put(hub, "spaces/user/taken", root / "other")
        spaces.write_space(root / "edited", spaces.Model("user/plain", "x"))
        (root / "edited" / "README.md").write_text(CARD)
        (root / "edited" / spaces.CODE / "gone.py").write_text("")
        put(hub, "spaces/user/edited", root / "edited")
        hub.fail("POST /api/spaces/user/faulty/commit/", 500)
        hub.fail("(GET|HEAD) /user/cut/", "cut", 1000)
        calls = {
            "plain": ["user/plain"],
            "by-class": ["user/by-class"],
            "text": ["user/text", "--space", "draw", "--example", "a dog", "--example", "a cat"],
            "again": ["user/plain"],
            "edited": ["user/plain", "--space", "user/edited"],
            "missing": ["user/missing"],
            "other": ["user/other"],
            "cut": ["user/cut"],
            "taken": ["user/plain", "--space", "user/taken"],
            "public": ["user/plain", "--private"],
            "folder": [models["plain"], "--space", "user/held"],
            "restore": ["user/plain", "--restore"],
            "restore-text": ["user/text", "--restore", "--space", "user/new"],
            "no-text": ["user/plain", "--space", "user/new", "--example", "x"],
            "both": ["user/plain", "--space", "user/new", "--out", root / "both"],
            "out": [models["by-class"], "--out", root / "out"],
            "full": ["user/plain", "--out", root / "theirs"],
            "faulty": ["user/plain", "--space", "user/faulty"],
            "mended": ["user/plain", "--space", "user/faulty"],
            "stranger": ["user/plain", "--token", STRANGERS],
            "wrong": ["user/plain", "--space", "user/new", "--token", WRONG],
        }
        (root / "theirs").mkdir()
        (root / "theirs" / "README.md").write_text("mine")
        words = json.dumps([[str(word) for word in words] for words in calls.values()])
        kept = client_environment(hub, root / "home", PYTHONPATH=str(ROOT), HF_TOKEN=TOKEN)
        done = warm.run("-c", COMMANDS, words, cwd=root, env=kept, timeout=600)
        assert done.returncode == 0, done.stderr
        self.said = done.stdout + done.stderr
        self.results = dict(zip(calls, json.loads(done.stdout.splitlines()[-1])))

    def files(self, space):
        """A Space's files, as texts."""
        files = self.hub.files(f"spaces/user/{space}")
        return {path: data.decode() for path, data in files.items()}


@pytest.fixture(scope="module")
def world(models, tmp_path_factory):
    """A Hub with what the command published."""
    with Hub({TOKEN: "user", STRANGERS: "stranger"}) as hub:
        yield World(tmp_path_factory.mktemp("world"), hub, models)


@pytest.mark.parametrize(
    ("call", "space"),
    [
        *(("plain", "plain"), ("by-class", "by-class"), ("text", "draw"), ("again", "plain"), ("edited", "edited")),
        *(("folder", "held"), ("restore", "plain-restore")),
    ],
)
def test_the_command_publishes_and_says_where(world, call, space):
    """Else nobody finds the app."""
    code, out, err = world.results[call]
    assert code == 0, err
    assert f"published at {world.hub.url}/spaces/user/{space}" in out


def test_each_upload_is_one_commit_and_the_same_app_none(world):
    """Else a Space builds half an app, or builds again for nothing."""
    commits = {
        name: len(one.commits) - 1 for name, one in world.hub.repositories.items() if name.startswith("spaces/")
    }
    assert commits == {
        **{"spaces/user/plain": 1, "spaces/user/by-class": 1, "spaces/user/draw": 1, "spaces/user/faulty": 1},
        **{"spaces/user/taken": 0, "spaces/user/edited": 1, "spaces/user/held": 1, "spaces/user/plain-restore": 1},
    }


def test_the_space_holds_what_was_written_for_it(world, tmp_path):
    """Else a file is lost on the way, or the model's name, license or prompts."""
    model = spaces.Model("user/text", f"{world.hub.url}/user/text", license="mit")
    expected = spaces.space_files(model, ["a dog", "a cat"])
    found = world.files("draw")
    assert found.pop(".gitattributes")
    assert found == expected


def test_a_folders_space_holds_the_model(world, models):
    """Else an app of a folder reads a folder that the Space does not have."""
    files = world.hub.files("spaces/user/held")
    settings = json.loads(files["space.json"])
    assert settings == {"model": spaces.MODEL_FOLDER, "title": "plain", "holds_model": True}
    prefix = f"{spaces.MODEL_FOLDER}/"
    held = {path.removeprefix(prefix): data for path, data in files.items() if path.startswith(prefix)}
    assert held == {
        path.relative_to(models["plain"]).as_posix(): path.read_bytes()
        for path in models["plain"].rglob("*")
        if path.is_file() and path.suffix != ".py"
    }


def test_a_restoring_space_says_so(world):
    """Else a visitor of a restoring Space gets the page that samples."""
    files = world.files("plain-restore")
    assert json.loads(files["space.json"])["restores"]
    assert f"{spaces.CODE}/restoration/studio.py" in files


def test_a_private_models_space_is_private_and_wants_its_token(world):
    """Else a private model's images are open to all, or its Space does not start and nobody knows why."""
    private = {name: one.private for name, one in world.hub.repositories.items() if name.startswith("spaces/")}
    assert private.pop("spaces/user/by-class")
    assert not any(private.values())
    assert "secret HF_TOKEN" in world.results["by-class"][1]
    assert "secret" not in world.results["plain"][1]


def test_what_a_person_wrote_into_the_readme_stays(world):
    """Else every upload takes back the title, the hardware hint and the words of the Space's owner."""
    files = world.files("edited")
    _, head, text = files["README.md"].split("---\n")
    card = yaml.safe_load(head)
    assert (card["title"], card["pinned"], text.strip()) == ("My digits", True, "What I wrote.")
    assert (card["sdk_version"], card["models"]) == (spaces.GRADIO_VERSION, ["user/plain"])
    assert f"{spaces.CODE}/gone.py" not in files


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("missing", "user/missing is neither a folder nor a model"),
        ("other", "it is a FluxPipeline"),
        ("cut", "your network"),
        ("taken", "holds another app; name another --space"),
        ("public", "is public; make it private"),
        ("restore-text", "--restore requires a model"),
        ("no-text", "has no text encoder"),
        ("both", "leave out --space"),
        ("full", "not empty"),
        ("faulty", "user/faulty could not be uploaded .*500"),
        ("stranger", "user/plain could not be uploaded .*403"),
        ("wrong", "--token"),
    ],
)
def test_what_goes_wrong_is_one_line(world, call, says):
    """Else it is a traceback, and its owner does not know what to do."""
    code, out, err = world.results[call]
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("ddpm-hf: error: ")]
    assert len(lines) == 1
    assert re.search(says, lines[0]), lines[0]
    assert "Traceback" not in err


def test_what_went_wrong_left_nothing(world):
    """Else a refusal leaves an empty Space, or changes somebody else's."""
    assert "spaces/user/new" not in world.hub.repositories
    assert set(world.files("taken")) == {"model_index.json"}
    assert not (world.root / "both").exists()
    assert [path.read_text() for path in (world.root / "theirs").iterdir()] == ["mine"]
    assert json.loads((world.root / "out" / "space.json").read_text())["model"].endswith("by-class")
    assert [path.name for path in world.root.iterdir() if path.name.startswith(".")] == []


def test_a_failed_upload_can_be_repeated(world):
    """Else a fault of the network costs the Space."""
    assert world.results["mended"][0] == 0, world.results["mended"][2]
    assert set(world.files("faulty")) == set(world.files("plain"))


def test_no_token_is_written_or_said(world):
    """Else whoever reads a Space can write to all of its owner's."""
    for name in world.hub.repositories:
        for text in world.hub.files(name).values():
            assert not any(token.encode() in text for token in (TOKEN, STRANGERS, WRONG))
    assert not any(token in world.said for token in (TOKEN, STRANGERS, WRONG))


DRAWING = """
import json, sys
sys.modules["ddpm_hf"] = None  # as where it is not installed
sys.path.insert(0, ".")  # as of a script
from ddpm_hf_space.inference.studio import Studio, SampleRequest
from ddpm_hf_space.publishing.space.serving import main
from ddpm_hf_space.publishing.space import page, restoration_page
from ddpm_hf_space.restoration import studio

settings = json.load(open("space.json"))
images = Studio(settings["model"], device="cpu").sample(SampleRequest(**json.loads(sys.argv[1])))
for index, image in enumerate(images):
    image.save(f"{index}.png")
print(json.dumps([name for name in sys.modules if name.startswith(("diffusers_modules", "gradio"))]))
"""


def test_the_spaces_code_draws_without_the_package_and_without_trust(world, models, tmp_path):
    """Else the app runs on its author's machine alone, or runs code that a model brought."""
    from PIL import Image

    for path, text in world.files("by-class").items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    request = json.dumps(REQUESTS["by-class"]._asdict())
    kept = client_environment(world.hub, tmp_path / "home", HF_TOKEN=TOKEN)
    done = warm.run("-c", DRAWING, request, cwd=tmp_path, env=kept, isolated=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    drawn = [Image.open(tmp_path / f"{index}.png") for index in range(REQUESTS["by-class"].count)]
    np.testing.assert_array_equal(pixels(drawn), by_hand(models, "by-class"))
