"""Each flag of train_text2image.py is read and alone changes what can be seen; defaults are those of Diffusers."""

import functools
from pathlib import Path
from unittest import mock

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image

import train_text2image
import train_unconditional
from ddpm_hf.common.pictures import image_grid
from ddpm_hf.training.setup.settings import public_settings, save_settings
from tests.support.fixtures_text import (
    CAPTIONS,
    WIDTH,
    parse_text,
    run_text_script,
)
from tests.support.flag_rows import Row, Seen, digest, fits, flags_of, has, last_grid, rates, remembered, scheduler
from tests.support.runs import changed, defaults, words
from tests.support.text_runs import START, text_command, train_text

# Command lines of Diffusers' scripts

NAMED = {"pretrained_model_name_or_path": "x", "train_data_dir": "x"}
PEER_DEFAULTS = {
    "pretrained_model_name_or_path": None, "revision": None, "variant": None, "dataset_name": None,
    "dataset_config_name": None, "train_data_dir": None, "max_train_samples": None, "validation_prompts": None,
    "cache_dir": None, "seed": None, "max_train_steps": None, "snr_gamma": None, "non_ema_revision": None,
    "hub_token": None, "prediction_type": None, "hub_model_id": None, "mixed_precision": None,
    "checkpoints_total_limit": None, "resume_from_checkpoint": None,
    "input_perturbation": 0, "image_column": "image", "caption_column": "text", "output_dir": "sd-model-finetuned",
    "resolution": 512, "train_batch_size": 16, "num_train_epochs": 100, "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 500, "dream_detail_preservation": 1.0,
    "dataloader_num_workers": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "logging_dir": "logs", "report_to": "tensorboard", "local_rank": -1,
    "checkpointing_steps": 500, "noise_offset": 0, "validation_epochs": 5,
    "tracker_project_name": "text2image-fine-tune", "image_interpolation_mode": "lanczos",
    "center_crop": False, "random_flip": False, "gradient_checkpointing": False, "scale_lr": False,
    "dream_training": False, "use_8bit_adam": False, "allow_tf32": False, "use_ema": False, "offload_ema": False,
    "foreach_ema": False, "push_to_hub": False, "enable_xformers_memory_efficient_attention": False,
}  # fmt: skip
OURS = {"num_train_epochs": "num_epochs", "report_to": "logger", "validation_epochs": "save_images_epochs"}

# said otherwise there, and meant alike: none is "no", no prompts are an empty list, the one image column is found, the
# size is the checkpoint's (512 for Stable Diffusion 1, which test_sizes shows)
SAID_OTHERWISE = {
    "mixed_precision": "no", "validation_prompts": [], "image_column": None, "foreach_ema": True, "resolution": None,
}  # fmt: skip


def test_the_peers_flags_are_all_here():
    """Else the list above, which the tests go by, lost a flag."""
    assert len(PEER_DEFAULTS) == 57


@pytest.mark.parametrize("flag", PEER_DEFAULTS)
def test_a_peers_flag_has_its_default_and_its_meaning(flag):
    """Else a peer's command line fails here, or trains with another value where it says nothing."""
    default, name = PEER_DEFAULTS[flag], OURS.get(flag, flag)
    named = {key: value for key, value in NAMED.items() if key != flag}
    if flag != "pretrained_model_name_or_path":
        got = getattr(parse_text(words(named)), name)
        assert got == SAID_OTHERWISE.get(flag, default) or str(got) == str(default)
    if default is False:
        assert getattr(parse_text([*words(named), f"--{flag}"]), name) is True
        return
    choices = {"report_to": "wandb", "mixed_precision": "fp16", "image_interpolation_mode": "nearest"}
    value = choices.get(flag, "7" if default is None or isinstance(default, str) else type(default)(1 + default))
    for spelling in {f"--{flag}", f"--{name.replace('_', '-')}"}:
        got = getattr(parse_text([*words(named), spelling, str(value)]), name)
        assert got == [value] if flag == "validation_prompts" else float_or_text(got) == float_or_text(value)


