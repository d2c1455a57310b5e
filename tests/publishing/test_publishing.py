"""What goes up and when: strategies, tags, variants, cards that were edited meanwhile, and what the Hub refuses."""

import json
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DModel
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.common.pictures import save_image
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.data.reading import read_dataset
from ddpm_hf.data.rows import Rows
from ddpm_hf.models.flags import StartFlags
from ddpm_hf.models.saving import save_half_precision, save_model, save_pipeline
from ddpm_hf.publishing.card.illustrations import write_pictures
from ddpm_hf.publishing.files import files_to_publish, frozen_copy
from ddpm_hf.publishing.flags import PublishingFlags
from ddpm_hf.publishing.hub import attributes, outdated, read_remote
from ddpm_hf.publishing.publisher import Publisher
from ddpm_hf.training.plan import StepPlan
from tests.support.fixtures_hub import STRANGERS, TOKEN, WRONG, run
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.hub_server import Hub
from tests.support.pictures import random_pixels, write_images
from tests.support.runs import training_run

# Each job is a command line of the script or, after "push", of `ddpm-hf push`
COMMANDS = """
import contextlib, io, json, sys
from pathlib import Path
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import _http
from ddpm_hf import cli
from tests.support import cheap
from tests.support.pictures import random_pixels, write_images
from tests.support.runs import run_script

cheap.install()
_http.time.sleep = lambda seconds: None
write_images(Path(sys.argv[2]) / "images", random_pixels(40, 8, 8, 0))
results = {}
for name, words in json.loads(sys.argv[1]):
    if words[0] == "edit":  # a person, on the Hub
        HfApi().upload_file(path_or_fileobj=words[2].encode(), path_in_repo=words[3], repo_id=words[1])
        continue
    if words[0] == "validate":
        card = ModelCard.load(words[1])
        card.validate()
        results[name] = card.data.to_dict()
        continue
    if words[0] == "append":  # a person, in the folder
        Path(words[1]).write_text(Path(words[1]).read_text() + words[2])
        continue
    if words[0] != "push":
        done = run_script(words, Path(words[words.index("--output_dir") + 1]))
        results[name] = {"code": done.code, "out": done.out, "err": done.err}
        continue
    sys.argv, out, err, code = ["ddpm-hf", *words], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    results[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
print(json.dumps(results))
"""
NOTE = "\n\nWritten by hand.\n"


