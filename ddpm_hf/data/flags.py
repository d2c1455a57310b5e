"""Flags of the data."""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..common.arguments import FREE, ONE_OR_MORE, SHARE, HfArg, Need, Range, synonyms
from ..common.errors import DataError, UsageError

if TYPE_CHECKING:
    from .images import ImageTransform

CAPTION_COLUMN = "text"  # of the embedded digits, and where none is named

CHANNELS = Range(lambda value: 1 <= value <= 1024, "from 1 to 1024")

# What other programs call these flags
DATA = synonyms("""
--train_data_dir: data data_dir dataset_dir image_dir images_dir img_dir image_folder images folder train_dir input_dir
--train_data_dir: data_path data_root root dataroot train_data instance_data_dir
--dataset_name: dataset dataset_id hf_dataset dataset_path
--dataset_config_name: subset config_name dataset_config
--dataset_split: split train_split
--image_column: image_key image_col
--label_column label: class_cond class_conditional conditional use_labels labels class_labels num_classes n_classes
--label_column: label label_key class_column label_col
--max_train_samples: max_samples limit num_train_samples max_images
--validation_split: val_split validation_fraction test_split holdout val_fraction val_ratio
--cache_dataset always: cache in_memory preload
--skip_broken_images: skip_broken ignore_broken
""") | {"": "--train_data_dir"}  # a word without a flag
IMAGES = synonyms("""
--resolution: image_size size img_size imsize res image_resolution crop_size im_size sample_size
--channels: in_channels image_channels img_channels n_channels
--channels 1: gray grayscale grey greyscale
--channels 3: rgb color colour
--channels 4: rgba alpha
--pixel_range: value_range data_range input_range intensity_range
--random_flip: flip hflip horizontal_flip augment_horizontal_flip random_horizontal_flip
--center_crop: crop centre_crop
--image_interpolation_mode: interpolation resize_mode
""")

KINDS = ("imagefolder", "parquet", "arrow", "csv", "json", "webdataset")  # of files, as `datasets` names them


