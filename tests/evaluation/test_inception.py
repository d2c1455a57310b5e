"""FID's Inception network against its architecture, written out here with plain functions, layer by layer."""

import dataclasses
import itertools
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ddpm_hf.common.errors import UsageError
from ddpm_hf.evaluation.features import extract, load_extractor
from ddpm_hf.evaluation.features import inception as module
from ddpm_hf.evaluation.features.inception import InceptionNetwork, extractor
from ddpm_hf.evaluation.protocols import PROTOCOLS

ADM = PROTOCOLS["adm"]


@pytest.fixture(scope="module")
def network():
    """With random weights that keep the size of activations, and batch statistics that show."""
    generator = torch.Generator().manual_seed(0)
    network = InceptionNetwork().eval().requires_grad_(False)
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bn.bias", "running_mean", "fc.bias")):
            value.normal_(0, 0.2, generator=generator)
    return network


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


class Reference:
    """The forward pass from a state dict with torchvision's names; counts the parameters of each block."""

    def __init__(self, state):
        self.state, self.block, self.parameters, self.outputs = state, "", {}, {}

    def conv(self, x, name, outputs, kernel, stride=1, padding=0):
        """Convolution, batch normalization with ε = 0.001, ReLU."""
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        name = f"{self.block}.{name}" if name else self.block
        weight = self.state[f"{name}.conv.weight"].double()
        assert weight.shape == (outputs, x.shape[1], height, width), name
        self.parameters[self.block] = self.parameters.get(self.block, 0) + weight.numel() + 2 * outputs
        scale, shift, mean, variance = (
            self.state[f"{name}.bn.{part}"].double()[:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = F.conv2d(x, weight, stride=stride, padding=padding)
        return ((x - mean) / (variance + 0.001).sqrt() * scale + shift).clamp(min=0)

    def average(self, x):
        """3×3 means of the pixels that are there."""
        ones = torch.ones_like(x[:1, :1])
        kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        sums = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view_as(x)
        return sums / F.conv2d(ones, kernel, padding=1)

    def mixed_5(self, x, pooled):
        b = self.conv(self.conv(x, "branch5x5_1", 48, 1), "branch5x5_2", 64, 5, padding=2)
        c = self.conv(self.conv(x, "branch3x3dbl_1", 64, 1), "branch3x3dbl_2", 96, 3, padding=1)
        c = self.conv(c, "branch3x3dbl_3", 96, 3, padding=1)
        d = self.conv(self.average(x), "branch_pool", pooled, 1)
        return torch.cat([self.conv(x, "branch1x1", 64, 1), b, c, d], 1)

    def mixed_6a(self, x):
        a = self.conv(x, "branch3x3", 384, 3, stride=2)
        b = self.conv(self.conv(x, "branch3x3dbl_1", 64, 1), "branch3x3dbl_2", 96, 3, padding=1)
        b = self.conv(b, "branch3x3dbl_3", 96, 3, stride=2)
        return torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)

    def mixed_6(self, x, width):
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        a = self.conv(x, "branch1x1", 192, 1)
        b = self.conv(self.conv(x, "branch7x7_1", width, 1), "branch7x7_2", width, **row)
        b = self.conv(b, "branch7x7_3", 192, **column)
        c = self.conv(self.conv(x, "branch7x7dbl_1", width, 1), "branch7x7dbl_2", width, **column)
        c = self.conv(self.conv(c, "branch7x7dbl_3", width, **row), "branch7x7dbl_4", width, **column)
        c = self.conv(c, "branch7x7dbl_5", 192, **row)
        return torch.cat([a, b, c, self.conv(self.average(x), "branch_pool", 192, 1)], 1)

    def mixed_7a(self, x):
        a = self.conv(self.conv(x, "branch3x3_1", 192, 1), "branch3x3_2", 320, 3, stride=2)
        b = self.conv(self.conv(x, "branch7x7x3_1", 192, 1), "branch7x7x3_2", 192, (1, 7), padding=(0, 3))
        b = self.conv(b, "branch7x7x3_3", 192, (7, 1), padding=(3, 0))
        b = self.conv(b, "branch7x7x3_4", 192, 3, stride=2)
        return torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)

    def mixed_7(self, x, pool):
        row, column = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        a = self.conv(x, "branch1x1", 320, 1)
        b = self.conv(x, "branch3x3_1", 384, 1)
        b = [self.conv(b, "branch3x3_2a", 384, **row), self.conv(b, "branch3x3_2b", 384, **column)]
        c = self.conv(self.conv(x, "branch3x3dbl_1", 448, 1), "branch3x3dbl_2", 384, 3, padding=1)
        c = [self.conv(c, "branch3x3dbl_3a", 384, **row), self.conv(c, "branch3x3dbl_3b", 384, **column)]
        return torch.cat([a, *b, *c, self.conv(pool(x), "branch_pool", 192, 1)], 1)

    def layers(self):
        """Each block: its name, what computes it, and the shape [C, H, W] of its output."""
        conv = self.conv
        return [
            ("Conv2d_1a_3x3", lambda x: conv(x, "", 32, 3, stride=2), (32, 149, 149)),
            ("Conv2d_2a_3x3", lambda x: conv(x, "", 32, 3), (32, 147, 147)),
            ("Conv2d_2b_3x3", lambda x: conv(x, "", 64, 3, padding=1), (64, 147, 147)),
            ("Conv2d_3b_1x1", lambda x: conv(F.max_pool2d(x, 3, 2), "", 80, 1), (80, 73, 73)),
            ("Conv2d_4a_3x3", lambda x: conv(x, "", 192, 3), (192, 71, 71)),
            ("Mixed_5b", lambda x: self.mixed_5(F.max_pool2d(x, 3, 2), 32), (256, 35, 35)),
            ("Mixed_5c", lambda x: self.mixed_5(x, 64), (288, 35, 35)),
            ("Mixed_5d", lambda x: self.mixed_5(x, 64), (288, 35, 35)),
            ("Mixed_6a", self.mixed_6a, (768, 17, 17)),
            ("Mixed_6b", lambda x: self.mixed_6(x, 128), (768, 17, 17)),
            ("Mixed_6c", lambda x: self.mixed_6(x, 160), (768, 17, 17)),
            ("Mixed_6d", lambda x: self.mixed_6(x, 160), (768, 17, 17)),
            ("Mixed_6e", lambda x: self.mixed_6(x, 192), (768, 17, 17)),
            ("Mixed_7a", self.mixed_7a, (1280, 8, 8)),
            ("Mixed_7b", lambda x: self.mixed_7(x, self.average), (2048, 8, 8)),
            ("Mixed_7c", lambda x: self.mixed_7(x, lambda y: F.max_pool2d(y, 3, 1, 1)), (2048, 8, 8)),
        ]

    def __call__(self, x):
        for name, layer, shape in self.layers():
            self.block = name
            x = layer(x)
            assert x.shape[1:] == shape, name
            self.outputs[name] = x
        return x.mean((2, 3))


