"""Images as they come: damaged, of every form, endless, bombs. Each is the right tensor, or named in one line.

The right tensor has the shape asked for and lies in [-1, 1]; what cannot be one is a `DataError` with the image's name
and the way out.
"""

import io
import json
import pickle
import struct
import warnings
import zlib

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddpm_hf.common.errors import DataError
from ddpm_hf.data import ImageTransform
from ddpm_hf.data.buckets import aspect_ratios
from ddpm_hf.data.dataset import ImageDataset
from ddpm_hf.data.images import to_model_range
from ddpm_hf.data.labels import label_ids
from ddpm_hf.data.reading import read_dataset
from ddpm_hf.data.rows import Rows
from tests.support import warm
from tests.support.fixtures_generated import Tally, generated, report
from tests.support.pictures import encoded, quiet, random_pixels, write_images

SIDE = 8


@pytest.fixture(scope="module")
def tally(request):
    """How the images of this file fared."""
    counted = Tally()
    yield counted
    report(request, counted, "images")


class Cells(list):
    """Images in memory, in the place of a `datasets.Dataset`."""

    def select(self, places):
        """Some of them."""
        return Cells(self[place] for place in places)


def cells(*values) -> Rows:
    """Rows of cells that are not encoded."""
    return Rows(Cells({"image": value} for value in values), "cells", "image")


def rows_of(value) -> Rows:
    """One image that is still encoded, as a dataset gives it."""
    return cells(value if isinstance(value, dict) else {"bytes": value, "path": "dog.png"})


