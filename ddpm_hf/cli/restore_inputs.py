"""What `ddpm-hf restore` reads: pictures, masks and true images, and the problem that each picture is."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..restoration.tasks import MASKS, Settings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from ..restoration.problems import Picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
BANDS = {"1": 1, "L": 1, "I": 1, "F": 1, "LA": 2, "RGB": 3, "RGBA": 4}  # by PIL's mode; others are converted to RGB(A)


def list_images(path: Path, flag: str) -> list[Path]:
    """An image file, or the images in a folder, by name.

    Raises:
        ValueError: neither, or a folder without images.
    """
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"--{flag} {path}: the folder holds no file that ends with {', '.join(SUFFIXES)}")
        return files
    if not path.is_file():
        raise ValueError(f"--{flag} {path}: there is no such file or folder")
    return [path]


def check_names(files: list[Path]) -> None:
    """Raise ValueError for images whose results could not have folders of their own, named as they are."""
    known: dict[str, Path] = {}
    for one in files if len(files) > 1 else ():
        if one.stem in (".", "..") or one.stem.casefold() in ("comparison.png", "restored.json"):
            raise ValueError(f"--image {one}: its results cannot have a folder of this name; rename it")
        other = known.setdefault(one.stem.casefold(), one)
        if other != one:
            raise ValueError(f"--image {one} and {other.name} would have results of one name; rename one of them")


def counterpart(image: Path, given: Path, flag: str) -> Path:
    """The file of a folder that has an image's name (whatever its suffix), or the one file that is given for all."""
    if not given.is_dir():
        return list_images(given, flag)[0]
    found = [one for one in list_images(given, flag) if one.stem == image.stem]
    if len(found) > 1:
        raise ValueError(
            f"--{flag} {given}: holds {found[0].name} and {found[1].name} for {image}; remove one of them"
        )
    if not found:
        raise ValueError(f"--{flag} {given}: holds no {image.stem}.png for {image}")
    return found[0]


def read_pixels(path: Path, channels: int, flag: str) -> "np.ndarray":
    """uint8 [H, W, channels] of an image file.

    Raises:
        ValueError: not an image, or one of other channels.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    from ..data.pixels import is_deep, prepare_image

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if not is_deep(image) and image.mode not in BANDS:
                image = image.convert("RGBA" if "transparency" in image.info or "A" in image.mode else "RGB")
            image = image if is_deep(image) else plain(image, channels)
            bands = 1 if is_deep(image) else BANDS[image.mode]
            pixels = None if bands != channels else np.atleast_3d(np.asarray(prepare_image(image, channels)))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise ValueError(f"--{flag} {path}: not an image that can be read ({error})") from error
    if pixels is None:
        raise ValueError(f"--{flag} {path} has {bands} channels, not {channels}{way_out(bands, channels)}")
    return pixels


def plain(image: "Image.Image", channels: int) -> "Image.Image":
    """The image, if it has too many channels without an opaque alpha, and in gray if its three channels are equal."""
    import numpy as np

    if BANDS[image.mode] > channels and image.mode in ("LA", "RGBA") and image.getextrema()[-1] == (255, 255):
        image = image.convert(image.mode[:-1])
    if BANDS[image.mode] > channels and image.mode == "RGB":
        pixels = np.asarray(image)
        if (pixels[..., :1] == pixels).all():
            return image.convert("L")
    return image


def way_out(bands: int, channels: int) -> str:
    """What to do about an image of other channels."""
    if bands == 1 and channels == 3:
        return "; for a gray image, --task colorize"
    if bands == 3 and channels == 1:
        return "; convert the image to gray, or use a model of colour images"
    return ""


def read_mask(path: Path) -> "torch.Tensor":
    """bool [H, W], True where a pixel is known: where the picture is black, or opaque if parts are transparent.

    Raises:
        ValueError: not an image, or one that hides nothing.
    """
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if "transparency" in image.info or "A" in image.mode:  # of a palette, too
                image = image.convert("RGBA")
            if image.mode == "RGBA" and image.getextrema()[-1][0] < 128:
                known = np.asarray(image.getchannel("A")) >= 128  # transparent where it is painted out
            else:
                known = np.asarray(image.convert("L")) < 128
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise ValueError(f"--mask {path}: not an image that can be read ({error})") from error
    if known.all():
        raise ValueError(f"--mask {path}: hides nothing; what is to be painted must be white, or transparent")
    return torch.from_numpy(known)


def fitted(pixels: "np.ndarray", size: tuple[int, int]) -> "np.ndarray":
    """uint8 [H, W, C] resized and cropped in the middle to (height, width)."""
    import numpy as np

    from ..data.images import ImageTransform

    bands = pixels.shape[2]
    resized = ImageTransform(*size, bands, center_crop=True).resize(pixels if bands > 1 else pixels[:, :, 0])
    return np.asarray(resized)


def read_picture(
    path: Path,
    task: str,
    settings: Settings,
    pipeline: Any,
    *,
    mask: str | None = None,
    truth: Path | None = None,
    degrade: bool = False,
    fit: bool = False,
    sigma_y: float | None = None,
    generator: "torch.Generator | None" = None,
) -> "Picture":
    """The problem that a picture is.

    Args:
        mask: a file, a folder of files of the pictures' names, or one of `MASKS`.
        degrade: whether the picture is a true image, from which y is made.
        fit: whether to resize it so that the restored image has the model's size.
        sigma_y: None is estimated, or 0 where y is made.
        generator: of the noise of a y that is made.

    Raises:
        ValueError: a picture, mask or truth that does not fit.
    """
    from ..restoration.pictures import to_tensor
    from ..restoration.problems import pose

    channels = pipeline.image_channels
    if task == "colorize" and channels not in (3, 4):
        raise ValueError(f"--task colorize requires a model of colour images, and this one has {channels} channels")
    observed_channels = channels if degrade or task != "colorize" else channels - 2
    pixels = read_pixels(path, observed_channels, "image")
    if fit:
        enlarged = settings.factor if task == "super-resolution" and not degrade else 1
        height, width = pipeline.image_size
        pixels = fitted(pixels, (height // enlarged, width // enlarged))
    if task == "inpaint" and mask is not None:
        known = mask if mask in MASKS else read_mask(counterpart(path, Path(mask), "mask"))
        settings = settings._replace(mask=known)
    true = None
    if truth is not None:
        true = to_tensor(read_pixels(counterpart(path, truth, "truth"), channels, "truth"))
    try:
        posed = pose(
            path.stem, to_tensor(pixels), task, settings, pipeline, degrade=degrade, sigma_y=sigma_y,
            generator=generator,
        )  # fmt: skip
        if true is not None and tuple(true.shape) != tuple(posed.operator.shape):
            _, height, width = posed.operator.shape
            raise ValueError(f"the truth has {true.shape[1]}x{true.shape[2]} pixels, the solution {height}x{width}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return posed if true is None else replace(posed, truth=true)
