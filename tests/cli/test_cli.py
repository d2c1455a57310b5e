"""The `ddpm-hf` command: pictures on disk, and one line for what a user can mend."""

import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler, TextToImageDDPMPipeline
from ddpm_hf.cli.conditions import class_ids
from ddpm_hf.common.ownership import MANIFEST
from ddpm_hf.common.randomness import keyed_seed
from ddpm_hf.inference.samplers import SAMPLERS, UNFITTED
from tests.support.fixtures_cli import assert_one_line, images
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_text import tiny_text_pipeline

STEPS = 20  # T of the tiny model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny grayscale model, saved."""
    folder = tmp_path_factory.mktemp("model")
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="cosine", variance_type="fixed_large")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(folder)
    return folder


def test_sample_writes_a_grid_and_every_image(run, model, tmp_path):
    """Else the first command that a user tries after training shows nothing."""
    out = tmp_path / "deep" / "samples"
    code, said, _ = run("sample", model, "--out", out, "--num-images", 5, "--steps", 4)
    assert code == 0
    assert str(out) in said
    written = [*(f"{index:04d}.png" for index in range(5)), MANIFEST, "grid.png"]
    assert sorted(path.name for path in out.iterdir()) == written
    assert images(out).shape == (5, 8, 8)
    # a grid of 3 columns and 2 rows, each image enlarged 8 times
    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape == (2 + 2 * 66, 2 + 3 * 66)
    np.testing.assert_array_equal(grid[2 + 66 + 4 : 2 + 66 + 64 : 8, 2 + 4 : 2 + 64 : 8], images(out)[3])


def test_an_image_depends_on_the_seed_and_its_number_alone(run, model, tmp_path):
    """Else image 3 of seed 7 cannot be drawn again with another batch size, or more of the same be had."""
    calls = {
        "few": ("--num-images", 3),
        "many": ("--num-images", 7),
        "small-batches": ("--num-images", 7, "--batch-size", 2),
        "another-seed": ("--num-images", 3, "--seed", 8),
    }
    drawn = {}
    for name, words in calls.items():
        seed = () if "--seed" in words else ("--seed", 7)
        assert run("sample", model, "--out", tmp_path / name, "--steps", 4, *seed, *words)[0] == 0
        drawn[name] = images(tmp_path / name)
    assert np.abs(drawn["few"] - drawn["many"][:3]).max() <= 1
    assert np.abs(drawn["small-batches"] - drawn["many"]).max() <= 1
    assert np.abs(drawn["another-seed"] - drawn["few"]).max() > 20
    assert np.abs(drawn["few"][0] - drawn["few"][1]).max() > 20


@pytest.mark.every(3)
@pytest.mark.parametrize("timesteps", [100, STEPS])
@pytest.mark.parametrize("sampler", UNFITTED)
def test_every_sampler_draws(sampler, timesteps, run, tmp_path):
    """Without --steps each takes its usual number, or what a shorter chain has: else NaN, which is shown as black."""
    scheduler = DDPMScheduler(num_train_timesteps=timesteps, beta_schedule="cosine")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "model")
    code, _, err = run("sample", tmp_path / "model", "--out", tmp_path, "--num-images", 2, "--sampler", sampler)
    assert code == 0, err
    assert np.ptp(images(tmp_path)) > 20


def test_the_default_sampler_is_the_pipeline(run, model, tmp_path):
    """Else the command draws from another distribution than DDPMPipeline with all its steps."""
    run("sample", model, "--out", tmp_path / "default", "--num-images", 2)
    run("sample", model, "--out", tmp_path / "explicit", "--num-images", 2, "--sampler", "ddpm", "--steps", STEPS)
    np.testing.assert_array_equal(images(tmp_path / "default"), images(tmp_path / "explicit"))


def test_progressive_shows_the_chain(run, model, tmp_path):
    """Else the strip or the animation does not move, or does not end in the images themselves."""
    code, said, _ = run("sample", model, "--out", tmp_path, "--num-images", 4, "--progressive")
    assert code == 0
    assert "progressive.png" in said
    strip = np.asarray(Image.open(tmp_path / "progressive.png")).astype(int)
    rows, columns = (strip.shape[0] - 2) // 66, (strip.shape[1] - 2) // 66
    assert rows == 4
    assert columns > 5
    for row, image in enumerate(images(tmp_path)):  # the last x̂_0 is the image
        top, left = 2 + row * 66, 2 + (columns - 1) * 66
        assert np.abs(strip[top + 4 : top + 64 : 8, left + 4 : left + 64 : 8] - image).max() <= 1
    with Image.open(tmp_path / "chain.gif") as chain:
        assert chain.is_animated
        assert chain.n_frames > 10
        first = np.asarray(chain.convert("L")).astype(int)
        chain.seek(chain.n_frames - 1)
        last = np.asarray(chain.convert("L")).astype(int)
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    assert np.abs(last - grid).max() <= 1
    assert np.abs(first - grid).max() > 20


