"""Every flag is accepted, is read, and alone changes something that can be seen."""

import dataclasses

import pytest
import torch

import train_unconditional
from ddpm_hf.evaluation.flags import EvaluationFlags
from tests.support.flag_rows import (
    Row,
    Seen,
    adam,
    checkpoints,
    fits,
    flags_of,
    grids,
    has,
    last_grid,
    logs,
    rates,
    scheduler,
    steps,
)
from tests.support.flag_runs import DRY, observe, weights
from tests.support.runs import BASE, defaults, fill, parse

PEER_DEFAULTS = {
    "dataset_name": None, "dataset_config_name": None, "model_config_name_or_path": None, "train_data_dir": None,
    "cache_dir": None, "hub_token": None, "hub_model_id": None, "checkpoints_total_limit": None,
    "resume_from_checkpoint": None, "output_dir": "ddpm-model-64", "resolution": None, "train_batch_size": 16,
    "eval_batch_size": 16, "dataloader_num_workers": 0, "num_epochs": 100, "save_images_epochs": 10,
    "save_model_epochs": 10,
    "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 500,
    "adam_beta1": 0.95, "adam_beta2": 0.999, "adam_weight_decay": 1e-6, "adam_epsilon": 1e-8, "ema_inv_gamma": 1.0,
    "ema_power": 0.75, "ema_max_decay": 0.9999, "logger": "tensorboard", "logging_dir": "logs", "local_rank": -1,
    "mixed_precision": "no", "prediction_type": "epsilon", "ddpm_num_steps": 1000, "ddpm_num_inference_steps": 1000,
    "ddpm_beta_schedule": "linear", "checkpointing_steps": 500,
    "overwrite_output_dir": False, "center_crop": False, "random_flip": False, "use_ema": False, "push_to_hub": False,
    "hub_private_repo": False, "enable_xformers_memory_efficient_attention": False, "preserve_input_precision": False,
}  # fmt: skip


# Command lines of Diffusers' scripts; its resolution of 64 is that of its own model, which test_sizes shows


def test_the_peers_flags_are_all_here():
    # Breaks if the list above, which the other tests go by, lost a flag.
    assert len(PEER_DEFAULTS) == 45


@pytest.mark.parametrize("flag", PEER_DEFAULTS)
def test_a_peers_flag_has_its_default_and_its_meaning(flag):
    # Breaks if a peer's command line fails here, or trains with another value where it says nothing.
    default = PEER_DEFAULTS[flag]
    named = ["--train_data_dir", "photos"] * (flag not in ("train_data_dir", "dataset_name"))
    if flag != "train_data_dir":
        assert getattr(parse(["--dataset_name" if flag == "train_data_dir" else "--train_data_dir", "x"]), flag) == (
            default
        )
    if default is False:
        assert getattr(parse([*named, f"--{flag}"]), flag) is True
        return
    choices = {"logger": "wandb", "mixed_precision": "fp16"}
    value = choices.get(flag, "7" if default is None or isinstance(default, str) else type(default)(0.5 + default))
    for spelling in (f"--{flag}", f"--{flag.replace('_', '-')}"):
        got = getattr(parse([*named, spelling, str(value)]), flag)
        assert str(got) == str(value)
        assert default is None or type(got) is type(default)


