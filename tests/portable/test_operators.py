"""The operators of restoration: adjoint, pseudo-inverse, SVD, and what they do to an image."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.portable.linear_ddpm_hf import Composition, FunctionOperator, as_operator
from ddpm_hf.portable.operators_ddpm_hf import OPERATORS, SeparableOperator
from tests.support.fixtures_pipeline import randn

SHAPES = [(1, 8, 8), (3, 12, 8), (4, 8, 12)]  # gray, rectangular, four channels
CLOSE = 1e-6


def make(name, shape):
    """The operator of a row, with its defaults."""
    options = {"mask": randn(*shape[1:]) > 0} if name == "mask" else {}
    return OPERATORS[name](shape, **options)


def matrix(function, shape):
    """A linear function of [N, *shape] as a matrix, one column for each element."""
    size = int(np.prod(shape))
    return function(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).reshape(size, -1).mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_pseudo_inverse_and_svd_are_those_of_the_matrix(name, shape):
    """Else every method solves another problem than the user's, and residuals do not vanish."""
    operator = make(name, shape)
    a = matrix(operator.forward, shape)
    torch.testing.assert_close(matrix(operator.adjoint, operator.observation_shape), a.mT, atol=CLOSE, rtol=0)
    inverse = torch.linalg.pinv(a, rtol=1e-9)
    torch.testing.assert_close(
        matrix(operator.pseudo_inverse, operator.observation_shape), inverse, atol=CLOSE, rtol=CLOSE
    )
    torch.testing.assert_close(a @ inverse @ a, a, atol=CLOSE, rtol=0)
    regularized = a.mT @ torch.linalg.inv(a @ a.mT + 0.3 * torch.eye(len(a), dtype=torch.float64))
    ours = matrix(lambda y: operator.regularized_inverse(y, 0.3), operator.observation_shape)
    torch.testing.assert_close(ours, regularized, atol=CLOSE, rtol=0)
    values, vectors = torch.linalg.eigh(a.mT @ a)
    expected = vectors @ torch.diag(torch.exp(-values.clamp(min=0).sqrt())) @ vectors.mT
    reweighted = matrix(lambda x: operator.reweight(x, lambda s: torch.exp(-s)), shape)
    torch.testing.assert_close(reweighted, expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "compressed-sensing"])
def test_constants_stay_what_they_are(name):
    """Else an observation of an image is too dark or too bright to be an image."""
    operator, ones = make(name, (3, 8, 8)), torch.ones(1, 3, 8, 8)
    y = operator.forward(ones)
    torch.testing.assert_close(y, operator.observed(torch.ones_like(y)), atol=1e-5, rtol=0)


