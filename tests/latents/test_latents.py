"""Latents and embeddings computed once: each belongs to its image or caption, and training sees no difference."""

import functools
import itertools
import os

import datasets
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ddpm_hf.common.errors import UsageError
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.data import ImageTransform
from ddpm_hf.data.batches import Images, make_batches
from ddpm_hf.data.dataset import ImageDataset
from ddpm_hf.data.images import augmentation_uniforms, to_model_range
from ddpm_hf.data.rows import Rows
from ddpm_hf.latents.cache import (
    LatentDataset,
    cache_embeddings,
    cache_latents,
    caption_key,
    flipped,
    image_keys,
)
from ddpm_hf.latents.encoding import draw_latents, x_start_of
from ddpm_hf.latents.table import TensorTable
from ddpm_hf.portable.text_encoding_ddpm_hf import encode_texts
from ddpm_hf.text.captions import all_captions, fit_tokenizer, make_text_encoder
from ddpm_hf.training.plan import StepPlan
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.latents import CPU, rank
from tests.support.pictures import encoded, image_rows, random_pixels
from tests.support.runs import training_run

PIXELS = random_pixels(24, 8, 8)
UPRIGHT = ImageTransform(8, 8, 3, center_crop=True)
FLIPPING = UPRIGHT._replace(random_flip=True)


def rows_of(numbers, captions=None, labels=True) -> Rows:
    """The pictures of these numbers, each labelled by its number; rows caption theirs."""
    captions = captions or [
        [f"{number} in row {row}, {which}" for which in "ab"] for row, number in enumerate(numbers)
    ]
    columns = {"text": captions, "label": [int(number) for number in numbers]}
    rows = image_rows([encoded(PIXELS[number]) for number in numbers], **columns)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    names = [str(number) for number in range(len(PIXELS))]
    return Rows(rows, "pictures", "image", "label" if labels else None, names, "text")


def close(ours, theirs):
    """Equal but for the rounding of other batch sizes."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def encode(vae, pixels: np.ndarray) -> torch.Tensor:
    """The moments of pictures [N, H, W, C]."""
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return vae.encode(to_model_range(images)).latent_dist.parameters


def cached(images, vae, folder, accelerator=None, embeddings=None) -> LatentDataset:
    """A dataset's latents, cached."""
    table, keys = cache_latents(images, vae, folder, accelerator or rank())
    return LatentDataset(images, table, keys, embeddings)


# Latents of images