class World:
    """A Hub, and what each command said."""

    def __init__(self, root, hub):
        self.root, self.hub = root, hub
        (root / "unet").mkdir()
        (root / "unet" / "config.json").write_text(json.dumps({**tiny_unet().config, "_class_name": "UNet2DModel"}))
        DDPMPipeline(tiny_unet(), DDPMScheduler(num_train_timesteps=20)).save_pretrained(root / "saved")
        (root / "saved" / "notes.txt").write_text("mine")
        (root / "saved" / "diary.txt").write_text("mine alone")
        (root / "classifier").mkdir()
        hub.fail("POST /api/models/user/each/commit", 500)
        hub.fail("GET /api/models/user/silent$", 503)
        best = ["--validation_split", "0.2", "--validation_steps", "2", "--hub_strategy", "best"]
        saved, kept = root / "saved", root / "kept"
        jobs = [
            ("each", self.train("each", "--hub_strategy", "checkpoint")),
            ("best", self.train("best", *best, "--learning_rate", "0.5", "--hub_revision", "v1")),
            ("best of nothing", self.train("nothing", *best[2:])),
            ("best at odd steps", self.train("odd", *best, "--checkpointing_steps", "3")),
            ("kept", self.train("kept", "--save_variants", "fp16", "non_ema", "--hub_license", "mit")),
            ("silent", self.train("silent", "--hub_private_repo")),  # the Hub answers 503 to its first question
            ("refused", self.train("refused", "--hub_token", WRONG)),
            ("taken", self.train("best", "--hub_revision", "v1", folder="taken")),
            ("saved", ["push", saved, "user/saved", "--license", "mit", "--revision", "v1", "--include", "n*.txt"]),
            ("same", ["push", saved, "user/saved", "--revision", "v1"]),
            ("on the Hub", ["edit", "user/saved", self.card(saved, "on the Hub"), "README.md"]),
            ("after an edit", ["push", saved, "user/saved"]),
            ("here", ["append", saved / "README.md", NOTE.replace("hand", "me")]),
            ("after another", ["push", saved, "user/saved"]),
            ("in both 1", ["append", saved / "README.md", "\nhere\n"]),
            ("in both 2", ["edit", "user/saved", "---\nlicense: mit\n---\n# Anew\n", "README.md"]),
            ("in both", ["push", saved, "user/saved"]),
            ("card of best", ["validate", "user/best"]),
            ("words", ["edit", "user/kept", "---\nlicense: mit\n---\nHer words.\n", "README.md"]),
            ("over words", ["push", kept, "user/kept"]),
            ("card of kept", ["validate", "user/kept"]),
            ("tag of old", ["push", kept, "user/kept", "--revision", "v2"]),
            ("tag again", ["push", kept, "user/kept", "--revision", "v2", "--variant", "fp16"]),
            ("half", ["push", kept, "user/half", "--variant", "fp16", "--private"]),
            ("public", ["push", saved, "user/saved", "--private"]),
            ("by a stranger", ["push", kept, "user/kept", "--token", STRANGERS]),
            ("no folder", ["push", root / "nowhere", "user/x"]),
            ("no pipeline", ["push", root / "classifier", "user/x"]),
            ("outside", ["push", saved, "user/x", "--include", "../*"]),
            ("no such", ["push", saved, "user/x", "--include", "*.md5"]),
            ("a folder", ["push", saved, "user/x", "--include", "unet"]),
            ("odd license", ["push", saved, "user/x", "--license", "Apache 2"]),
            ("odd token", ["push", saved, "user/x", "--token", f"{TOKEN} and more"]),
            ("odd license of a run", self.train("odd", "--hub_license", "Apache-2.0")),
            ("odd name", ["push", saved, "user//x"]),
        ]
        jobs = [(name, list(map(str, words))) for name, words in jobs]
        self.said = run(hub, root / "home", COMMANDS, json.dumps(jobs), root, HF_TOKEN=TOKEN)

    def train(self, name, *more, folder=None):
        """A run of four steps of which every second is a checkpoint."""
        return [
            *["--output_dir", self.root / (folder or name), "--model_config_name_or_path", self.root / "unet"],
            *["--train_data_dir", self.root / "images", "--resolution", "8", "--channels", "1", "--seed", "1"],
            *["--train_batch_size", "8", "--max_train_steps", "6", "--checkpointing_steps", "2", "--use_ema"],
            *["--eval_batch_size", "2", "--ddpm_num_steps", "20", "--ddpm_num_inference_steps", "2"],
            *["--ddpm_beta_schedule", "cosine", "--cpu_threads", "1", "--logging_steps", "1", "--save_images_epochs"],
            *["9", "--save_model_epochs", "9", "--push_to_hub", "--hub_model_id", f"user/{name}", *more],
        ]

    @staticmethod
    def card(folder, where):
        """What a person makes of a card; it keeps no section."""
        return f"---\nlicense: mit\ntags:\n- art\n---\n\n# Mine\n{NOTE}\nEdited {where}.\n"

    def error(self, name):
        """The one line that says what is wrong."""
        said = self.said[name]
        assert said["code"] == 2, said
        assert "Traceback" not in said["err"]
        lines = [line for line in said["err"].splitlines() if re.match(r"\S+: error: ", line)]
        assert len(lines) == 1, said["err"]
        return lines[0]

    def history(self, name):
        """The files of each commit of a repository, oldest first, but for its creation."""
        return list(self.hub.repositories[f"user/{name}"].commits.values())[1:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What became of all of it."""
    with Hub({TOKEN: "user", STRANGERS: "stranger"}) as hub:
        yield World(tmp_path_factory.mktemp("world"), hub)


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def weights(path):
    """A model's weights as one vector."""
    loaded = UNet2DModel.from_pretrained(path, use_safetensors=True)
    return torch.cat([one.flatten() for one in loaded.parameters()]).detach()


# Strategies


def test_each_checkpoint_goes_up_as_a_whole_model(world):
    """Else `--hub_strategy checkpoint` shows nothing before the end, or half a model, or ends the training."""
    assert world.said["each"]["code"] == 0, world.said["each"]["err"]
    assert "warning: the upload at step 2 failed" in world.said["each"]["err"]  # a fault, as asked for
    commits = world.history("each")
    steps = [json.loads(files["run.json"].data)["step"] for files in commits]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6
    assert len(steps) <= 3
    for files in commits:
        assert {"model_index.json", "README.md", WEIGHTS} <= set(files)
        step = json.loads(files["run.json"].data)["step"]
        assert f"| steps | {step} |" in files["README.md"].data.decode()
        metrics = [json.loads(line) for line in files["metrics.jsonl"].data.splitlines()]
        assert metrics[-1]["step"] == step
        saved = (world.root / "each" / f"checkpoint-{step}" / "unet_ema" / Path(WEIGHTS).name).read_bytes()
        assert files[WEIGHTS].data[-1000:] == saved[-1000:]  # the header may differ, the last tensors not


def test_an_upload_beside_training_leaves_nothing_behind(world):
    """Else each checkpoint adds a copy of the model to the folder."""
    for name in ("each", "best", "kept", "saved"):
        assert not [path.name for path in (world.root / name).iterdir() if path.name.startswith(".")]


def test_the_best_checkpoint_is_what_is_saved_and_published(world):
    """Else `--hub_strategy best` publishes the last weights, however bad they have become."""
    assert world.said["best"]["code"] == 0, world.said["best"]["err"]
    lines = [json.loads(line) for line in (world.root / "best" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert set(losses) == {2, 4, 6}
    best = min(losses, key=losses.get)
    assert json.loads((world.root / "best" / "run.json").read_text())["step"] == best
    saved = weights(world.root / "best" / "unet")
    torch.testing.assert_close(saved, weights(world.root / "best" / f"checkpoint-{best}" / "unet_ema"))
    files = world.hub.files("user/best")
    assert files[WEIGHTS] == (world.root / "best" / WEIGHTS).read_bytes()
    assert f"| held-out loss | {losses[best]:.4g} | 8 |" in files["README.md"].decode()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("best of nothing", "--validation_split"),
        ("best at odd steps", "--checkpointing_steps 3"),
        ("refused", "--hub_token"),
        ("taken", "tag v1 already"),
    ],
)
def test_what_cannot_be_published_is_refused_before_training(world, name, says):
    """Else days of training end in the news."""
    assert says in world.error(name)
    assert "training:" not in world.said[name]["err"]
    assert not (world.root / {"best of nothing": "nothing", "best at odd steps": "odd"}.get(name, name)).exists()


def test_a_hub_that_does_not_answer_at_first_is_asked_again_at_the_end(world):
    """Else an outage of minutes keeps a training of days from beginning, or its model from being published."""
    assert world.said["silent"]["code"] == 0, world.said["silent"]["err"]
    assert "warning: the Hub does not answer" in world.said["silent"]["err"]
    assert WEIGHTS in world.hub.files("user/silent")


# Tags and variants


def test_a_tag_names_the_upload(world):
    """Else nobody can go on loading this version once another is published."""
    for name in ("best", "saved"):
        repository = world.hub.repositories[f"user/{name}"]
        assert WEIGHTS in repository.commits[repository.tags["v1"]]
    assert world.hub.repositories["user/best"].tags["v1"] == world.hub.repositories["user/best"].branches["main"]


def test_a_tag_stays_where_it_is(world):
    """Else `revision="v2"` loads another model than yesterday."""
    assert world.said["tag of old"]["code"] == 0
    repository = world.hub.repositories["user/kept"]
    assert world.said["tag again"]["code"] == 0 or "has a tag v2 already" in world.error("tag again")
    assert repository.tags["v2"] in list(repository.commits)[1:4]


def test_variants_load_by_diffusers_own_name(world):
    """Else `variant="fp16"` and `variant="non_ema"` load nothing, or the same weights under another name."""
    folder = world.root / "kept"
    loaded = {
        name: DiffusionPipeline.from_pretrained(folder, variant=name, use_safetensors=True).unet
        for name in (None, "fp16", "non_ema")
    }
    vectors = {name: torch.cat([one.flatten() for one in unet.parameters()]) for name, unet in loaded.items()}
    torch.testing.assert_close(vectors["non_ema"], weights(folder / "checkpoint-6" / "unet"))
    torch.testing.assert_close(vectors[None], weights(folder / "checkpoint-6" / "unet_ema"))
    assert not torch.equal(vectors[None], vectors["non_ema"])
    assert torch.equal(vectors["fp16"], vectors[None].half().float())
    half, full = (folder / "unet" / f"diffusion_pytorch_model.{name}safetensors" for name in ("fp16.", ""))
    assert half.stat().st_size < 0.8 * full.stat().st_size
    assert {str(half.relative_to(folder)), WEIGHTS} <= set(world.hub.files("user/kept"))


def test_a_push_makes_the_half_precision_weights_that_it_is_asked_for(world):
    """Else `ddpm-hf push --variant fp16` uploads none."""
    assert world.said["half"]["code"] == 0, world.said["half"]["err"]
    assert world.hub.repositories["user/half"].private
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in world.hub.files("user/half")


def test_making_half_precision_weights_leaves_the_model_alone(tmp_path):
    """Else saving a variant while training goes on in fp32 rounds the weights that are trained."""
    pipeline = DDPMPipeline(tiny_unet(), DDPMScheduler())
    before = [one.clone() for one in pipeline.unet.parameters()]
    save_model(pipeline, tmp_path)
    save_half_precision(pipeline, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(pipeline.unet.parameters(), before))


# `ddpm-hf push`


def test_a_saved_pipeline_is_published_with_pictures(world):
    """Else a model that was not trained here has a page without any."""
    files = world.history("saved")[0]
    assert {"assets/samples.png", "assets/chain.png"} <= set(files)
    listed = {line.split()[0] for line in world.said["saved"]["out"].splitlines()[:-1]}
    assert listed == set(files)
    for line in world.said["saved"]["out"].splitlines()[:-1]:
        name, size = line.split()
        assert int(size.replace(",", "")) == len(files[name].data)


def test_what_else_lies_in_the_folder_goes_up_on_request_alone(world):
    """Else a push publishes a person's own files, or cannot."""
    files = world.history("saved")[0]
    assert files["notes.txt"].data == b"mine"
    assert "diary.txt" not in files


def test_the_same_again_is_no_commit(world):
    """Else each push makes history of nothing."""
    assert world.said["same"]["code"] == 0, world.said["same"]["err"]
    assert len(world.history("saved")) == 5  # two pushes and two edits that changed something, and the first


def test_what_people_write_into_the_card_stays(world):
    """Else a push deletes it."""
    assert world.said["after an edit"]["code"] == 0, world.said["after an edit"]["err"]
    first, edited, after, another, anew = (files["README.md"].data.decode() for files in world.history("saved"))
    assert NOTE.strip() in edited
    assert "## Use" in first
    assert "ddpm_hf" not in edited
    for card in (after, another):
        assert f"# Mine\n{NOTE}\nEdited on the Hub." in card
        assert "- art" in card
        assert "## Use" in card
    assert "Written by me." not in after
    assert "Written by me." in another
    assert anew.endswith("# Anew\n")


def test_a_card_without_our_sections_stays_whole(world):
    """Else the first push over a hand-written card deletes it."""
    assert world.said["over words"]["code"] == 0, world.said["over words"]["err"]
    assert "Her words." in world.hub.files("user/kept")["README.md"].decode()


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("the Hub does not answer"), OSError("cut")])
def test_a_card_that_cannot_be_read_is_not_taken_for_none(error):
    """Else a moment's trouble of the Hub deletes what a person wrote there."""

    def hf_hub_download(*args, **kwargs):
        raise error

    api = SimpleNamespace(hf_hub_download=hf_hub_download)
    there = SimpleNamespace(id="user/kept", sha="1", siblings=[SimpleNamespace(rfilename="README.md")])
    with pytest.raises(type(error)):
        read_remote(api, there, "README.md")
    assert read_remote(api, there, ".gitattributes") == ""