def test_every_block_is_the_published_architecture(network):
    """Else the published weights load, and give other features."""
    x = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(2))
    ours = {}
    hooks = [
        block.register_forward_hook(lambda block, given, output, name=name: ours.update({name: output}))
        for name, block in network.named_children()
    ]
    output = network(x)
    for hook in hooks:
        hook.remove()
    reference = Reference(network.state_dict())
    pool = reference(x.double())
    assert set(ours) == set(reference.outputs)  # all blocks, and the last layer by its weights
    for name, expected in reference.outputs.items():
        assert ours[name].shape == expected.shape
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
        assert sum(p.numel() for p in network.get_submodule(name).parameters()) == reference.parameters[name]
    torch.testing.assert_close(output.pool.double(), pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits.double(), pool @ network.fc.weight.double().T, rtol=1e-4, atol=1e-4)
    spatial = reference.outputs["Mixed_6d"][0, :7].permute(1, 2, 0).flatten()  # branch1x1 comes first; channels last
    assert output.spatial.shape == (1, 2023)
    torch.testing.assert_close(output.spatial[0].double(), spatial, rtol=1e-4, atol=1e-4)


def test_the_parameters_are_as_many_as_published(network):
    """Torchvision's `inception_v3`: 27,161,264, of these 3,326,696 of the auxiliary classifier, which FID's lacks."""
    last = 2048 * 1000 + 1000
    without_last = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("fc."))
    assert without_last == 27_161_264 - 3_326_696 - last
    assert network.fc.weight.shape == (1008, 2048)
    assert sum(name.endswith("conv.weight") for name in network.state_dict()) == 94


def test_features_do_not_depend_on_the_batches(network, images):
    """Else a figure depends on the memory of the machine."""
    features = [extract(extractor(network, ADM), images.split(size)) for size in (3, 1)]
    for part in ("pool", "spatial", "logits"):
        one, other = (torch.from_numpy(getattr(each, part)) for each in features)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * one.std().item())


