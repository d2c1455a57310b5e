"""Samples of an evaluation: keyed by index, shared by ranks, resumed; and the figures that follow from them alone."""

import threading

import numpy as np
import pytest
import torch

from ddpm_hf.common.errors import DataError
from ddpm_hf.common.image_sets import ImageSet
from ddpm_hf.evaluation.ranks import Ranks
from ddpm_hf.evaluation.sampling import SampleStore, as_bytes, fill, stored_features
from tests.support.evaluation import PixelFeatures

SHAPE = (3, 4, 6)


def image(index):
    """The image of an index."""
    return np.random.default_rng(index).integers(0, 256, SHAPE, dtype=np.uint8)


def sample(indices):
    return np.stack([image(index) for index in indices])


def everything(store, count):
    return np.concatenate([batch.numpy() for batch in store.batches(count)])


@pytest.fixture
def store(tmp_path):
    store = SampleStore(tmp_path / "samples", SHAPE)
    store.open({"seed": 0})
    return store


def test_each_image_is_sampled_once_and_is_at_its_index(store):
    """Else images are lost, repeated or shuffled between files."""
    asked = []
    fill(store, 10, 4, lambda indices: asked.extend(indices) or sample(indices))
    assert sorted(asked) == list(range(10))
    assert np.array_equal(everything(store, 10), sample(range(10)))
    assert np.array_equal(store.take([7, 0, 9]), sample([7, 0, 9]))


def test_a_stopped_run_goes_on_to_the_same_set_with_any_batch_size(store):
    """Else what a killed evaluation sampled is lost, or the set depends on where it stopped."""

    def stops(indices):
        if 12 in indices:
            raise KeyboardInterrupt
        return sample(indices)

    with pytest.raises(KeyboardInterrupt):
        fill(store, 20, 8, stops)
    asked = []
    there = fill(store, 20, 3, lambda indices: asked.extend(indices) or sample(indices))
    assert there == 8
    assert asked == list(range(8, 20))
    assert np.array_equal(everything(store, 20), sample(range(20)))


def test_more_images_are_added_and_fewer_are_the_first_of_them(store):
    """Else a set of another size is sampled from the start."""
    fill(store, 6, 4, sample)
    asked = []
    fill(store, 9, 4, lambda indices: asked.extend(indices) or sample(indices))
    assert asked == [6, 7, 8]
    assert np.array_equal(everything(store, 5), sample(range(5)))


def test_a_file_that_was_cut_off_is_named(store):
    """Else damaged images are measured, or an error of NumPy is all that is said."""
    fill(store, 4, 4, sample)
    path = store.path(range(4))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"00000000-00000004.npy.*remove it"):
        everything(store, 4)


def test_images_of_other_settings_are_not_mixed(store):
    """Else a set is half of one model and half of another."""
    with pytest.raises(DataError, match="otherwise"):
        store.open({"seed": 1})


def test_what_a_killed_run_left_half_written_goes(store):
    """Else files of a killed run pile up."""
    (store.folder / ".00000000-00000004.npy.x1.partial").write_bytes(b"half")
    store.open({"seed": 0})
    assert not list(store.folder.glob(".*"))


def two_ranks(work):
    """What two ranks return, as threads."""
    barrier, results = threading.Barrier(2), {}

    def run(rank):
        results[rank] = work(Ranks(rank, 2, barrier.wait))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


def test_two_ranks_share_the_work_and_get_the_same_features(store, tmp_path):
    """Else a figure depends on how many processes there were."""
    alone = SampleStore(tmp_path / "alone", SHAPE)
    alone.open({"seed": 0})
    fill(alone, 21, 4, sample)
    expected = stored_features(alone, 21, PixelFeatures(), frozenset({"pool"}), Ranks())

    asked = {0: [], 1: []}

    def work(ranks):
        fill(store, 21, 4, lambda indices: asked[ranks.rank].extend(indices) or sample(indices), ranks)
        return stored_features(store, 21, PixelFeatures(), frozenset({"pool"}), ranks)

    results = two_ranks(work)
    assert sorted(asked[0] + asked[1]) == list(range(21))
    assert asked[0]
    assert asked[1]
    for rank in range(2):
        assert np.array_equal(results[rank].pool, expected.pool)


def test_features_are_of_the_images_in_order_and_computed_once(store):
    """Else features belong to other images, or a resumed evaluation computes them again."""
    calls = []

    class Counting(PixelFeatures):
        def __call__(self, images):
            calls.append(len(images))
            return super().__call__(images)

    fill(store, 10, 4, sample)
    first = stored_features(store, 10, Counting(), frozenset({"pool"}), Ranks())
    again = stored_features(store, 7, Counting(), frozenset({"pool"}), Ranks())
    assert calls == [4, 4, 2]
    assert np.array_equal(first.pool, PixelFeatures()(torch.from_numpy(sample(range(10)))).pool)
    assert np.array_equal(again.pool, first.pool[:7])


def test_images_are_rounded_as_a_png_is_and_nan_is_refused():
    """Else figures differ from those of the saved images; or a broken model gets figures."""
    images = torch.tensor([0.0, 0.5 / 255, 1.5 / 255, 1.0]).reshape(1, 1, 2, 2)
    assert as_bytes(images).ravel().tolist() == [0, 0, 2, 255]
    with pytest.raises(DataError, match="NaN"):
        as_bytes(torch.full((1, 1, 2, 2), float("nan")))


def test_a_part_of_a_sorted_set_has_images_of_each_class():
    """Else the first images of a folder, of one class, stand for all of it."""
    labels = np.repeat([0, 1, 2], 4)
    images = ImageSet("sorted", "print", SHAPE, 12, sample, labels, ["a", "b", "c"], [str(i) for i in range(12)])
    part = images.part(6)
    assert part.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert part.captions == ["0", "2", "4", "6", "8", "10"]
    assert np.array_equal(part.read([1, 5]), sample([2, 10]))
    assert part.fingerprint != images.fingerprint
    assert images.part(12) is images
