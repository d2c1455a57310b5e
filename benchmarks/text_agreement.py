"""Does a text-to-image model follow the caption? Accuracy by caption, of an SVC fitted on real images.

    python benchmarks/text_agreement.py MODEL [--fashion FOLDER] [--guidance 3] [--steps 50] [--grid out.png]

The digits' model by default: the SVC is fitted on the train part of the embedded digits (28×28, padded to 32); the
captions are one that was trained with for each digit, and two paraphrases of known words that never occurred. With
--fashion, the folder of `fashion_mnist.py`: an SVC of 10,000 of its train images, and its captions.
"""

import argparse

import datasets
import numpy as np
import torch
from digit_quality import real_digits
from fashion_mnist import NAMES, caption_of
from sklearn.svm import SVC
from tqdm.auto import tqdm

from ddpm_hf import TextToImageDDPMPipeline
from ddpm_hf.common.machine import usable_cores
from ddpm_hf.common.pictures import image_grid
from ddpm_hf.data.digits import DIGIT_CAPTIONS, DIGIT_NAMES

PARAPHRASES = ("a picture of a handwritten {}", "the handwritten number {}")


def fashion_images(folder: str, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 1024] in [0, 1] and labels [N] of some images."""
    rows = datasets.load_from_disk(folder)[part].shuffle(seed=0).select(range(count))
    return np.stack([np.asarray(image).ravel() for image in rows["image"]]) / 255.0, np.array(rows["label"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--fashion", help="the folder of fashion_mnist.py")
    parser.add_argument("--samples", type=int, default=20, help="for each caption")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", help="write a picture: a row for each caption of the first kind")
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cores())

    if arguments.fashion:
        real = fashion_images(arguments.fashion, "train", 10_000)
        held_out = fashion_images(arguments.fashion, "test", 5000)
        captions = {"a photo of ...": [caption_of(name, "a photo of {}") for name in NAMES]}
    else:
        real, held_out = real_digits("train", 32), real_digits("test", 32)
        kinds = (DIGIT_CAPTIONS[0], *PARAPHRASES)
        captions = {kind.format("..."): [kind.format(name) for name in DIGIT_NAMES] for kind in kinds}
    svc = SVC(C=10).fit(*real)
    print(f"{arguments.samples} samples a caption, guidance {arguments.guidance}, {arguments.steps} steps;")
    print(f"the SVC's accuracy on held-out images is {svc.score(*held_out):.1%}\n")
    print(f"| captions | all | worst class | {' | '.join(map(str, range(10)))} |\n|---|---|---|{'---|' * 10}")
    pipeline = TextToImageDDPMPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    for number, (kind, texts) in enumerate(captions.items()):
        shares, pictures = [], []
        for label, text in enumerate(tqdm(texts, leave=False)):
            images = pipeline(
                text,
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance,
                num_images_per_prompt=arguments.samples,
                generator=torch.Generator().manual_seed(arguments.seed + label),
            ).images
            pictures += images[:10]
            pixels = np.stack([np.asarray(image.convert("L")).ravel() for image in images]) / 255.0
            shares.append(float((svc.predict(pixels) == label).mean()))
        cells = " | ".join(f"{share:.0%}" for share in shares)
        print(f"| {kind} | {np.mean(shares):.1%} | {min(shares):.0%} | {cells} |", flush=True)
        if arguments.grid and number == 0:
            image_grid(pictures, 10, scale=2).save(arguments.grid)


if __name__ == "__main__":
    main()