def test_edits_in_both_places_stop_a_push(world):
    """Else one of two texts is deleted."""
    assert "edited here and on the Hub" in world.error("in both")
    assert "\nhere\n" in (world.root / "saved" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("public", "is public"),
        ("by a stranger", "user/kept"),
        ("no folder", "is not a folder"),
        ("no pipeline", "no model_index.json"),
        ("outside", "--include"),
        ("no such", "--include"),
        ("a folder", "--include unet"),
        ("odd license", "--license"),
        ("odd license of a run", "--hub_license"),
        ("odd token", "--token"),
        ("odd name", "user//x"),
    ],
)
def test_a_push_that_cannot_be_is_one_line(world, name, says):
    """Else it is a traceback, or publishes what it should not."""
    assert says in world.error(name)
    assert "user/x" not in world.hub.repositories


@pytest.mark.parametrize("name", ["best", "kept"])
def test_the_hub_accepts_the_cards(world, name):
    """Else the push is refused, or the Hub shows a warning in the place of the model's task and results."""
    data = world.said[f"card of {name}"]
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert ("model-index" in data) == (name == "best")
    assert data.get("license") == ("mit" if name == "kept" else None)


# What goes up


def fingerprint(place, **images):
    """Of the dataset that a folder of such images is."""
    write_images(place, np.stack(list(images.values())))
    return read_dataset(None, str(place)).fingerprint()


