"""From images on disk or on the Hub to tensors in [-1, 1], by way of Hugging Face datasets.

A dataset is read as rows whose images are still encoded (`reading`, `rows`), so that a broken one can be named.
`prepare_image` brings any image or array to the model's channels and one scale (`pixels`); `ImageTransform` resizes,
crops and flips (`images`); `ImageDataset` puts both behind torch's DataLoader and keeps small datasets decoded
(`dataset`). A column of labels becomes class names and ids (`labels`).

The public names are imported when they are first used, so that `--help`, which needs only the flags, is quick.
"""

from typing import TYPE_CHECKING

from ..common.lazy import lazy_exports

if TYPE_CHECKING:
    from ..common.pictures import image_grid as image_grid
    from .digits import embedded_digits as embedded_digits
    from .images import ImageTransform as ImageTransform

_HOMES = {
    "..common.pictures": ("image_grid",),
    ".digits": ("embedded_digits",),
    ".images": ("ImageTransform",),
}

__all__ = [name for names in _HOMES.values() for name in names]

if not TYPE_CHECKING:  # else type checkers would accept any name
    __getattr__, __dir__ = lazy_exports(__name__, _HOMES)