ALIASES = {
    "report_to": ("logger", "none"),
    "num_train_epochs": ("num_epochs", "3"),
    "dataset_image_column_name": ("image_column", "img"),
    "dataset_class_label_column_name": ("label_column", "fine_label"),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_both_spellings_work(alias, tmp_path):
    # Breaks if a flag of another of Diffusers' scripts is unknown here, on the command line or in a config file.
    name, value = ALIASES[alias]
    file = tmp_path / "run.yaml"
    file.write_text(f"{alias}: {value}\ntrain_data_dir: x\n")
    for argv in ([f"--{alias}", value], [f"--{name}", value], ["--config", str(file)]):
        assert str(getattr(parse(["--train_data_dir", "x", *argv]), name)) == value


def asked_of_the_hub(key):
    return lambda seen: [kwargs.get(key) for _, kwargs, _ in seen.spied("upload")]


def labels(seen):
    return sorted(torch.cat([batch["labels"] for batch in seen.batches[:2]]).tolist())


def conditioned(key):
    return lambda seen: seen.run.json("model_index.json").get("conditioning", {}).get(key)


EMA = {"use_ema": True}
SR = {"more": {"conditioning": "super-resolution"}, "group": "conditioned"}
PUSH = {"more": {"push_to_hub": True}, "group": "push"}
ADAM, MACHINE, SCHEDULER = {"group": "adam"}, {"group": "machine"}, {"group": "scheduler"}
SAVED, TRACKED = {"group": "saved"}, {"more": {"logger": "tensorboard"}, "group": "tracked"}
BOUND = {"variance_type": "learned_range", "objective": "hybrid"}
CLASSES = {"train_data_dir": "{shop}/labelled", "label_column": "label"}
CONSTANT = {"lr_scheduler": "constant"}
ANY_UNET = {**DRY, "model_config_name_or_path": None, "resolution": 32}
ROWS = [
    Row("dataset_name", "{shop}/few", lambda s: s.line("data"), lambda line: "embedded digits" in line,
        lambda line: "few: 4 images" in line, {**DRY, "train_data_dir": None}),
    Row("train_data_dir", "{shop}/few", lambda s: s.line("data"), lambda line: "embedded digits" in line,
        lambda line: "few: 4 images" in line, {**DRY, "train_data_dir": None}),
    Row("dataset_split", "small", lambda s: len(s.batches), 4, 2, {"train_data_dir": "{shop}/splits"}),
    Row("streaming", True, lambda s: s.line("data"), lambda line: "8 images" in line,
        lambda line: "a stream" in line, {**DRY, "max_train_steps": 2}),
    Row("image_column", "b", lambda s: s.batches[0]["images"].unique().tolist(), [10], [20],
        {"train_data_dir": "{shop}/two"}),
    Row("label_column", "label", lambda s: s.run.json("model_index.json").get("id2label"), None,
        {"0": "0", "1": "1"}, {"train_data_dir": "{shop}/labelled"}),
    Row("class_dropout", 0, lambda s: s.run.json("unet/config.json")["num_class_embeds"], 3, 2, CLASSES),
    Row("class_balanced", True, labels, [0] * 7 + [1], [0] * 4 + [1] * 4, CLASSES),
    Row("resolution", "16x8", lambda s: s.batches[0]["images"].shape[-2:], (8, 8), (16, 8)),
    Row("channels", 1, lambda s: s.line("images").split()[1], "3", "1",
        {**ANY_UNET, "model_preset": "small-32"}),
    Row("center_crop", True, Seen.distinct_images, lambda count: count > 8, 8),
    Row("image_interpolation_mode", "nearest", lambda s: s.batches[0]["images"].float().std().item(), None,
        lambda spread: spread > 0, {"resolution": "32"}),
    Row("max_train_samples", 3, lambda s: s.line("data").split(": ")[1].split(",")[0], None, "3 images", DRY),
    Row("random_flip", True, Seen.distinct_images, 8, lambda count: 8 < count <= 16, {"center_crop": True}),
    Row("preserve_input_precision", True, lambda s: s.batches[0]["images"].unique().numel(), 1, 2,
        {"train_data_dir": "{shop}/deep"}),
    Row("pixel_range", (0, 2000), lambda s: s.batches[0]["images"].unique().numel(), 1, 2,
        {"train_data_dir": "{shop}/deep"}),
    Row("cache_dataset", "never", lambda s: s.line("images").endswith("not kept decoded"), False, True, DRY),
    Row("skip_broken_images", True, lambda s: s.run.code, 2, 0, {"train_data_dir": "{shop}/broken"}),
    Row("validation_split", 0.25, lambda s: s.run.code or "validation_loss" in s.run.records()[-1], 2, True,
        {"validation_steps": 2}),
    Row("validation_steps", 3, lambda s: [r["step"] for r in s.run.records() if "validation_loss" in r], [], [3, 4],
        {"validation_split": 0.25}),
    Row("model_config_name_or_path", "{shop}/wide", lambda s: s.line("model"),
        lambda line: "113,673,219 parameters" in line, lambda line: "wide" in line, ANY_UNET),
    Row("model_preset", "small-32", lambda s: s.line("model"), lambda line: "113,673,219 parameters" in line,
        lambda line: "small-32" in line, ANY_UNET),
    Row("ddpm_num_steps", 50, scheduler("num_train_timesteps"), 1000, 50, **SCHEDULER),
    Row("ddpm_num_inference_steps", 3, lambda s: last_grid(s).tobytes()),
    Row("ddpm_beta_schedule", "scaled_linear", scheduler("beta_schedule"), "linear", "scaled_linear", **SCHEDULER),
    Row("rescale_betas_zero_snr", True, scheduler("rescale_betas_zero_snr"), False, True,
        {"prediction_type": "v_prediction"}),
    Row("prediction_type", "v_prediction", scheduler("prediction_type"), "epsilon", "v_prediction",
        **SCHEDULER),
    Row("prediction_type", "sample", weights),
    Row("variance_type", "fixed_large", scheduler("variance_type"), "fixed_small", "fixed_large", **SCHEDULER),
    Row("objective", "hybrid", weights, more={"variance_type": "learned_range"}),
    Row("loss_type", "l1", weights),
    Row("loss_weighting", "p2", weights),
    Row("snr_gamma", 5, weights),
    Row("vlb_weight", 1, weights, more=BOUND),
    Row("timestep_sampler", "loss_second_moment", has("timestep_sampler.safetensors"), False, True,
        **SAVED),
    Row("seed", 1, weights),
    Row("cpu_threads", 2, lambda s: s.spied("threads")[0], 1, 2, **MACHINE),
    Row("train_batch_size", 2, steps, 4, 8),
    Row("eval_batch_size", 4, lambda s: last_grid(s).size, (68, 68), (134, 134)),
    Row("gradient_accumulation_steps", 2, steps, 4, 2),
    Row("dataloader_num_workers", 1, lambda s: s.spied("loader")[0][1]["num_workers"], 0, 1,
        {"cache_dataset": "never"}),
    Row("num_epochs", 3, steps, 4, 6),
    Row("max_train_steps", 3, steps, 4, 3),
    Row("max_train_hours", 1e-9, checkpoints, ["checkpoint-4"], ["checkpoint-1"]),
    Row("learning_rate", 5e-4, rates, [1e-4] * 4, [5e-4] * 4, CONSTANT),
    Row("scale_lr", True, rates, [1e-4] * 4, [4e-4] * 4, CONSTANT),
    Row("lr_scheduler", "linear", lambda s: [round(rate * 1e6) for rate in rates(s)],
        lambda seen: seen[1] == 50 != 75 != seen[0], [75, 50, 25, 0]),
    Row("lr_warmup_steps", 4, lambda s: [round(rate * 1e6) for rate in rates(s)], [100] * 4, [25, 50, 75, 100],
        {"lr_scheduler": "constant_with_warmup"}),
    Row("adam_beta1", 0.5, lambda s: adam("betas")(s)[0], 0.95, 0.5, **ADAM),
    Row("adam_beta2", 0.5, lambda s: adam("betas")(s)[1], 0.999, 0.5, **ADAM),
    Row("adam_weight_decay", 0.5, adam("weight_decay"), 1e-6, 0.5, **ADAM),
    Row("adam_epsilon", 0.5, adam("eps"), 1e-8, 0.5, **ADAM),
    Row("max_grad_norm", 1e-9, weights),
    Row("max_nonfinite_steps", 3, lambda s: s.run.err.count("step skipped"), 1, 3,
        {"learning_rate": 1e30, "max_nonfinite_steps": 1, "num_epochs": 9}),
    Row("use_ema", True, has("unet_ema/"), False, True),
    Row("use_ema", True, weights),
    Row("ema_inv_gamma", 3, weights, more=EMA),
    Row("ema_power", 0.25, weights, more=EMA),
    Row("ema_max_decay", 0.1, weights, more=EMA),
    Row("ema_min_decay", 0.9, weights, more=EMA),
    Row("ema_snapshot_steps", 3, lambda s: [name[-13] for name in s.run.files() if "ema-snapshots" in name], [],
        ["3", "4"] * 2, **SAVED),
    Row("mixed_precision", "bf16", lambda s: s.spied("precision")[0], "no", "bf16", **MACHINE),
    Row("mixed_precision", "bf16", weights),
    Row("allow_tf32", True, lambda s: s.spied("tf32")[0], False, True, **MACHINE),
    Row("acceleration", "compile", lambda s: len(s.spied("compile_blocks")), 0, 1),
    Row("compile", True, lambda s: len(s.spied("compile")), 0, 1, **MACHINE),
    Row("gradient_checkpointing", True, lambda s: s.spied("checkpointing")[0], False, True, **MACHINE),
    Row("enable_xformers_memory_efficient_attention", True, lambda s: len(s.spied("xformers")), 0, 1,
        **MACHINE),
    Row("checkpointing_steps", 3, checkpoints, ["checkpoint-4"], ["checkpoint-3", "checkpoint-4"], **SAVED),
    Row("checkpoints_total_limit", 2, lambda s: checkpoints(s), [f"checkpoint-{n}" for n in (1, 2, 3, 4)],
        ["checkpoint-3", "checkpoint-4"], {"checkpointing_steps": 1}),
    Row("save_images_epochs", 1, grids, ["step-000002.png", "step-000006.png"],
        ["step-000002.png", "step-000004.png", "step-000006.png"], {"num_epochs": 3}),
    Row("save_images_epochs", 0, grids, ["step-000002.png", "step-000004.png"], []),
    Row("save_images_steps", 3, grids, ["step-000002.png", "step-000004.png"], ["step-000003.png", "step-000004.png"]),
    Row("save_model_epochs", 1, lambda s: len(s.spied("save")), more={"num_epochs": 4}),
    Row("logging_steps", 3, lambda s: [record["step"] for record in s.run.records()], [1, 2, 3, 4], [3, 4],
        **SAVED),
    Row("logger", "tensorboard", logs, [], lambda places: places and all(p.startswith("logs") for p in places)),
    Row("logging_dir", "curves", logs, lambda places: all(p.startswith("logs") for p in places),
        lambda places: places and all(p.startswith("curves") for p in places), **TRACKED),
    Row("tracker_project_name", "mine", logs, lambda places: "logs/train_unconditional" in places,
        lambda places: any(place.endswith("/mine") for place in places), **TRACKED),
    Row("conditioning", "deblur", conditioned("task"), None, "deblur"),
    Row("conditioning_factor", 4, conditioned("factor"), 2, 4, **SR),
    Row("conditioning_filter", "average", conditioned("filter"), "bicubic", "average", **SR),
    Row("conditioning_enlarge", "bilinear", conditioned("enlarge"), "bicubic", "bilinear", **SR),
    Row("conditioning_noise", 0, lambda s: s.run.json("unet/config.json")["in_channels"], 7, 6, **SR),
    Row("conditioning_masks", ("half",), conditioned("masks"), ["box", "random", "half"], ["half"],
        {"conditioning": "inpaint"}),
    Row("conditioning_blur_size", 2.0, conditioned("blur_size"), 1.0, 2.0, {"conditioning": "deblur"}),
    Row("push_to_hub", True, lambda s: len(s.spied("upload")), 0, 1),
    Row("hub_model_id", "me/photos", lambda s: (s.spied("create")[0][0][0], s.spied("upload")[0][0][2]),
        lambda names: names[1] != "me/photos", ("me/photos", "me/photos"), **PUSH),
    Row("hub_token", "hf_secret", lambda s: (s.spied("create")[0][0][1], s.spied("upload")[0][0][3]),
        (None, None), ("hf_secret", "hf_secret"), **PUSH),
    Row("hub_private_repo", True, lambda s: s.spied("create")[0][0][2], False, True, **PUSH),
    Row("hub_revision", "v1", lambda s: [len(s.spied("tags")), *asked_of_the_hub("tag")(s)], [0, None], [1, "v1"],
        **PUSH),
    Row("hub_license", "mit", asked_of_the_hub("license"), [None], ["mit"], **PUSH),
]  # fmt: skip

# Flags whose effect takes more than a run with and without, each with a test of its own below, or in test_averaging,
# test_optimizers, test_latent_training, test_pretrained, test_publishing and test_in_training
APART = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "local_rank", "cache_dir", "dataset_config_name",
    "dry_run", "config", "foreach_ema", "offload_ema", "use_8bit_adam", "optimizer",
    "vae_name_or_path", "cache_latents", "hub_strategy", "save_variants",
    "pretrained_model_name_or_path", "revision", "variant", "subfolder", "hub_best_metric",
    *(field.name for field in dataclasses.fields(EvaluationFlags)),
}  # fmt: skip


def test_every_flag_is_seen_to_work():
    # Breaks if a flag is declared that nobody shows to be read.
    declared = set(defaults(train_unconditional.PROGRAM).values())
    assert declared == {row.flag for row in ROWS} | APART


@pytest.mark.every(3)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # pictures of NaN
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.flag}-{row.value}".replace("{shop}/", ""))
def test_a_flag_changes_what_is_seen(row, seen_of):
    # Breaks if a flag is accepted and ignored, or does something else than it says.
    without, given = seen_of(row.more), seen_of(flags_of(row, ROWS))
    assert given.run.code in (0, without.run.code), given.run.err
    before, after = row.see(without), row.see(given)
    assert before != after
    assert fits(before, row.before), before
    assert fits(after, row.after), after


def test_a_run_is_a_function_of_its_flags(seen_of, shop, tmp_path):
    # Breaks if two runs of one command line differ: then "changes alone" above would mean nothing.
    again = observe(fill(BASE, shop), tmp_path / "again")
    assert weights(again) == weights(seen_of({}))
    assert last_grid(again).tobytes() == last_grid(seen_of({})).tobytes()
    assert again.run.records() == seen_of({}).run.records()