def test_a_fingerprint_tells_data_from_data(tmp_path):
    """Else a card's fingerprint is of the folder's place, and nobody can compare what was trained on."""
    pixels = random_pixels(3, 8, 8, 0)
    own = fingerprint(tmp_path / "one", a=pixels[0], b=pixels[1])
    assert own == fingerprint(tmp_path / "two", a=pixels[0], b=pixels[1])
    assert own != fingerprint(tmp_path / "three", a=pixels[0], b=pixels[2])
    assert own != fingerprint(tmp_path / "four", a=pixels[0])
    embedded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "one"), split="train")
    embedded.save_to_disk(tmp_path / "saved")  # with the files' bytes in it
    assert own == read_dataset(None, str(tmp_path / "saved")).fingerprint()


def test_an_image_that_cannot_be_read_does_not_keep_data_from_its_fingerprint(tmp_path):
    """Else a run with --skip_broken_images dies of an image that it would leave out."""
    rows = read_dataset(None, str(write_images(tmp_path / "images", random_pixels(3, 8, 8, 0))))
    whole = rows.fingerprint()
    (tmp_path / "images" / "1.png").unlink()
    assert rows.fingerprint() != whole
    column = datasets.Dataset.from_dict({"image": [None, None]})
    assert Rows(column, "none", "image").fingerprint() == Rows(column, "none", "image").fingerprint()