def test_the_protocols_scale_and_resize(network, images):
    """Else `--protocol` changes nothing, or not what it says."""
    first = images[:1]
    different = ("adm", "clean-fid", "dgm-eval")
    got = {name: extractor(network, PROTOCOLS[name])(first) for name in different}
    for one, other in itertools.combinations(different, 2):
        assert abs(got[one].pool - got[other].pool).max() > 1e-3
    fingerprints = {name: extractor(network, protocol).fingerprint for name, protocol in PROTOCOLS.items()}
    assert fingerprints["adm"] == fingerprints["torch-fidelity"] == fingerprints["edm2"]  # the same preparation
    assert len(set(fingerprints.values())) == 3
    resized = F.interpolate(first.float(), size=(299, 299), mode="bilinear") / 255  # as pytorch-fid
    expected = network(resized * 2 - 1).pool
    torch.testing.assert_close(torch.from_numpy(got["dgm-eval"].pool), expected, rtol=1e-4, atol=1e-4)


def test_logits_have_a_bias_only_where_a_protocol_says_so(network, images):
    """Else the Inception Score differs from the published ones in the second digit."""
    plain = extractor(network, ADM)
    biased = extractor(network, dataclasses.replace(ADM, logits_bias=True))
    difference = biased(images[:1]).logits - plain(images[:1]).logits
    torch.testing.assert_close(torch.from_numpy(difference[0]), network.fc.bias, rtol=1e-3, atol=1e-5)
    assert plain.fingerprint != biased.fingerprint


# Weights


@pytest.fixture
def saved(network, tmp_path):
    """The weights as torch saves them, without counters, as converted files are."""
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_weights_come_from_a_file_of_either_kind(network, saved, tmp_path, images):
    """Else `--features_weights` reads other weights, or none."""
    save_file(torch.load(saved, weights_only=True), tmp_path / "weights.safetensors")
    expected = extractor(network, ADM)
    for path in (saved, tmp_path / "weights.safetensors"):
        loaded = load_extractor("inception", protocol=ADM, weights=str(path))
        assert loaded.fingerprint == expected.fingerprint
        assert loaded.provides == {"pool", "spatial", "logits"}


class Attack:
    """What a pickle runs when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_file_of_something_else_is_refused_and_not_executed(network, saved, tmp_path):
    """Else a stranger's weights run code, or another network gives figures."""
    marker = tmp_path / "executed"
    torch.save({"x": Attack(marker)}, tmp_path / "attack.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "cut.pth").write_bytes(saved.read_bytes()[:100_000])
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a", "b")
    for name in ("attack.pth", "other.pth", "list.pth", "junk.pth", "junk.safetensors", "cut.pth", "zip.pth", "none"):
        with pytest.raises(UsageError) as caught:
            load_extractor("inception", protocol=ADM, weights=str(tmp_path / name))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Torch's cache in a folder of the test."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "hub" / "checkpoints"


def digest(path: Path) -> str:
    from ddpm_hf.evaluation.features.network import sha256_of

    return sha256_of(path)


def test_weights_are_downloaded_once_and_checked(hub, saved, network, monkeypatch):
    """Else each start downloads, or a broken file gives figures."""
    monkeypatch.setattr(module, "URL", saved.as_uri())
    monkeypatch.setattr(module, "SHA256", digest(saved))
    first = load_extractor("inception", protocol=ADM)
    assert [path.name for path in hub.iterdir()] == [saved.name]
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert load_extractor("inception", protocol=ADM).fingerprint == first.fingerprint
    (hub / saved.name).rename(hub / "weights-inception-2015-12-05-6726825d.pth")  # as torch-fidelity calls it
    assert load_extractor("inception", protocol=ADM).fingerprint == first.fingerprint


@pytest.mark.parametrize("why", ["no network", "offline", "another file"])
def test_without_weights_the_message_says_which_ways_are_left(why, hub, saved, monkeypatch, tmp_path):
    """Else a machine without a network ends in a traceback."""
    monkeypatch.setattr(module, "URL", saved.as_uri() if why == "another file" else (tmp_path / "no").as_uri())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", why == "offline")
    with pytest.raises(UsageError, match=r"--features_weights FILE.*efficientnet-lite0.*classifier:FOLDER") as caught:
        load_extractor("inception", protocol=ADM)
    assert "\n" not in str(caught.value)
    assert not hub.exists() or not list(hub.iterdir())
