"""The classifier of noised images: its network and its loss."""

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ddpm_hf import DDPMScheduler
from ddpm_hf.cli.classifier_training import compute_loss, validation_accuracy
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.models.classifier import AttentionPool, NoisyClassifier
from tests.support.classifier import STEPS, WEIGHTS, tiny_classifier
from tests.support.fixtures_pipeline import randn
from tests.support.runs import training_run

# The network


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, (8, 16)), (1, (16, 4))], ids=str)
def test_logits_are_one_row_an_image(channels, size):
    """Else height and width are taken for one another, or an image's logits depend on its neighbours."""
    model = tiny_classifier(channels, size)
    height, width = (size, size) if isinstance(size, int) else size
    x_t, t = randn(4, channels, height, width), torch.tensor([0, 3, 10, 19])
    with torch.no_grad():
        logits = model(x_t, t)
        assert logits.shape == (4, 3)
        for index in range(4):
            alone = model(x_t[index : index + 1], t[index : index + 1])
            torch.testing.assert_close(alone, logits[index : index + 1], rtol=0, atol=1e-5)


def test_a_timestep_is_a_number_or_one_for_each_image():
    """Else what calls it as a UNet is called fails, or all images get the first one's timestep."""
    model, x_t = tiny_classifier(), randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = model(x_t, torch.tensor([7, 7, 7]))
        for t in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7).expand(3), torch.tensor([7] * 3).int()):
            torch.testing.assert_close(model(x_t, t), expected, rtol=0, atol=1e-6)
        mixed = model(x_t, torch.tensor([7, 15, 7]))
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-5)
    assert (mixed[1] - expected[1]).abs().max() > 1e-3


def test_the_gradient_reaches_every_pixel_and_every_weight():
    """Else guidance leaves part of the image alone, or a part of the network never learns."""
    model = tiny_classifier(3, (8, 16)).train()
    x_t = randn(2, 3, 8, 16).requires_grad_(True)
    F.cross_entropy(model(x_t, torch.tensor([3, 12])), torch.tensor([0, 2])).backward()
    assert (x_t.grad != 0).float().mean() > 0.99
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert still == []


@pytest.mark.parametrize(("channels", "size", "heads"), [(8, (3, 3), 1), (8, (2, 5), 2), (64, (1, 4), 4)], ids=str)
def test_attention_pool_is_attention_of_the_mean(channels, size, heads):
    """Against the formula (Vaswani et al. 2017, Eq. 1); else it pools something else than its docstring says."""
    torch.manual_seed(0)
    pool = AttentionPool(channels, size[0] * size[1], heads).double()
    features = randn(3, channels, *size).double()
    tokens = torch.cat([features.mean(dim=(2, 3))[:, :, None], features.flatten(2)], dim=2).transpose(1, 2)
    tokens = tokens + pool.position  # [N, 1 + H·W, C]
    weights, biases = pool.attention.in_proj_weight.chunk(3), pool.attention.in_proj_bias.chunk(3)
    q, k, v = (F.linear(tokens, w, b).unflatten(2, (heads, -1)) for w, b in zip(weights, biases))  # [N, L, h, C/h]
    scores = torch.einsum("nhd,nlhd->nhl", q[:, 0], k) / math.sqrt(channels / heads)
    pooled = torch.einsum("nhl,nlhd->nhd", scores.softmax(dim=2), v).flatten(1)
    expected = F.linear(pooled, pool.attention.out_proj.weight, pool.attention.out_proj.bias)
    torch.testing.assert_close(pool(features), expected)
    with torch.no_grad():  # torch then computes it by another way
        torch.testing.assert_close(pool.eval()(features), expected)


