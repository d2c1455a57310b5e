#!/usr/bin/env python
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6",
#     "numpy>=1.26",
#     "diffusers>=0.38",
#     "accelerate>=1.10",
#     "transformers>=5.0",
#     "tokenizers>=0.20",
#     "datasets>=4.0",
#     "pandas>=2.0",
#     "pyarrow>=15.0",
#     "huggingface_hub>=1.0",
#     "safetensors>=0.5",
#     "pillow>=10.0",
#     "psutil>=5.9",
#     "pyyaml>=6.0",
#     "tqdm>=4.66",
#     "matplotlib>=3.8",
#     "typer>=0.15",
#     "tensorboard>=2.16",
#     "mlxtend>=0.23",
# ]
# ///
"""Train text to image in latents.

    accelerate launch train_text2image.py --train_data_dir pictures        # pictures/metadata.jsonl has the captions
    accelerate launch train_text2image.py                                  # the embedded digits, minutes on a CPU
    accelerate launch train_text2image.py --pretrained_model_name_or_path MODEL --dataset_name DATASET --use_ema

With `--pretrained_model_name_or_path` a Stable Diffusion checkpoint (1.x, 2.x) is trained further; without it, all
networks are trained from scratch: first an autoencoder, then a text encoder and a UNet together. The output folder is
one that `DiffusionPipeline.from_pretrained` loads anywhere, as Stable Diffusion's; `ddpm-hf sample` samples from it.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ddpm_hf.latents.flags import AUTOENCODER_FOLDER
from ddpm_hf.models.sizes import settle_resolution
from ddpm_hf.text.flags import Text2ImageConfig
from ddpm_hf.text.recipes import weaker_layers
from ddpm_hf.training.parsing import parse_layers

QUARTILES = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")  # of the timesteps, from little noise to much
# The settings that the model card shows
SHOWN = (
    "resolution", "caption_dropout", "prediction_type", "loss_type", "snr_gamma",
    "train_text_encoder", "train_batch_size", "learning_rate", "use_ema",
)  # fmt: skip


def parse(argv: list[str]) -> Text2ImageConfig:
    """The settings for a command line; a mistake is one line and exit code 2."""
    stages = ("", AUTOENCODER_FOLDER)
    return parse_layers(Text2ImageConfig, argv, weaker_layers, description=__doc__, stages=stages)


if __name__ == "__main__":  # before torch is imported, so that --help and an unknown flag are answered at once
    CONFIG = parse(sys.argv[1:])

import torch

from ddpm_hf.common.errors import DataError
from ddpm_hf.common.layout import AUTOENCODER, COMPONENTS, layout
from ddpm_hf.common.randomness import StepKeys, sent
from ddpm_hf.data.batches import Images, held_out_means, make_batches, open_images, plan_steps
from ddpm_hf.inference.components import Components, assemble, load_checkpoint_components
from ddpm_hf.latents.autoencoder import make_autoencoder
from ddpm_hf.latents.encoding import x_start_of
from ddpm_hf.latents.training import autoencoder_of, take_over_autoencoder, train_autoencoder
from ddpm_hf.models.acceleration import accelerate_for_training
from ddpm_hf.models.autoencoder import downscaling
from ddpm_hf.models.gradient_gate import recorded_call
from ddpm_hf.models.unet import time_blindness
from ddpm_hf.objectives.losses import training_losses
from ddpm_hf.objectives.timestep_samplers import UniformTimestepSampler
from ddpm_hf.portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline, tokenize
from ddpm_hf.publishing.publisher import Publisher, describe_run, reserve_repository
from ddpm_hf.text.components import build, draw_blueprint, fit_to_size, save_tokenizer
from ddpm_hf.text.conditioning import TextConditioned, caption_input, dream_noise, trained_model
from ddpm_hf.text.prepare import (
    cached,
    check_images,
    check_parts,
    check_schedule,
    default_prompts,
    image_channels,
    in_buckets,
    log_cut_texts,
)
from ddpm_hf.training.ending import ends_in_one_line
from ddpm_hf.training.logs import end_training
from ddpm_hf.training.loop import training_loop
from ddpm_hf.training.meter import Losses
from ddpm_hf.training.plan import StepPlan
from ddpm_hf.training.previews import draw_grid
from ddpm_hf.training.rehearsal import rehearse, show_dry_run
from ddpm_hf.training.reporting import ending, run_lines
from ddpm_hf.training.run import Run
from ddpm_hf.training.setup.begin import begin_training, run_facts, start_run
from ddpm_hf.training.setup.claiming import check_resumable, start_writing


def compute_loss(
    model,
    batch: dict,
    keys: StepKeys,
    *,
    run: Run,
    config: Text2ImageConfig,
    components: Components,
    null_embedding: torch.Tensor | None,
) -> Losses:
    """Draw t and noise, add it to the latents, predict from the caption, compare (Rombach et al. 2022, Eq. 3)."""
    scheduler = components.scheduler
    x_start = x_start_of(batch, keys, components.vae, run.device)  # [N, C, h, w]
    timesteps = UniformTimestepSampler(len(scheduler)).sample(keys.uniform("timestep"))[0]
    timesteps = sent(timesteps, x_start.device)
    noise = keys.normal_like(x_start)
    text = caption_input(batch, keys, config, components, null_embedding, run.device)
    if config.noise_offset and not keys.validation:
        noise = noise + config.noise_offset * keys.normal_like(x_start[:, :, :1, :1].clone(), "noise_offset")
    if config.dream_training and not keys.validation:
        noise = dream_noise(model, scheduler, x_start, noise, timesteps, text, config.dream_detail_preservation)
    added = noise
    if config.input_perturbation and not keys.validation:  # Ning et al. 2023
        added = noise + config.input_perturbation * keys.normal_like(x_start, "input_perturbation")
    output = model(scheduler.add_noise(x_start, added, timesteps), timesteps, text).float()
    losses = training_losses(
        scheduler, output, x_start, noise, timesteps, loss_type=config.loss_type, snr_gamma=config.snr_gamma
    )
    return Losses(losses, groups=timesteps * 4 // len(scheduler))


def validation_loss(model, *, run: Run, held_out, **options) -> dict[str, float]:
    """The mean loss over the held-out images, at the same timesteps and noise each time, no caption left out."""

    def measure(batch: dict, keys: StepKeys) -> list[torch.Tensor]:
        with run.accelerator.autocast():
            return [compute_loss(model, batch, keys, run=run, **options).losses]

    return held_out_means(run, held_out, ["validation_loss"], measure)


def make_pipeline(model: TextConditioned, components: Components) -> TextToImageDDPMPipeline:
    """The pipeline that samples from the model."""
    text_encoder = model.text_encoder or components.text_encoder
    return assemble(components._replace(unet=model.unet, text_encoder=text_encoder))


def draw_prompts(
    model, step: int, *, run: Run, pipeline_of: Callable, prompts: list[str], num_inference_steps: int
) -> Path | None:
    """A grid with a row for each prompt."""
    pipeline, prompts = pipeline_of(model), prompts[: run.flags.eval_batch_size]
    columns = run.flags.eval_batch_size // len(prompts)
    requests = [prompt for prompt in prompts for _ in range(columns)]
    steps = min(num_inference_steps, len(pipeline.scheduler))
    return draw_grid(run, pipeline, requests, columns, step, prompts, num_inference_steps=steps)


def describe(
    run: Run, config: Text2ImageConfig, images: Images, plan: StepPlan, model: TextConditioned
) -> dict[str, str]:
    """What runs: said at the start, and by --dry_run."""
    count = "a stream" if images.dataset is None else f"{len(images.dataset):,} images"
    start = config.pretrained_model_name_or_path or "from scratch"
    vae = config.vae_name_or_path or f"a new one, {config.vae_widths}, {config.vae_train_steps} steps"
    return {
        "data": f"{images.rows.name}: {count}, captions in {config.caption_column!r}",
        "images": f"{images.transform.channels} × {' × '.join(map(str, config.size()))}",
        "model": f"{start}, {sum(each.numel() for each in model.parameters()):,} parameters to train",
        "latents": "of the checkpoint" if config.pretrained_model_name_or_path else vae,
        "text": "trained along" if config.trains_text_encoder else "frozen",
        **run_lines(run, plan),
    }


def train(config: Text2ImageConfig) -> None:
    """From flags to a trained, saved and, if asked, published pipeline."""
    config.check()
    new_autoencoder = not config.pretrained_model_name_or_path and not config.vae_name_or_path
    written = layout(*COMPONENTS, autoencoder=new_autoencoder)
    run = start_run(config, written, (config.train_data_dir, config.dataset_name), stages=[AUTOENCODER])
    if new_autoencoder and run.resumed is not None:
        autoencoder_of(run.resumed.checkpoint, run.folder)
    checkpoint = load_checkpoint_components(config) if config.pretrained_model_name_or_path else None
    if checkpoint is not None:
        size = checkpoint.unet.config.sample_size, downscaling(checkpoint.vae)
        run.log(settle_resolution(config, *size, usual="512", trained=True))
    start = checkpoint or draw_blueprint(run, config)
    check_schedule(config, start.scheduler)
    channels = image_channels(config, start.vae)
    if checkpoint is not None:
        fit_to_size(checkpoint, config.size())
    data = dataclasses.replace(config, cache_dataset="never") if config.aspect_ratio_buckets else config
    images = open_images(run, data, channels, config.hub_token, config.caption_column)
    if config.aspect_ratio_buckets:
        images = in_buckets(run, images, config, start.vae, start.unet)
    check_images(config, images, new_autoencoder)
    plan = plan_steps(run, images)

    # all of the model, so that its first batch is computed before an autoencoder is trained: with a stand-in for that
    vae = start.vae or make_autoencoder(config, channels, config.size(), run.seed)
    components = checkpoint or build(start, vae, images, run.seed, run.resumed and run.resumed.checkpoint)
    if config.guidance_scale is not None:
        components.others["guidance_scale"] = config.guidance_scale
    for frozen in (components.vae, components.text_encoder):
        frozen.eval().requires_grad_(False).to(run.device)
    log_cut_texts(run, config.validation_prompts, images, components.tokenizer)
    if checkpoint is None:
        run.log(time_blindness(components.unet.config))
    model = trained_model(config, components, run.device)
    parts = {"unet": model.unet} | ({"text_encoder": model.text_encoder} if model.text_encoder is not None else {})
    facts = run_facts(run, images.count, plan)
    check_resumable(run, model.unet, facts, "unet")
    check_parts(run, parts)
    facts["scheduler"] = json.loads(components.scheduler.to_json_string())  # so that a checkpoint can be sampled
    repository = reserve_repository(run, bool(images.held_out))

    state = begin_training(run, model, plan, facts, QUARTILES, parts=parts)
    loss_of = functools.partial(compute_loss, run=run, config=config, components=components, null_embedding=None)
    with recorded_call(model.unet) as call:
        batches = rehearse(run, state, plan, make_batches(run, images, plan, state.step), loss_of)
    lines = describe(run, config, images, plan, model)
    lines["acceleration"] = accelerate_for_training(
        model.unet, call, config.acceleration, run.autocast_dtype, run.captures_steps(plan), plan.total
    )
    if config.dry_run:
        if new_autoencoder and run.resumed is None:
            train_autoencoder(run, config, images, config.size(), rehearse_only=True)
        show_dry_run(run, lines, state, plan, batches, loss_of)
        return
    start_writing(run, state.step, lines, Path(__file__).stem)
    if new_autoencoder and run.resumed is not None:
        take_over_autoencoder(run)
    if new_autoencoder:
        vae = train_autoencoder(run, config, images, config.size())
        if vae is None:  # stopped, and said so
            return
        components = components._replace(vae=vae.eval().requires_grad_(False).to(run.device))
    null_embedding = None
    if config.cache_latents:
        images, null_embedding = cached(run, images, config, components)
        batches = make_batches(run, images, plan, state.step)
    tokenize(components.tokenizer, [""])  # it is saved as it was last used, which a run that only saves it did not
    if checkpoint is None:
        run.must_write(lambda: save_tokenizer(components.tokenizer, run.folder), "the tokenizer")

    shared = {"run": run, "config": config, "components": components, "null_embedding": null_embedding}
    pipeline_of = functools.partial(make_pipeline, components=components)
    prompts = default_prompts(config, images)
    base = config.pretrained_model_name_or_path
    about = describe_run(run, images, plan, model, SHOWN, prompts[: config.eval_batch_size], base)
    publisher = Publisher(run, state, pipeline_of, about, plan.total, repository)
    finished = training_loop(
        run,
        state,
        plan,
        batches,
        compute_loss=functools.partial(compute_loss, **shared),
        validate=images.held_out and functools.partial(validation_loss, held_out=images.held_out, **shared),
        draw=functools.partial(
            draw_prompts,
            run=run,
            pipeline_of=pipeline_of,
            prompts=prompts,
            num_inference_steps=config.num_inference_steps,
        ),
        save=publisher.save,
        saves_checkpoints=config.hub_strategy != "end",
        name_of=images.name_of,
    )
    publisher.close(finished)
    sample = ["ddpm-hf", "sample", "--prompt", prompts[0]]
    end_training(run, ending(run, state, f"accelerate launch {Path(__file__).name}", finished, sample))


def run(config: Text2ImageConfig) -> None:
    """Train; a mistake that the user can mend is one line and exit code 2."""
    with ends_in_one_line(Path(__file__).name, config.output_dir, DataError):
        train(config)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and train."""
    run(parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    run(CONFIG)