def test_what_an_earlier_upload_had_and_this_one_has_not_goes():
    """Else old weights stay beside new ones, and `variant="fp16"` loads another model than the rest."""
    there = [
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors", "notes.txt",
        "unet/diffusion_pytorch_model.safetensors.index.json", "old_ddpm_hf.py", "assets/chain.png", "a/b.safetensors",
        "unet/config.json", "sampling_ddpm_hf.py", "assets/mine.png", "demo/sampling_ddpm_hf.py",
        "unet/own/a.safetensors",
    ]  # fmt: skip
    content = {"unet/diffusion_pytorch_model.safetensors": b"", "unet/config.json": b""}
    assert outdated(there, content) == [there[0], there[3], there[5], there[8]]  # and nothing of a person's


def test_saving_again_removes_variants_of_other_weights(tmp_path):
    """Else `variant="fp16"` loads the model of an earlier save."""
    save_pipeline(DDPMPipeline(tiny_unet(), DDPMScheduler()), tmp_path)
    save_half_precision(DDPMPipeline(tiny_unet(), DDPMScheduler()), tmp_path)
    (tmp_path / "unet" / "notes.txt").write_text("mine")
    save_pipeline(DDPMPipeline(tiny_unet(seed=1), DDPMScheduler()), tmp_path)
    names = {path.name for path in (tmp_path / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "notes.txt"}


def test_a_folder_of_links_is_published(tmp_path):
    """Else a model from the Hub's cache, which is one, cannot be passed on."""
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "blobs")
    (tmp_path / "links" / "unet").mkdir(parents=True)
    for name, path in files_to_publish(tmp_path / "blobs").items():
        (tmp_path / "links" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "links" / name).symlink_to(path)
    wanted = files_to_publish(tmp_path / "links")
    with frozen_copy(wanted, tmp_path / "links") as files:
        for name, path in files.items():
            assert not path.is_symlink()
            assert path.read_bytes() == wanted[name].read_bytes()