def float_or_text(value):
    """A number as one, however it is written."""
    try:
        return float(value)
    except ValueError:
        return value


def test_several_prompts_on_one_line():
    """Else Diffusers' `--validation_prompts "a" "b"` is an error, or one prompt."""
    config = parse_text([*words(NAMED), "--validation_prompts", "a cat", "a dog", "--seed", "1"])
    assert config.validation_prompts == ["a cat", "a dog"]


def test_without_a_checkpoint_the_recipe_is_from_scratch_and_yields_to_the_user():
    """Else a small model is trained with a large one's settings, or what the user said is overruled."""
    data = ["--train_data_dir", "x"]
    assert parse_text(data).caption_dropout == 0.1
    assert parse_text(data).trains_text_encoder
    assert parse_text([*data, "--resolution", "64", "--use_ema", "False"]).resolution == "64"
    assert not parse_text([*data, "--use_ema", "False"]).use_ema
    assert parse_text([]).vae_train_steps != parse_text(data).vae_train_steps  # the digits'


# Each flag of the script's own alone


def observe(start: str, flags: dict, folder: Path, shop: Path) -> Seen:
    """Run the script and watch its batches, and what it asks of `from_pretrained`."""
    batches, calls = [], []
    compute_loss, loaded = train_text2image.compute_loss, UNet2DConditionModel.from_pretrained.__func__
    pipeline = train_text2image.TextToImageDDPMPipeline.from_pretrained.__func__

    def watched_loss(model, batch, keys, **options):
        if not keys.validation:
            batches.append(batch)
        return compute_loss(model, batch, keys, **options)

    def load_unet(cls, name, **options):
        calls.append(("unet", str(name), options))
        if options.get("revision") == "raw":
            return loaded(cls, shop / "raw")
        return loaded(cls, name, **options)

    def load_pipeline(cls, name, **options):
        calls.append(("pipeline", str(name), options))
        return pipeline(cls, name)

    with (
        mock.patch.object(train_text2image, "compute_loss", watched_loss),
        mock.patch.object(UNet2DConditionModel, "from_pretrained", classmethod(load_unet)),
        mock.patch.object(train_text2image.TextToImageDDPMPipeline, "from_pretrained", classmethod(load_pipeline)),
    ):
        run = run_text_script(text_command(start, shop, folder, **flags), folder)
    return Seen(run, batches, calls)


def pixels(seen):
    return [batch["images"].numpy().tobytes() for batch in seen.batches]


def asked(what, key):
    return lambda seen: next(options.get(key) for kind, _, options in seen.calls if kind == what)


