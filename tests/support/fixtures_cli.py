"""What `ddpm-hf` wrote and said, for the tests of the command."""

import numpy as np
from PIL import Image


def images(folder):
    """The single images of a folder, in order: int [N, H, W] or [N, H, W, 3]."""
    paths = sorted(path for path in folder.iterdir() if path.stem.isdecimal())
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])


def assert_one_line(result, *named):
    """Exit code 2, and one line on stderr that names what is wrong."""
    code, _, err = result
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("ddpm-hf: error: ")
    for word in named:
        assert str(word) in lines[0]
