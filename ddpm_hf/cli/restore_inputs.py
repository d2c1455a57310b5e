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


def read_pixels(path: Path, channels: int, flag: str, task: str | None = None) -> "np.ndarray":
    """uint8 [H, W, channels] of an image file.

    Args:
        task: of a model that was not trained for it, whose observation this is.

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
        raise ValueError(f"--{flag} {path} has {bands} channels, not {channels}{way_out(bands, channels, task)}")
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


def way_out(bands: int, channels: int, task: str | None) -> str:
    """What to do about an image of other channels, which `task` observes."""
    if bands == 1 and channels == 3:
        return "; for a gray image, --task colorize" if task else "; convert it to colour (RGB)"
    if bands == 3 and channels == 1 and task == "colorize":
        return "; --degrade takes the colours away first, or convert the image to gray"
    if bands == 3 and channels == 1:
        return "; convert the image to gray, or use a model of colour images"
    return ""


def read_mask(path: Path) -> "torch.Tensor":
    """bool [H, W], True where a pixel is known: where the picture is black, or opaque if parts are transparent.

    Raises:
        ValueError: not an image, or one that hides nothing, or does not say what.
    """
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    from ..portable.image_to_image_ddpm_hf import known_of_picture

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise ValueError(f"--mask {path}: not an image that can be read ({error})") from error
    try:
        return torch.from_numpy(known_of_picture(image))
    except ValueError as error:
        raise ValueError(f"--mask {path}: {error}") from error


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
    import torch

    from ..restoration.pictures import to_tensor
    from ..restoration.problems import pose

    channels = pipeline.image_channels
    if task == "colorize" and channels not in (3, 4):
        raise ValueError(f"--task colorize requires a model of colour images, and this one has {channels} channels")
    observed_channels = channels if degrade or task != "colorize" else channels - 2
    untrained = not degrade and not hasattr(pipeline, "conditioning")
    pixels = read_pixels(path, observed_channels, "image", task if untrained else None)
    size, before = pipeline.image_size, pixels.shape[:2]
    if fit:
        enlarged = settings.factor if task == "super-resolution" and not degrade else 1
        pixels = fitted(pixels, (size[0] // enlarged, size[1] // enlarged))
    if task == "inpaint" and mask is not None:
        known = mask if mask in MASKS else read_mask(counterpart(path, Path(mask), "mask"))
        if fit and not isinstance(known, str) and tuple(known.shape) == before:
            # Known is what the resizing made of known pixels alone: what it mixed with hidden ones is painted too
            known = torch.from_numpy(fitted(255 * known.byte().numpy()[..., None], size)).reshape(size) == 255
            if known.all():
                raise ValueError(f"--mask {mask}: hides nothing that --fit keeps of {path}; leave --fit out")
        settings = settings._replace(mask=known)
    true = None
    if truth is not None:
        whole = read_pixels(counterpart(path, truth, "truth"), channels, "truth")
        true = to_tensor(fitted(whole, size) if fit else whole)
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
