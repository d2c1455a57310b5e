"""The images that `ddpm-hf evaluate` reads: a dataset, a run's own data, or a folder of generated images."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common.errors import DataError, UsageError

if TYPE_CHECKING:
    from ..common.image_sets import ImageSet
    from ..data.flags import DataFlags
    from ..data.rows import Rows

Shape = tuple[int, int, int]  # (C, H, W)
EMBEDDED = "digits"  # the name here of the embedded digits


class Data(NamedTuple):
    """The images to compare with.

    Args:
        reference: those that samples are compared with.
        held_out: images that the model was not trained on, where there are some.
    """

    reference: "ImageSet"
    held_out: "ImageSet | None" = None


class DataOptions(NamedTuple):
    """The options of `ddpm-hf evaluate` that say which images are real."""

    dataset: str | None = None
    config_name: str | None = None
    split: str | None = None
    held_out_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    token: str | None = None


def recorded_settings(model: str) -> dict[str, Any]:
    """The settings of the run that wrote a folder or its checkpoint; empty if there are none."""
    from ..common.checkpoints import SETTINGS
    from ..common.files import read_json

    for folder in (Path(model), Path(model).absolute().parent):
        settings = read_json(folder / SETTINGS)
        if isinstance(settings, dict):
            return settings
    return {}


def read_data(options: DataOptions, model: str, shape: Shape, sized: bool = True, of_images: bool = False) -> Data:
    """The real images at a size, by the options or as the run recorded them.

    Args:
        model: of which a run may have recorded its data.
        shape: (C, H, W) to bring the images to, as in training, without augmentation.
        sized: whether that size is a model's or requested; else the images must have it.
        of_images: whether the shape is that of generated images, and no model's.

    Raises:
        DataError: no dataset is named and none recorded, or it cannot be read, or its images have another size, or
            colours that generated images lack.
    """
    from ..data.upright import upright_images

    settings = {} if options.dataset else recorded_settings(model)
    if options.dataset is None and "train_data_dir" not in settings:
        raise DataError(
            f"no dataset: {model} does not say what it was trained on; give --dataset, a folder or a name on the Hub"
        )
    if options.dataset and options.dataset.endswith(".npz"):
        for name, value in options._replace(dataset=None, token=None)._asdict().items():
            if value is not None:
                flag = "dataset-" * (name == "config_name") + name.replace("_", "-")
                raise UsageError(f"--{flag} {value}: an npz file has no splits or columns; leave it out")
        return Data(_checked(_npz(options.dataset), shape))
    if options.dataset is None and options.split is None:
        return _of_the_run(settings, shape, options)
    flags = _flags(options, settings)
    if of_images:
        rows = _rows(flags, options, options.split or "train", shape)
        size = _one_shape(rows, any_size=sized)
        if size[0] > shape[0]:
            raise DataError(f"{rows.name} has images in colour, and {model} gray ones; convert one of them")
        if not sized and size[1:] != shape[1:]:
            raise DataError(
                f"{rows.name} has images of {size[1]}x{size[2]} pixels, and {model} of {shape[1]}x{shape[2]}; bring"
                " both to one size with --resolution"
            )
    reference = upright_images(_rows(flags, options, options.split or "train", shape), flags, shape)
    if options.held_out_split is None:
        return Data(reference)
    return Data(reference, upright_images(_rows(flags, options, options.held_out_split, shape), flags, shape))


def _npz(name: str) -> "ImageSet":
    from ..common.image_sets import from_npz

    return from_npz(Path(name))


def _checked(images: "ImageSet", shape: Shape) -> "ImageSet":
    """Images of a fixed size.

    Raises:
        DataError: they have another.
    """
    if images.shape != shape:
        raise DataError(f"{images.name} holds images of {_size(images.shape)}, and these are of {_size(shape)}")
    return images


def _size(shape: Shape) -> str:
    return f"{shape[0]} channel{'s' * (shape[0] > 1)} and {shape[1]}x{shape[2]} pixels"


def _flags(options: DataOptions, settings: dict[str, Any]) -> "DataFlags":
    """The flags of the data: a run's, or of what the options name."""
    from ..data.flags import DataFlags

    known = {field.name for field in dataclasses.fields(DataFlags)}
    flags = DataFlags(**{name: value for name, value in settings.items() if name in known})
    if options.dataset:
        local = Path(options.dataset).exists()
        named = None if options.dataset == EMBEDDED and not local else options.dataset
        flags.train_data_dir, flags.dataset_name = (named, None) if local else (None, named)
    flags.dataset_config_name = options.config_name or flags.dataset_config_name
    flags.image_column = options.image_column or flags.image_column
    flags.label_column = options.label_column or flags.label_column
    flags.streaming = False
    return flags