@pytest.mark.parametrize("transform", [UPRIGHT, FLIPPING], ids=["upright", "flipping"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_table_holds_every_images_moments(vae, transform, in_memory, memory, tmp_path):
    """Else the UNet learns to draw other latents than the images', or mirrored ones are the upright ones'."""
    images = ImageDataset(rows_of(range(10)), transform, 0, in_memory)
    table, keys = cache_latents(images, vae, tmp_path, rank())
    assert len(set(keys)) == 10
    assert len(table) == (20 if transform.random_flip else 10)
    close(table.look_up(keys), encode(vae, PIXELS[:10]))
    if transform.random_flip:
        mirrored = table.look_up([flipped(key) for key in keys])
        close(mirrored, encode(vae, PIXELS[:10, :, ::-1]))
        assert (mirrored - table.look_up(keys)).abs().max() > 1e-3


def same_batches(ours, theirs, vae, keys, step=0):
    """A cached batch is the uncached one, its x_0 to rounding."""
    ours, theirs = ours.__getitems__(keys), theirs.__getitems__(keys)
    assert ours.keys() - {"moments", "embeddings"} == theirs.keys() - {"images"}
    assert ours["captions"] == theirs["captions"]
    for name in ("index", "labels"):
        assert torch.equal(ours[name], theirs[name])
    step_keys = StepKeys(3, step, 0, len(keys))
    close(x_start_of(ours, step_keys, vae, CPU), x_start_of(theirs, step_keys, vae, CPU))


@pytest.mark.parametrize("transform", [UPRIGHT, FLIPPING], ids=["upright", "flipping"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_training_from_the_cache_is_training(vae, transform, in_memory, tmp_path):
    """Else --cache_latents changes what is learnt: other flips, other draws, other captions."""
    images = ImageDataset(rows_of(range(10)), transform, 4, in_memory)
    reference = ImageDataset(rows_of(range(10)), transform, 4, True)
    dataset = cached(images, vae, tmp_path)
    images.cache = None  # nothing of it may be needed
    assert len(dataset) == 10
    for epoch in range(4):
        order = np.random.default_rng(epoch).permutation(10)
        same_batches(dataset, reference, vae, [(epoch, int(index)) for index in order], step=epoch)


def test_batches_come_in_the_same_order(vae, tmp_path):
    """Else a run with --cache_latents cannot be compared with one without."""
    images = ImageDataset(rows_of(range(10)), FLIPPING, 4, True)
    dataset = cached(images, vae, tmp_path)
    run = training_run(rank(), 4, train_batch_size=4, dataloader_num_workers=2)
    streams = []
    for one in (dataset, images):
        of_run = Images(images.rows, FLIPPING, one, None)
        streams.append(make_batches(run, of_run, StepPlan(10, 4, 1, 1), 2))
    for step in range(2, 9):
        ours, theirs = next(streams[0]), next(streams[1])
        assert ours["captions"] == theirs["captions"]
        keys = StepKeys(4, step, 0, len(ours["captions"]))
        close(x_start_of(ours, keys, vae, CPU), x_start_of(theirs, keys, vae, CPU))


VARIATIONS = {
    "all": list(range(24)),
    "shuffled": np.random.default_rng(0).permutation(24).tolist(),
    "some": np.random.default_rng(1).permutation(24)[:11].tolist(),
    "repeated": np.random.default_rng(2).integers(0, 24, 30).tolist(),
    "one twice": [5, 5],
}


@pytest.mark.parametrize("order", [tuple(VARIATIONS), tuple(VARIATIONS)[::-1]], ids=["shrinking", "growing"])
def test_a_cache_never_pairs_a_caption_with_another_images_latent(vae, order, monkeypatch, tmp_path):
    """Else rows that were shuffled, dropped or repeated since the cache was made teach the wrong words."""
    references = torch.cat([encode(vae, PIXELS), encode(vae, PIXELS[:, :, ::-1])]).flatten(1)
    encoded_images, encode_all = [0], vae.encode

    def counting(batch):
        encoded_images[0] += len(batch)
        return encode_all(batch)

    monkeypatch.setattr(vae, "encode", counting)
    known = set()
    for name in order:
        numbers = VARIATIONS[name]
        encoded_images[0] = 0
        dataset = cached(ImageDataset(rows_of(numbers), FLIPPING, 1, False), vae, tmp_path)
        assert encoded_images[0] == 2 * len(set(numbers) - known)
        known |= set(numbers)
        for epoch in range(4):
            keys = [(epoch, int(row)) for row in np.random.default_rng(epoch).permutation(len(numbers))]
            batch = dataset.__getitems__(keys)
            nearest = torch.cdist(batch["moments"].flatten(1), references).argmin(1)
            for place, (_, row) in enumerate(keys):
                mirrored = augmentation_uniforms(1, epoch, row)[2] < 0.5
                assert int(nearest[place]) == numbers[row] + 24 * mirrored
                assert batch["captions"][place].startswith(f"{numbers[row]} in row {row}, ")
                assert int(batch["labels"][place]) == numbers[row]
                assert int(batch["index"][place]) == row
            close(batch["moments"].flatten(1), references[nearest])


@pytest.mark.parametrize("broken", [(3,), (0, 3, 4), (9,)])
def test_latents_stay_with_captions_where_broken_images_are_left_out(vae, broken, tmp_path):
    """Else one broken file shifts every caption after it to another latent."""
    rows = rows_of(range(10))
    cells = [{"bytes": b"junk", "path": None} if n in broken else cell for n, cell in enumerate(rows.dataset["image"])]
    columns = {"text": rows.dataset["text"][:], "label": rows.dataset["label"][:]}
    rows.dataset = datasets.Dataset.from_dict({"image": cells, **columns}, features=rows.dataset.features)
    dataset = cached(ImageDataset(rows, FLIPPING, 0, True, skip_broken=True), vae, tmp_path)
    assert len(dataset) == 10 - len(broken)
    for epoch in range(3):
        batch = dataset.__getitems__([(epoch, index) for index in range(len(dataset))])
        assert set(batch["index"].tolist()) == set(range(10)) - set(broken)
        for place, number in enumerate(batch["index"].tolist()):
            assert batch["captions"][place].startswith(f"{number} in row {number}")
            mirrored = augmentation_uniforms(0, epoch, place)[2] < 0.5
            pixels = PIXELS[number, :, ::-1] if mirrored else PIXELS[number]
            close(batch["moments"][place], encode(vae, pixels[None])[0])


def test_files_are_told_apart_by_place_and_time(vae, tmp_path):
    """Else a picture that was replaced keeps its old latent."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]

    def latents_of(pixels):
        for path, one in zip(paths, pixels):
            path.write_bytes(encoded(one))
        cells = {"image": [{"bytes": None, "path": str(path)} for path in paths]}
        rows = datasets.Dataset.from_dict(cells, features=datasets.Features({"image": datasets.Image(decode=False)}))
        images = ImageDataset(Rows(rows, "files", "image"), UPRIGHT, 0, False)
        table, keys = cache_latents(images, vae, tmp_path / "cache", rank())
        assert keys == image_keys(images)
        return table.look_up(keys)

    close(latents_of(PIXELS[:2]), encode(vae, PIXELS[:2]))
    for path in paths:
        os.utime(path, ns=(0, 0))
    close(latents_of(PIXELS[2:4]), encode(vae, PIXELS[2:4]))


def folders(path) -> set[str]:
    """The tables in a cache."""
    return {one.name for one in path.iterdir()}


def test_another_autoencoder_or_transform_has_another_table(vae, tmp_path):
    """Else latents of another network, crop or resampling are taken from the cache."""
    transforms = [
        UPRIGHT, UPRIGHT._replace(height=4), UPRIGHT._replace(width=4), UPRIGHT._replace(height=4, width=4),
        UPRIGHT._replace(height=4, width=4, interpolation="box"), UPRIGHT._replace(keep_precision=True),
    ]  # fmt: skip
    for made, (transform, network) in enumerate(itertools.product(transforms, (vae, tiny_vae(seed=1))), 1):
        images = ImageDataset(rows_of(range(5)), transform, 0, True)
        table, keys = cache_latents(images, network, tmp_path, rank())
        assert len(folders(tmp_path)) == made
        batch = to_model_range(images.__getitems__([(0, index) for index in range(5)])["images"])
        close(table.look_up(keys), network.encode(batch).latent_dist.parameters.detach())


def test_flips_and_rows_share_a_table(vae, tmp_path):
    """Else every change of the dataset or of --random_flip encodes all images anew."""
    for transform, numbers in ((UPRIGHT, range(4)), (FLIPPING, range(6)), (UPRIGHT, range(2))):
        cached(ImageDataset(rows_of(numbers), transform, 0, True), vae, tmp_path)
    rescaled = tiny_vae(scaling_factor=9.0, shift_factor=None)
    cached(ImageDataset(rows_of(range(6)), FLIPPING, 0, True), rescaled, tmp_path)
    assert len(folders(tmp_path)) == 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_random_crops_are_refused_with_the_way_out(vae, in_memory, tmp_path):
    """Else every epoch sees the same corner of each image."""
    cropping = ImageTransform(8, 4, 3)
    with pytest.raises(UsageError, match=r"--center_crop.*leave --cache_latents out"):
        cached(ImageDataset(rows_of(range(3)), cropping, 0, in_memory), vae, tmp_path)
    whole = ImageDataset(rows_of(range(3)), ImageTransform(8, 8, 3), 0, in_memory)
    table, keys = cache_latents(whole, vae, tmp_path, rank())  # where nothing is cut off, nothing is random
    close(table.look_up(keys), encode(vae, PIXELS[:3]))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_encode_images_together(vae, world, tmp_path):
    """Else each process of a run has a table with holes, or another one."""
    images = [ImageDataset(rows_of(range(9)), FLIPPING, 0, True) for _ in range(world)]
    keys = image_keys(images[0])
    wanted = keys + [flipped(key) for key in keys]
    tables = [TensorTable(tmp_path / "together") for _ in range(world)]
    moments = torch.cat([encode(vae, PIXELS[:9]), encode(vae, PIXELS[:9, :, ::-1])])
    for number, table in enumerate(tables):
        table.fill(wanted, lambda places: moments[places], rank(number, world), "encoding")
    alone, own_keys = cache_latents(images[0], vae, tmp_path / "alone", rank())
    assert own_keys == keys
    for number, table in enumerate(tables):
        table.read()
        assert image_keys(images[number]) == keys
        close(table.look_up(wanted), alone.look_up(wanted))


# Draws from the posterior


def test_latents_are_drawn_from_the_posterior(vae):
    """Else the diffusion's data is not what the autoencoder decodes: another mean, spread, shift or scale."""
    count = 4000
    one = torch.tensor([[[[0.5, -2.0]], [[1.0, 3.0]], [[-1.0, 0.0]], [[0.0, -4.0]]]])  # two means, two log σ²
    posterior = DiagonalGaussianDistribution(one)
    keys = StepKeys(1, 2, 0, count)
    drawn = draw_latents(one.expand(count, -1, -1, -1), vae, keys).double()
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    mean = (posterior.mean[0].double() - shift) * scale
    variance = posterior.var[0].double() * scale**2
    assert ((drawn.mean(0) - mean).abs() < 4 * (variance / count).sqrt()).all()
    assert ((drawn.var(0) - variance).abs() < 4 * variance * (2 / count) ** 0.5).all()
    stock = DiagonalGaussianDistribution(one.expand(count, -1, -1, -1))
    theirs = (stock.sample(torch.Generator().manual_seed(0)) - shift) * scale
    assert ((drawn.mean(0) - theirs.double().mean(0)).abs() < 4 * (2 * variance / count).sqrt()).all()
    flat = ((drawn - mean) / variance.sqrt()).flatten(1)
    correlation = (flat.T @ flat / count - torch.eye(4)).abs()
    assert correlation.max() < 4 * (2 / count) ** 0.5


class NoNoise:
    """Keys that draw zeros."""

    def normal_like(self, reference, name):
        """Zeros, and only for the posterior."""
        assert name == "posterior"
        return torch.zeros_like(reference)


@pytest.mark.parametrize("scale", [0.18215, 1.0, 2.5])
@pytest.mark.parametrize("shift", [None, 0.0, 0.1159, -3.0])
def test_shift_and_scale_are_those_of_autoencoders_users(scale, shift):
    """Else a UNet that is trained here, or its pipeline's decoding, is off by a shift or a factor."""
    own = tiny_vae(scaling_factor=scale, shift_factor=shift).requires_grad_(False)
    moments = encode(own, PIXELS[:3])
    mode = DiagonalGaussianDistribution(moments).mode()
    drawn = draw_latents(moments, own, NoNoise())
    assert torch.equal(drawn, (mode - (shift or 0.0)) * scale)
    torch.testing.assert_close(drawn / scale + (shift or 0.0), mode)  # as pipelines go back
    batch = {"images": torch.from_numpy(np.ascontiguousarray(PIXELS[:3].transpose(0, 3, 1, 2)))}
    close(x_start_of(batch, NoNoise(), own, CPU), drawn)
    assert torch.equal(x_start_of({"moments": moments}, NoNoise(), own, CPU), drawn)


def test_each_step_draws_anew(vae):
    """Else an image has one latent for all of training, or two ranks and resumed runs draw others."""
    moments = encode(vae, PIXELS[:6])
    keys = {
        (seed, step, validation): draw_latents(moments, vae, StepKeys(seed, step, 0, 6, validation))
        for seed, step, validation in itertools.product((0, 1), (0, 1, 2), (False, True))
    }
    drawn = torch.stack(list(keys.values()))
    assert len(drawn.flatten(2)[:, :, 0].unique()) == drawn.shape[0] * drawn.shape[1]
    again = draw_latents(moments, vae, StepKeys(1, 2, 0, 6))
    assert torch.equal(again, keys[1, 2, False])
    parts = [
        draw_latents(moments[:2], vae, StepKeys(1, 2, 0, 2)),
        draw_latents(moments[2:], vae, StepKeys(1, 2, 2, 4)),
    ]
    torch.testing.assert_close(torch.cat(parts), again)


def test_without_an_autoencoder_images_are_the_data():
    """Else training in pixels sees bytes, or images of another range."""
    batch = {"images": torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)}
    found = x_start_of(batch, NoNoise(), None, CPU)
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, -0.6, 1.0]))


