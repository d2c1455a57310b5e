"""Protocols: how each published tool prepares images and computes its figures (one row a tool)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """What decides a figure besides the images and the network; figures of different protocols do not compare.

    All tools evaluate 8-bit images.

    Args:
        name: as in `--protocol`.
        tool: what it reproduces.
        inception_resize: how images become 299×299 for Inception, a key of `RESIZES`.
        inception_centre: c of (x - c) / c, with which Inception's input x in 0..255 is scaled.
        resize: the same for every other network, a key of `RESIZES`.
        clip_model: the CLIP network that `clip` without an argument loads, a name on the Hub.
        clip_projection: whether CLIP's features are projected to the space that it shares with texts.
        logits_bias: whether Inception's logits include the bias of its last layer.
        splits: number of parts of the Inception Score.
        split_size: samples in each part, in place of `splits`; the last part may be smaller.
        shuffle_seed: of the permutation before the Inception Score is split; None keeps the order.
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        strict: whether a ball excludes its surface (`<`), else it includes it (`<=`).
        manifold_samples: precision, recall, density and coverage use at most so many images of each set; None is all.
        kernel_subsets: number of subsets of KID.
        kernel_subset_size: images of each set in a subset.
    """

    name: str
    tool: str
    inception_resize: str = "tf1-bilinear"
    inception_centre: float = 128.0
    resize: str = "pil-bicubic"
    clip_model: str = "openai/clip-vit-base-patch32"
    clip_projection: bool = True
    logits_bias: bool = False
    splits: int = 10
    split_size: int | None = None
    shuffle_seed: int | None = None
    neighbours: int = 3
    density_neighbours: int = 5
    strict: bool = False
    manifold_samples: int | None = None
    kernel_subsets: int = 100
    kernel_subset_size: int = 1000


ROWS = (
    # evaluations/evaluator.py: Inception only; what it lacks is as in torch-fidelity, other networks as in dgm-eval
    Protocol("adm", "guided-diffusion's evaluator", split_size=5000),
    # defaults.py and the feature extractors of version 0.4
    Protocol("torch-fidelity", "torch-fidelity 0.4", resize="tf1-bilinear", shuffle_seed=2020),
    # resize.py in mode "clean"; clip_features.py; it has FID and KID alone
    Protocol(
        "clean-fid",
        "clean-fid 0.1",
        inception_resize="pil-bicubic-float",
        resize="pil-bicubic-crop",
        shuffle_seed=2020,
    ),
    # models/inception.py, models/dinov2.py, models/clip.py; __main__.py
    Protocol(
        "dgm-eval",
        "dgm-eval",
        inception_resize="torch-bilinear",
        inception_centre=127.5,
        clip_model="laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
        clip_projection=False,
        shuffle_seed=2020,
        neighbours=5,
        strict=True,
        manifold_samples=10_000,
    ),
    # calculate_metrics.py, which has the Fréchet distances alone
    Protocol("edm2", "EDM2's calculate_metrics.py", resize="torch-bicubic-antialias", shuffle_seed=2020),
)
PROTOCOLS: dict[str, Protocol] = {row.name: row for row in ROWS}