@dataclass
class DataFlags:
    """Flags of the data, for every script that reads images."""

    title: ClassVar[str] = "Data"
    meanings: ClassVar[dict[str, str]] = DATA | IMAGES
    needs: ClassVar[dict[str, Need]] = {
        "validation_split": Need(
            lambda run: run.validation_steps, "holds out images that are never used without --validation_steps"
        ),
        "cache_dir": Need(
            lambda run: run.dataset_name or run.train_data_dir or getattr(run, "cache_latents", False),
            "has no effect on the embedded digits",
        ),
    }

    dataset_name: str | None = HfArg(
        instead_of="train_data_dir",
        joins=KINDS,
        default=None,
        help="A dataset on the Hub, or a local path; with --train_data_dir the kind of its files, such as imagefolder."
        " Without any dataset: the embedded digits.",
    )
    dataset_config_name: str | None = HfArg(default=None, help="The dataset's configuration.")
    dataset_split: str = HfArg(default="train", help="The split to train on, or parts: train[:67%], train+test.")
    train_data_dir: str | None = HfArg(
        instead_of="dataset_name",
        default=None,
        help="A folder of images (also in class folders), or of parquet, arrow, csv, json, webdataset or save_to_disk"
        " data; a train/ folder in it is trained on, and validation/ is for --validation_steps.",
    )
    cache_dir: str | None = HfArg(resume=FREE, default=None, help="Where datasets are cached.")
    streaming: bool = HfArg(
        default=False, help="Stream the dataset instead of downloading it first; requires --max_train_steps."
    )
    image_column: str | None = HfArg(
        default=None, aliases=["--dataset_image_column_name"], help="By default the column that holds images."
    )
    label_column: str | None = HfArg(
        default=None,
        aliases=["--dataset_class_label_column_name"],
        help="Train by class: the column of the labels (class names, integers or strings; class folders: label).",
    )
    cache_dataset: Literal["auto", "never", "always"] = HfArg(
        resume=FREE,
        default="auto",
        help="Keep all images decoded in memory; auto: if they take at most a quarter of the free memory.",
    )
    skip_broken_images: bool = HfArg(default=False, help="Leave out images that cannot be read, instead of stopping.")
    max_train_samples: int | None = HfArg(
        range=ONE_OR_MORE, default=None, help="Train on a random subset of this many images."
    )
    validation_split: float = HfArg(
        range=SHARE,
        default=0.0,
        help="Share of the images to hold out for --validation_steps, such as 0.05; by default the dataset's"
        " validation split is used.",
    )
    resolution: str | None = HfArg(
        group="Images",
        default=None,
        help="64, or HEIGHTxWIDTH such as 64x96; by default the size of the model, else 64.",
    )
    channels: int | None = HfArg(
        range=CHANNELS,
        default=None,
        help="1 for grayscale, 3 for colour, 2 and 4 for these with alpha, n for arrays of n channels; by default what"
        " the model has, else 3.",
    )
    pixel_range: list[float] | None = HfArg(  # noqa: RUF009
        default=None,
        help="LOW HIGH: values of arrays, and of images of more than 8 bits, that become black and white. By default"
        " 0 255, of 16 bits 0 65535, of floats and booleans 0 1.",
    )
    image_interpolation_mode: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = HfArg(
        default="bilinear", help="How images are resized."
    )
    center_crop: bool = HfArg(default=False, help="Crop the centre; by default a random part.")
    random_flip: bool = HfArg(default=False, help="Flip half of the images left to right.")
    preserve_input_precision: bool = HfArg(
        default=False, help="Keep 16- and 32-bit images as they are instead of rounding them to 8 bits."
    )

    def size(self) -> tuple[int, int]:
        """(height, width) of --resolution, which a script settles from the model; else 64."""
        parts = (self.resolution or "64").lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and len(part) < 6 and 0 < int(part) <= 16384 for part in parts):
            raise DataError(
                f"--resolution {self.resolution}: give a number up to 16384 such as 64, or HEIGHTxWIDTH such as 64x96"
            )
        return int(parts[0]), int(parts[-1])

    def transform(self, channels: int) -> "ImageTransform":
        """What makes the images the model's."""
        from .images import ImageTransform

        return ImageTransform(
            *self.size(),
            channels,
            self.center_crop,
            self.random_flip,
            self.preserve_input_precision,
            self.image_interpolation_mode,
            (float(self.pixel_range[0]), float(self.pixel_range[1])) if self.pixel_range else None,
        )

    @property
    def embedded(self) -> bool:
        """Whether no dataset is named, so that the embedded digits are meant."""
        return self.dataset_name is None and self.train_data_dir is None

    def check(self, flags: Any) -> None:
        """Raise DataError for a value out of range or a combination that cannot work."""
        if self.resolution is not None:
            self.size()
        given = self.pixel_range
        if given is not None and not (len(given) == 2 and all(map(math.isfinite, given)) and given[0] < given[1]):
            said = " ".join(f"{value:g}" for value in given)
            raise DataError(f"--pixel_range {said}: give two numbers, LOW and then HIGH, such as -1 1")
        if self.embedded and self.channels is not None and self.channels > 4:
            raise DataError(f"--channels {self.channels}: the embedded digits have 1, and become up to 4")
        if self.embedded and self.pixel_range is not None:
            raise DataError("--pixel_range: the embedded digits have 8 bits, from 0 to 255; leave it out")
        if self.embedded and (self.dataset_config_name or self.dataset_split != "train"):
            flag = "--dataset_config_name" if self.dataset_config_name else f"--dataset_split {self.dataset_split}"
            raise DataError(f"{flag}: the embedded digits have none to choose from; leave it out, or name a dataset")
        if self.dataset_name and self.train_data_dir and self.dataset_name not in KINDS:
            raise DataError(
                "--dataset_name and --train_data_dir name two datasets; give one of them, or with --train_data_dir the"
                f" kind of its files ({', '.join(KINDS)})"
            )
        if self.dataset_name in KINDS and not self.train_data_dir and not os.path.exists(self.dataset_name):
            raise DataError(f"--dataset_name {self.dataset_name} requires --train_data_dir, the folder of its files")
        if self.streaming and self.embedded:
            raise DataError("--streaming needs --dataset_name or --train_data_dir; the embedded digits are in memory")
        if self.streaming and (self.validation_split or self.max_train_samples or self.cache_dataset == "always"):
            raise DataError("--streaming allows no --validation_split, --max_train_samples, --cache_dataset always")
        if self.streaming and flags.max_train_steps is None:
            raise DataError("--streaming has no epochs to count: give --max_train_steps")


@dataclass
class ClassFlags:
    """Flags of training by class, for scripts whose model knows classes."""

    title: ClassVar[str] = "Classes"
    meanings: ClassVar[dict[str, str]] = synonyms("""
--class_dropout: p_uncond uncond_prob cond_drop_prob class_drop_prob label_dropout cfg_dropout unconditional_prob
--class_balanced: balanced class_balance balance_classes
""")
    needs: ClassVar[dict[str, Need]] = {
        "class_dropout": Need(lambda run: run.label_column, "has no effect without --label_column")
    }

    class_dropout: float = HfArg(
        range=SHARE,
        default=0.1,
        help="Share of the images to train without their label, for classifier-free guidance; 0 to disable.",
    )
    class_balanced: bool = HfArg(default=False, help="Sample every class equally often, however many images it has.")

    def check(self, flags: Any) -> None:
        """Raise UsageError for classes that cannot be balanced."""
        if self.class_balanced and (flags.label_column is None or flags.streaming):
            raise UsageError("--class_balanced needs --label_column, and a dataset that is not a stream")
