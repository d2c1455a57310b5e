"""`ddpm-hf sample`: grids with a legend, formats, samplers, interpolation, and what a text model's guidance is."""

import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, TextToImageDDPMPipeline
from ddpm_hf.common.randomness import keyed_seed
from ddpm_hf.inference.samplers import UNFITTED, usable_samplers
from ddpm_hf.inference.studio import Studio
from ddpm_hf.portable.guidance_ddpm_hf import find_class
from tests.support.fixtures_cli import assert_one_line, images
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_text import tiny_text_pipeline

STEPS = 20  # T of the tiny models
QUICK = ("--steps", 2)


def scheduler(**config):
    """A chain of few steps."""
    return DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="cosine", **config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny grayscale model, saved; it does not clip, so that samplers agree where the mathematics says so."""
    folder = tmp_path_factory.mktemp("plain")
    DDPMPipeline(tiny_unet(), scheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    """A tiny model of three classes, saved."""
    folder = tmp_path_factory.mktemp("by-class")
    unet = tiny_unet(num_class_embeds=4)
    ClassConditionalDDPMPipeline(unet, scheduler(), dict(enumerate(["cat", "dog", "Łoś"]))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_text(tmp_path_factory):
    """A tiny text-to-image model, saved with another guidance scale than Stable Diffusion's."""
    folder = tmp_path_factory.mktemp("by-text")
    TextToImageDDPMPipeline(**tiny_text_pipeline().components, guidance_scale=3.0).save_pretrained(folder)
    return folder


def generator():
    """That of the command's first image."""
    return torch.Generator().manual_seed(keyed_seed(0, "sample", 0, 0))


def loaded(cls, folder):
    """A pipeline that shows no progress."""
    pipeline = cls.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Grids and classes


@pytest.mark.parametrize("kind", ["class", "prompt"])
def test_each_class_or_prompt_has_a_row_with_its_label(kind, run, by_class, by_text, tmp_path):
    """Else nobody can tell which images are of which class."""
    model, given = (by_class, ["dog", "cat"]) if kind == "class" else (by_text, ["a dog", "two"])
    words = [word for one in given for word in (f"--{kind}", one)]
    assert run("sample", model, "--out", tmp_path, *words, "--num-images", 5, *QUICK)[0] == 0
    singles, grid = images(tmp_path), np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    scale = 64 // singles.shape[1]
    cell = singles.shape[1] * scale + 2
    left = grid.shape[1] - 2 - 3 * cell  # three columns
    assert left > 0
    assert grid.shape[0] == 2 + 2 * cell
    assert (grid[2:cell, :left] < 128).any()  # a label
    assert (grid[2 + cell :, :left] < 128).any()
    for index, single in enumerate(singles):
        column, row = divmod(index, 2)
        top, start = 2 + row * cell, left + 2 + column * cell
        shown = grid[top + scale // 2 : top + cell - 2 : scale, start + scale // 2 : start + cell - 2 : scale]
        np.testing.assert_array_equal(shown, single)
    assert (grid[2 + cell : 2 * cell, left + 2 + 2 * cell :] == 255).all()  # the sixth


def test_one_class_is_a_square_without_a_legend(run, by_class, tmp_path):
    """Else the grid of a single class is a strip."""
    assert run("sample", by_class, "--out", tmp_path, "--class", "dog", "--num-images", 4, *QUICK)[0] == 0
    assert Image.open(tmp_path / "grid.png").size == (2 + 2 * 66, 2 + 2 * 66)


@pytest.mark.parametrize(("given", "known"), [("CAT", "cat"), ("łoŚ", "Łoś"), ("2", "Łoś")])
def test_classes_are_matched_without_case(given, known, run, by_class, tmp_path):
    """Else `--class Dog` is an error where the folder was called dog."""
    for name, word in (("given", given), ("known", known)):
        assert run("sample", by_class, "--out", tmp_path / name, "--class", word, "--num-images", 1, *QUICK)[0] == 0
    np.testing.assert_array_equal(images(tmp_path / "given"), images(tmp_path / "known"))


def test_a_class_that_two_names_resemble_is_not_guessed():
    """Else "A" samples "a" where both are classes, or one of two that differ in case alone."""
    ids = {"a": 0, "A": 1, "Bee": 2, "BEE": 3}
    assert [find_class(name, ids) for name in ("a", "A", "Bee")] == [0, 1, 2]
    with pytest.raises(ValueError, match="'Bee' or 'BEE'"):
        find_class("bee", ids)


def test_an_unknown_class_is_answered_with_the_one_that_is_meant(run, by_class, tmp_path):
    """Else a typing mistake among a thousand classes costs a search."""
    assert_one_line(run("sample", by_class, "--out", tmp_path, "--class", "dgo"), "--class", "'dgo'", "mean 'dog'")
    pipeline = loaded(ClassConditionalDDPMPipeline, by_class)
    assert pipeline.class_ids(["Dog", 0]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="did you mean 'cat'"):
        pipeline.class_ids("cta")


# Formats


@pytest.mark.parametrize("kind", ["plain", "by_class"])
def test_npz_is_what_adm_reads(kind, run, plain, by_class, tmp_path):
    """arr_0 and arr_1 of guided-diffusion's evaluator; else figures are of other images, or of none."""
    model = {"plain": plain, "by_class": by_class}[kind]
    given = ("--num-images", 5, "--batch-size", 2, *QUICK)
    assert run("sample", model, "--out", tmp_path / "png", *given)[0] == 0
    assert run("sample", model, "--out", tmp_path / "npz", "--format", "npz", *given)[0] == 0
    assert sorted(path.name for path in (tmp_path / "npz").iterdir()) == [
        "ddpm_hf_files.json",
        "grid.png",
        "samples.npz",
    ]
    with np.load(tmp_path / "npz" / "samples.npz") as arrays:
        assert set(arrays) == {"arr_0", "arr_1"} if kind == "by_class" else {"arr_0"}
        assert arrays["arr_0"].shape == (5, 8, 8, 1)
        assert arrays["arr_0"].dtype == np.uint8
        np.testing.assert_allclose(arrays["arr_0"][..., 0], images(tmp_path / "png"), atol=1)
        if kind == "by_class":
            assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1]
            assert arrays["arr_1"].dtype == np.int64