def tried(value, tally, channels=3, size=(SIDE, SIDE), **more) -> torch.Tensor | None:
    """An image by the scripts' own way: its tensor, or None where it was refused as it must be."""
    transform = ImageTransform(*size, channels, **more)
    rows = value if isinstance(value, Rows) else rows_of(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of what it mends, and of sizes that it decodes all the same
        try:
            batch = ImageDataset(rows, transform, seed=0, cached=True).__getitems__([(0, 0)])
        except DataError as error:
            line = str(error)
            assert line.startswith("broken image") or ("--pixel_range" in line or "--channels" in line)
            assert line.startswith("image ") or "--skip_broken_images" in line
            assert len(line.splitlines()) == 1
            assert " at 0x" not in line
            aspect_ratios(rows, channels)  # buckets leave it to the dataset to name it
            tally["named"] += 1
            return None
    pixels = to_model_range(batch["images"])
    assert pixels.shape == (1, channels, *size)
    assert pixels.isfinite().all()
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    height, width = aspect_ratios(rows, channels)[0]
    assert min(height, width) > 0
    tally["read"] += 1
    return pixels


PIXELS = random_pixels(1, 20, 16)[0]
PICTURE = Image.fromarray(PIXELS)
GRAY16 = Image.fromarray(np.arange(320, dtype=np.uint16).reshape(20, 16) * 200)


def exif(orientation: int) -> bytes:
    """EXIF data that say how a photo was held."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def several(form: str) -> bytes:
    """A file of three pictures."""
    buffer = io.BytesIO()
    PICTURE.save(buffer, form, save_all=True, append_images=[PICTURE.rotate(90 * n) for n in (1, 2)])
    return buffer.getvalue()


# Files of every form, of which any may be damaged
FORMS = {
    "PNG": encoded(PICTURE, "PNG"),
    "PNG of 16 bits": encoded(GRAY16, "PNG"),
    "PNG of a palette": encoded(PICTURE.convert("P"), "PNG", transparency=3),
    "PNG interlaced by text": encoded(PICTURE, "PNG", exif=exif(6)),
    "PNG that moves": several("PNG"),
    "JPEG": encoded(PICTURE, "JPEG", exif=exif(6)),
    "JPEG progressive": encoded(PICTURE, "JPEG", progressive=True, quality=60),
    "JPEG of CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "GIF": encoded(PICTURE, "GIF"),
    "GIF that moves": several("GIF"),
    "WebP": encoded(PICTURE, "WEBP", lossless=True),
    "WebP that moves": several("WEBP"),
    "BMP": encoded(PICTURE, "BMP"),
    "TIFF": encoded(PICTURE, "TIFF"),
    "TIFF deflated": encoded(PICTURE, "TIFF", compression="tiff_deflate"),
    "TIFF of LZW": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "TIFF of floats": encoded(Image.fromarray((PIXELS[..., 0] / 255).astype(np.float32)), "TIFF"),
    "TIFF of pages": several("TIFF"),
    "PPM": encoded(PICTURE, "PPM"),
    "TGA": encoded(PICTURE, "TGA"),
    "ICO": encoded(PICTURE, "ICO"),
    "PCX": encoded(PICTURE, "PCX"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form, tally):
    """Else a folder of photos in that form cannot be trained on; of several pictures, the first is meant."""
    assert tried(FORMS[form], tally) is not None
    if form.endswith("moves") or form.endswith("pages"):
        alone = tried(FORMS[form.split()[0]], tally)
        difference = (tried(FORMS[form], tally) - alone).abs().mean()
        assert difference < (0.1 if "WebP" in form else 1e-6)


@generated(200)
@given(form=st.sampled_from(sorted(FORMS)), place=st.floats(0, 1, exclude_max=True), channels=st.sampled_from([1, 3]))
def test_a_file_cut_off_anywhere_is_read_or_named(form, place, channels, tally):
    """Else one interrupted download among thousands of photos stops a run with a traceback."""
    data = FORMS[form]
    tried(data[: int(place * len(data))], tally, channels)


HEADS = st.integers(0, 120)  # where forms say what they hold


@generated(450)
@given(
    form=st.sampled_from(sorted(FORMS)),
    damage=st.lists(st.tuples(HEADS | st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=6),
    keep=st.booleans(),
)
def test_a_file_with_wrong_bytes_is_read_or_named(form, damage, keep, tally):
    """Else a stray byte makes PIL raise what nobody expected, or the numbers leave the range."""
    data = bytearray(FORMS[form])
    for place, byte in damage:
        data[place % len(data)] = byte
    tried(bytes(data), tally, keep_precision=keep)


@generated(75)
@given(data=st.binary(max_size=64), form=st.sampled_from(sorted(FORMS)))
def test_anything_that_begins_like_an_image_is_read_or_named(data, form, tally):
    """Else what is no image, but begins like one, is a traceback."""
    tried(FORMS[form][:12] + data, tally)


def test_a_broken_orientation_is_read_or_named(tally):
    """Else a photo whose EXIF data are damaged passes the decoder and is a traceback afterwards."""
    for data in (
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x09\0\0\0\x01\xff",
    ):
        tried(encoded(PICTURE, "JPEG", exif=data), tally)


# Sizes


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (2, 9000), (1, 7), (3, 5)])
def test_strips_and_points_are_read_in_little_memory(size, crop, tally):
    """Else a strip of 1×20,000 is blown up to gigabytes before it is cropped, and held like that."""
    pixels = np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[1], size[0])
    rows = rows_of(encoded(pixels))
    transform = ImageTransform(64, 64, 3, center_crop=crop)
    assert tried(rows, tally, size=(64, 64), center_crop=crop) is not None
    kept = transform.resize(Image.fromarray(pixels))
    assert kept.shape[0] * kept.shape[1] <= 64 * 64 * 33


def test_a_strip_shows_its_middle(tally):
    """Else what is left of an endless strip is one of its ends."""
    strip = np.zeros((1, 20_001), np.uint8)
    strip[:, 9990:10011] = 255
    assert tried(encoded(strip), tally, center_crop=True).min() == 1


def test_an_image_of_usual_proportions_is_not_cut_before_it_is_cropped():
    """Else random crops no longer reach the ends of a panorama."""
    panorama = Image.fromarray(random_pixels(1, 10, 80)[0])
    assert ImageTransform(10, 10, 3).resize(panorama).shape == (10, 80, 3)
    np.testing.assert_array_equal(ImageTransform(10, 10, 3).resize(panorama), np.asarray(panorama))


# Bombs: a few bytes that say they are huge


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of RGB with a width, a height and whatever chunks."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [head, *chunks, (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    checked = [struct.pack(">I", len(b)) + t + b + struct.pack(">I", zlib.crc32(t + b)) for t, b in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


def resized_header(form: str, place: int, layout: str, *values: int) -> bytes:
    """A file that says another size than it has."""
    data = bytearray(FORMS[form])
    struct.pack_into(layout, data, place, *values)
    return bytes(data)


NOTHING = zlib.compress(b"\0" * 300_000_000, 1)
BOMBS = {
    "PNG": png(60_000, 60_000),
    "PNG of text": png(4, 4, (b"zTXt", b"a\0\0" + NOTHING)),
    "PNG of a profile": png(4, 4, (b"iCCP", b"a\0\0" + NOTHING)),
    "GIF": resized_header("GIF", 6, "<HH", 65_000, 65_000),
    "BMP": resized_header("BMP", 18, "<ii", 60_000, 60_000),
    "PPM": b"P6 60000 60000 255\n" + bytes(100),
    "TGA": resized_header("TGA", 12, "<HH", 65_000, 65_000),
}

MEMORY = """
import pickle, resource, sys
from tests.data.test_image_zoo import Tally, tried
limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in pickle.load(open(sys.argv[1], "rb")).items():
    outcome = tried(data, Tally())
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit
    print(name, "read" if outcome is not None else "named", used // 1024, sep="|")
"""


def test_bombs_are_named_before_they_go_off(tmp_path):
    """Else a file of a kilobyte fills the memory of the machine."""
    (tmp_path / "bombs").write_bytes(pickle.dumps(BOMBS))
    end = warm.run("-c", MEMORY, tmp_path / "bombs")
    assert end.returncode == 0, end.stderr
    lines = [line.split("|") for line in end.stdout.splitlines()]
    seen = {name: (how, int(mebibytes)) for name, how, mebibytes in lines}
    assert set(seen) == set(BOMBS)
    assert max(mebibytes for _, mebibytes in seen.values()) < 200, seen
    assert all(how == "named" for name, (how, _) in seen.items() if name not in ("PNG of text", "PNG of a profile"))


def test_postscript_is_not_executed(tally):
    """Else a picture's file in a dataset runs an interpreter of programs on this machine."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    rows = rows_of(program)
    assert tried(rows, tally) is None
    with pytest.raises(DataError, match="EPS files are not supported"):
        ImageDataset(rows, ImageTransform(SIDE, SIDE, 3), 0, cached=True)


# Cells that are no files

MODES = [
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "La",
    "RGBa",
    "RGBX",
    "I;16",
    "I;16B",
    "I;16L",
]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_any_size_is_read(mode, channels, keep, tally):
    """Else a mode that PIL has is a traceback at some size, or leaves the range."""
    for size in ((1, 1), (20, 16), (3, 900)):
        assert tried(cells(Image.new(mode, size)), tally, channels, keep_precision=keep) is not None


@generated(100)
@given(
    values=st.lists(st.floats(width=32) | st.integers(-(2**40), 2**40), min_size=1, max_size=6),
    shape=st.sampled_from([(-1,), (1, -1), (-1, 1), (1, -1, 1), (1, 1, -1), (1, 1, 1, -1)]),
    nested=st.booleans(),
)
def test_arrays_of_any_numbers_are_read_or_named(values, shape, nested, tally):
    """Else NaN, infinity or numbers beyond 16 bits wrap around, and train as if they were pixels."""
    array = np.array(values).reshape(shape)
    tried(cells(array.tolist() if nested else array), tally)


@pytest.mark.parametrize(
    "value",
    [None, 5, 2.5, "nowhere.png", "", b"", {}, {"path": None}, {"bytes": None, "path": None}, [], [[]], [["a"]],
     object, {"bytes": "text"}, np.zeros((0, 4, 3)), np.full((4, 4), np.nan), np.full((4, 4), np.inf), True],
    ids=lambda value: str(value)[:20].replace("\n", " "),
)  # fmt: skip
def test_what_is_no_image_is_named(value, tally):
    """Else a column of something else is a traceback."""
    assert tried(cells(value), tally) is None


# Labels


@pytest.mark.parametrize("value", [-1, 4, 2**70, None, 1.5, "", "nobody", "1", [1], {}, float("nan"), b"1", object()])
def test_a_label_that_is_none_is_named(value):
    """Else a label outside the classes indexes another class, or ends a run with a traceback."""
    rows = Rows(None, "photos", "image", "kind", ["cat", "dog", "owl"])
    with pytest.raises(DataError, match="'kind' of photos"):
        label_ids([0, "dog", value], rows)


# Where a dataset's files may lie


def test_a_dataset_cannot_name_files_elsewhere(tmp_path):
    """Else a stranger's dataset trains a model, which is then published, on pictures that were never in it."""
    write_images(tmp_path / "private", random_pixels(1))
    write_images(tmp_path / "data", random_pixels(1))
    (tmp_path / "near").mkdir()
    features = datasets.Features({"image": datasets.Image()})
    for kind, places in {
        "absolute": tmp_path / "private" / "0.png",
        "beside": tmp_path / "data-private" / ".." / "private" / "0.png",
        "own": tmp_path / "own" / "0.png",
    }.items():
        folder = tmp_path / kind
        write_images(folder, random_pixels(1))
        table = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(places)}]}, features=features)
        pyarrow.parquet.write_table(table.data.table, folder / "train.parquet")
        with quiet():
            rows = read_dataset(directory=str(folder / "train.parquet"), cache_dir=str(tmp_path / "cache"))
        if kind == "own":
            assert len(ImageDataset(rows, ImageTransform(SIDE, SIDE, 3), 0, True)) == 1
            continue
        with pytest.raises(DataError, match=r"broken image .*0\.png: it is outside of .*; put the images into it"):
            ImageDataset(rows, ImageTransform(SIDE, SIDE, 3), 0, True)