def test_bicubic_is_pils():
    """Else a picture that PIL made small is restored as another one."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48), dtype=np.uint8)
    small = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize((12, 8), Image.Resampling.BICUBIC))
    ours = OPERATORS["bicubic"]((1, 32, 48), factor=4).forward(torch.tensor(pixels[None, None]).double())
    np.testing.assert_allclose(ours[0, 0], small, atol=0.05)


def test_blurs_are_those_of_scipy():
    """Else a blur of 2 pixels is another one than everywhere."""
    ndimage = pytest.importorskip("scipy.ndimage")
    x = randn(1, 1, 16, 16).double()
    ours = OPERATORS["gaussian-blur"]((1, 16, 16), sigma=1.5).forward(x)[0, 0]
    np.testing.assert_allclose(ours, ndimage.gaussian_filter(x[0, 0].numpy(), 1.5), atol=1e-2)  # its cutoff
    moved = OPERATORS["motion-blur"]((1, 16, 16), length=3).forward(x)[0, 0]
    np.testing.assert_allclose(moved, ndimage.uniform_filter1d(x[0, 0].numpy(), 3, axis=1, mode="wrap"), atol=1e-2)


def test_a_composition_is_the_product():
    """Else a gray small image is restored from something else."""
    shape = (3, 8, 8)
    small = OPERATORS["average-pooling"](shape)
    composed = Composition(small, OPERATORS["gray"](small.observation_shape))
    a = matrix(composed.forward, shape)
    inverse = matrix(composed.pseudo_inverse, composed.observation_shape)
    torch.testing.assert_close(inverse, torch.linalg.pinv(a), atol=CLOSE, rtol=0)
    product = small.then(OPERATORS["gray"](small.observation_shape))
    assert isinstance(product, SeparableOperator)
    for name in ("box", "motion-blur", "gaussian-blur"):  # one of any kind can be followed by another
        first, x = OPERATORS[name]((1, 8, 8)), torch.rand(1, 1, 8, 8)
        both = first.then(OPERATORS["box"]((1, 8, 8)))
        torch.testing.assert_close(both.forward(x), OPERATORS["box"]((1, 8, 8)).forward(first.forward(x)))
    torch.testing.assert_close(matrix(product.forward, shape), a, atol=CLOSE, rtol=0)


class Physics:
    """What deepinv calls an operator."""

    def A(self, x):
        return x[..., ::2] + x[..., 1::2]

    def A_adjoint(self, y):
        return y.repeat_interleave(2, -1)


@pytest.mark.parametrize(
    "given", [Physics(), (Physics().A, Physics().A_adjoint), (Physics().A, None)], ids=["physics", "pair", "gradient"]
)
def test_a_users_operator_is_two_functions(given):
    """Else only our own operators can be restored from."""
    shape = (1, 4, 6)
    operator = FunctionOperator(shape, *given) if isinstance(given, tuple) else as_operator(given, shape)
    a = matrix(operator.forward, shape)
    inverse = matrix(operator.pseudo_inverse, operator.observation_shape)
    torch.testing.assert_close(inverse, torch.linalg.pinv(a), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_no_image_explains_is_left_over(dtype):
    """Else the solution of an observation outside of the operator's range is NaN, or of 10⁸."""
    generator = torch.Generator().manual_seed(0)
    shown = (torch.rand(1, 1, 6, 6, generator=generator) > 0.5).to(dtype)
    sensors = FunctionOperator((1, 6, 6), lambda x: x.mean((2, 3), keepdim=True).expand(-1, 1, 4, 4))
    pooled = OPERATORS["box"]((1, 6, 6)).then(OPERATORS["average-pooling"]((1, 6, 6)))
    for operator in (FunctionOperator((1, 6, 6), *2 * [lambda x: x * shown.to(x.dtype)]), sensors, pooled):
        y = torch.randn(3, *operator.observation_shape, generator=generator, dtype=dtype)
        for ratio in (0.0, 0.3, torch.tensor([0.0, 0.1, 2.0], dtype=dtype)[:, None, None, None]):
            a = matrix(operator.forward, operator.shape)
            rho = torch.as_tensor(ratio, dtype=torch.float64).reshape(-1, 1, 1).expand(3, 1, 1)
            eye = torch.eye(a.shape[1], dtype=torch.float64)
            exact = torch.linalg.pinv(a.T @ a + rho * eye, rtol=1e-10) @ (a.T @ y.double().flatten(1)[:, :, None])
            found = operator.regularized_inverse(y, ratio).double().flatten(1)
            torch.testing.assert_close(found, exact[:, :, 0], atol=1e-5 if dtype == torch.float32 else 1e-9, rtol=0)


@pytest.mark.parametrize(
    ("make_it", "named"),
    [
        (lambda: OPERATORS["mask"]((1, 8, 8), torch.ones(8, 9)), "mask of shape (8, 9)"),
        (lambda: OPERATORS["mask"]((1, 8, 8), torch.zeros(8, 8)), "shows no pixel"),
        (lambda: OPERATORS["bicubic"]((1, 8, 9), factor=2), "8x9"),
        (lambda: OPERATORS["bicubic"]((1, 8, 8), factor=1), "factor=1"),
        (lambda: OPERATORS["box"]((1, 8, 8), hidden=1.0), "hidden=1.0"),
        (lambda: OPERATORS["half"]((1, 8, 8), shown="middle"), "'middle'"),
        (lambda: OPERATORS["gaussian-blur"]((1, 8, 8), sigma=-1), "sigma=-1"),
        (lambda: OPERATORS["compressed-sensing"]((1, 8, 8), ratio=2), "ratio=2"),
        (lambda: as_operator((Physics().A, lambda y: y.repeat(1, 1, 1, 2)), (1, 4, 6)), "adjoint"),
        (lambda: as_operator((lambda x: x * x, lambda y: y), (1, 4, 6)), "not linear"),
        (lambda: as_operator("blur", (1, 4, 6)), "'blur'"),
        (lambda: as_operator(OPERATORS["gray"]((3, 8, 8)), (3, 4, 4)), "(3, 8, 8)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(make_it, named):
    """Else a wrong operator fails within the chain, or restores something else."""
    with pytest.raises(ValueError, match=re.escape(named)):
        make_it()