@pytest.mark.parametrize("size", [8, (8, 16)], ids=str)
def test_a_saved_classifier_is_the_same_classifier(size, tmp_path):
    """Else guidance after loading is another's, or the folder holds pickled code, or forgets its diffusion."""
    model = tiny_classifier(3, size)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    loaded = NoisyClassifier.from_pretrained(tmp_path, use_safetensors=True)
    x_t = randn(2, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x_t, 4), model(x_t, 4))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    for config in (json.loads((tmp_path / "config.json").read_text()), loaded.config):
        assert config["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
        assert config["num_classes"] == 3
        assert config["num_train_timesteps"] == STEPS
        assert config["unet"]["in_channels"] == 3
        assert torch.equal(
            torch.tensor(config["trained_betas"], dtype=torch.float64),
            DDPMScheduler(STEPS, beta_schedule="cosine").exact_tables.betas,
        )
    again = NoisyClassifier.from_config(loaded.config)
    assert again.config.id2label == loaded.config.id2label
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


# The loss


def loss_at(model, labels, step=0):
    """The training loss of random images at one step."""
    count = len(labels)
    batch = {"images": (randn(count, 1, 8, 8) * 40 + 128).clamp(0, 255).byte(), "labels": torch.tensor(labels)}
    keys = StepKeys(0, step, 0, count)
    return compute_loss(model, batch, keys, scheduler=DDPMScheduler(STEPS), device=torch.device("cpu"))


def test_a_classifier_that_knows_nothing_loses_log_K():
    """ln K nats for equal logits; else the loss is not the mean cross-entropy that is logged as it."""
    model, labels = tiny_classifier(), [0, 1, 2] * 8
    with torch.no_grad():
        model.head.weight.mul_(1 / 8)  # as it is made
        assert loss_at(model, labels).losses.mean().item() == pytest.approx(math.log(3), abs=0.3)
        model.head.weight.zero_()
        model.head.bias.zero_()
        result = loss_at(model, labels)
    torch.testing.assert_close(result.losses, torch.full((24,), math.log(3)))
    assert set(result.groups.tolist()) == {0, 1, 2, 3}  # the quarters of T


def test_the_loss_is_the_cross_entropy_of_the_noised_image():
    """Else the classifier is trained on clean images, or at other timesteps than it is told."""
    labels = [0, 1, 2] * 8
    seen = []
    constant = torch.log(torch.tensor([0.5, 0.3, 0.2]))

    def model(x_t, t):
        seen.append((x_t, t))
        return constant.expand(len(x_t), 3)

    losses = loss_at(model, labels).losses
    torch.testing.assert_close(losses, -constant[torch.tensor(labels)])
    (x_t, t), x_start = seen[0], (randn(24, 1, 8, 8) * 40 + 128).clamp(0, 255).byte().float() / 127.5 - 1
    assert t.min() >= 0
    assert t.max() < STEPS
    assert len(set(t.tolist())) > 5
    alpha_bar = torch.cumprod(1 - DDPMScheduler(STEPS).exact_tables.betas, 0)[t].reshape(-1, 1, 1, 1).float()
    noise = (x_t - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
    assert noise.mean().item() == pytest.approx(0, abs=5 / math.sqrt(noise.numel()))
    assert noise.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / noise.numel()))


class HeldOut:
    """Seven images whose brightness is their class."""

    def __len__(self):
        return 7

    def __getitems__(self, keys):
        labels = torch.tensor([index % 3 for _, index in keys])
        return {"images": (labels * 100 + 20).byte().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8), "labels": labels}


def test_accuracies_are_shares_of_the_held_out_images():
    """Else the metrics count a partial batch twice, or noised images as clean ones."""
    asked = []

    def model(x_t, t):
        asked.append((x_t, t))
        known = (x_t.mean(dim=(1, 2, 3)) * 127.5 + 127.5 - 20) / 100  # the class, where there is no noise
        return -((torch.where(t == 0, known, torch.ones_like(known))[:, None] - torch.arange(3)) ** 2)

    one = {"process_index": 0, "num_processes": 1, "reduce": lambda total, reduction: total}
    engine = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext, **one)
    run, scheduler = training_run(engine, eval_batch_size=3), DDPMScheduler(STEPS)
    for _ in range(2):  # the same each time
        found = validation_accuracy(model, run=run, held_out=HeldOut(), scheduler=scheduler)
    clean, noised = ([torch.cat(pair) for pair in zip(*asked[start:6:2])] for start in (0, 1))
    assert len(clean[0]) == len(noised[0]) == 7
    assert (clean[1] == 0).all()
    assert noised[1].max() > 0
    assert all(torch.equal(x, again) for (x, _), (again, _) in zip(asked[:6], asked[6:], strict=True))
    assert (noised[0] - clean[0]).std() > 0.1
    labels = torch.arange(7) % 3
    right = torch.where(noised[1] == 0, True, labels == 1).double().mean().item()  # all others are taken for class 1
    assert found == {"accuracy_clean": 1.0, "accuracy_noised": pytest.approx(right)}
