"""Errors that name the image or the dataset that cannot be read."""

from ..common.errors import DataError, one_line


def broken_image(name: str, reason: str) -> DataError:
    """The error for an image that cannot be used."""
    return DataError(f"broken image {name}: {reason}; remove it, or pass --skip_broken_images")


def unreadable(what: str, error: Exception) -> DataError:
    """The error for a dataset that fails while it is read."""
    return DataError(f"{what} cannot be read: {one_line(error, 300)} ({error.__class__.__name__})")