# Embeddings of captions

CAPTIONS = [["a red dog", "dog"], ["two cats", "a pair of cats"], None, ["naïve 四つ"], ["a red dog"], ["dog", None]]


@pytest.fixture(scope="module")
def text():
    """A tokenizer and an encoder of the captions."""
    tokenizer = fit_tokenizer(all_captions(CAPTIONS, "captions"))
    torch.manual_seed(0)
    return tokenizer, make_text_encoder(tokenizer, width=32, layers=1).eval()


def embedded(tokenizer, encoder, captions, folder, accelerator=None):
    """The table of the captions' embeddings."""
    encode_all = functools.partial(encode_texts, encoder, tokenizer, device=CPU)
    return cache_embeddings(captions, encoder, tokenizer, encode_all, folder, accelerator or rank())


def test_the_table_holds_every_captions_embedding(text, memory, tmp_path):
    """Else a cached run conditions on other embeddings than the pipeline will compute."""
    tokenizer, encoder = text
    captions = all_captions([*CAPTIONS, ""], "captions")
    assert "" in captions
    table = embedded(tokenizer, encoder, captions, tmp_path)
    assert len(table) == len(set(captions))
    for caption in captions:
        found = table.look_up([caption_key(caption)])
        close(found, encode_texts(encoder, tokenizer, [caption], CPU).detach())
    assert not table.look_up([caption_key("")]).requires_grad


