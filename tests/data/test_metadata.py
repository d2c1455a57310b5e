"""What metadata beside images says is taken as it is written."""

import json

import pandas
import pytest

from ddpm_hf.data.reading import read_dataset
from tests.support.pictures import random_pixels, write_images

TEXTS = ["None", "null", "nan", "NA", "n/a", "01", "1", "1e3", "2020-01-01", "a cat, sitting", 'say "hi"']


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_texts_stay_as_they_are_written(kind, tmp_path):
    """Else captions such as "None" are empty prompts, the classes 01 and 1 are one, and dates are no strings."""
    names = [f"{number}.png" for number in range(len(TEXTS))]
    rows = [dict(zip(("file_name", "text", "label"), row)) for row in zip(names, TEXTS, TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "csv":
        lines = pandas.DataFrame(rows).to_csv(index=False)
    write_images(tmp_path, random_pixels(len(TEXTS)))
    (tmp_path / f"metadata.{kind}").write_text(lines)
    rows = read_dataset(directory=str(tmp_path), caption_column="text", label_column="label")
    assert sorted(rows.dataset["text"]) == sorted(TEXTS)
    assert sorted(rows.label_names) == sorted(TEXTS)


def test_numbers_in_a_csv_are_numbers(tmp_path):
    """Else class ids are names, and names that begin with zeros are ids."""
    write_images(tmp_path, random_pixels(2))
    (tmp_path / "metadata.csv").write_text(
        "file_name,label,zip,score,few,,\n0.png,10,00501,0.5,1,,\n1.png,9,10001,2\n"
    )
    rows = read_dataset(directory=str(tmp_path))
    assert rows.dataset["label"][:] == [10, 9]
    assert rows.dataset["zip"][:] == ["00501", "10001"]
    assert rows.dataset["score"][:] == [0.5, 2.0]
    assert rows.dataset["few"][:] == [1, None]
