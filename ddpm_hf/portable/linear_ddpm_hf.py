"""Linear operators y = A x: what restoration asks of them, and operators that consist of two functions.

All methods of restoration rest on three maps, of which the pseudo-inverse A⁺ = Aᵀ(AAᵀ)⁻¹ is one case:

    Aᵀ(AAᵀ + ρI)⁻¹ y          `regularized_inverse`, by conjugate gradients where A has no known SVD
    V f(S) Uᵀ y               `from_observation` \\
    V g(S) Vᵀ x + g(0) x_0    `reweight`          for A = U S Vᵀ; x_0 is the part of x that A does not observe

This file is copied into published repositories: it imports torch alone.
"""

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Shape: TypeAlias = tuple[int, ...]
OfSingularValues: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  # elementwise, of S ≥ 0
LinearMap: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
MOST_ITERATIONS = 500  # of conjugate gradients
READ_EVERY = 8  # iterations between two looks at whether all have converged, for which a GPU makes the host wait


class Operator:
    """A linear operator A from images x [N, C, H, W] to observations y [N, ...].

    A subclass defines `forward` and `adjoint`; the rest follows from them.

    Args:
        shape: (C, H, W) of x.

    Attributes:
        observation_shape: of y without N.
    """

    has_svd = False

    def __init__(self, shape: Shape, observation_shape: Shape):
        self.shape, self.observation_shape = tuple(shape), tuple(observation_shape)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape={shape!r}: give (C, H, W), the channels, height and width of the images")
        self._kept: dict[tuple, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A x, [N, *observation_shape] for x [N, *shape]."""
        raise NotImplementedError

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """Aᵀ y, [N, *shape] for y [N, *observation_shape]."""
        raise NotImplementedError

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        """A⁺ y, [N, *shape]: of all x that explain y best the smallest (Moore and Penrose)."""
        return self.regularized_inverse(y, 0.0)

    def regularized_inverse(self, y: torch.Tensor, ratio: float | torch.Tensor) -> torch.Tensor:
        """Aᵀ(AAᵀ + ρI)⁻¹ y, [N, *shape]: E[x | y] for x ~ N(0, I) and noise of variance ρ.

        Args:
            ratio: ρ, or one for each sample, [N, 1, 1, 1].
        """
        return least_squares(self.forward, self.adjoint, y, ratio)

    def observe(self, x: torch.Tensor, sigma_y: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        """A x + n with n ~ N(0, σ_y² I), [N, *observation_shape]; only what A observes has noise."""
        y = self.forward(x)
        if not sigma_y:
            return y
        device = generator.device if generator is not None else y.device
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=device)
        return y + sigma_y * self.observed(noise.to(y.device))

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        """y [N, *observation_shape] without what no x explains: the hidden pixels of a mask."""
        return y

    def then(self, other: "Operator") -> "Operator":
        """This operator followed by another.

        Raises:
            ValueError: the other does not read what this one gives.
        """
        return Composition(self, other)

    def cast(self, name: str, table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A constant of the operator, in the precision and on the device of a tensor; kept for the next call."""
        dtype = table.dtype if table.dtype == torch.bool or not table.is_floating_point() else like.dtype
        key = (name, like.device, dtype)
        if key not in self._kept:
            with torch.inference_mode(False):
                self._kept[key] = table.to(dtype=dtype).to(like.device)
        return self._kept[key]


class SpectralOperator(Operator):
    """An operator with a known singular value decomposition A = U S Vᵀ."""

    has_svd = True

    def from_observation(self, y: torch.Tensor, factor: OfSingularValues) -> torch.Tensor:
        """V f(S) Uᵀ y, [N, *shape]; `factor` is asked for positive singular values only."""
        raise NotImplementedError

    def reweight(self, x: torch.Tensor, factor: OfSingularValues) -> torch.Tensor:
        """V g(S) Vᵀ x + g(0) (x - V Vᵀ x), [N, *shape]; `factor` is asked for 0 too."""
        raise NotImplementedError

    @property
    def norm(self) -> float:
        """The largest singular value."""
        values: list[float] = []

        def note(s: torch.Tensor) -> torch.Tensor:
            values.append(float(s.max()))
            return s

        self.reweight(torch.zeros(1, *self.shape, dtype=torch.float64), note)
        return max(values)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """Aᵀ y = V S Uᵀ y."""
        return self.from_observation(y, lambda s: s)

    def regularized_inverse(self, y: torch.Tensor, ratio: float | torch.Tensor) -> torch.Tensor:
        """Aᵀ(AAᵀ + ρI)⁻¹ y = V S/(S² + ρ) Uᵀ y."""
        exact = not isinstance(ratio, torch.Tensor) and not ratio
        return self.from_observation(y, lambda s: 1 / s if exact else s / (s * s + ratio))


class FunctionOperator(Operator):
    """A user's operator: two functions, A and its adjoint.

    Args:
        shape: (C, H, W) of x.
        forward: A, [N, C, H, W] -> [N, ...].
        adjoint: Aᵀ, [N, ...] -> [N, C, H, W]. Without it, it is A's gradient.
        pseudo_inverse: A⁺ where it is known; otherwise it is computed by conjugate gradients.

    Raises:
        ValueError: functions whose shapes do not fit, or that are not linear and adjoint.
    """

    def __init__(
        self,
        shape: Shape,
        forward: LinearMap,
        adjoint: LinearMap | None = None,
        pseudo_inverse: LinearMap | None = None,
    ):
        probe = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        y = forward(probe)
        if not isinstance(y, torch.Tensor) or len(y) != 1:
            raise ValueError("the operator's function must map a batch [N, C, H, W] to a batch [N, ...]")
        super().__init__(shape, tuple(y.shape[1:]))
        self._forward, self._pseudo_inverse = forward, pseudo_inverse
        self._adjoint = adjoint or self._gradient
        back = self._adjoint(y)
        if tuple(back.shape) != tuple(probe.shape):
            raise ValueError(f"the adjoint returns {tuple(back.shape)} for images of shape {tuple(probe.shape)}")
        forth, doubled = float((y * y).sum()), forward(2 * probe)
        if not torch.allclose(doubled, 2 * y, rtol=1e-3, atol=1e-4):
            raise ValueError("the operator is not linear: A(2x) differs from 2 A(x)")
        if abs(forth - float((back * probe).sum())) > 1e-3 * max(forth, 1e-12):
            raise ValueError("the adjoint does not fit the operator: <A x, y> differs from <x, Aᵀ y>")

    def _gradient(self, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = torch.zeros(len(y), *self.shape, dtype=y.dtype, device=y.device, requires_grad=True)
            return torch.autograd.grad(self._forward(x), x, y)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A x."""
        return self._forward(x)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """Aᵀ y."""
        return self._adjoint(y)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        """A⁺ y."""
        return super().pseudo_inverse(y) if self._pseudo_inverse is None else self._pseudo_inverse(y)


class Composition(Operator):
    """A = A_n ... A_1: the operators in the order in which they act.

    Raises:
        ValueError: none given, or two that do not fit.
    """

    def __init__(self, *operators: Operator):
        if not operators:
            raise ValueError("a composition requires an operator")
        for before, after in itertools.pairwise(operators):
            if before.observation_shape != after.shape:
                raise ValueError(
                    f"the operators do not fit: one gives {before.observation_shape}, the next reads {after.shape}"
                )
        super().__init__(operators[0].shape, operators[-1].observation_shape)
        self.operators = operators

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A x."""
        for operator in self.operators:
            x = operator.forward(x)
        return x

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """Aᵀ y."""
        for operator in reversed(self.operators):
            y = operator.adjoint(y)
        return y

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        """What the last operator observes."""
        return self.operators[-1].observed(y)


def as_operator(operator: Any, shape: Shape) -> Operator:
    """An `Operator` for images of `shape`: ours, a physics of deepinv, or a pair of functions (A, Aᵀ).

    Raises:
        ValueError: none of these, or for images of another shape.
    """
    ours = ("forward", "adjoint", "pseudo_inverse", "regularized_inverse")
    if isinstance(operator, Operator) or all(callable(getattr(operator, name, None)) for name in ours):
        if tuple(operator.shape) != tuple(shape):
            raise ValueError(
                f"the operator is for images of shape {tuple(operator.shape)}, and the images are {tuple(shape)}"
                " (channels, height, width)"
            )
        return operator
    if callable(getattr(operator, "A", None)) and callable(getattr(operator, "A_adjoint", None)):
        return FunctionOperator(shape, operator.A, operator.A_adjoint, getattr(operator, "A_dagger", None))
    if isinstance(operator, (tuple, list)) and len(operator) == 2 and all(map(callable, operator)):
        return FunctionOperator(shape, *operator)
    raise ValueError(
        f"operator={operator!r}: give one of OPERATORS, a physics of deepinv, or a pair of functions (A, its adjoint)"
    )


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """⟨a, b⟩ of each sample, [N, 1, ...] to broadcast against [N, ...]."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def least_squares(
    forward: LinearMap, adjoint: LinearMap, y: torch.Tensor, ratio: float | torch.Tensor = 0.0
) -> torch.Tensor:
    """argmin ‖y - A x‖² + ρ ‖x‖², [N, C, H, W]; with ρ = 0 the smallest of them (CGLS, Björck 1996, sec. 7.4).

    y may have parts that no x explains: they are what remains of the residual. It stops at the rounding of y's
    precision, each sample by itself.

    Args:
        ratio: ρ, or one for each sample, [N, 1, 1, 1].
    """
    tolerance = 1e-14 if y.dtype == torch.float64 else 1e-7
    residual, gradient = y, adjoint(y)  # y - A x, and Aᵀ(y - A x) - ρ x
    x, direction, size = torch.zeros_like(gradient), gradient, inner(gradient, gradient)
    largest, explained = torch.zeros_like(size), tolerance**2 * inner(y, y).reshape(size.shape)
    for iteration in range(MOST_ITERATIONS):
        image, length = forward(direction), inner(direction, direction)
        curvature = inner(image, image).reshape(size.shape) + ratio * length
        largest = torch.maximum(largest, curvature / length.clamp(min=1e-38))  # of ‖A‖² + ρ
        error = inner(residual, residual).reshape(size.shape) + ratio * inner(x, x)
        left = (error > explained) & (size > (10 * tolerance) ** 2 * largest * error)  # else rounding remains
        if iteration % READ_EVERY == READ_EVERY - 1 and not bool(left.any()):
            break  # a sample that has converged stays as it is until then
        step = torch.where(left & (curvature > 0), size / curvature.clamp(min=1e-38), 0.0)
        x = x + step * direction
        residual = residual - step.reshape(-1, *[1] * (y.ndim - 1)) * image
        gradient = torch.where(left, adjoint(residual) - ratio * x, 0.0)
        before, size = size, inner(gradient, gradient)
        direction = gradient + torch.where(before > 0, size / before.clamp(min=1e-38), 0.0) * direction
    return x


def conjugate_gradients(matrix: LinearMap, y: torch.Tensor, iterations: int) -> torch.Tensor:
    """u with M u = y for a symmetric positive definite M, [N, ...] (Hestenes & Stiefel 1952).

    It stops at the rounding of y's precision, each sample by itself.
    """
    tolerance = 1e-14 if y.dtype == torch.float64 else 1e-7
    u, residual = torch.zeros_like(y), y
    direction, size = residual, inner(residual, residual)
    enough = tolerance**2 * size
    for iteration in range(iterations):
        if iteration % READ_EVERY == READ_EVERY - 1 and bool((size <= enough).all()):
            break  # a sample that has converged stays as it is until then
        image = matrix(direction)
        curvature = inner(direction, image)
        step = torch.where((size > enough) & (curvature > 0), size / curvature.clamp(min=1e-38), 0.0)
        u, residual = u + step * direction, residual - step * image
        before, size = size, inner(residual, residual)
        direction = residual + torch.where(before > 0, size / before.clamp(min=1e-38), 0.0) * direction
    return u
