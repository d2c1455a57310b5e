"""An autoencoder of one's own: its loss, its scaling factor, and a training that is resumed as if never stopped."""

import json
import math
import os
import shutil
import signal

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from safetensors.torch import load_file

import train_text2image
from ddpm_hf.common.errors import UsageError
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.data import ImageTransform
from ddpm_hf.data.batches import Images, open_images
from ddpm_hf.data.dataset import ImageDataset
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.data.images import to_model_range
from ddpm_hf.data.rows import Rows
from ddpm_hf.latents import training as autoencoder
from ddpm_hf.latents.autoencoder import AutoencoderFlags, make_autoencoder
from ddpm_hf.latents.training import Reconstruction, compute_loss, measure_scaling_factor, train_autoencoder
from ddpm_hf.models.autoencoder import load_autoencoder
from ddpm_hf.portable.sampling_ddpm_hf import downscaling
from ddpm_hf.training.flags import Flags, GridFlags, TrainingFlags
from ddpm_hf.training.run import Run
from ddpm_hf.training.setup.accelerator import start_accelerator
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.pictures import encoded, image_rows, quiet, random_pixels, write_rows
from tests.support.runs import defaults

PIXELS = random_pixels(22, 8, 8)


@pytest.fixture(autouse=True)
def _alone():
    """With all that a run sets globally put back afterwards."""
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    with torch.random.fork_rng(), quiet():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


# Flags

BAD_FLAGS = {
    "vae_widths": ["10,x", "", "16,", "12", "0", "0,8", "-8", "8.0", "16;32", "8,,8"],
    "vae_train_steps": [0, -1],
    "vae_latent_channels": [0, -4],
    "vae_learning_rate": [0.0, -1e-3, math.nan],
    "vae_kl_weight": [-1e-9, math.nan],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_FLAGS.items() for value in values])
def test_a_bad_value_is_named(name, value):
    """Else a typo ends in a traceback from the depths of a network, or in an autoencoder that learns nothing."""
    with pytest.raises(UsageError, match=f"--{name} "):
        Flags([AutoencoderFlags(**{name: value})]).check()
    with pytest.raises(UsageError, match=f"--{name} "):
        defaults(train_text2image.PROGRAM, **{name: value}).check()


