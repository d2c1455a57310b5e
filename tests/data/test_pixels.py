"""From files to tensors: every mode and size lands where it should, and augmentation is keyed."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm_hf.common.errors import DataError
from ddpm_hf.data import ImageTransform
from ddpm_hf.data.dataset import ImageDataset
from ddpm_hf.data.images import augmentation_uniforms, decode_row, to_model_range
from ddpm_hf.data.pixels import prepare_image
from tests.support.pictures import encoded, plain_rows, random_pixels

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


@settings(max_examples=60)
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