@pytest.mark.parametrize("name", ["../private/0.png", "{}/private/0.png", "/etc/passwd", "a/../../private/0.png"])
def test_metadata_cannot_name_files_elsewhere(name, tmp_path):
    """Else `metadata.jsonl` reaches all that the user can read."""
    write_images(tmp_path / "private", random_pixels(1))
    folder = write_images(tmp_path / "data", random_pixels(1))
    line = json.dumps({"file_name": name.format(tmp_path), "text": "a"})
    (folder / "metadata.jsonl").write_text(line)
    with quiet(), pytest.raises(DataError, match=r"metadata.jsonl names .*not a relative path pointing inside"):
        read_dataset(directory=str(folder), caption_column="text", cache_dir=str(tmp_path / "cache"))


def test_a_program_among_the_pictures_is_not_run(tmp_path):
    """Else a dataset's folder executes code, which nobody agreed to."""
    folder = write_images(tmp_path / "data", random_pixels(2))
    marker = tmp_path / "executed"
    (folder / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with quiet():
        rows = read_dataset(directory=str(folder), cache_dir=str(tmp_path / "cache"))
        for how in ({"name": str(folder / "data.py")}, {"directory": str(folder), "config_name": "other"}):
            with pytest.raises(DataError):
                read_dataset(**how, cache_dir=str(tmp_path / "cache"))
    assert len(rows.dataset) == 2
    assert not marker.exists()


def test_rows_in_memory_may_lie_anywhere(tmp_path):
    """Else who makes a dataset of their own files is refused them."""
    write_images(tmp_path, random_pixels(1))
    rows = rows_of({"bytes": None, "path": str(tmp_path / "0.png")})
    assert len(ImageDataset(rows, ImageTransform(SIDE, SIDE, 3), 0, True)) == 1