def test_grid_only_writes_no_single_images(run, model, tmp_path):
    """Else the flag has no effect."""
    assert run("sample", model, "--out", tmp_path, "--num-images", 2, "--steps", 2, "--grid-only")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", MANIFEST}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precisions_draw_nearly_the_same(precision, run, model, tmp_path):
    """Else a precision that --help offers fails, or draws something else."""
    assert run("sample", model, "--out", tmp_path / "plain", "--num-images", 2, "--steps", 5)[0] == 0
    words = ("--num-images", 2, "--steps", 5, "--precision", precision)
    assert run("sample", model, "--out", tmp_path / "other", *words)[0] == 0
    difference = np.abs(images(tmp_path / "other") - images(tmp_path / "plain"))
    assert difference.mean() <= (10 if precision == "bf16" else 0)


def test_models_of_stock_are_sampled_too(run, tmp_path):
    """Else the command knows only folders that this package saved."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=STEPS)
    diffusers.DDPMPipeline(tiny_unet(3), scheduler).save_pretrained(tmp_path / "stock")
    code, _, err = run("sample", tmp_path / "stock", "--out", tmp_path / "out", "--num-images", 2, "--steps", 3)
    assert code == 0, err
    assert images(tmp_path / "out").shape == (2, 8, 8, 3)


# What a user can mend


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("sample", "MODEL", "--sampler", "dpm"), ("dpm", "dpm++")),
        (("sample", "MODEL", "--num-images", "many"), ("--num-images", "integer")),
        (("sample", "MODEL", "--num-images", "0"), ("--num-images", "1")),
        (("sample", "MODEL", "--steps", "-3"), ("--steps", "1")),
        (("sample", "MODEL", "--seed", "-1"), ("--seed", "0")),
        (("sample", "MODEL", "--precision", "fp8"), ("fp8", "bf16")),
        (("sample", "MODEL", "--numimages", "3"), ("--numimages",)),
        (("sample", "MODEL", "--device", "toaster"), ("toaster",)),
        (("sample",), ("MODEL",)),
        (("draw", "MODEL"), ("draw",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_usage_errors_are_one_line(words, named, run, model, tmp_path, monkeypatch):
    """Else the user reads a traceback, or a screen of help, for a typing mistake."""
    monkeypatch.chdir(tmp_path)
    assert_one_line(run(*(model if word == "MODEL" else word for word in words)), *named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sampler", UNFITTED)
def test_more_steps_than_the_model_has_are_refused(sampler, run, model, tmp_path):
    """Else a sampler visits timesteps that do not exist, and the pictures are noise."""
    words = ("--out", tmp_path, "--num-images", 1, "--sampler", sampler, "--steps", STEPS + 1)
    assert_one_line(run("sample", model, *words), STEPS + 1, STEPS)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_pipeline_is_named(run, tmp_path):
    """Else a mistyped folder is looked for on the Hub, or fails somewhere inside Diffusers."""
    assert_one_line(run("sample", tmp_path), tmp_path, "model_index.json", "--output_dir")
    assert_one_line(run("sample", tmp_path / "nothing" / "here"), tmp_path / "nothing" / "here")


def test_a_broken_or_foreign_pipeline_is_named(run, model, tmp_path):
    """Else a folder that cannot be sampled ends in a traceback."""
    shutil.copytree(model, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "unet")
    assert_one_line(run("sample", tmp_path / "broken"), tmp_path / "broken")
    shutil.copytree(model, tmp_path / "halved")
    weights = tmp_path / "halved" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_one_line(run("sample", tmp_path / "halved"), tmp_path / "halved")
    shutil.copytree(model, tmp_path / "foreign")
    index = tmp_path / "foreign" / "model_index.json"
    index.write_text(index.read_text().replace("DDPMPipeline", "KandinskyPipeline"))
    assert_one_line(run("sample", tmp_path / "foreign"), tmp_path / "foreign", "KandinskyPipeline")
    (tmp_path / "scrap").mkdir()
    (tmp_path / "scrap" / "model_index.json").write_text("{")
    assert_one_line(run("sample", tmp_path / "scrap"), tmp_path / "scrap")


def test_an_output_that_cannot_be_written_is_named_before_the_work(run, model, tmp_path, monkeypatch):
    """Else an hour of sampling ends in an error about the folder."""
    taken = tmp_path / "taken"
    taken.write_text("a file")
    drawn = []
    original = DDPMPipeline.__call__

    def noted(*arguments, **options):
        drawn.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(DDPMPipeline, "__call__", noted)
    assert_one_line(run("sample", model, "--out", taken, "--num-images", 1, "--steps", 2), taken)
    assert not drawn


def test_help_names_the_options_and_the_samplers(run, monkeypatch):
    """Else --help does not say what can be given."""
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("sample", "--help")
    assert code == 0
    for word in ("--sampler", "--num-images", "--progressive", "--seed", *SAMPLERS):
        assert word in out


def test_no_command_gives_the_help(run):
    """Else the bare command says nothing of use, or hides the help in an error."""
    _, out, err = run()
    assert "sample" in out + err
    assert "error" not in out + err


def test_threads_are_not_left_changed(run, model, tmp_path):
    """Else OMP_NUM_THREADS, which a user set, is overridden."""
    before = torch.get_num_threads()
    run("sample", model, "--out", tmp_path, "--num-images", 1, "--steps", 1)
    assert torch.get_num_threads() == before


def test_class_names_that_look_like_ids_are_names():
    """Else `--class 2` draws the class that sorts third among "0", "1", "10", "11", "2"."""
    names = sorted(str(number) for number in range(12))
    id2label = {str(number): name for number, name in enumerate(names)}
    assert class_ids(["2", "11"], id2label) == [names.index("2"), names.index("11")]
    assert class_ids(None, id2label) == list(range(12))


# By prompt


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A tiny text-to-image model, saved."""
    folder = tmp_path_factory.mktemp("text")
    tiny_text_pipeline().save_pretrained(folder)
    return folder


