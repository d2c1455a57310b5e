"""Which files are images: by their suffix, and without one by their first bytes."""

import functools
import importlib
import importlib.util
import os
import re

from PIL import Image

EXECUTED = ("EPS", "WMF")  # formats that PIL passes to an external interpreter
IDENTIFIED_ONLY = ("BUFR", "GRIB", "HDF5", "MPEG")  # formats that PIL recognizes but cannot decode
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8")  # no other format begins so
# suffix -> the package that adds the format to PIL, its module, and the module's function that registers it (None: the
# import does)
PLUGINS = {
    ".heic": ("pillow-heif", "pillow_heif", "register_heif_opener"),
    ".heif": ("pillow-heif", "pillow_heif", "register_heif_opener"),
    ".avif": ("pillow-avif-plugin", "pillow_avif", None),
    ".jxl": ("pillow-jxl-plugin", "pillow_jxl", None),
}


@functools.cache
def register_plugins() -> None:
    """Register the formats of the plugins that are installed, once per process."""
    Image.init()
    for suffix, (_, module, register) in PLUGINS.items():
        if suffix not in Image.registered_extensions() and importlib.util.find_spec(module) is not None:
            imported = importlib.import_module(module)
            if register is not None:
                getattr(imported, register)()


def readable_formats() -> set[str]:
    """The names of the formats that PIL decodes by itself."""
    register_plugins()
    return set(Image.OPEN) - {*EXECUTED, *IDENTIFIED_ONLY}


def image_suffixes() -> set[str]:
    """The suffixes, lower-case and with the dot, of the formats that PIL decodes by itself."""
    formats = readable_formats() | {"MPO"}  # which PIL opens as JPEG
    return {suffix for suffix, form in Image.registered_extensions().items() if form in formats}


def suffix_of(name: str) -> str:
    """A file name's suffix in lower case; empty for other endings, as in `photo.jpg_large` or `v1.5`.

    >>> suffix_of("a.b/Photo.JPG"), suffix_of("v1.5"), suffix_of(".hidden")
    ('.jpg', '', '')
    """
    suffix = os.path.splitext(os.path.basename(name))[1].lower()
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9]{0,11}", suffix) else ""


def begins_like_an_image(path: str) -> bool:
    """Whether PIL recognizes the file by its content."""
    try:
        with open(path, "rb") as file:
            prefix = file.read(32)
        if prefix.startswith(SIGNATURES):
            return True
        formats = [form for form in sorted(readable_formats()) if _accepts(form, prefix)]
        if formats:
            Image.open(path, formats=formats).close()
        return bool(formats)
    except Exception:  # PIL's plugins have no common base for the errors of a file that is not an image
        return False


def _accepts(form: str, prefix: bytes) -> bool:
    """Whether a format's plugin takes a file that begins so; False for plugins that take any file."""
    accept = Image.OPEN[form][1]
    return accept is not None and accept(prefix) is True