FROM_SCRATCH = {"start": "scratch"}
LARGE = {"train_data_dir": "{shop}/large"}
READY = {"vae_name_or_path": "{shop}/vae"}
ROWS = [
    Row("pretrained_model_name_or_path", "{shop}/stable", has("autoencoder/"), None, False,
        {"model_config_name_or_path": None, "vae_widths": None}, **FROM_SCRATCH),
    Row("revision", "v2", asked("pipeline", "revision"), None, "v2", group="loaded"),
    Row("variant", "fp16", asked("pipeline", "variant"), None, "fp16", group="loaded"),
    Row("non_ema_revision", "raw", digest("unet")),
    Row("model_config_name_or_path", "{shop}/wide", lambda s: s.run.json("unet/config.json")["block_out_channels"],
        [8, 16], [16, 16], READY, **FROM_SCRATCH),
    Row("text_encoder_name_or_path", "{shop}/stable",
        lambda s: s.run.json("text_encoder/config.json")["hidden_size"], None, WIDTH,
        {**READY, "model_config_name_or_path": "{shop}/narrow"}, **FROM_SCRATCH),
    Row("train_text_encoder", True, digest("text_encoder")),
    Row("caption_column", "description", lambda s: sorted(set(s.batches[0]["captions"])),
        None, ["a cat", "a dog"], {"train_data_dir": "{shop}/described"}),
    Row("caption_dropout", 0.9, digest("unet")),
    Row("cache_latents", True, has("cache/latents"), False, True),
    Row("cache_latents", True, has("cache/embeddings"), False, True),
    Row("validation_prompts", "a blue square", lambda s: last_grid(s).tobytes()),
    Row("guidance_scale", 9, lambda s: last_grid(s).tobytes()),
    Row("num_inference_steps", 5, lambda s: last_grid(s).tobytes()),
    Row("prediction_type", "v_prediction", scheduler("prediction_type"), "epsilon", "v_prediction"),
    Row("prediction_type", "v_prediction", digest("unet")),
    Row("loss_type", "l1", digest("unet")),
    Row("loss_weighting", "p2", digest("unet")),
    Row("snr_gamma", 5, digest("unet")),
    Row("noise_offset", 0.1, digest("unet")),
    Row("input_perturbation", 0.1, digest("unet")),
    Row("dream_training", True, digest("unet")),
    Row("dream_detail_preservation", 0.5, digest("unet"), more={"dream_training": True}),
    Row("rescale_betas_zero_snr", True, scheduler("rescale_betas_zero_snr"), lambda on: not on, True,
        {"prediction_type": "v_prediction"}),
    Row("ddpm_num_steps", 50, scheduler("num_train_timesteps"), 1000, 50, READY, group="scheduler",
        **FROM_SCRATCH),
    Row("ddpm_beta_schedule", "cosine", scheduler("beta_schedule"), "linear", "squaredcos_cap_v2", READY,
        group="scheduler", **FROM_SCRATCH),
    Row("vae_name_or_path", "{shop}/vae", digest("vae"), **FROM_SCRATCH),
    Row("vae_train_steps", 2, lambda s: s.run.json("autoencoder/checkpoint-2/manifest.json")["step"]
        if "autoencoder/checkpoint-2/manifest.json" in s.run.files() else None, None, 2, group="vae",
        **FROM_SCRATCH),
    Row("vae_learning_rate", 1e-2, digest("vae"), **FROM_SCRATCH),
    Row("vae_kl_weight", 1, digest("vae"), **FROM_SCRATCH),
    Row("vae_latent_channels", 3, lambda s: s.run.json("unet/config.json")["in_channels"], None, 3,
        {"model_config_name_or_path": "{shop}/rgb"}, **FROM_SCRATCH),
    Row("vae_widths", "8,16,16", lambda s: s.run.json("vae/config.json")["block_out_channels"], [8, 16],
        [8, 16, 16], group="vae", **FROM_SCRATCH),
    # flags of the data and of training, where latents and captions might lose them
    Row("max_train_samples", 3, lambda s: s.run.json("checkpoint-2/manifest.json")["samples"], 8, 3, group="training"),
    Row("center_crop", True, pixels, more=LARGE),
    Row("random_flip", True, pixels),
    Row("image_interpolation_mode", "nearest", pixels, more={**LARGE, "center_crop": True}),
    Row("random_flip", True, digest("unet"), more={"cache_latents": True}),
    Row("channels", 1, lambda s: s.run.json("vae/config.json")["in_channels"], 3, 1, group="vae",
        **FROM_SCRATCH),
    Row("scale_lr", True, rates, [1e-3] * 2, [4e-3] * 2, group="training"),
    Row("use_ema", True, digest("unet")),
    Row("validation_steps", 1, lambda s: sum("validation_loss" in r for r in s.run.records()), 0, 2,
        {"validation_split": 0.25}),
    Row("streaming", True, lambda s: s.run.json("checkpoint-2/manifest.json")["samples"], 8, None),
]  # fmt: skip