def test_prompts_are_drawn_in_turn(run, text_model, tmp_path):
    """Else image i is of another prompt than the one asked for, or depends on how many there are."""
    given = ("--num-images", 4, "--steps", 3, "--guidance_scale", 3)
    assert run("sample", text_model, "--out", tmp_path / "two", "--prompt", "a dog", "--prompt", "two", *given)[0] == 0
    assert run("sample", text_model, "--out", tmp_path / "one", "--prompt", "a dog", *given)[0] == 0
    two, one = images(tmp_path / "two"), images(tmp_path / "one")
    np.testing.assert_array_equal(two[[0, 2]], one[[0, 2]])
    assert (two[[1, 3]] != one[[1, 3]]).any()


def test_the_command_draws_what_the_pipeline_draws(run, text_model, tmp_path):
    """Else a flag of the command does not reach the pipeline."""
    given = ("--prompt", "a dog", "--negative-prompt", "two", "--guidance-scale", 4, "--guidance-rescale", 0.5)
    assert run("sample", text_model, "--out", tmp_path, "--num-images", 2, "--steps", 3, "--seed", 5, *given)[0] == 0
    pipeline = TextToImageDDPMPipeline.from_pretrained(text_model)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(keyed_seed(5, "sample", 0, index)) for index in range(2)]
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "guidance_rescale": 0.5, "negative_prompt": "two"}
    drawn = pipeline(["a dog"] * 2, generator=generators, **options).images
    np.testing.assert_array_equal(images(tmp_path), np.stack([np.asarray(image).astype(int) for image in drawn]))


def test_prompts_and_classes_are_for_models_that_read_them(run, model, text_model, tmp_path):
    """Else a wish is dropped in silence, or ends in a traceback."""
    assert_one_line(run("sample", text_model, "--out", tmp_path / "a"), "--prompt")
    assert_one_line(run("sample", text_model, "--out", tmp_path / "a", "--prompt", "x", "--class", "1"), "--class")
    assert_one_line(run("sample", model, "--out", tmp_path / "a", "--prompt", "x"), "has no text encoder")
    assert_one_line(run("sample", model, "--out", tmp_path / "a", "--negative-prompt", "x"), "has no text encoder")
    assert not (tmp_path / "a").exists()