@pytest.mark.parametrize(("text", "widths"), [("8", (8,)), ("16,32,64", (16, 32, 64)), ("8, 16", (8, 16))])
def test_widths_are_levels(text, widths):
    """Else --vae_widths makes another autoencoder than it says, or latents of another size."""
    flags = AutoencoderFlags(vae_widths=text, vae_latent_channels=3)
    Flags([flags]).check()
    assert flags.widths() == widths
    vae = make_autoencoder(flags, 1, (8, 16), 0)
    assert tuple(vae.config.block_out_channels) == widths
    factor = 2 ** (len(widths) - 1)
    assert downscaling(vae.config.block_out_channels) == factor
    latents = vae.encode(torch.zeros(2, 1, 8, 16)).latent_dist.mode()
    assert latents.shape == (2, 3, 8 // factor, 16 // factor)
    assert vae.decode(latents).sample.shape == (2, 1, 8, 16)


def test_an_autoencoder_is_of_its_seed():
    """Else a resumed or repeated run begins with other weights."""
    flags = AutoencoderFlags(vae_widths="8,8")
    one, again, other = (make_autoencoder(flags, 3, (8, 8), seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


# The loss


class Stub(torch.nn.Module):
    """An autoencoder whose latents are the images, times a gain, with a variance; it decodes to its latents."""

    def __init__(self, gain=1.0, log_variance=-30.0, offset=0.0):
        super().__init__()
        self.gain, self.log_variance, self.offset = gain, log_variance, offset
        self.device = torch.device("cpu")

    def encode(self, images):
        """Images [N, C, H, W] to a Gaussian of the same shape."""
        mean = self.gain * images + self.offset
        moments = torch.cat([mean, torch.full_like(mean, self.log_variance)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, latents):
        """Latents to themselves."""
        return DecoderOutput(sample=latents)


def batch_of(count):
    """Pictures as they come from the data."""
    return {"images": torch.from_numpy(np.ascontiguousarray(PIXELS[:count].transpose(0, 3, 1, 2)))}


@pytest.mark.parametrize("offset", [0.0, 0.25, -1.5])
def test_the_loss_is_the_mean_absolute_error_of_each_image(offset):
    """Else blurs and shifts are weighed otherwise than with an L1 loss, or one image's error is another's."""
    batch, keys = batch_of(5), StepKeys(0, 0, 0, 5)
    shifts = offset * torch.arange(5.0)

    def model(images, noise_of):
        return images + shifts.view(-1, 1, 1, 1), torch.full((5,), 1e6)

    found = compute_loss(model, batch, keys, kl_weight=0.0, device=torch.device("cpu"))
    torch.testing.assert_close(found.losses, shifts.abs(), rtol=1e-5, atol=1e-6)
    exact = compute_loss(Reconstruction(Stub()), batch, keys, kl_weight=0.0, device=torch.device("cpu"))
    torch.testing.assert_close(exact.losses, torch.zeros(5), rtol=0, atol=1e-5)
    zero = compute_loss(Reconstruction(Stub(gain=0.0)), batch, keys, kl_weight=0.0, device=torch.device("cpu"))
    want = to_model_range(batch["images"]).abs().flatten(1).mean(1)
    torch.testing.assert_close(zero.losses, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 1e-3, 7.0])
@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (2.0, 1.0), (-0.5, 0.1), (3.0, 5.0)])
def test_the_kl_is_that_of_gaussians_a_pixel(mean, variance, weight):
    """Else --vae_kl_weight means another thing at each resolution, or pulls the latents elsewhere than to N(0, 1)."""
    nats = 0.5 * (mean**2 + variance - 1 - math.log(variance))  # of one latent value; as many as pixels here
    model = Reconstruction(Stub(gain=0.0, log_variance=math.log(variance), offset=mean))
    batch, keys = batch_of(4), StepKeys(0, 0, 0, 4)
    with_kl, without = (
        compute_loss(model, batch, keys, kl_weight=one, device=torch.device("cpu")).losses for one in (weight, 0.0)
    )
    torch.testing.assert_close(with_kl - without, torch.full((4,), weight * nats), rtol=1e-4, atol=2e-6)


def test_the_decoder_learns_from_draws():
    """Else it never meets the latents that it will decode, or a resumed run meets others."""
    model, batch = Reconstruction(Stub(gain=0.0, log_variance=0.0)), batch_of(3)
    images = to_model_range(batch["images"])
    drawn = {
        step: compute_loss(model, batch, StepKeys(1, step, 0, 3), kl_weight=0.0, device=torch.device("cpu")).losses
        for step in (0, 1)
    }
    noise = StepKeys(1, 1, 0, 3).normal_like(images, "posterior")
    torch.testing.assert_close(drawn[1], (noise - images).abs().flatten(1).mean(1))
    assert not torch.isclose(drawn[0], drawn[1]).any()
    tail = {"images": batch["images"][1:]}
    alone = compute_loss(model, tail, StepKeys(1, 1, 1, 2), kl_weight=0.0, device=torch.device("cpu")).losses
    torch.testing.assert_close(alone, drawn[1][1:])


# The scaling factor


def images_of(pixels) -> Images:
    """A run's data: these pictures."""
    rows = image_rows([encoded(one) for one in pixels]).cast_column("image", datasets.Image(decode=False))
    transform = ImageTransform(8, 8, 3)
    rows = Rows(rows, "pictures", "image")
    return Images(rows, transform, ImageDataset(rows, transform, 0, True), None)


@pytest.mark.parametrize("gain", [0.05, 1.0, 40.0])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_the_scaling_factor_makes_unit_variance(gain, offset):
    """Else the noise schedule is too weak or too strong for the latents."""
    latents = gain * (PIXELS / 127.5 - 1) + offset
    for batch_size in (1, 5, 22, 64):
        found = measure_scaling_factor(Stub(gain, offset=offset), images_of(PIXELS), batch_size, 0)
        assert abs(found - 1 / latents.std()) < 1e-5 + 1e-4 / latents.std()


def test_the_scaling_factor_is_of_draws_not_means():
    """Else latents of a wide posterior come to more than unit variance."""
    variance = 2.0
    found = measure_scaling_factor(Stub(0.5, math.log(variance)), images_of(PIXELS), 4, 0)
    total = (0.5 * (PIXELS / 127.5 - 1)).var() + variance
    count = PIXELS.size
    assert abs(found**-2 - total) < 4 * total * math.sqrt(2 / count)
    for batch_size in (1, 7, 22):
        same = measure_scaling_factor(Stub(0.5, math.log(variance)), images_of(PIXELS), batch_size, 0)
        assert abs(same - found) < 2e-5


# Training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of pictures with captions."""
    captions = [f"number {number}" for number in range(len(PIXELS))]
    return write_rows(tmp_path_factory.mktemp("data") / "rows", [encoded(one) for one in PIXELS], text=captions)


def recorded_settings(data, output_dir, **more) -> Flags:
    """A run with an autoencoder of eight steps."""
    return defaults(
        train_text2image.PROGRAM,
        **{
            "train_data_dir": str(data), "output_dir": str(output_dir), "resolution": "8", "center_crop": True,
            "seed": 3, "train_batch_size": 4, "eval_batch_size": 5, "vae_train_steps": 8, "vae_widths": "8,8",
            "vae_latent_channels": 2, "checkpointing_steps": 3, "logging_steps": 2, "logger": "none", "cpu_threads": 1,
            **more,
        },
    )  # fmt: skip


def train(flags: Flags) -> tuple[AutoencoderKL | None, Images]:
    """Train its autoencoder; the images, too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    training, data = flags[TrainingFlags], flags[DataFlags]
    run = Run(training, flags, start_accelerator(training), seed=training.seed, grids=flags[GridFlags])
    images = open_images(run, data, 3, caption_column="text")
    return train_autoencoder(run, flags[AutoencoderFlags], images, data.size()), images


def tensors(folder, name="") -> dict[str, torch.Tensor]:
    """The weights in a folder."""
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def equal(ours: dict, theirs: dict) -> bool:
    """The same tensors, bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An autoencoder that was trained without a stop: (what came back, its run's folder, the images)."""
    output_dir = tmp_path_factory.mktemp("finished")
    with torch.random.fork_rng(), quiet():
        trained, images = train(recorded_settings(data, output_dir))
    AcceleratorState._reset_state(reset_partial_state=True)
    return trained, output_dir, images


def test_what_training_leaves(finished):
    """Else latents cannot be scaled, the pipeline holds other weights than were judged, or nobody sees how it did."""
    trained, output_dir, images = finished
    folder = output_dir / "autoencoder"
    loaded = load_autoencoder(str(folder))
    assert equal(loaded.state_dict(), trained.state_dict())
    assert type(loaded) is AutoencoderKL
    assert loaded.config.sample_size == 8
    assert tuple(loaded.config.block_out_channels) == (8, 8)
    assert not trained.training
    assert not any(parameter.requires_grad for parameter in trained.parameters())

    scale = json.loads((folder / "config.json").read_text())["scaling_factor"]
    assert scale == measure_scaling_factor(loaded, images, 5, 3) != 1.0
    assert equal(loaded.state_dict(), tensors(folder / "checkpoint-8", "vae_ema"))  # the average, as --use_ema
    assert not equal(loaded.state_dict(), tensors(folder / "checkpoint-8", "vae"))

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    assert all(math.isfinite(record["loss"]) for record in records)
    with Image.open(folder / "samples" / "step-000008.png") as picture:
        assert picture.mode == "RGB"
        shown = np.asarray(picture)
    original = np.asarray(Image.fromarray(PIXELS[0]).resize((64, 64), Image.Resampling.NEAREST))
    assert np.array_equal(shown[2:66, 2:66], original)
    assert shown.shape == (2 + 2 * 66, 2 + 8 * 66, 3)  # eight images, and what came of them


def test_latents_have_unit_variance_at_the_end(finished):
    """Else the diffusion's noise schedule does not fit what it noises."""
    trained, _, images = finished
    batch = images.dataset.__getitems__([(0, index) for index in range(len(PIXELS))])["images"]
    latents = trained.encode(to_model_range(batch)).latent_dist.sample(torch.Generator().manual_seed(0))
    scaled = latents * trained.config.scaling_factor
    assert abs(float(scaled.var()) - 1) < 4 * math.sqrt(2 / scaled.numel())


@pytest.mark.every(2)
@pytest.mark.parametrize("how", ["killed", "told to stop"])
@pytest.mark.parametrize("step", [4, 6])
def test_resumed_is_uninterrupted(finished, data, how, step, monkeypatch, tmp_path):
    """Else a run that was stopped ends with another autoencoder, and with it another model."""
    _, reference, _ = finished
    loss = autoencoder.compute_loss

    def stopping(model, batch, keys, **options):
        if keys.step == step:
            if how == "killed":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(model, batch, keys, **options)

    folder = tmp_path / "autoencoder"
    with monkeypatch.context() as stopped:
        stopped.setattr(autoencoder, "compute_loss", stopping)
        if how == "killed":
            with pytest.raises(MemoryError):
                train(recorded_settings(data, tmp_path))
        else:
            assert train(recorded_settings(data, tmp_path))[0] is None
            assert (folder / f"checkpoint-{step + 1}").is_dir()
    assert not (folder / "config.json").exists()

    trained, _ = train(recorded_settings(data, tmp_path, resume_from_checkpoint="latest"))
    assert equal(trained.state_dict(), tensors(reference / "autoencoder"))
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "metrics.jsonl", "samples/step-000008.png"):
        assert (folder / name).read_bytes() == (reference / "autoencoder" / name).read_bytes()
    for part in ("vae", "vae_ema"):
        assert equal(*(tensors(one / "checkpoint-8", part) for one in (folder, reference / "autoencoder")))


def contents(folder) -> dict:
    """All files, with what is in them and when it was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("asked", ["latest", "checkpoint-100"])
def test_a_finished_autoencoder_is_taken_as_it_is(finished, data, asked):
    """Else resuming the diffusion would change the latents under it."""
    trained, output_dir, _ = finished
    before = contents(output_dir)
    again, _ = train(recorded_settings(data, output_dir, resume_from_checkpoint=asked))
    assert contents(output_dir) == before
    assert equal(again.state_dict(), trained.state_dict())
    assert again.config.scaling_factor == trained.config.scaling_factor


def test_a_finished_autoencoder_is_not_trained_by_other_settings(finished, data):
    """Else settings are recorded that did not train it."""
    before = contents(finished[1])
    with pytest.raises(UsageError, match="--vae_train_steps 20: the run to resume was trained with"):
        train(recorded_settings(data, finished[1], resume_from_checkpoint="latest", vae_train_steps=20))
    assert contents(finished[1]) == before


def test_an_autoencoder_that_was_trained_but_not_saved_is_saved(data, finished, tmp_path):
    """Else a kill between the last step and the saving loses the autoencoder, or trains it twice."""
    train(recorded_settings(data, tmp_path))
    folder = tmp_path / "autoencoder"
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / name).unlink()
    train(recorded_settings(data, tmp_path, resume_from_checkpoint="latest"))
    reference = finished[1] / "autoencoder"
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes()


def test_an_earlier_autoencoder_is_not_overwritten_unasked(finished, data):
    """Else a second run into the same folder destroys what took hours."""
    before = contents(finished[1])
    with pytest.raises(UsageError, match="holds an earlier run"):
        train(recorded_settings(data, finished[1]))
    assert contents(finished[1]) == before


def test_another_autoencoder_is_not_resumed(data, finished, tmp_path):
    """Else weights of one shape would go on with the optimizer of another."""
    shutil.copytree(finished[1] / "autoencoder" / "checkpoint-8", tmp_path / "autoencoder" / "checkpoint-8")
    with pytest.raises(UsageError, match="latent_channels is 2, this run's 3"):
        train(recorded_settings(data, tmp_path, vae_latent_channels=3, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("resolution", ["6", "8x10", "10x8"])
def test_a_size_that_cannot_be_halved_is_refused(data, resolution, tmp_path):
    """Else the decoder's images have another size than the data, and the loss is a traceback."""
    config = recorded_settings(data, tmp_path, resolution=resolution, vae_widths="8,8,8")
    with pytest.raises(UsageError, match=r"--resolution \d+x\d+: .*multiples of 4"):
        train(config)
    assert not (tmp_path / "autoencoder").exists()


def test_the_autoencoder_has_flags_of_its_own(data, monkeypatch, tmp_path):
    """Else the UNet's learning rate, warm-up or accumulation is the autoencoder's too."""
    seen = []

    def loop(run, *args, **options):
        seen.append((run.flags, options["compute_loss"].keywords["kl_weight"]))
        return False

    monkeypatch.setattr(autoencoder, "training_loop", loop)
    config = recorded_settings(
        data, tmp_path, vae_learning_rate=0.02, vae_kl_weight=0.5, learning_rate=1e-5, gradient_accumulation_steps=4,
        lr_scheduler="constant", lr_warmup_steps=500, max_train_steps=1000, num_epochs=3,
    )  # fmt: skip
    before = config.values()
    assert train(config)[0] is None
    own, kl_weight = seen[0]
    assert (own.learning_rate, own.max_train_steps, own.gradient_accumulation_steps) == (0.02, 8, 1)
    assert (own.lr_scheduler, own.use_ema, kl_weight) == ("cosine", True, 0.5)
    assert own.lr_warmup_steps < own.max_train_steps
    assert config.values() == before


# Loading


def test_an_autoencoder_is_loaded_from_its_folder_or_its_pipelines(tmp_path):
    """Else --vae_name_or_path takes only one of the two that people have on disk."""
    vae = tiny_vae(scaling_factor=0.3)
    vae.save_pretrained(tmp_path / "alone")
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    for folder in ("alone", "pipeline", "pipeline/vae"):
        loaded = load_autoencoder(str(tmp_path / folder))
        assert type(loaded) is AutoencoderKL
        assert equal(loaded.state_dict(), vae.state_dict())
        assert loaded.config.scaling_factor == 0.3


def test_a_variant_is_loaded(tmp_path):
    """Else --variant is read for all of a checkpoint but its autoencoder."""
    tiny_vae(seed=1).save_pretrained(tmp_path, variant="fp16")
    assert equal(load_autoencoder(str(tmp_path), variant="fp16").state_dict(), tiny_vae(seed=1).state_dict())
    with pytest.raises(UsageError, match="--vae_name_or_path"):
        load_autoencoder(str(tmp_path))


def no_weights(folder):
    """A config alone."""
    tiny_vae().save_config(folder)


def broken_weights(folder):
    """Weights that were cut off."""
    tiny_vae().save_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")


def broken_config(folder):
    """A config that was cut off."""
    folder.mkdir()
    (folder / "config.json").write_text("{")


def empty(folder):
    """A folder with nothing in it."""
    folder.mkdir()


@pytest.mark.parametrize("make", [empty, no_weights, broken_weights, broken_config], ids=lambda make: make.__name__)
def test_what_is_no_autoencoder_is_named(make, tmp_path):
    """Else a wrong folder is a traceback, or an autoencoder of random weights."""
    make(tmp_path / "there")
    with pytest.raises(UsageError, match=r"--vae_name_or_path .*there: no AutoencoderKL there"):
        load_autoencoder(str(tmp_path / "there"))


def test_a_place_that_does_not_exist_is_named(monkeypatch, tmp_path):
    """Else a typo in the name is a traceback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (tmp_path / "nowhere", "nobody/nothing"):
        with pytest.raises(UsageError, match=f"--vae_name_or_path {name}: no AutoencoderKL there"):
            load_autoencoder(str(name))
