"""Grids of images."""

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.common.pictures import image_grid
from tests.support.pictures import random_pixels

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
