"""Every error that names a way out, and the way: rows that make the error happen and follow its advice."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import train_text2image
import train_unconditional
from ddpm_hf.cli.classifier_flags import CLASSIFIER, parse_classifier_flags
from tests.support.fixtures_text import run_text_script
from tests.support.runs import run_script

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
PROGRAMS = (train_unconditional.PROGRAM, train_text2image.PROGRAM, CLASSIFIER)
SCRIPTS = {"unconditional": run_script, "text": run_text_script}
Flags = dict[str, Any]
Way = Callable[[str, Flags], list[Flags]]  # the message and the flags that it is about: the flags to try instead


def filled(flags: Flags, shop: Path, out: Path) -> Flags:
    """Flags with the folders filled in."""

    def into(value: Any) -> Any:
        if isinstance(value, list):
            return [into(one) for one in value]
        return value.replace("{shop}", str(shop)).replace("{out}", str(out)) if isinstance(value, str) else value

    return {name: into(value) for name, value in flags.items()}


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
    U("--{} {}: must be {}", take_number, adam_beta1=1),
    U("--{} {}: must be {} or less", take_number, cpu_threads=5000),
    U("--seed {}: must be less than 2^63", take_number, seed=2**63),
    U("--{} {}: must be {}", take_number, class_dropout=1, label_column="label"),
    U("--{} {}: must be {}", take_number, validation_split=1,
      validation_steps=1),
    U("--{} {}: must be {}", take_number, ddpm_num_steps=0),
    U("--{} {}: must be {}", take_number, ddpm_num_inference_steps=0),
    U("--{} {}: must be {}", take_number, vlb_weight=-1, objective="hybrid",
      variance_type="learned_range"),
    U("--{} {}: must be {}", take_number, channels=0),
    U("--lr_scheduler must be one of {} (got {})", take_choice, lr_scheduler="nonesuch"),
    U("--save_variants: each must be one of {} (got {})", take_choice, save_variants=["nonesuch"], use_ema=True),
    U("--{} must be one of {} (got {})", take_choice, timestep_sampler="nonesuch"),
    U("--model_preset must be one of {} (got {})", take_choice, model_preset="nonesuch",
      model_config_name_or_path=None),
    U("--ddpm_beta_schedule {}: must be one of {}", take_choice, ddpm_beta_schedule="nonesuch"),
    U("--resolution {}: give a number up to 16384 such as 64, or HEIGHTxWIDTH such as 64x96", take_example,
      resolution="8x"),
    U("--pixel_range {}: give two numbers, LOW and then HIGH, such as -1 1", take_example, pixel_range=[1, 0]),
    U("--{} {}: give the Hub's lower-case name, such as apache-2.0 or mit", take_example,
      hub_license="MIT 2"),
    U("--{} {} is empty; leave the flag out, or give a value", leave_out, give(cache_dir="{out}"), cache_dir=""),
    T("--prediction_type must be one of {} (got {})", take_choice, prediction_type="nonesuch"),
    T("--{} {}: must be {}", take_number, caption_dropout=1),
    T("--{} {}: must be {}", take_number, noise_offset=-1),
    T("--{} {}: must be {}", take_number, num_inference_steps=0),
    T("--vae_widths {}: give up to 8 multiples of 8, each up to 4096, such as 16,32,64", take_example, vae_widths="7"),
    T("--{} {}: must be {}", take_number, vae_train_steps=0),
    T("--vae_latent_channels {}: must be 1024 or less", take_number, vae_latent_channels=2000),
    T("--{} {}: must be {}", take_number, vae_kl_weight=-1),
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
    U("--hub_best_metric {}: must be {}, or one of --evaluation_metrics with --evaluation_epochs",
      give(hub_best_metric="validation_loss"), hub_strategy="best", hub_best_metric="kid", validation_steps=5,
      checkpointing_steps=10),
    U("--ema_min_decay {} is above --ema_max_decay {}", give(ema_min_decay=0.5), give(ema_max_decay=0.99),
      ema_min_decay=0.9, ema_max_decay=0.8, use_ema=True),
    U("--streaming has no epochs to count: give --max_train_steps", give(max_train_steps=2),
      streaming=True, max_train_steps=None),
    U("--streaming needs --dataset_name or --train_data_dir", give(dataset_name="{shop}/photos"),
      give(train_data_dir="{shop}/photos"), streaming=True, **DIGITS),
    U("--streaming allows no --validation_split, --max_train_samples, --cache_dataset always",
      lambda _, flags: [without(flags, ["validation_split"])], streaming=True, validation_split=0.5,
      validation_steps=2),
    U("--{} {}: must be {}", take_number, max_train_samples=0),
    U("--streaming allows no --validation_split, --max_train_samples, --cache_dataset always",
      lambda _, flags: [without(flags, ["streaming"])], max_train_samples=4, streaming=True),
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
    U("--model_config_name_or_path {}: no {} config there", give(model_config_name_or_path="{shop}/tiny"),
      dry=True, model_config_name_or_path="{out}/none"),
    U("--model_config_name_or_path {}: a {}, not a {}", give(model_config_name_or_path="{shop}/tiny"),
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
    T("--model_config_name_or_path {}: a {}, not a {}",
      give(model_config_name_or_path="{shop}/text-unet"),
      dry=True, model_config_name_or_path="{shop}/tiny"),
    T("--model_config_name_or_path {}: no {} config there", give(model_config_name_or_path="{shop}/text-unet"),
      dry=True, model_config_name_or_path="{out}/none"),
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
    S("--classifier {} was trained for images of another size", give(classifier="{shop}/classifier"),
      classifier="{shop}/classifier-16"),
    S("--classifier {} has other classes than the model", give(classifier="{shop}/classifier"), model="by-class",
      classifier="{shop}/classifier-ab"),
    S("{} and --classifier: give one of them", give_one, shared_timestep=5, classifier="{shop}/classifier"),
    S("--interpolate {}: not an image that can be read", give(interpolate=["{shop}/a.png"] * 2), timestep=5,
      num_images=2, interpolate=["{shop}/a.png", "{shop}/run/run.json"]),
    S("--out {} cannot be written; name another folder", give(out="{out}/samples"), out="{shop}/a.png/samples"),
    S("--{} {} holds files that would be replaced but were not written by this command", give(out="{out}/samples"),
      change(lambda shop, out: shutil.copytree(shop / "theirs", out / "moved" / "to"), out="{out}/moved"),
      out="{shop}/theirs"),
    S("{} has no averaged (EMA) weights", lambda message, flags: [{**flags, flags_in(message)[-1]: True, "ema": None}],
      model="run/checkpoint-2", ema=True, steps=1),
    S("{} holds no pipeline (no model_index.json); give the --output_dir of a training run",
      give(**{"": "{shop}/run"}), model="pictures"),
    S("{} is neither a folder nor a model that can be reached on the Hub", give(**{"": "{shop}/run"}),
      model="none/at/all"),
    Row("info", {"": "{shop}/pictures"}, "{} is neither a model nor a run", (give(**{"": "{shop}/run"}),), True),
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
    Row("push-space", {"": "{shop}/plain", "out": "{out}/app", "ema": True},
        "--{}ema: {} is not a checkpoint-N of a run", (leave_out,), True),
    Row("push-space", {"": "{shop}/text", "out": "{out}/app", "restore": True},
        "--restore requires a model that is unconditional or by class", (leave_out,), True),
    # words, files of flags
    U("--{}: a token has letters and digits only", give(hub_token="hf_some"), hub_token="hf some"),
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
    W("the highest {} value in the inspected images is {}", take_example, train_data_dir="{shop}/dark",
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