def publisher(folder, losses, total_steps=6):
    """One of a run with checkpoints every second step and these held-out losses by step."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "validation_loss": loss}) + "\n" for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(lines))
    flags = PublishingFlags(hub_strategy="best", hub_private_repo=True, hub_license="mit", hub_revision="v1")
    run = training_run(Accelerator(cpu=True), output_dir=str(folder), checkpointing_steps=2)
    run.settings.parts += (DataFlags(train_data_dir="photos"), StartFlags())
    rows = SimpleNamespace(name="photos", fingerprint=lambda: None)
    images = SimpleNamespace(rows=rows, count=8, held_out=None)
    state = SimpleNamespace(model=torch.nn.Linear(1, 1), sessions=SimpleNamespace(note=lambda **facts: None))
    plan = StepPlan(8, 4, 1, 1, total_steps)
    return Publisher(run, flags, TOKEN, "user/my model", state, plan, images, None, (), ())


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({2: 0.5, 4: 0.4, 6: 0.6}, [2, 4]),
        ({2: math.nan, 4: 0.4, 6: math.inf}, [4]),
        ({1: 0.1, 2: 0.5, 3: 0.1, 4: 0.6}, [2]),  # between checkpoints nothing is kept
    ],
)
def test_the_best_so_far_is_known_by_its_loss(tmp_path, losses, best):
    """Else `--hub_strategy best` keeps another checkpoint, or after one NaN none at all."""
    known, found = {}, []
    for step, loss in losses.items():
        known[step] = loss
        if step % 2 == 0 and publisher(tmp_path / "run", known).is_best(step):
            found.append(step)
    assert found == best


def test_the_command_that_repeats_an_upload_asks_for_the_same(tmp_path):
    """Else a model that was to be private is public once its upload is repeated."""
    words = shlex.split(publisher(tmp_path / "my run", {}).command())
    assert words[:4] == ["ddpm-hf", "push", str(tmp_path / "my run"), "user/my model"]
    assert words[4:] == ["--private", "--license", "mit", "--revision", "v1"]


def test_the_pictures_are_of_the_saved_step(tmp_path):
    """Else the card of the best checkpoint shows what a later one draws, and calls it its own."""
    for step in (999_998, 1_000_000, 1_000_002):
        save_image(Image.new("L", (8, 8), step % 256), tmp_path / "samples" / f"step-{step:06d}.png")
    for step, shown in ((1_000_001, 1_000_000), (999_999, 999_998), (5, None)):
        (tmp_path / "run.json").write_text(json.dumps({"step": step, "sessions": []}))
        write_pictures(tmp_path)
        there = tmp_path / "assets" / "samples.png"
        assert there.is_file() == (shown is not None)
        if shown:
            assert there.read_bytes() == (tmp_path / "samples" / f"step-{shown}.png").read_bytes()
        assert json.loads((tmp_path / "run.json").read_text()).get("pictures_step") == shown


def test_gitattributes_gain_our_kinds_once():
    """Else pictures lie in git itself, or each push adds the same lines."""
    before = "*.bin filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
    after = attributes(before)
    assert after.startswith(before)
    assert after.count("*.safetensors") == 1
    assert "*.png filter=lfs" in after
    assert attributes(after) == after
    assert "*.png filter=lfs" in attributes("")


def test_an_upload_is_of_the_moment_it_was_asked_for(tmp_path):
    """Else what training writes meanwhile is mixed into it."""
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    wanted = files_to_publish(tmp_path)
    before = {name: path.read_bytes() for name, path in wanted.items()}
    with frozen_copy(wanted, tmp_path) as files:
        save_model(DDPMPipeline(tiny_unet(seed=1), DDPMScheduler()), tmp_path)
        with open(tmp_path / "metrics.jsonl", "a") as log:
            log.write('{"step": 2}\n')
        assert {name: path.read_bytes() for name, path in files.items()} == before
        assert (tmp_path / WEIGHTS).read_bytes() != before[WEIGHTS]
    assert not np.any([path.name.startswith(".") for path in tmp_path.iterdir()])
