"""Each resize against its definition: weights of each input pixel as a matrix, in float64."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.common.errors import DataError
from ddpm_hf.evaluation.features.resizing import RESIZES, as_rgb
from ddpm_hf.evaluation.protocols import PROTOCOLS

SHAPES = [((32, 32), (299, 299)), ((61, 47), (40, 52)), ((300, 220), (64, 64)), ((5, 3), (7, 9)), ((1, 1), (4, 4))]


def tf1_matrix(length, wanted):
    """TensorFlow 1: output i is at i·in/out, between the two inputs around it; the last input repeats."""
    matrix = np.zeros((wanted, length))
    for i in range(wanted):
        position = i * length / wanted
        first = int(position)
        matrix[i, first] += 1 - (position - first)
        matrix[i, min(first + 1, length - 1)] += position - first
    return matrix


def half_pixel_matrix(length, wanted):
    """Output i is at (i + 1/2)·in/out - 1/2, not below 0, between the two inputs around it."""
    matrix = np.zeros((wanted, length))
    for i in range(wanted):
        position = max((i + 0.5) * length / wanted - 0.5, 0)
        first = min(int(position), length - 1)
        matrix[i, first] += 1 - (position - first)
        matrix[i, min(first + 1, length - 1)] += position - first
    return matrix


def keys(x, a=-0.5):
    """Keys' cubic kernel, of support 2."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def antialiased_bicubic_matrix(length, wanted):
    """The kernel is as wide as an output pixel where the image shrinks, and its weights sum to 1."""
    scale = max(length / wanted, 1.0)
    matrix = np.zeros((wanted, length))
    for i in range(wanted):
        centre = (i + 0.5) * length / wanted
        first = max(int(centre - 2 * scale + 0.5), 0)
        last = min(int(centre + 2 * scale + 0.5), length)
        weights = [keys((j + 0.5 - centre) / scale) for j in range(first, last)]
        matrix[i, first:last] = np.array(weights) / sum(weights)
    return matrix


def pixels(shape, n=2, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, *shape), dtype=np.uint8))


def by_matrix(images, size, matrix):
    rows, columns = matrix(images.shape[2], size[0]), matrix(images.shape[3], size[1])
    return rows @ images.numpy().astype(np.float64) @ columns.T


@pytest.mark.parametrize(
    ("name", "matrix", "clipped"),
    [
        ("tf1-bilinear", tf1_matrix, False),
        ("torch-bilinear", half_pixel_matrix, False),
        ("torch-bicubic-antialias", antialiased_bicubic_matrix, False),
        ("pil-bicubic-float", antialiased_bicubic_matrix, True),
    ],
)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_a_resize_is_its_formula(name, matrix, clipped, shape, size):
    """Else FID is off by points, and nothing says so."""
    images = pixels(shape)
    expected = by_matrix(images, size, matrix)
    expected = expected.clip(0, 255) if clipped else expected
    resized = RESIZES[name](images, size)
    assert resized.dtype == torch.float32
    assert resized.shape == (2, 3, *size)
    assert np.abs(resized.numpy() - expected).max() < 2e-3  # of 255; float32


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_pillow_in_8_bits_is_the_formula_but_for_its_roundings(shape, size):
    """Else "8 bits" means something else than in dgm-eval. Pillow 13 begins with the cheaper of the two directions."""
    images = pixels(shape)
    resized = RESIZES["pil-bicubic"](images, size).numpy()
    rows, columns = antialiased_bicubic_matrix(shape[0], size[0]), antialiased_bicubic_matrix(shape[1], size[1])
    pixels_in = images.numpy().astype(np.float64)
    orders = [rows @ eight_bits(pixels_in @ columns.T), eight_bits(rows @ pixels_in) @ columns.T]
    expected = min((eight_bits(one) for one in orders), key=lambda one: np.abs(resized - one).sum())
    assert np.abs(resized - expected).max() <= 2  # its weights have 22 bits: a half may round down, in either pass
    assert (resized == expected).mean() > 0.99


def eight_bits(values):
    return values.round().clip(0, 255)


def test_pillow_gets_each_image_as_it_is():
    """Else channels or sides are mixed up."""
    images = pixels((30, 50))
    one = Image.fromarray(np.ascontiguousarray(images[1].permute(1, 2, 0).numpy()))
    expected = np.asarray(one.resize((20, 24), Image.Resampling.BICUBIC))
    assert (RESIZES["pil-bicubic"](images, (24, 20))[1].permute(1, 2, 0).numpy() == expected).all()


def test_the_crop_covers_and_is_centred():
    """Else an image that is not square is squeezed, or its side is shown."""
    images = pixels((40, 60))
    one = Image.fromarray(np.ascontiguousarray(images[0].permute(1, 2, 0).numpy()))
    covering = np.asarray(one.resize((30, 20), Image.Resampling.BICUBIC))
    cropped = RESIZES["pil-bicubic-crop"](images, (20, 20))[0].permute(1, 2, 0).numpy()
    assert (cropped == covering[:, 5:25]).all()


@pytest.mark.parametrize("name", RESIZES)
def test_no_resize_changes_an_image_of_the_right_size(name):
    """Else images that need no resizing are blurred."""
    images = pixels((24, 18))
    assert torch.equal(RESIZES[name](images, (24, 18)), images.float())


@pytest.mark.parametrize("name", RESIZES)
def test_grey_images_are_rgb_images_of_equal_channels(name):
    """Else the embedded digits have other features than the same digits in RGB."""
    grey = pixels((28, 28))[:, :1]
    assert torch.equal(RESIZES[name](as_rgb(grey), (40, 40)), RESIZES[name](grey.repeat(1, 3, 1, 1), (40, 40)))


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8).byte()]
)
def test_other_images_are_refused(images):
    """Else floats in [-1, 1] or RGBA are taken for bytes of RGB."""
    with pytest.raises(DataError, match="require uint8 images"):
        as_rgb(images)


def test_the_protocols_name_resizes_that_exist():
    """Else a protocol fails when it is used."""
    assert set(PROTOCOLS) == {"adm", "torch-fidelity", "clean-fid", "dgm-eval", "edm2"}
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert {protocol.resize, protocol.inception_resize} <= set(RESIZES)