def test_batches_bring_their_captions_embeddings(text, vae, tmp_path):
    """Else a caption is learnt with another one's embedding."""
    tokenizer, encoder = text
    images = ImageDataset(rows_of(range(6), CAPTIONS), UPRIGHT, 2, True)
    table = embedded(tokenizer, encoder, all_captions([*images.captions, ""], "captions"), tmp_path)
    dataset = cached(images, vae, tmp_path, embeddings=table)
    seen = set()
    for epoch in range(12):
        keys = [(epoch, int(index)) for index in np.random.default_rng(epoch).permutation(6)]
        batch = dataset.__getitems__(keys)
        assert batch["captions"] == images.__getitems__(keys)["captions"]
        seen |= set(batch["captions"])
        close(batch["embeddings"], encode_texts(encoder, tokenizer, batch["captions"], CPU).detach())
    assert seen == set(all_captions(CAPTIONS, "captions"))


def test_another_text_encoder_has_another_table(text, tmp_path):
    """Else the embeddings of another network are taken from the cache."""
    tokenizer, encoder = text
    torch.manual_seed(1)
    other = make_text_encoder(tokenizer, width=32, layers=1).eval()
    for made, one in enumerate((encoder, other, encoder), 1):
        table = embedded(tokenizer, one, ["dog", ""], tmp_path)
        assert len(folders(tmp_path)) == min(made, 2)
        for caption in ("dog", ""):
            close(table.look_up([caption_key(caption)]), encode_texts(one, tokenizer, [caption], CPU).detach())


def test_embeddings_of_new_captions_are_added(text, tmp_path):
    """Else a caption that was added to the dataset is missing in the middle of training."""
    tokenizer, encoder = text
    encoded_captions = []

    def encode_some(texts):
        encoded_captions.extend(texts)
        return encode_texts(encoder, tokenizer, texts, CPU)

    for captions in (["dog", ""], ["", "two cats", "dog"], ["dog"]):
        table = cache_embeddings(captions, encoder, tokenizer, encode_some, tmp_path, rank())
        close(
            table.look_up([caption_key(caption) for caption in captions]),
            encode_texts(encoder, tokenizer, captions, CPU).detach(),
        )
    assert sorted(encoded_captions) == ["", "dog", "two cats"]