# Samplers


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("config", "unable"),
    [
        ({}, set()),
        ({"variance_type": "learned_range"}, set()),
        ({"prediction_type": "v_prediction"}, set()),
        ({"prediction_type": "sample"}, {"pndm"}),
        ({"prediction_type": "posterior_mean"}, set(UNFITTED) - {"ddpm"}),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, set(UNFITTED) - {"ddpm", "ddim"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),  # a set has no order
)
def test_samplers_run_a_model_or_are_refused_before_the_work(config, unable, run, tmp_path):
    """Else one fails in the middle, or samples noise; the Space and the cards offer those that run."""
    learned = "learned" in config.get("variance_type", "")
    pipeline = DDPMPipeline(tiny_unet(out_channels=2 if learned else 1), scheduler(**config))
    pipeline.save_pretrained(tmp_path / "model")
    assert set(usable_samplers(pipeline)) == set(UNFITTED) - unable
    for name in UNFITTED:
        result = run("sample", tmp_path / "model", "--out", tmp_path / name, "--num-images", 1, "--sampler", name)
        if name in unable:
            assert_one_line(result, "sample with")
            assert not (tmp_path / name).exists()
        else:
            assert result[0] == 0, result[2]
            assert np.ptp(images(tmp_path / name)) > 20


def test_ddim_with_all_its_noise_is_ancestral_sampling(run, plain, tmp_path):
    """Song et al. 2021, sec. 4.1: eta = 1 over all timesteps is DDPM with the posterior's variance."""
    for name, words in {
        "ddpm": (),
        "noisy": ("--sampler", "ddim", "--eta", 1),
        "still": ("--sampler", "ddim"),
    }.items():
        assert run("sample", plain, "--out", tmp_path / name, "--num-images", 3, "--steps", STEPS, *words)[0] == 0
    difference = {
        name: np.abs(images(tmp_path / name) - images(tmp_path / "ddpm")).max() for name in ("noisy", "still")
    }
    assert difference["noisy"] <= 1
    assert difference["still"] > 20


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--eta", 0.5), ("--eta 0.5", "ddim")),
        (("--sampler", "ddim", "--eta", 2), ("--eta", "1")),
        (("--timestep", 5), ("--timestep 5", "--interpolate")),
        (("--interpolate", "A", "A"), ("--timestep",)),
        (("--interpolate", "A", "A", "--timestep", 5, "--sampler", "ddim"), ("--interpolate", "--sampler ddim")),
        (("--interpolate", "A", "none.png", "--timestep", 5), ("none.png",)),
        (("--interpolate", "A", "model_index.json", "--timestep", 5), ("model_index.json",)),
        (("--interpolate", "A", "A", "--timestep", STEPS), (f"timestep {STEPS}",)),
        (("--interpolate", "A", "A", "--timestep", 5, "--num-images", 1), ("--num-images 1",)),
        (("--shared-timestep", STEPS), (f"timestep {STEPS}",)),
        (("--shared-timestep", 5, "--progressive"), ("--shared-timestep", "--progressive")),
        (("--shared-timestep", 5, "--format", "npz"), ("--shared-timestep", "npz")),
        (("--format", "npz", "--grid-only"), ("--grid-only", "npz")),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_options_that_exclude_each_other_are_one_line(words, named, run, plain, tmp_path, monkeypatch):
    """Else a wish is dropped in silence, or fails after the work."""
    picture = tmp_path / "A.png"
    Image.new("L", (8, 8), 100).save(picture)
    shutil.copy(plain / "model_index.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    given = [picture if word == "A" else word for word in words]
    assert_one_line(run("sample", plain, "--out", tmp_path / "out", *given), *named)
    assert not (tmp_path / "out").exists()


# Interpolation and shared latents


def test_interpolation_is_the_pipelines(run, plain, tmp_path):
    """Ho et al. 2020, fig. 8, between files; else the command's images are others than the method's."""
    for name, mode, gray in (("a", "L", 40), ("b", "RGB", 200)):
        Image.new(mode, (16, 16), (gray,) * 3 if mode == "RGB" else gray).save(tmp_path / f"{name}.png")
    files = (tmp_path / "a.png", tmp_path / "b.png")
    words = ("--interpolate", *files, "--timestep", 10, "--num-images", 5)
    assert run("sample", plain, "--out", tmp_path / "out", *words)[0] == 0
    ends = [Image.new("L", (8, 8), gray) for gray in (40, 200)]
    expected = loaded(DDPMPipeline, plain).interpolate(*ends, 10, [0, 0.25, 0.5, 0.75, 1], generator()).images
    found = images(tmp_path / "out")
    np.testing.assert_allclose(found, np.stack(expected).astype(int), atol=1)
    assert Image.open(tmp_path / "out" / "grid.png").size == (2 + 5 * 66, 2 + 66)  # one row
    assert run("sample", plain, "--out", tmp_path / "usual", *words[:-2])[0] == 0
    assert len(images(tmp_path / "usual")) == 11


def test_shared_latents_are_the_pipelines(run, tmp_path):
    """Ho et al. 2020, fig. 7: the lower the shared timestep, the more the images are alike."""
    model, spread = tmp_path / "model", {}  # it clips, else every pixel of an untrained model is black or white
    DDPMPipeline(tiny_unet(), scheduler()).save_pretrained(model)
    for timestep in (2, 18):
        out = tmp_path / str(timestep)
        assert run("sample", model, "--out", out, "--shared-timestep", timestep, "--num-images", 3)[0] == 0
        expected = loaded(DDPMPipeline, model).sample_from_shared(3, timestep, generator()).images
        np.testing.assert_allclose(images(out), np.stack(expected).astype(int), atol=1)
        spread[timestep] = np.abs(images(out) - images(out)[:1]).mean()
    assert 0 < spread[2] < spread[18]


def test_models_by_class_and_text_do_not_interpolate(run, by_class, by_text, tmp_path):
    """Else the command asks for a method that they lack."""
    for model, words in ((by_class, ()), (by_text, ("--prompt", "a dog"))):
        result = run("sample", model, "--out", tmp_path / "out", *words, "--shared-timestep", 5)
        assert_one_line(result, "--shared-timestep", "unconditional")
    assert not (tmp_path / "out").exists()


# A text model's guidance scale


def test_the_guidance_scale_is_the_models_own_everywhere(run, by_text, tmp_path):
    """Else grids, command, Space and pipeline show one model at four scales."""
    pipeline = loaded(TextToImageDDPMPipeline, by_text)
    assert pipeline.config.guidance_scale == Studio(str(by_text)).guidance_scale == 3.0
    options = {"num_inference_steps": 2, "output_type": "latent"}
    default, given, other = (
        pipeline("a dog", generator=generator(), **options, **more).images
        for more in ({}, {"guidance_scale": 3.0}, {"guidance_scale": 7.5})
    )
    assert torch.equal(default, given)
    assert not torch.allclose(default, other)
    for name, words in {"default": (), "given": ("--guidance-scale", 3)}.items():
        out = tmp_path / name
        assert run("sample", by_text, "--out", out, "--prompt", "a dog", "--num-images", 1, *QUICK, *words)[0] == 0
    np.testing.assert_array_equal(images(tmp_path / "default"), images(tmp_path / "given"))


def test_the_guidance_scale_is_saved_so_that_stock_does_not_mind(by_text, tmp_path, caplog, monkeypatch):
    """Else Diffusers warns of a setting that it does not know, or ours forgets it on the way."""
    monkeypatch.setattr(diffusers.utils.logging._get_library_root_logger(), "propagate", True)
    stock = diffusers.DiffusionPipeline.from_pretrained(by_text)
    assert type(stock) is diffusers.StableDiffusionPipeline
    assert "guidance_scale" not in caplog.text
    ours = TextToImageDDPMPipeline.from_pretrained(by_text)
    ours.save_pretrained(tmp_path)
    assert TextToImageDDPMPipeline.from_pretrained(tmp_path).config.guidance_scale == 3.0
    assert tiny_text_pipeline().config.guidance_scale == 7.5  # a checkpoint that says nothing is Stable Diffusion's
    remote = diffusers.DiffusionPipeline.from_pretrained(
        by_text, custom_pipeline="pipeline_text2image_ddpm_hf", trust_remote_code=True
    )
    assert remote.config.guidance_scale == 3.0
