"""Does guidance help? Label agreement and diversity by guidance scale, on the embedded digits.

    python benchmarks/guidance.py CONDITIONAL [--classifier CLASSIFIER --unconditional MODEL] [--plot guidance.png]

Of `--per-class` samples a class, the share that an SVC fitted on the train part (4,000 real digits) classifies as
requested; and the mean pairwise distance of the pixels within a class, as a ratio to that of real held-out digits
(1,000). For classifier-free guidance with ancestral and with DDIM steps; and, with a classifier, for classifier
guidance over an unconditional model.
"""

import argparse

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from digit_quality import real_digits
from sklearn.svm import SVC
from tqdm.auto import tqdm

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.common.machine import usable_cores
from ddpm_hf.common.pictures import image_grid
from ddpm_hf.models.classifier import NoisyClassifier


class StockDDIM(DDIMScheduler):
    """DDIM that does not re-derive ε from the clipped x̂_0, as in a pipeline of Diffusers."""

    def step(self, model_output, timestep, sample, generator=None):
        """As the parent's, with its defaults."""
        return super().step(model_output, timestep, sample, generator=generator)


SCALES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
CLASSIFIER_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)


def diversity(pixels: np.ndarray, labels: np.ndarray) -> float:
    """The mean distance between two different images of one class, averaged over the classes."""
    means = []
    for label in np.unique(labels):
        means.append(torch.pdist(torch.from_numpy(pixels[labels == label])).mean().item())
    return float(np.mean(means))


def sample(pipeline, labels: torch.Tensor, steps: int, seed: int, **options) -> np.ndarray:
    """Samples for the labels, rounded to 256 levels, [N, D] in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for part in labels.split(250):
        what = part if isinstance(pipeline, ClassConditionalDDPMPipeline) else len(part)
        if "classifier" in options:
            options["class_labels"] = part
        images = pipeline(
            what, generator=generator, num_inference_steps=steps, output_type="np", **options
        ).images  # [N, H, W, 1]
        samples.append(np.round(images.reshape(len(part), -1).astype(np.float64) * 255) / 255)
    return np.concatenate(samples)


def main() -> None:
    """Print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("conditional", nargs="?", help="the output folder of a run with --label_column label")
    parser.add_argument("--classifier", help="the output folder of ddpm-hf train-classifier")
    parser.add_argument("--unconditional", help="the output folder of a run without classes")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100, help="of ancestral sampling")
    parser.add_argument("--ddim-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="write a picture of the first table here")
    parser.add_argument("--grids", help="only write this picture: a row per class, at guidance 1, 2 and 4")
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cores())

    if arguments.grids:
        draw_grids(ClassConditionalDDPMPipeline.from_pretrained(arguments.conditional), arguments)
        return
    start = arguments.conditional or arguments.unconditional
    resolution = UNet2DModel.load_config(start, subfolder="unet")["sample_size"]
    train, train_labels = real_digits("train", resolution)
    test, test_labels = real_digits("test", resolution)
    svc = SVC(C=10).fit(train, train_labels)
    real = diversity(test, test_labels)
    labels = torch.arange(10).repeat_interleave(arguments.per_class)
    print(
        f"{len(labels)} samples a row; the SVC's accuracy on held-out digits is {svc.score(test, test_labels):.1%}\n"
    )

    def row(name: str, pixels: np.ndarray) -> tuple[float, float]:
        agreement, spread = float((svc.predict(pixels) == labels.numpy()).mean()), diversity(pixels, labels) / real
        tqdm.write(f"| {name} | {agreement:.1%} | {spread:.3f} |")
        return agreement, spread

    results = {}
    samplers = {
        f"ancestral, {arguments.steps} steps": (DDPMScheduler, arguments.steps, SCALES),
        f"DDIM, {arguments.ddim_steps} steps": (DDIMScheduler, arguments.ddim_steps, SCALES),
        f"Diffusers' DDIM step, {arguments.ddim_steps} steps": (StockDDIM, arguments.ddim_steps, (1.0, 2.0, 4.0)),
    }
    if arguments.conditional:
        print("| classifier-free guidance | classified as requested | diversity |\n|---|---|---|")
        pipeline = ClassConditionalDDPMPipeline.from_pretrained(arguments.conditional)
        config = pipeline.scheduler.config
        for name, (sampler, steps, scales) in samplers.items():
            pipeline.scheduler = sampler.from_config(config)
            for scale in scales:
                pixels = sample(pipeline, labels, steps, arguments.seed, guidance_scale=scale)
                results[name, scale] = row(f"{name}, scale {scale}", pixels)

    if arguments.classifier:
        guided = DDPMPipeline.from_pretrained(arguments.unconditional)
        config = guided.scheduler.config
        classifier = NoisyClassifier.from_pretrained(arguments.classifier).eval()
        print("\n| classifier guidance, unconditional model | classified as requested | diversity |\n|---|---|---|")
        for name, (sampler, steps, _) in list(samplers.items())[:2]:
            guided.scheduler = sampler.from_config(config)
            for scale in CLASSIFIER_SCALES:
                options = {"classifier": classifier, "classifier_scale": scale}
                pixels = sample(guided, labels, steps, arguments.seed, **options)
                row(f"{name}, scale {scale}", pixels)

    if arguments.plot:
        plot(results, list(samplers)[:2], svc.score(test, test_labels), arguments.plot)


def draw_grids(pipeline, arguments) -> None:
    """Three grids side by side, from the same noise."""
    labels = torch.arange(len(pipeline.config.id2label)).repeat_interleave(6)
    grids = []
    for scale in (1.0, 2.0, 4.0):
        generators = [torch.Generator().manual_seed(arguments.seed + index) for index in range(len(labels))]
        images = pipeline(labels, scale, generators, arguments.steps).images
        grids.append(image_grid(images, 6, scale=2))
    image_grid(grids, 3, gap=10).save(arguments.grids)


def plot(results: dict, samplers: list[str], real_accuracy: float, path: str) -> None:
    """Agreement and diversity over the guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for index, (axis, title) in enumerate(zip(axes, ("classified as requested", "diversity, real digits = 1"))):
        for name in samplers:
            axis.plot(SCALES, [results[name, scale][index] for scale in SCALES], "o-", label=name)
        axis.axhline((real_accuracy, 1.0)[index], color="gray", linestyle=":", label="held-out digits")
        axis.set(xlabel="guidance scale", title=title)
        axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
