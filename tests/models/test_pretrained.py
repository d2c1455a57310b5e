"""Training from trained weights: where they are looked for, what they decide, and how they are fitted."""

import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.common.locations import find_location
from ddpm_hf.models.flags import StartFlags
from ddpm_hf.models.pretrained import fit_classes, fit_variance, load_weights, read_source, trained_settings
from ddpm_hf.models.sources import Source, find_source
from tests.support.fixtures_pipeline import randn, tiny_unet, tiny_vae
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import BASE, fill, parse, run_script, words


def close(first, second):
    """Whether two outputs are the same but for rounding."""
    return torch.allclose(first, second, rtol=1e-4, atol=1e-5)


def by_class(names, null=True, channels=3, **more):
    """An untrained pipeline by class."""
    unet = tiny_unet(channels, seed=1, num_class_embeds=len(names) + null, **more)
    return ClassConditionalDDPMPipeline(unet, DDPMScheduler(), dict(enumerate(names)))


def write_diffusers_checkpoint(folder, unet, ema=None):
    """A checkpoint as Diffusers' training script leaves it."""
    unet.save_pretrained(folder / "unet")
    if ema is not None:
        EMAModel(ema.parameters(), model_cls=UNet2DModel, model_config=ema.config).save_pretrained(folder / "unet_ema")
    (folder / "optimizer.bin").write_bytes(b"of torch")
    (folder / "random_states_0.pkl").write_bytes(b"of torch")
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Images and models, by name."""
    root = tmp_path_factory.mktemp("shop")
    files = [encoded(one) for one in random_pixels(6)]
    write_rows(root / "photos", files, label=list("aabbcc"))
    DDPMPipeline(tiny_unet(3), DDPMScheduler(beta_schedule="cosine")).save_pretrained(root / "ours")
    stock = DDPMScheduler(prediction_type="v_prediction", variance_type="fixed_large", num_train_timesteps=500)
    stock = diffusers.DDPMScheduler.from_config(stock.config)
    diffusers.DDPMPipeline(tiny_unet(3, seed=2), stock).save_pretrained(root / "stock")
    by_class("cxa").save_pretrained(root / "by-class")
    DDPMPipeline(tiny_unet(4, size=4), DDPMScheduler(clip_sample=False), tiny_vae()).save_pretrained(root / "latents")
    write_diffusers_checkpoint(root / "theirs/checkpoint-5", tiny_unet(3), tiny_unet(3, seed=3))
    write_diffusers_checkpoint(root / "finished/checkpoint-5", tiny_unet(3))
    diffusers.DDPMPipeline(tiny_unet(3), stock).save_pretrained(root / "finished")
    tiny_unet(3).save_pretrained(root / "bare")
    tiny_unet(3).save_pretrained(root / "root")  # as the Hub's first models: all at the root
    diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(root / "root")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (root / "root/model_index.json").write_text(json.dumps(index))
    tiny_unet(3).save_pretrained(root / "pickled", safe_serialization=False)
    return root


FLAGS = {**BASE, "model_config_name_or_path": None, "resolution": None, "num_epochs": None, "max_train_steps": 1}


def start(shop, folder, pretrained, **flags):
    """A run from trained weights."""
    name = str(shop / pretrained)
    return run_script(
        words(fill({**FLAGS, "output_dir": str(folder), "pretrained_model_name_or_path": name, **flags}, shop)), folder
    )


# Where the weights lie


@pytest.mark.parametrize(
    ("name", "weights", "schedule", "steps"),
    [
        ("ours", "unet", "squaredcos_cap_v2", 1000),
        ("stock", "unet", "linear", 500),
        ("root", "", "squaredcos_cap_v2", 1000),
        ("bare", "", None, None),
        ("ours/unet", "", "squaredcos_cap_v2", 1000),
        ("theirs/checkpoint-5", "unet_ema", None, None),
        ("theirs/checkpoint-5/unet", "", None, None),
        ("finished/checkpoint-5", "unet", "linear", 500),
    ],
)
def test_a_model_is_known_by_its_folder(shop, name, weights, schedule, steps):
    # Breaks if another folder's weights are taken than those that the name means, or its diffusion is not known.
    source = find_source(find_location(str(shop / name)))
    assert source.place.root == str((shop / name) / weights)
    assert source.unet["block_out_channels"] in ([8, 16], (8, 16))
    settings = trained_settings(source)
    assert settings.get("ddpm_beta_schedule") == schedule
    assert settings.get("ddpm_num_steps") == steps
    assert settings["resolution"] == "8"


@pytest.fixture
def hub(shop, tmp_path, monkeypatch):
    """user/digits on the Hub, with a branch `trial`: in the cache, as where there is no network."""
    cached = tmp_path / "hub/models--user--digits"
    for number, (branch, names) in enumerate({"main": ("root", "by-class"), "trial": ("ours",)}.items()):
        snapshot = cached / "snapshots" / (str(number) * 40)
        shutil.copytree(shop / names[0], snapshot)
        for name in names[1:]:
            shutil.copytree(shop / name, snapshot / "best")
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / branch).write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_model_is_known_by_its_name_on_the_hub(hub, shop):
    # Breaks if a repository is read another way than a folder, or another branch or folder of it than was named.
    flags = ["--train_data_dir", "x", "--pretrained_model_name_or_path", "user/digits"]

    def weights(*more):
        config = parse([*flags, *more])
        source = read_source(config[StartFlags], None)
        return source, load_weights(source, config.variant)["conv_in.weight"]

    source, of_main = weights()
    assert (source.place.root, source.place.subfolder, source.classes) == ("user/digits", "", None)
    assert source.scheduler["beta_schedule"] == "squaredcos_cap_v2"
    assert torch.equal(of_main, tiny_unet(3).conv_in.weight)
    for folder in ("best", "best/unet"):
        source, of_folder = weights("--subfolder", folder)
        assert (source.place.subfolder, source.classes) == ("best/unet", ["c", "x", "a"])
        assert torch.equal(of_folder, tiny_unet(3, seed=1).conv_in.weight)
    source, of_branch = weights("--revision", "trial")
    assert (source.place.subfolder, torch.equal(of_branch, of_main)) == ("unet", True)
    with pytest.raises(ValueError, match="neither a folder nor a model that can be reached"):
        find_source(find_location("user/unknown"))


def test_a_variant_of_the_weights_can_be_named(shop, tmp_path):
    # Breaks if --variant is ignored: an fp16 copy differs in its last bits, and trains in float32.
    tiny_unet(3).half().save_pretrained(tmp_path, variant="fp16")
    tiny_unet(3, seed=5).save_pretrained(tmp_path)
    source = find_source(find_location(str(tmp_path)))
    half, whole = (load_weights(source, variant)["conv_in.weight"] for variant in ("fp16", None))
    assert half.dtype == whole.dtype == torch.float32
    assert torch.equal(half, tiny_unet(3).half().conv_in.weight.float())
    assert torch.equal(whole, tiny_unet(3, seed=5).conv_in.weight)


def test_a_model_of_latents_brings_its_autoencoder(shop, tmp_path):
    # Breaks if latents are taken for pixels, or the size is told in latents.
    done = start(shop, tmp_path / "run", "latents", dry_run=True)
    assert done.code == 0, done.err
    assert f"in the latents of {shop / 'latents'}" in done.out
    assert "3 × 8" in done.out


WRONG = {
    "nothing there": ("photos", {}, "no model there"),
    "no such folder": ("missing/folder/", {}, "no such folder"),
    "another program's file": ("model-10.pt", {}, "a file.*checkpoint-N.*ddpm-hf convert"),
    "a folder of such files": ("weights", {}, "there is model-10.pt.*ddpm-hf convert"),
    "text to image": ("text", {}, "train_text2image.py"),
    "another model": ("other", {}, "a AutoencoderKL, not a UNet2DModel"),
    "another diffusion": ("sde", {}, "ScoreSdeVeScheduler"),
    "other outputs": ("colourizer", {}, "reads 4 channels and predicts 3"),
    "other channels": ("bare", {"channels": 1}, "reads 3 channels.*leave --channels out"),
    "pickled weights": ("pickled", {}, "safe_serialization=True"),
    "half of the weights": ("half", {}, "incomplete"),
    "no such part": ("bare", {"subfolder": "unet"}, "no folder unet"),
    "no such variant": ("bare", {"variant": "fp16"}, "cannot be loaded"),
    "two models": ("bare", {"model_config_name_or_path": "{shop}/tiny"}, "two models"),
    "a list of betas, for another T": ("listed", {"ddpm_num_steps": 50}, "leave the flag out, or name a"),
    "no such list": ("ours", {"ddpm_beta_schedule": "trained_betas"}, "squaredcos_cap_v2; leave the flag out"),
    "a number of unnamed classes": ("unnamed", {"label_column": "label"}, "embeds 7 classes without names.*have 3"),
}


@pytest.fixture(scope="module")
def wrong(shop):
    """Models that cannot be started from."""
    (shop / "model-10.pt").write_bytes(b"of torch")
    (shop / "weights").mkdir()
    (shop / "weights/model-10.pt").write_bytes(b"of torch")
    write_unet(shop / "tiny")
    write_unet(shop / "text/unet", _class_name="UNet2DConditionModel")
    tiny_vae().save_pretrained(shop / "other")
    tiny_unet(3).save_pretrained(shop / "sde")
    (shop / "sde/scheduler_config.json").write_text('{"_class_name": "ScoreSdeVeScheduler"}')
    tiny_unet(4, 3).save_pretrained(shop / "colourizer")
    tiny_unet(3).save_pretrained(shop / "half")
    weights = load_file(shop / "half/diffusion_pytorch_model.safetensors")
    del weights["conv_in.weight"]
    save_file(weights, shop / "half/diffusion_pytorch_model.safetensors")
    betas = np.linspace(1e-3, 0.1, 40).tolist()
    listed = DDPMScheduler(num_train_timesteps=40, trained_betas=betas)
    DDPMPipeline(tiny_unet(3), listed).save_pretrained(shop / "listed")
    tiny_unet(3, num_class_embeds=7).save_pretrained(shop / "unnamed")
    return shop


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_started_from_is_one_line(wrong, tmp_path, case):
    # Breaks if it ends in a traceback, or after something was written.
    name, flags, said = WRONG[case]
    done = start(wrong, tmp_path / "run", name, **flags)
    assert done.code == 2
    assert "--pretrained_model_name_or_path" in done.error() or "--ddpm_beta_schedule" in done.error()
    assert re.search(said, done.error()), done.error()
    assert not (tmp_path / "run").exists()


# What they decide


def test_the_trained_diffusion_is_the_default(wrong):
    # Breaks if a model goes on with other noise than it was trained with, unless that was asked for.
    stock = ["--train_data_dir", "x", "--pretrained_model_name_or_path", str(wrong / "stock")]
    config = parse([*stock, "--model_preset", "ddpm-cifar10"])  # a recipe is weaker
    assert (config.prediction_type, config.variance_type) == ("v_prediction", "fixed_large")
    assert (config.ddpm_num_steps, config.resolution, config.use_ema) == (500, "8", True)
    assert parse([*stock, "--prediction_type", "sample"]).prediction_type == "sample"
    listed = parse(["--train_data_dir", "x", "--pretrained_model_name_or_path", str(wrong / "listed")])
    assert (listed.ddpm_beta_schedule, listed.ddpm_num_steps) == ("trained_betas", 40)


def test_a_list_of_betas_goes_on(wrong, tmp_path):
    # Breaks if a schedule that no flag can name is lost on the way.
    done = start(wrong, tmp_path / "run", "listed")
    assert done.code == 0, done.err
    saved = [
        json.loads((folder / "scheduler/scheduler_config.json").read_text())
        for folder in (wrong / "listed", done.folder)
    ]
    assert saved[0]["trained_betas"] == saved[1]["trained_betas"] is not None


def test_flags_that_differ_are_said(shop, tmp_path):
    # Breaks if another diffusion, size or preset than the model's is trained without a word.
    flags = {"prediction_type": "sample", "resolution": 16, "model_preset": "small-16", "label_column": "label"}
    done = start(shop, tmp_path / "run", "ours", **flags, dry_run=True)
    assert "--prediction_type sample" in done.err
    assert "--resolution 16" in done.err
    assert "only its recipe counts" in done.err
    assert "3 classes are new" in done.err
    assert "nothing says which diffusion" in start(shop, tmp_path / "run", "bare", dry_run=True).err


# How they are fitted


def fitted_to(pipeline, names, null=True):
    """The UNet of a pipeline with the classes of another training, and what was said."""
    source = Source(None, "it", dict(pipeline.unet.config), classes=list(getattr(pipeline, "labels", [])) or None)
    weights = dict(pipeline.unet.state_dict())
    embeddings = len(names) + null if names else 0
    lines = fit_classes(weights, source, names, embeddings)
    unet = UNet2DModel.from_config(pipeline.unet.config, num_class_embeds=embeddings or None)
    unet.load_state_dict(weights)
    return unet.eval(), lines


X, T = randn(3, 3, 8, 8), torch.tensor([0, 400, 999])


@torch.no_grad()
def test_added_classes_begin_as_the_unconditional_model():
    # Breaks if new class embeddings disturb what was learned.
    pipeline = DDPMPipeline(tiny_unet(3), DDPMScheduler())
    unet, lines = fitted_to(pipeline, ["cat", "dog"])
    before = pipeline.unet(X, T).sample
    for label in range(3):
        assert close(unet(X, T, class_labels=torch.full((3,), label)).sample, before)
    assert "2 classes are new" in lines[0]


@torch.no_grad()
def test_classes_are_mapped_by_name():
    # Breaks if a class gets the embedding of another, because the new images are in another order.
    pipeline = by_class(["cat", "dog", "owl"])
    unet, lines = fitted_to(pipeline, ["ape", "owl", "cat"])
    for label, before in ((0, 3), (1, 2), (2, 0), (3, 3)):  # a new one begins as the null class
        now, then = (
            one(X, T, class_labels=torch.full((3,), number)).sample
            for one, number in ((unet, label), (pipeline.unet, before))
        )
        assert close(now, then), (label, before)
    assert lines == ["2 classes kept, 1 new, which begin as the null class (ape), 1 left out (dog)"]


@torch.no_grad()
def test_without_classes_it_goes_on_as_the_null_class():
    # Breaks if a model by class cannot go on without, or begins as something else than its unconditional half.
    pipeline = by_class(["cat", "dog"])
    unet, lines = fitted_to(pipeline, [])
    null = pipeline.unet(X, T, class_labels=torch.full((3,), pipeline.null_class)).sample
    assert close(unet(X, T).sample, null)
    assert "begins as the null class" in lines[0]


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (False, False)])
def test_a_null_class_comes_and_goes(before, after):
    # Breaks if --class_dropout cannot be turned on or off when a model by class is trained on.
    pipeline = by_class(["cat", "dog"], null=before)
    rows = pipeline.unet.class_embedding.weight
    weights = fitted_to(pipeline, ["dog", "cat"], null=after)[0].class_embedding.weight
    assert torch.equal(weights[:2], rows[[1, 0]])
    assert len(weights) == 2 + after
    if after:
        assert close(weights[2], rows.mean(dim=0))


@pytest.mark.parametrize("before", ["fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log"])
def test_a_learned_variance_begins_as_the_fixed_one(before):
    # Breaks if the new half of the output makes other samples than the trained model's.
    trained, scheduler = DDPMScheduler(variance_type=before), DDPMScheduler(variance_type="learned_range")
    old = tiny_unet(3)
    weights = dict(old.state_dict())
    source = Source(None, "it", dict(old.config), dict(trained.config))
    assert fit_variance(weights, source, 6, scheduler)
    new = UNet2DModel.from_config(old.config, out_channels=6).eval()
    new.load_state_dict(weights)
    t = torch.tensor([1, 400, 999])
    with torch.no_grad():
        first = trained.p_mean_variance(old(X, t).sample, t, X)
        second = scheduler.p_mean_variance(new(X, t).sample, t, X)
    assert close(first.mean, second.mean)
    assert close(first.log_variance.expand_as(X), second.log_variance.expand_as(X))
    # and back
    again = dict(new.state_dict())
    assert fit_variance(again, Source(None, "it", dict(new.config), dict(scheduler.config)), 3, trained)
    assert all(torch.equal(again[name], value) for name, value in old.state_dict().items())


def test_a_variance_in_logs_begins_within_its_range():
    # Breaks if a log-variance begins at 0, which is a variance of 1.
    old, scheduler = tiny_unet(3), DDPMScheduler(variance_type="learned")
    weights = dict(old.state_dict())
    fit_variance(weights, Source(None, "it", dict(old.config), dict(DDPMScheduler().config)), 6, scheduler)
    log_variance = weights["conv_out.bias"][3:]
    assert bool((log_variance < scheduler.betas.max().log()).all() and (log_variance > -20).all())


# The run


def test_a_run_starts_from_them_and_resumes_without_them(shop, tmp_path):
    # Breaks if weights are not used, classes are lost, or a run cannot be resumed once the model that it began with
    # has moved.
    shutil.copytree(shop / "by-class", tmp_path / "base")
    flags = {"label_column": "label", "learning_rate": 1e-12, "checkpointing_steps": 1}
    done = start(tmp_path, tmp_path / "run", "base", train_data_dir=str(shop / "photos"), **flags)
    assert done.code == 0, done.err
    assert "2 classes kept, 1 new, which begin as the null class (b), 1 left out (x)" in done.err
    before = UNet2DModel.from_pretrained(tmp_path / "base/unet")
    after = ClassConditionalDDPMPipeline.from_pretrained(done.folder)
    assert after.labels == {"a": 0, "b": 1, "c": 2}
    assert close(after.unet.class_embedding.weight, before.class_embedding.weight[[2, 3, 0, 3]])
    assert done.json("run.json")["base_model"] is None  # a path of this machine
    flags |= {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    other = start(shop, tmp_path / "run", "by-class", train_data_dir=str(shop / "photos"), **flags)
    assert other.code == 2
    assert f"--pretrained_model_name_or_path {shop / 'by-class'}: the run to resume was trained with" in other.error()
    shutil.rmtree(tmp_path / "base")
    again = start(tmp_path, tmp_path / "run", "base", train_data_dir=str(shop / "photos"), **flags)
    assert again.code == 0, again.err
    assert "starting from" not in again.err
    # and a checkpoint of ours is a start again, with all that it knows
    source = find_source(find_location(str(tmp_path / "run/checkpoint-2")))
    assert source.classes == ["a", "b", "c"]
    assert trained_settings(source)["ddpm_beta_schedule"] == "linear"


def test_a_checkpoint_of_diffusers_says_how_to_go_on(shop, tmp_path):
    # Breaks if it is called broken or an earlier run of ours, or what the line says does not work.
    shutil.copytree(shop / "theirs", tmp_path / "run")
    for flags in ({}, {"resume_from_checkpoint": "latest"}, {"resume_from_checkpoint": "checkpoint-5"}):
        done = run_script(words(fill({**FLAGS, "output_dir": str(tmp_path / "run"), **flags}, shop)), tmp_path / "run")
        assert done.code == 2
        assert "a checkpoint of Diffusers' script" in done.error()
    advice = done.error().partition("start from its weights with ")[2].split()
    assert advice[0] == "--pretrained_model_name_or_path"
    done = start(shop, tmp_path / "new", advice[1])
    assert done.code == 0, done.err
    assert "the averaged (EMA) weights of" in done.err
