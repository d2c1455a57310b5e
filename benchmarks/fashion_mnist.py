"""Fashion-MNIST with captions, as a folder that the scripts read.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_mnist.py fashion [--source /usr/share/datasets/fashion-mnist]
    python train_text2image.py --train_data_dir fashion --output_dir fashion-text

Writes `train` (60,000) and `test` (10,000): grayscale images padded to 32×32 (`--size 28`: as they are), their label,
and captions of the class.
"""

import argparse
import gzip
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

NAMES = [
    "t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip
CAPTIONS = ("a photo of {}", "{} on black", "a picture of {}", "{}")


def caption_of(name: str, template: str) -> str:
    """A template with a name and its article."""
    return template.format(f"{'an' if name[0] in 'aeiou' else 'a'} {name}")


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file of bytes."""
    with gzip.open(path) as file:
        data = file.read()
    shape = np.frombuffer(data, ">u4", data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def rows(source: Path, part: str, size: int) -> datasets.Dataset:
    """A part as a dataset, its images padded to a size."""
    margin = (size - 28) // 2
    images = np.pad(read_idx(source / f"{part}-images-idx3-ubyte.gz"), ((0, 0), (margin, margin), (margin, margin)))
    labels = read_idx(source / f"{part}-labels-idx1-ubyte.gz")
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=NAMES),
            "text": datasets.List(datasets.Value("string")),
        }
    )
    texts = [[caption_of(NAMES[label], template) for template in CAPTIONS] for label in labels]
    return datasets.Dataset.from_dict({"image": encoded, "label": labels.tolist(), "text": texts}, features=features)


def main() -> None:
    """Read the source, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--size", type=int, choices=(28, 32), default=32)
    arguments = parser.parse_args()
    source, size = arguments.source, arguments.size
    parts = {"train": rows(source, "train", size), "test": rows(source, "t10k", size)}
    datasets.DatasetDict(parts).save_to_disk(arguments.out)


if __name__ == "__main__":
    main()
