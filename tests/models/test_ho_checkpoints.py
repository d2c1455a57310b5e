"""Ho et al.'s TensorFlow checkpoints are read without TensorFlow, and their networks are the same functions."""

import numpy as np
import pytest
import torch

from ddpm_hf.models.converters import Options, convert
from ddpm_hf.models.converters.ho import EMA, is_ho, of_tensorflow
from ddpm_hf.models.converters.tensor_bundle import crc32c, read_bundle
from tests.support.ho_network import forward, variables, write_bundle

CIFAR = {"channels": 32, "factors": (1, 2), "layers": 2, "attends": (False, True)}
FLAGS = "--model_var_type fixedlarge"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(prefix, weights, averaged weights) of a checkpoint as Ho et al.'s training leaves it."""
    tmp_path = tmp_path_factory.mktemp("ho")
    weights, averaged = variables(**CIFAR), variables(**CIFAR, seed=1)
    arrays = dict(weights) | {name + EMA: value for name, value in averaged.items()}
    arrays |= {f"{name}/Adam": value[:1] for name, value in weights.items()}
    arrays["global_step"] = np.array(790000, np.int64)
    write_bundle(tmp_path / "model.ckpt-790000", arrays, shards=2)
    return tmp_path / "model.ckpt-790000", weights, averaged


def test_the_reader_returns_what_was_written(checkpoint):
    """Else a checkpoint is read with other values, shapes or names, and no error says so."""
    prefix, weights, averaged = checkpoint
    read = read_bundle(prefix)
    assert len(read) == 3 * len(weights) + 1
    assert read["global_step"] == 790000
    for name, value in weights.items():
        np.testing.assert_array_equal(read[name], value)
        np.testing.assert_array_equal(read[name + EMA], averaged[name])
    assert read_bundle(prefix.parent).keys() == read.keys()  # a folder with one checkpoint


def test_types_scalars_and_empty_arrays(tmp_path):
    """Else only what the tests above hold can be read."""
    arrays = {
        "a": np.float64(1.5),
        "b": np.zeros((0, 3), np.float32),
        "c/d": np.arange(6, dtype=np.int32).reshape(2, 3),
        "h": np.array([1, 2], np.float16),
    }
    write_bundle(tmp_path / "x", arrays)
    read = read_bundle(tmp_path / "x.index")
    for name, value in arrays.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


def test_checksums_are_castagnolis():
    """The check value of the polynomial, and a byte at a time; else damaged files pass, or whole ones do not."""
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(np.full(32, 255, np.uint8)) == 0x62A8AB43
    data = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    twice = [crc32c(data[:n]) for n in (0, 1, 64, 4999)]
    assert twice == [bitwise(data[:n]) for n in (0, 1, 64, 4999)]


def bitwise(data):
    state = 0xFFFFFFFF
    for byte in data.tolist():
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize("ema", [True, False])
def test_the_converted_network_is_the_original_function(checkpoint, ema):
    """Else padding, norms, the order of sines or a transposed matrix differ, and samples are subtly wrong."""
    prefix, weights, averaged = checkpoint
    pipeline = convert(str(prefix), Options(FLAGS, ema=ema)).model
    assert pipeline.unet.config.sample_size == 32  # it attends at 16×16
    x, t = np.random.default_rng(2).normal(size=(2, 16, 16, 3)), np.array([3, 871])
    expected = forward(averaged if ema else weights, x, t, layers=2).transpose(0, 3, 1, 2)
    for dtype, most in ((torch.float64, 1e-6), (torch.float32, 1e-5)):  # the sinusoids are float32 in any case
        unet = pipeline.unet.to(dtype)
        with torch.no_grad():
            ours = unet(torch.from_numpy(x).permute(0, 3, 1, 2).to(dtype), torch.from_numpy(t)).sample.numpy()
        assert np.abs(ours - expected).max() <= most * expected.std()
    assert pipeline.scheduler.config.variance_type == "fixed_large"
    assert (pipeline.scheduler.config.beta_schedule, len(pipeline.scheduler)) == ("linear", 1000)


def test_the_port_and_npz_are_the_same_network(checkpoint, tmp_path):
    """Else the three ways to one model give different ones."""
    prefix, _, averaged = checkpoint
    np.savez(tmp_path / "vars.npz", **averaged)
    port = of_tensorflow(averaged, ema=False)
    port = {
        name: value[..., None, None] if value.ndim == 2 and "temb" not in name else value
        for name, value in port.items()
    }  # its 1×1 layers convolve
    assert is_ho(port)
    torch.save(port, tmp_path / "ema_cifar10.ckpt")
    states = [
        convert(str(path), Options(FLAGS)).model.unet.state_dict()
        for path in (prefix, tmp_path / "vars.npz", tmp_path / "ema_cifar10.ckpt")
    ]
    for name, value in states[0].items():
        assert all(torch.equal(value, other[name]) for other in states[1:])


def test_the_published_sizes_have_their_variances():
    """Else the CIFAR-10 model samples with the variance of LSUN's, or a variance is guessed."""
    from ddpm_hf.models.converters.ho import read_config

    for factors, attends, size, variance, dropout in (
        ((1, 2, 2, 2), (0, 1, 0, 0), 32, "fixed_large", 0.1),
        ((1, 1, 2, 2, 4, 4), (0, 0, 0, 0, 1, 0), 256, "fixed_small", 0.0),
    ):
        state = {
            "conv_in.weight": torch.empty(128, 3, 3, 3, device="meta"),
            "conv_out.weight": torch.empty(3, 128, 3, 3, device="meta"),
        }
        for level, factor in enumerate(factors):
            for layer in range(2):
                state[f"down.{level}.block.{layer}.conv1.weight"] = torch.empty(128 * factor, 1, device="meta")
            if attends[level]:
                state[f"down.{level}.attn.0.q.weight"] = torch.empty(1, device="meta")
        unet, scheduler, _ = read_config(state, {})
        assert (unet["sample_size"], scheduler["variance_type"], unet["dropout"]) == (size, variance, dropout)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda index, data: index.write_bytes(index.read_bytes()[:-20]), "truncated, or not the index"),
        (lambda index, data: index.write_bytes(b"x" + index.read_bytes()[1:]), "checksum of the index"),
        (lambda index, data: data.write_bytes(data.read_bytes()[:-400]), "truncated"),
        (
            lambda index, data: data.write_bytes(data.read_bytes()[:100] + b"\x01" + data.read_bytes()[101:]),
            "checksum",
        ),
        (lambda index, data: data.unlink(), "No such file"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage, says):
    """Else a network of half a file samples noise."""
    prefix = tmp_path / "model.ckpt-1"
    write_bundle(prefix, variables(factors=(1,), attends=(False,)), shards=2)
    damage(prefix.with_name(prefix.name + ".index"), prefix.with_name(prefix.name + ".data-00000-of-00002"))
    with pytest.raises(ValueError, match=says):
        read_bundle(prefix)
