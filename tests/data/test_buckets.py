"""Images of several aspect ratios: sizes, batches of one size each, and training on them."""

import shutil

import datasets
import numpy as np
import pytest

import train_text2image
from ddpm_hf.data import ImageTransform
from ddpm_hf.data.buckets import bucket_sizes, bucketed, nearest_bucket
from ddpm_hf.data.dataset import ImageDataset
from ddpm_hf.data.orders import bucketed_length, keyed_bucketed_order
from ddpm_hf.data.rows import Rows
from ddpm_hf.training.plan import KeyedBatchSampler, StepPlan
from tests.support.fixtures_text import tiny_text_pipeline
from tests.support.pictures import encoded, image_rows, quiet
from tests.support.runs import assert_same_run, attempt, losses, train

SHAPES = [(16, 16), (12, 20), (20, 12), (16, 17), (30, 18)]  # of the images, in turn


@pytest.mark.parametrize(("size", "step"), [((64, 64), 16), ((512, 512), 64), ((512, 768), 64), ((16, 16), 4)])
def test_sizes_fit_the_model_and_cost_no_more(size, step):
    """Else a batch of one shape runs out of memory, or cannot be halved."""
    sizes = bucket_sizes(*size, step)
    assert size in sizes
    assert len(set(sizes)) == len(sizes) > 2
    for h, w in sizes:
        assert h % step == w % step == 0
        assert size[0] * size[1] / 2 < h * w <= size[0] * size[1]
        assert max(h / w, w / h) <= 2


def test_an_image_of_a_sizes_ratio_gets_that_size():
    """Else more of the image is cropped away than must be."""
    sizes = bucket_sizes(512, 512, 64)
    for place, (h, w) in enumerate(sizes):
        assert nearest_bucket(3 * h, 3 * w, sizes) == place
    assert sizes[nearest_bucket(4000, 100, sizes)] == max(sizes)
    assert sizes[nearest_bucket(100, 4000, sizes)] == min(sizes)


GROUPS = [13, 4, 2, 8]


@pytest.mark.parametrize("batch", [1, 3, 4, 5])
def test_an_epoch_is_whole_batches_of_one_group(batch):
    """Else images of two sizes meet in a batch, or an image is drawn twice while another waits."""
    ends = np.cumsum(GROUPS)
    seen = set()
    for epoch in range(60):
        order = keyed_bucketed_order(0, epoch, GROUPS, batch)
        assert len(order) == bucketed_length(GROUPS, batch)
        groups = np.searchsorted(ends, order, side="right").reshape(-1, batch)
        assert (groups == groups[:, :1]).all()
        for group, size in enumerate(GROUPS):
            drawn = order[np.searchsorted(ends, order, side="right") == group]
            assert len(drawn) == max(1, size // batch) * batch
            assert np.bincount(drawn - (ends[group] - size), minlength=size).max() <= -(-batch // size)
        seen |= set(order.tolist())
    assert seen == set(range(sum(GROUPS)))


def test_ranks_share_the_batches_of_one_order():
    """Else two ranks see other images than one with twice the batch."""

    def batches(size, world, rank):
        plan = StepPlan(bucketed_length(GROUPS, 4), size, world, 1)
        sampler = iter(KeyedBatchSampler(plan, lambda e: keyed_bucketed_order(0, e, GROUPS, 4), rank, 0))
        return [next(sampler) for _ in range(2 * plan.steps_per_epoch)]

    together = [first + second for first, second in zip(batches(2, 2, 0), batches(2, 2, 1))]
    assert together == batches(4, 1, 0)


def rows(count=20):
    """Images of several shapes whose gray level and caption both say which row they are."""
    files = [encoded(np.full((*SHAPES[row % len(SHAPES)], 3), 10 * row + 5, dtype=np.uint8)) for row in range(count)]
    return image_rows(files, text=[f"number {row}" for row in range(count)])


@pytest.mark.parametrize("cached", [True, False])
def test_captions_stay_with_their_images(cached):
    """Else an image is paired with another one's caption."""
    named = Rows(rows().cast_column("image", datasets.Image(decode=False)), "rows", "image", caption_column="text")
    whole = ImageDataset(named, ImageTransform(16, 16, 3, center_crop=True), seed=0, cached=cached)
    dataset = bucketed(whole, bucket_sizes(16, 16, 4), cached)
    assert len(dataset) == 20
    assert len(dataset.parts) == 3
    found = []
    for index in range(len(dataset)):
        batch = dataset.__getitems__([(0, index)])
        number = (int(batch["images"][0, 0, 0, 0]) - 5) // 10
        assert dataset.name_of(int(batch["index"][0])) == f"{number} of rows"
        assert batch["captions"] == [f"number {number}"] == [dataset.captions[index]]
        h, w = SHAPES[number % len(SHAPES)]
        sizes = bucket_sizes(16, 16, 4)
        assert tuple(batch["images"].shape[2:]) == sizes[nearest_bucket(h, w, sizes)]
        found.append(number)
    assert sorted(found) == list(range(20))
    with pytest.raises(ValueError, match="one size"):
        dataset.__getitems__([(0, 0), (0, 19)])


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Captioned images of several shapes, and a tiny checkpoint."""
    root = tmp_path_factory.mktemp("shop")
    with quiet():
        rows().save_to_disk(str(root / "shapes"))
    tiny_text_pipeline().save_pretrained(root / "stable")
    return root


BUCKETS = {
    "train_data_dir": "{shop}/shapes", "pretrained_model_name_or_path": "{shop}/stable", "resolution": 16,
    "aspect_ratio_buckets": True, "train_batch_size": 3, "max_train_steps": 6, "checkpointing_steps": 3,
    "center_crop": True, "seed": 0, "logger": "none", "logging_steps": 1, "eval_batch_size": 1, "cpu_threads": 1,
    "num_inference_steps": 1, "validation_prompts": "a",
}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("cache", [True, None])
def test_runs_on_buckets_resume_exactly(cache, shop, tmp_path):
    """Else a resumed run sees other shapes than it would have."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(shop, whole, BUCKETS, train_text2image.main, cache_latents=cache)
    shutil.copytree(whole / "checkpoint-3", part / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", part)  # with lines that were logged after the checkpoint
    train(shop, part, BUCKETS, train_text2image.main, cache_latents=cache, resume_from_checkpoint="latest")
    assert_same_run(part, whole)


def test_cached_buckets_train_as_uncached_ones(shop, tmp_path):
    """Else the cache mixes the sizes."""
    for name, cache in (("plain", None), ("cached", True)):
        train(shop, tmp_path / name, BUCKETS, train_text2image.main, cache_latents=cache)
    np.testing.assert_allclose(losses(tmp_path / "plain"), losses(tmp_path / "cached"), rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"streaming": True}, "--streaming"),
        ({"pretrained_model_name_or_path": None}, "--vae_name_or_path"),
    ],
    ids=str,
)
def test_what_cannot_be_bucketed_is_refused(flags, said, shop, tmp_path):
    """Else a run fails after the autoencoder was trained, or on the first batch."""
    run = attempt(shop, tmp_path / "run", BUCKETS, train_text2image.main, **flags)
    assert run.code == 2
    assert said in run.error()
    assert not (tmp_path / "run").exists()
