"""Digits inpainted from their left half, and what a classifier reads in them.

    python benchmarks/restoration_digits.py MODEL --count 40 --solutions 8

MODEL samples the embedded digits in gray. A support vector machine that was trained on whole digits reads the true
digits, the halves alone (the hidden half black, or that of the mean digit), and several solutions of each half.
If the solutions' spread is right, a solution agrees with the truth as often as with another solution of the same half.
"""

import argparse

import numpy as np
import torch

from ddpm_hf import OPERATORS, DDPMRestorationPipeline, load
from ddpm_hf.data import ImageTransform, embedded_digits


def digits(part, size):
    """[N, 1, H, W] in [-1, 1], and labels [N]."""
    import io

    from PIL import Image

    rows, images = embedded_digits(part, (32, 32) if size == (32, 32) else (28, 28)), []
    transform = ImageTransform(*size, 1)
    for row in rows.dataset:
        images.append(transform.resize(Image.open(io.BytesIO(row["image"]["bytes"])))[None, :, :, 0])
    return torch.from_numpy(np.stack(images)).float() / 127.5 - 1, np.array(rows.dataset["label"])


def main():
    """The shares that are read as the true digit."""
    from sklearn.svm import SVC

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--solutions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--method", default="ddnm")
    args = parser.parse_args()
    pipeline = DDPMRestorationPipeline.from_pipe(load(args.model))
    size = pipeline.image_size
    train, train_labels = digits("train", size)
    test, labels = digits("test", size)
    test, labels = test[: args.count], labels[: args.count]
    reader = SVC(C=5).fit(train.flatten(1).numpy(), train_labels)

    def read(images):
        return reader.predict(images.flatten(1).numpy())

    operator = OPERATORS["half"]((1, *size))
    y, shown = operator.forward(test), operator.mask
    output = pipeline(
        y, operator, 0.0, args.method, args.steps, args.solutions, torch.Generator().manual_seed(0), "latent"
    )
    readings = read(output.images).reshape(args.count, args.solutions)
    frequency = np.stack([(readings == label).mean(1) for label in range(10)], 1)  # [N, 10]
    agree = (frequency * (frequency * args.solutions - 1)).sum(1) / (args.solutions - 1)  # of two different solutions
    print(f"{args.count} digits, {args.solutions} solutions each by {args.method} in {args.steps} calls")
    black, mean = (torch.where(shown, test, rest) for rest in (torch.tensor(-1.0), train.mean(0)))
    print(f"true digits read as their label          {(read(test) == labels).mean():.1%}")
    print(f"left half alone, the rest black          {(read(black) == labels).mean():.1%}")
    print(f"left half alone, the rest the mean digit {(read(mean) == labels).mean():.1%}")
    print(f"solutions                                {(readings == labels[:, None]).mean():.1%}")
    print(f"the most frequent reading of solutions   {(frequency.argmax(1) == labels).mean():.1%}")
    print(f"two solutions of a half read alike       {agree.mean():.1%}")


if __name__ == "__main__":
    main()