def test_every_flag_of_the_script_is_seen_to_work():
    """Else a flag is declared that nobody shows to be read."""
    declared = defaults(train_text2image.PROGRAM).values().keys()
    shared = defaults(train_unconditional.PROGRAM).values().keys() - {"cache_latents"}
    assert declared - shared <= {row.flag for row in ROWS} | {"aspect_ratio_buckets"}  # which test_buckets shows


@pytest.fixture(scope="module")
def seen_of(shop, tmp_path_factory):
    """What is seen with flags on top of a start; a run that was made before is not made again."""
    usual = {"max_train_steps": 2, "lr_scheduler": "constant"}  # of which the second ends an epoch and is drawn
    folders = tmp_path_factory.mktemp("runs")
    watched = {start: remembered(functools.partial(observe, start, shop=shop), folders / start) for start in START}
    return lambda start, flags: watched[start or "checkpoint"]({**usual, **flags})


# without which the rest of the row's flags do not fit together
NEEDED = {"pretrained_model_name_or_path", "text_encoder_name_or_path", "caption_column", "vae_latent_channels"}


@pytest.mark.every(3)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.flag}-{row.value}".replace("{shop}/", ""))
def test_a_flag_changes_what_is_seen(row, seen_of):
    """Else a flag is accepted and ignored, or does something else than it says."""
    given = seen_of(row.start, flags_of(row, ROWS))
    if row.flag not in NEEDED:
        without = seen_of(row.start, row.more)
        assert without.run.code == 0, without.run.err
        before = row.see(without)
        assert before != row.see(given)
        assert fits(before, row.before), before
    assert given.run.code == 0, given.run.err
    after = row.see(given)
    assert fits(after, row.after), after


def test_a_run_is_a_function_of_its_flags(seen_of, shop, tmp_path):
    """Else "changes alone" above means nothing."""
    flags = {"max_train_steps": 2, "lr_scheduler": "constant"}
    for start in START:
        again = observe(start, flags, tmp_path / start, shop)
        assert digest("unet")(again) == digest("unet")(seen_of(start, {}))
        assert again.run.records() == seen_of(start, {}).run.records()


@pytest.mark.parametrize("prompts", [[], ["a red square"], ["a red square", "a blue 'square'"]])
def test_a_run_can_be_repeated_from_what_it_wrote(prompts, tmp_path):
    """Else `--config training_config.json` is refused, or trains with other settings."""
    argv = words({**NAMED, "output_dir": tmp_path, "seed": 5, "caption_dropout": 0.2, "use_ema": True})
    config = parse_text([*argv, *(["--validation_prompts", *prompts] if prompts else [])])
    save_settings(config)
    again = parse_text(["--config", str(tmp_path / "training_config.json")])
    assert public_settings(changed(again, config=None)) == public_settings(config)


def test_several_prompts_are_as_many_rows(shop, tmp_path):
    """Else only the first of the prompts is ever drawn."""
    argv = text_command("checkpoint", shop, tmp_path, validation_prompts=None, max_train_steps=1, eval_batch_size=6)
    run = run_text_script([*argv, "--validation_prompts", *CAPTIONS[:3]], tmp_path)
    grid = Image.open(run.folder / "samples" / "step-000001.png")
    expected = image_grid([Image.new("RGB", (16, 16))] * 6, 2, scale=4, legend=CAPTIONS[:3])
    assert grid.size == expected.size


@pytest.mark.parametrize("start", START)
def test_a_dry_run_says_all_and_writes_nothing(start, shop, tmp_path):
    """Else looking at what would run costs a training, or hides what it would do."""
    run = train_text(start, shop, tmp_path / "run", dry_run=True)
    assert not run.folder.exists()
    for fragment in (
        "8 images",
        "'text'",
        "6 (2 an epoch)",
        "= 4",
        "parameters to train",
        "s a step",
        "MiB of memory",
        "seed 3",
    ):
        assert fragment in run.out
    assert ("stable" if start == "checkpoint" else "from scratch") in run.out
