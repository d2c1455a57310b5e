"""Whether a resumed run was trained on images that it now holds out."""

from ..run import Run


def trained_on_held_out(run: Run, samples: int | None) -> bool:
    """Whether images that `--validation_split` holds out were, or may have been, trained on before.

    It is a random share of all images: with another share, or of more or fewer images, others are held out. A
    dataset's own validation split stays what it is.

    Args:
        samples: how many images are trained on.
    """
    if run.resumed is None or not getattr(run.settings, "validation_split", 0):
        return False
    before = run.resumed.manifest
    was = before.get("settings", {})
    share, limit = (getattr(run.settings, name) for name in ("validation_split", "max_train_samples"))
    if was.get("validation_split") != share:
        return True
    return was.get("max_train_samples") == limit and before.get("samples") != samples
