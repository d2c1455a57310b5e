"""Errors of data that a user can mend."""


class DataError(ValueError):
    """A dataset or an image that cannot be used; the message names it and the way out."""

    def __init__(self, message: str):
        if "Original Traceback" in message:  # torch's DataLoader wraps what a worker raised
            message = message.strip().rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(message)


class ImageMismatchError(DataError):
    """An image that the settings do not fit: the dataset's range of values, or the model's channels; never skipped."""


def broken_image(name: str, reason: str) -> DataError:
    """The error for an image that cannot be used."""
    return DataError(f"broken image {name}: {reason}; remove it, or pass --skip_broken_images")


def unreadable(what: str, error: Exception) -> DataError:
    """The error for a dataset that fails while it is read."""
    return DataError(f"{what} cannot be read: {' '.join(str(error).split())[:300]} ({error.__class__.__name__})")
