"""Quality of the embedded digits' model: a classifier's confidence, and the distance to training digits.

    python benchmarks/digit_quality.py demo [--num-images 256] [--steps 250]

The train part (4,000 digits) fits the classifier and trained the model; the test part (1,000) is the reference.
Pixels are in [0, 1], at the model's resolution. Reported for the samples and for held-out digits:

- confidence: the share of images with a probability of 0.9 or more for one class, by an SVC with calibrated
  probabilities;
- the smallest and largest share of a class among the samples;
- the 1st percentile and the median of the distance to the nearest training image;
- the Fréchet distance of the pixels to held-out digits, and that from train to held-out.
"""

import argparse

import numpy as np
import torch
from scipy.linalg import sqrtm
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC

from ddpm_hf import DDPMPipeline
from ddpm_hf.data import ImageTransform, embedded_digits
from ddpm_hf.data.images import decode_row


def real_digits(part: str, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, D] in [0, 1] and labels [N] of a part of the embedded digits."""
    rows = embedded_digits(part, (resolution, resolution))
    transform = ImageTransform(resolution, resolution, channels=1)
    pixels = [transform.resize(decode_row(row["image"], "digit")).ravel() for row in rows.dataset]
    return np.stack(pixels) / 255.0, np.array(rows.dataset["label"])


def sampled_digits(folder: str, count: int, steps: int, seed: int) -> np.ndarray:
    """`count` samples rounded to 256 levels, [N, D] in [0, 1]."""
    pipeline = DDPMPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    while sum(map(len, samples)) < count:
        batch = min(128, count - sum(map(len, samples)))
        images = pipeline(batch, generator, num_inference_steps=steps, output_type="np").images
        samples.append(np.round(images.reshape(batch, -1).astype(np.float64) * 255) / 255)
    return np.concatenate(samples)


def nearest_distances(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """The Euclidean distance of each image to its nearest reference, [N]."""
    return torch.cdist(torch.from_numpy(images), torch.from_numpy(references)).min(dim=1).values.numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The squared Fréchet distance between Gaussians fitted to two sets of pixels."""
    ridge = 1e-8 * np.eye(a.shape[1])  # pixels that never change make the covariances singular
    cov_a, cov_b = np.cov(a.T) + ridge, np.cov(b.T) + ridge
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default="demo", help="a training run's output folder")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    resolution = DDPMPipeline.from_pretrained(arguments.folder).unet.config.sample_size
    train, train_labels = real_digits("train", resolution)
    test, test_labels = real_digits("test", resolution)
    samples = sampled_digits(arguments.folder, arguments.num_images, arguments.steps, arguments.seed)

    classifier = CalibratedClassifierCV(SVC(C=10), ensemble=False).fit(train, train_labels)
    sampled, real = classifier.predict_proba(samples), classifier.predict_proba(test)
    sure = [(probability.max(axis=1) >= 0.9).mean() for probability in (sampled, real)]
    shares = np.bincount(sampled.argmax(axis=1), minlength=10) / len(samples)
    near = [np.percentile(nearest_distances(images, train), (1, 50)) for images in (samples, test)]

    print(f"{len(samples)} samples of {arguments.folder}, {arguments.steps} steps; held-out: {len(test)} digits,")
    print(f"the classifier's accuracy on these is {(real.argmax(axis=1) == test_labels).mean():.1%}\n")
    print("| | samples | held-out digits | ratio |\n|---|---|---|---|")
    print(f"| confidence of a class ≥ 0.9 | {sure[0]:.1%} | {sure[1]:.1%} | {sure[0] / sure[1]:.3f} |")
    print(f"| smallest and largest class | {shares.min():.1%}, {shares.max():.1%} | 10.0%, 10.0% | |")
    for index, name in enumerate(("1st percentile", "median")):
        sample, held_out = near[0][index], near[1][index]
        print(
            f"| distance to nearest training digit, {name} | {sample:.3f} | {held_out:.3f} | {sample / held_out:.3f} |"
        )
    between = frechet_distance(samples, test), frechet_distance(train, test)
    print(f"| Fréchet distance of pixels to held-out | {between[0]:.3f} | {between[1]:.3f} (train) | |")


if __name__ == "__main__":
    main()
