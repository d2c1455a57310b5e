"""The operators of restoration: masks, smaller images, gray, blurs, compressed sensing; `OPERATORS` has them by name.

Those that map images to images keep constants (A 1 = 1, where a mask shows it): their observations are images too.

This file is copied into published repositories: it imports torch and `linear_ddpm_hf`, from the same folder.
"""

import math
from collections.abc import Callable

import torch

from .linear_ddpm_hf import OfSingularValues, Operator, Shape, SpectralOperator

CUTOFF = 1e-3  # singular values below this share of the largest are 0: 8 bits a pixel observe nothing of them
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
CUBIC = -0.5  # Keys 1981, as PIL


class MaskOperator(SpectralOperator):
    """The pixels that a mask shows; the others are 0 in y, and whatever a given y holds there is not read.

    Args:
        mask: True where a pixel is observed, [H, W] or [C, H, W].

    Raises:
        ValueError: a mask of another size, or one that shows nothing.
    """

    def __init__(self, shape: Shape, mask: torch.Tensor):
        super().__init__(shape, shape)
        mask = torch.as_tensor(mask)
        fits = mask.ndim in (2, 3) and tuple(mask.shape[-2:]) == self.shape[1:]
        if not fits or (mask.ndim == 3 and mask.shape[0] not in (1, self.shape[0])):
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} for images of {self.shape[1]}x{self.shape[2]} pixels"
            )
        self.mask = mask.bool().expand(self.shape).clone()  # [C, H, W]
        if not self.mask.any():
            raise ValueError("the mask shows no pixel")

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        """y where the mask shows it, else 0."""
        return torch.where(self.cast("mask", self.mask, y), y, 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x where the mask shows it, else 0."""
        return self.observed(x)

    def from_observation(self, y: torch.Tensor, factor: OfSingularValues) -> torch.Tensor:
        """S is 1."""
        return factor(torch.ones((), dtype=y.dtype, device=y.device)) * self.observed(y)

    def reweight(self, x: torch.Tensor, factor: OfSingularValues) -> torch.Tensor:
        """g(1) where the mask shows x, else g(0)."""
        shown, hidden = factor(x.new_ones(())), factor(x.new_zeros(()))
        return torch.where(self.cast("mask", self.mask, x), shown * x, hidden * x)


class SeparableOperator(SpectralOperator):
    """A matrix for each axis: A = A_channels ⊗ A_rows ⊗ A_columns, whose SVD is that of its factors.

    Args:
        channels, rows, columns: float matrices [C', C], [H', H] and [W', W]; None is the identity.
        cutoff: singular values below this share of the largest are taken for 0, in `forward` too.
    """

    def __init__(
        self,
        shape: Shape,
        channels: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        cutoff: float = CUTOFF,
    ):
        matrices = [None if one is None else torch.as_tensor(one).double() for one in (channels, rows, columns)]
        for matrix, size in zip(matrices, shape):
            if matrix is not None and (matrix.ndim != 2 or matrix.shape[1] != size):
                raise ValueError(f"a matrix of shape {tuple(matrix.shape)} for an axis of {size}")
        super().__init__(shape, tuple(size if one is None else len(one) for one, size in zip(matrices, shape)))
        self.matrices = matrices
        self._left: list[torch.Tensor | None] = []
        self._right: list[torch.Tensor | None] = []
        values = torch.ones(1, 1, 1, dtype=torch.float64)
        for axis, matrix in enumerate(matrices):
            s = torch.ones(shape[axis], dtype=torch.float64)
            u = v = None
            if matrix is not None:
                u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
                v = vh.mT.contiguous()
            self._left.append(u)
            self._right.append(v)
            values = values * s.reshape([-1 if other == axis else 1 for other in range(3)])
        self.singular_values = torch.where(values < cutoff * values.max(), 0.0, values)  # [c, h, w], the ranks

    def then(self, other: Operator) -> Operator:
        """This operator followed by another; of two separable ones the SVD is known again."""
        if not isinstance(other, SeparableOperator):
            return super().then(other)
        if self.observation_shape != other.shape:
            raise ValueError(
                f"the operators do not fit: one gives {self.observation_shape}, the next reads {other.shape}"
            )
        pairs = zip(self.matrices, other.matrices)
        channels, rows, columns = (a if b is None else b if a is None else b @ a for a, b in pairs)
        return SeparableOperator(self.shape, channels, rows, columns)

    def _apply(self, name: str, factors: list[torch.Tensor | None], x: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Multiply each axis of x [N, C, H, W] by its matrix."""
        for axis, matrix in enumerate(factors):
            if matrix is not None:
                on = self.cast(f"{name}{axis}", matrix, x)
                x = torch.movedim(torch.movedim(x, axis + 1, -1) @ (on if transposed else on.mT), -1, axis + 1)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """U S Vᵀ x."""
        spectrum = self._apply("right", self._right, x, True)  # [N, c, h, w]
        return self._apply("left", self._left, spectrum * self.cast("values", self.singular_values, x), False)

    def from_observation(self, y: torch.Tensor, factor: OfSingularValues) -> torch.Tensor:
        """V f(S) Uᵀ y."""
        s = self.cast("values", self.singular_values, y)
        factors = torch.where(s > 0, factor(torch.where(s > 0, s, 1.0)), 0.0)
        return self._apply("right", self._right, self._apply("left", self._left, y, True) * factors, False)

    def reweight(self, x: torch.Tensor, factor: OfSingularValues) -> torch.Tensor:
        """V g(S) Vᵀ x + g(0) (x - V Vᵀ x)."""
        s = self.cast("values", self.singular_values, x)
        unseen = factor(torch.zeros((), dtype=x.dtype, device=x.device))
        spectrum = self._apply("right", self._right, x, True) * (factor(s) - unseen)
        return unseen * x + self._apply("right", self._right, spectrum, False)


class ConvolutionOperator(SpectralOperator):
    """Circular convolution of each channel with a kernel, whose SVD is the Fourier transform.

    Args:
        kernel: float [h, w], centred; it wraps around the images.
        cutoff: frequencies below this share of the strongest are taken for 0, in `forward` too.
    """

    def __init__(self, shape: Shape, kernel: torch.Tensor, cutoff: float = CUTOFF):
        super().__init__(shape, shape)
        kernel = torch.as_tensor(kernel).double()
        height, width = self.shape[1:]
        if kernel.ndim != 2 or not kernel.numel():
            raise ValueError(f"a kernel of shape {tuple(kernel.shape)}: give a matrix [h, w]")
        rows, columns = ((torch.arange(n) - n // 2) % size for n, size in zip(kernel.shape, (height, width)))
        centred = torch.zeros(height, width, dtype=torch.float64)
        centred.index_put_((rows[:, None], columns[None]), kernel, accumulate=True)
        response = torch.fft.rfft2(centred)  # [H, W // 2 + 1]
        gains = response.abs()
        seen = gains >= cutoff * gains.max()
        self.singular_values = torch.where(seen, gains, 0.0)
        phase = torch.where(seen, response / gains.clamp(min=1e-300), 1.0)
        self._phase = torch.stack([phase.real, phase.imag])

    def _multiply(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * factors, s=self.shape[1:])

    def _u_over_v(self, like: torch.Tensor) -> torch.Tensor:
        return torch.complex(*self.cast("phase", self._phase, like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution."""
        return self._multiply(x, self.cast("values", self.singular_values, x) * self._u_over_v(x))

    def from_observation(self, y: torch.Tensor, factor: OfSingularValues) -> torch.Tensor:
        """f of the gain, and the phase turned back."""
        s = self.cast("values", self.singular_values, y)
        factors = torch.where(s > 0, factor(torch.where(s > 0, s, 1.0)), 0.0)
        return self._multiply(y, factors * self._u_over_v(y).conj())

    def reweight(self, x: torch.Tensor, factor: OfSingularValues) -> torch.Tensor:
        """g of the gain."""
        return self._multiply(x, factor(self.cast("values", self.singular_values, x)))


class CompressedSensingOperator(SpectralOperator):
    """Random rows of an orthogonal transform of randomly signed pixels: m of C·H·W measurements, y [N, m].

    The transform of each channel is Walsh and Hadamard's where height and width are powers of two, else the cosine
    transform.

    Args:
        ratio: m as a share of C·H·W.
        seed: of the rows and signs.
    """

    def __init__(self, shape: Shape, ratio: float = 0.25, seed: int = 0):
        pixels = math.prod(shape)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio!r}: must be above 0, and at most 1")
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(pixels, generator=generator)[: max(1, round(ratio * pixels))].sort().values
        super().__init__(shape, (len(rows),))
        self._rows = rows
        self._signs = (torch.randint(2, shape, generator=generator) * 2 - 1).double()
        powers = all(size & (size - 1) == 0 for size in shape[1:])
        self._transforms = [hadamard(size) if powers else cosine_transform(size) for size in shape[1:]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The measurements."""
        signed = x * self.cast("signs", self._signs, x)
        height, width = (self.cast(f"transform{axis}", one, x) for axis, one in enumerate(self._transforms))
        return (height @ signed @ width.mT).flatten(1)[:, self.cast("rows", self._rows, x)]  # [N, m]

    def from_observation(self, y: torch.Tensor, factor: OfSingularValues) -> torch.Tensor:
        """S is 1."""
        spectrum = y.new_zeros(len(y), math.prod(self.shape))
        spectrum[:, self.cast("rows", self._rows, y)] = y
        height, width = (self.cast(f"transform{axis}", one, y) for axis, one in enumerate(self._transforms))
        x = (height.mT @ spectrum.reshape(-1, *self.shape) @ width) * self.cast("signs", self._signs, y)
        return factor(torch.ones((), dtype=y.dtype, device=y.device)) * x

    def reweight(self, x: torch.Tensor, factor: OfSingularValues) -> torch.Tensor:
        """g(1) of what is measured, g(0) of the rest."""
        seen, unseen = factor(x.new_ones(())), factor(x.new_zeros(()))
        return unseen * x + (seen - unseen) * self.from_observation(self.forward(x), lambda s: s)


# Matrices and kernels, float64


def hadamard(size: int) -> torch.Tensor:
    """Walsh and Hadamard's orthogonal matrix [size, size], for a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / math.sqrt(size)


def cosine_transform(size: int) -> torch.Tensor:
    """The orthogonal cosine transform (DCT-II), [size, size]."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def pooling_matrix(size: int, factor: int) -> torch.Tensor:
    """Means of `factor` neighbours, [size / factor, size]."""
    return torch.kron(torch.eye(size // factor).double(), torch.full((1, factor), 1 / factor).double())


def cubic_matrix(size: int, factor: int) -> torch.Tensor:
    """Bicubic reduction by `factor` with antialiasing, as PIL's, [size / factor, size]."""
    centres = (torch.arange(size // factor, dtype=torch.float64) + 0.5) * factor
    distance = ((torch.arange(size, dtype=torch.float64) + 0.5 - centres[:, None]) / factor).abs()
    a = CUBIC
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def gaussian_matrix(size: int, sigma: float) -> torch.Tensor:
    """Gaussian blur of `sigma` pixels, reflected at the border, [size, size]."""
    radius = max(1, math.ceil(4 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights = weights / weights.sum()
    place = (torch.arange(size)[:, None] + offsets) % (2 * size)  # the image and its mirror image repeat
    place = torch.where(place < size, place, 2 * size - 1 - place)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, place, weights.expand(size, -1).contiguous())


def anisotropic_kernel(along: float, across: float, angle: float) -> torch.Tensor:
    """A Gaussian of these deviations in pixels along and across a direction, in degrees from the horizontal."""
    radius = max(1, math.ceil(3 * max(along, across)))
    y, x = torch.meshgrid(*[torch.arange(-radius, radius + 1, dtype=torch.float64)] * 2, indexing="ij")
    turn = math.radians(angle)
    u, v = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    kernel = torch.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
    return kernel / kernel.sum()


def motion_kernel(length: float, angle: float) -> torch.Tensor:
    """A straight path of `length` pixels in a direction, in degrees from the horizontal."""
    radius = max(1, math.ceil(length / 2))
    turn = math.radians(angle)
    count = 15 * math.ceil(length)
    steps = length * ((torch.arange(count, dtype=torch.float64) + 0.5) / count - 0.5)
    x, y = radius + steps * math.cos(turn), radius - steps * math.sin(turn)
    place = torch.arange(2 * radius + 1, dtype=torch.float64)
    columns, rows = (((along[:, None] - place).abs() < 0.5).double() for along in (x, y))  # [steps, w], nearest
    kernel = rows.mT @ columns
    return kernel / kernel.sum()


# Operators by name


def identity(shape: Shape) -> Operator:
    """The image itself, for denoising."""
    return SeparableOperator(shape)


def box(shape: Shape, hidden: float = 0.5) -> Operator:
    """A box in the middle is hidden, of `hidden` of the height and width."""
    check_share(hidden=hidden)
    mask = torch.ones(shape[1:], dtype=torch.bool)
    (top, height), (left, width) = (((n - round(hidden * n)) // 2, max(1, round(hidden * n))) for n in shape[1:])
    mask[top : top + height, left : left + width] = False
    return MaskOperator(shape, mask)


def random_pixels(shape: Shape, hidden: float = 0.5, seed: int = 0) -> Operator:
    """Random pixels are hidden, a share `hidden` of them."""
    check_share(hidden=hidden)
    order = torch.randperm(shape[1] * shape[2], generator=torch.Generator().manual_seed(seed))
    return MaskOperator(shape, (order >= round(hidden * len(order))).reshape(shape[1:]))


def half(shape: Shape, shown: str = "left") -> Operator:
    """One half is shown: the left, right, top or bottom one."""
    height, width = shape[1:]
    halves = {
        "left": (slice(None), slice(0, width // 2)), "right": (slice(None), slice(width // 2, None)),
        "top": (slice(0, height // 2), slice(None)), "bottom": (slice(height // 2, None), slice(None)),
    }  # fmt: skip
    if shown not in halves:
        raise ValueError(f"shown={shown!r}: must be one of {', '.join(halves)}")
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[halves[shown]] = True
    return MaskOperator(shape, mask)


def average_pooling(shape: Shape, factor: int = 2) -> Operator:
    """Each pixel is the mean of `factor` × `factor`."""
    check_factor(shape, factor)
    rows, columns = (pooling_matrix(size, factor) for size in shape[1:])
    return SeparableOperator(shape, None, rows, columns)


def bicubic(shape: Shape, factor: int = 2) -> Operator:
    """Reduced `factor` times by PIL's bicubic filter."""
    check_factor(shape, factor)
    rows, columns = (cubic_matrix(size, factor) for size in shape[1:])
    return SeparableOperator(shape, None, rows, columns)


def gray(shape: Shape) -> Operator:
    """The luma of three channels (and alpha, the fourth, as it is); of other images the mean of the channels."""
    weights = torch.full((1, shape[0]), 1 / shape[0], dtype=torch.float64)
    if shape[0] in (3, 4):
        weights = torch.zeros(shape[0] - 2, shape[0], dtype=torch.float64)
        weights[0, :3] = torch.tensor(LUMA, dtype=torch.float64)
        if shape[0] == 4:
            weights[1, 3] = 1.0
    return SeparableOperator(shape, weights)


def gaussian_blur(shape: Shape, sigma: float = 1.0) -> Operator:
    """A Gaussian blur of `sigma` pixels, reflected at the border."""
    check_positive(sigma=sigma)
    rows, columns = (gaussian_matrix(size, sigma) for size in shape[1:])
    return SeparableOperator(shape, None, rows, columns)


def anisotropic_blur(shape: Shape, along: float = 2.0, across: float = 0.5, angle: float = 45.0) -> Operator:
    """A Gaussian blur that is wider along a direction than across it; the image repeats beyond its border."""
    check_positive(along=along, across=across)
    return ConvolutionOperator(shape, anisotropic_kernel(along, across, angle))


def motion_blur(shape: Shape, length: float = 5.0, angle: float = 0.0) -> Operator:
    """A movement of `length` pixels in a direction; the image repeats beyond its border."""
    check_positive(length=length)
    return ConvolutionOperator(shape, motion_kernel(length, angle))


def check_share(**values: float) -> None:
    """Raise ValueError for a share that is not above 0 and below 1."""
    for name, value in values.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value!r}: must be above 0 and below 1")


def check_positive(**values: float) -> None:
    """Raise ValueError for a length that is not positive and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: must be above 0")


def check_factor(shape: Shape, factor: int) -> None:
    """Raise ValueError for a factor that does not divide height and width."""
    if not (isinstance(factor, int) and factor >= 2):
        raise ValueError(f"factor={factor!r}: must be a whole number of 2 or more")
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(f"factor={factor}: does not divide the image's height and width, {shape[1]}x{shape[2]}")


# name -> (shape (C, H, W), **options) -> the operator
OPERATORS: dict[str, Callable[..., Operator]] = {
    "identity": identity,
    "mask": MaskOperator,
    "box": box,
    "random-pixels": random_pixels,
    "half": half,
    "average-pooling": average_pooling,
    "bicubic": bicubic,
    "gray": gray,
    "gaussian-blur": gaussian_blur,
    "anisotropic-blur": anisotropic_blur,
    "motion-blur": motion_blur,
    "compressed-sensing": CompressedSensingOperator,
}