def _rows(flags: "DataFlags", options: DataOptions, split: str | None, shape: Shape) -> "Rows":
    from ..data.reading import Columns, open_dataset, read_rows

    if flags.embedded:
        from ..data.digits import embedded_digits

        if split not in ("train", "test"):
            raise DataError(f"split {split}: the embedded digits have train and test")
        rows = embedded_digits(split, (shape[1], shape[2]))
        rows.label_column, rows.caption_column = flags.label_column, options.caption_column
        return rows
    opened = open_dataset(
        flags.dataset_name, flags.train_data_dir, flags.dataset_config_name, flags.cache_dir, options.token
    )
    columns = Columns(flags.image_column, flags.label_column, options.caption_column)
    return read_rows(opened, split or "train", columns)


def _of_the_run(settings: dict[str, Any], shape: Shape, options: DataOptions) -> Data:
    """The images that a run was trained on, and those that it held out."""
    from ..data.reading import load_rows
    from ..data.upright import upright_images

    flags = _flags(options, settings)
    holds_out = bool(settings.get("validation_steps") or flags.validation_split or flags.embedded)
    caption = options.caption_column or settings.get("caption_column")
    if flags.embedded and caption is None and "caption_column" in settings:  # a run by text on the embedded digits
        from ..data.digits import CAPTION_COLUMN

        caption = CAPTION_COLUMN
    seed = settings.get("seed") or 0
    try:
        rows, held_out = load_rows(flags, seed, options.token, caption, holds_out)
    except DataError as error:
        raise DataError(f"the data that the run recorded: {error}; name it with --dataset") from error
    if options.held_out_split is not None:
        held_out = _rows(flags, options, options.held_out_split, shape)
    return Data(
        upright_images(rows, flags, shape), None if held_out is None else upright_images(held_out, flags, shape)
    )


def generated_images(path: str, size: tuple[int, int] | None = None) -> "ImageSet | None":
    """The images of a folder or an npz file that is named instead of a model; None if it is a model.

    Args:
        size: (height, width) to crop and resize them to.

    Raises:
        DataError: they have several sizes, channels that extractors do not read, or, in an npz file, another size.
    """
    from ..common.checkpoints import SETTINGS
    from ..data.upright import upright_images
    from ..inference.loading import MODEL_INDEX, is_checkpoint

    folder = Path(path)
    if folder.suffix == ".npz" and folder.is_file():
        images = _npz(path)
        if size is not None and size != images.shape[1:]:
            own = f"{images.shape[1]}x{images.shape[2]}"
            raise DataError(f"--resolution: images of an npz file keep their size, here {own}; give {own}")
        return images
    if not folder.is_dir() or is_checkpoint(folder):
        return None
    if (folder / MODEL_INDEX).is_file() or (folder / SETTINGS).is_file():
        return None
    from ..data.flags import DataFlags

    rows = _sampled_here(folder) or _rows_of(path)
    shape = _one_shape(rows, any_size=size is not None)
    return upright_images(rows, DataFlags(), shape if size is None else (shape[0], *size))


def _rows_of(path: str) -> "Rows":
    """The images of a folder, or of its training split."""
    from ..data.reading import Columns, open_dataset, read_rows

    opened = open_dataset(None, path, None, None, None)
    splits = opened.source.splits()
    return read_rows(opened, "train" if "train" in splits else splits[0], Columns())


def _sampled_here(folder: Path) -> "Rows | None":
    """The images of a folder that `ddpm-hf sample` wrote to, without its grids; None if it wrote to none."""
    import datasets

    from ..common.ownership import listed
    from ..data.formats import image_suffixes
    from ..data.rows import Rows
    from .pictures import PART

    written = [name for name in listed(folder, PART) if (folder / name).is_file()]
    if not any(Path(name).stem.isdecimal() for name in written):
        return None
    grids = {name for name in written if not Path(name).stem.isdecimal()}
    suffixes = image_suffixes()
    there = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix.lower() in suffixes)
    names = [name for name in there if name not in grids]
    cells = [{"bytes": None, "path": str(folder / name)} for name in names]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return Rows(datasets.Dataset.from_dict({"image": cells}, features=features), str(folder), "image")


def _one_shape(rows: "Rows", any_size: bool = False) -> Shape:
    """The shape that all images have; with `any_size` the first's. One channel if all are gray, else three.

    Raises:
        DataError: there are several sizes.
    """
    from ..data.images import image_size, peek, why_unreadable

    shape = name = None
    for index, row in enumerate(rows.dataset):
        try:
            image = peek(row[rows.image_column], rows.array_type and rows.array_type[0])
            height, width = image_size(image, 3)
        except Exception as error:  # whatever PIL's decoders raise
            raise DataError(f"image {rows.name_of(row, index)}: {why_unreadable(error)}") from error
        gray = getattr(image, "mode", "RGB") in ("1", "L", "LA") or getattr(image, "mode", "").startswith("I")
        one = (1 if gray else 3, height, width)
        shape, name = shape or one, name or rows.name_of(row, index)
        if one[1:] != shape[1:] and not any_size:
            raise DataError(
                f"image {rows.name_of(row, index)} has {height}x{width} pixels, and {name} {shape[1]}x{shape[2]}; give"
                " images of one size, or --resolution"
            )
        shape = (max(one[0], shape[0]), *shape[1:])
    if shape is None:
        raise DataError(f"{rows.name} has no images")
    return shape
