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
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ddpm_hf.common.errors import DataError
from ddpm_hf.common.layout import COMPONENTS, layout
from ddpm_hf.common.randomness import StepKeys
from ddpm_hf.data.batches import Images, make_batches, make_plan, open_images
from ddpm_hf.inference.components import Components, assemble, load_checkpoint_components
from ddpm_hf.latents.autoencoder import make_autoencoder
from ddpm_hf.latents.encoding import x_start_of
from ddpm_hf.latents.training import autoencoder_of, find_autoencoder_run, take_over_autoencoder, train_autoencoder
from ddpm_hf.models.acceleration import compiled
from ddpm_hf.models.autoencoder import downscaling
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
from ddpm_hf.training.faults import must_write
from ddpm_hf.training.logs import end_training, log, start_trackers
from ddpm_hf.training.loop import training_loop
from ddpm_hf.training.meter import Losses, sum_over_ranks
from ddpm_hf.training.plan import StepPlan
from ddpm_hf.training.previews import draw_grid
from ddpm_hf.training.rehearsal import measure_pace, rehearse
from ddpm_hf.training.reporting import ending, run_lines, show, shows_bars, table
from ddpm_hf.training.setup.accelerator import start_accelerator
from ddpm_hf.training.setup.begin import begin_training, run_facts
from ddpm_hf.training.setup.claiming import (
    check_resumable,
    check_unchanged,
    claim_output_dir,
    describe_start,
    find_run,
)
from ddpm_hf.training.setup.settings import agree_on_seed, save_settings
from ddpm_hf.training.state import averaged_weights, unwrap
from ddpm_hf.training.stopping import deadline_of


def compute_loss(
    model,
    batch: dict,
    keys: StepKeys,
    *,
    config: Text2ImageConfig,
    components: Components,
    null_embedding: torch.Tensor | None,
    accelerator,
) -> Losses:
    """Draw t and noise, add it to the latents, predict from the caption, compare (Rombach et al. 2022, Eq. 3)."""
    scheduler = components.scheduler
    x_start = x_start_of(batch, keys, components.vae, accelerator)  # [N, C, h, w]
    timesteps = UniformTimestepSampler(len(scheduler)).sample(keys.uniform("timestep"))[0].to(x_start.device)
    noise = keys.normal_like(x_start)
    text = caption_input(batch, keys, config, components, null_embedding, accelerator)
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


@torch.no_grad()
def validation_loss(model, *, held_out, config: Text2ImageConfig, accelerator, **options) -> dict:
    """The mean loss over the held-out images, at the same timesteps and noise each time, no caption left out."""
    total = torch.zeros(2, dtype=torch.float64)
    starts = range(0, len(held_out), config.eval_batch_size)
    for first in list(starts)[accelerator.process_index :: accelerator.num_processes]:
        places = range(first, min(first + config.eval_batch_size, len(held_out)))
        batch = held_out.__getitems__([(0, index) for index in places])
        keys = StepKeys(config.seed, 0, first, len(places), validation=True)
        with accelerator.autocast():
            losses = compute_loss(model, batch, keys, config=config, accelerator=accelerator, **options).losses
        total += torch.stack([losses.cpu().double().sum(), torch.tensor(float(len(places)))])
    total = sum_over_ranks(total)
    return {"validation_loss": float(total[0] / total[1])}


def make_pipeline(model: TextConditioned, components: Components) -> TextToImageDDPMPipeline:
    """The pipeline that samples from the model."""
    text_encoder = model.text_encoder or components.text_encoder
    return assemble(components._replace(unet=model.unet, text_encoder=text_encoder))


def draw_prompts(
    model, step: int, *, pipeline_of, prompts: list[str], config: Text2ImageConfig, accelerator
) -> Path | None:
    """A grid with a row for each prompt."""
    pipeline = pipeline_of(model)
    shown = accelerator.is_main_process and shows_bars()
    pipeline.set_progress_bar_config(desc="sampling", leave=False, disable=not shown)
    prompts = prompts[: config.eval_batch_size]
    columns = config.eval_batch_size // len(prompts)

    steps = min(config.num_inference_steps, len(pipeline.scheduler))

    def sample(places: list[int], generators: list[torch.Generator], num_frames: int):
        asked = [prompts[place // columns] for place in places]
        options = {"num_inference_steps": steps, "num_frames": num_frames, "output_type": "preview"}
        return pipeline(asked, generator=generators, **options)

    return draw_grid(sample, columns * len(prompts), columns, step, config, accelerator, prompts)


def describe(
    config: Text2ImageConfig, images: Images, plan: StepPlan, total_steps: int, model: TextConditioned, accelerator
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
        **run_lines(config, accelerator, plan, total_steps),
    }


def train(config: Text2ImageConfig) -> None:
    """From flags to a trained, saved and, if asked, published pipeline."""
    config.check()
    deadline = deadline_of(config.max_train_hours)
    accelerator = start_accelerator(config)
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # an error is one line, and main says it
    diffusers_logging.disable_progress_bar()  # one for the parts of a checkpoint
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # one for each file that is saved
    new_autoencoder = not config.pretrained_model_name_or_path and not config.vae_name_or_path
    written = layout(*COMPONENTS, autoencoder=new_autoencoder)
    found = find_run(config, accelerator, written, (config.train_data_dir, config.dataset_name))
    begun = found or (config.resume_from_checkpoint and find_autoencoder_run(config))
    config.seed = agree_on_seed(config, begun and begun[1])
    check_unchanged(config, begun and begun[1])
    if new_autoencoder and found is not None:
        autoencoder_of(found[0], config.output_dir)
    checkpoint = load_checkpoint_components(config) if config.pretrained_model_name_or_path else None
    if checkpoint is not None:
        size = checkpoint.unet.config.sample_size, downscaling(checkpoint.vae)
        log(accelerator, settle_resolution(config, *size, usual="512", trained=True))
    start = checkpoint or draw_blueprint(config, accelerator)
    check_schedule(config, start.scheduler)
    channels = image_channels(config, start.vae)
    if checkpoint is not None:
        fit_to_size(checkpoint, config.size())
    data = dataclasses.replace(config, cache_dataset="never") if config.aspect_ratio_buckets else config
    images = open_images(data, config, channels, accelerator, config.caption_column)
    if config.aspect_ratio_buckets:
        images = in_buckets(images, config, start.vae, start.unet, accelerator)
    check_images(config, images, new_autoencoder)
    plan, total_steps = make_plan(images, config, accelerator.num_processes)

    # all of the model, so that its first batch is computed before an autoencoder is trained: with a stand-in for that
    vae = start.vae or make_autoencoder(config, channels, config.size(), config.seed)
    components = checkpoint or build(start, vae, images, config.seed, found and found[0])
    if config.guidance_scale is not None:
        components.others["guidance_scale"] = config.guidance_scale
    for frozen in (components.vae, components.text_encoder):
        frozen.eval().requires_grad_(False).to(accelerator.device)
    log_cut_texts(config, images, components.tokenizer, accelerator)
    if checkpoint is None:
        log(accelerator, time_blindness(components.unet.config))
    model = trained_model(config, components, accelerator)
    parts = {"unet": model.unet} | ({"text_encoder": model.text_encoder} if model.text_encoder is not None else {})
    facts = run_facts(config, images.count, plan, total_steps)
    check_resumable(found, config, model.unet, facts, accelerator)
    check_parts(found, parts)
    facts["scheduler"] = json.loads(components.scheduler.to_json_string())  # so that a checkpoint can be sampled
    repository = reserve_repository(config, bool(images.held_out), accelerator)
    state = begin_training(config, accelerator, model, total_steps, QUARTILES, facts, found, parts=parts)
    if config.compile and not config.dry_run:  # compiling takes minutes
        state.model = compiled(state.model)
    loss_of = functools.partial(
        compute_loss, config=config, accelerator=accelerator, components=components, null_embedding=None
    )
    batches = make_batches(images, config, config, plan, state.step, accelerator)
    batches = rehearse(config, accelerator, state, plan, batches, loss_of)
    lines = describe(config, images, plan, total_steps, model, accelerator)
    if config.dry_run:
        if new_autoencoder and found is None:
            own = start_accelerator(config)
            train_autoencoder(config, config, images, channels, config.size(), own, rehearse_only=True)
        lines |= measure_pace(config, accelerator, state, plan, batches, loss_of, total_steps)
        show(accelerator, table(lines), describe_start(config, found))
        return

    claim_output_dir(config, accelerator, written, state.step)
    start_trackers(config, accelerator, Path(__file__).stem)
    must_write(accelerator, lambda: save_settings(config), "training_config.json")
    log(accelerator, table(lines))
    if new_autoencoder and found is not None:
        take_over_autoencoder(found[0], config, accelerator)
    if new_autoencoder:
        own = start_accelerator(config)
        vae = train_autoencoder(config, config, images, channels, config.size(), own, deadline)
        if vae is None:  # stopped, and said so
            return
        components = components._replace(vae=vae.eval().requires_grad_(False).to(accelerator.device))
    null_embedding = None
    if config.cache_latents:
        images, null_embedding = cached(images, config, components, accelerator)
        batches = make_batches(images, config, config, plan, state.step, accelerator)
    tokenize(components.tokenizer, [""])  # it is saved as it was last used, which a run that only saves it did not
    if checkpoint is None:
        must_write(accelerator, lambda: save_tokenizer(components.tokenizer, config.output_dir), "the tokenizer")

    shared = {"config": config, "accelerator": accelerator, "components": components, "null_embedding": null_embedding}
    pipeline_of = functools.partial(make_pipeline, components=components)
    prompts = default_prompts(config, images)
    base = config.pretrained_model_name_or_path
    about = describe_run(config, images, plan, model, SHOWN, prompts[: config.eval_batch_size], base)
    publisher = Publisher(config, state, pipeline_of, about, total_steps, repository, accelerator)
    finished = training_loop(
        config,
        accelerator,
        state,
        plan,
        batches,
        total_steps,
        compute_loss=functools.partial(compute_loss, **shared),
        validate=images.held_out and functools.partial(validation_loss, held_out=images.held_out, **shared),
        draw=functools.partial(
            draw_prompts, pipeline_of=pipeline_of, prompts=prompts, config=config, accelerator=accelerator
        ),
        save=publisher.save,
        saves_checkpoints=config.hub_strategy != "end",
        name_of=images.name_of,
        deadline=deadline,
    )
    if finished:
        with averaged_weights(state, unwrap(accelerator, state.model)) as trained:
            if accelerator.is_main_process:
                publisher.finish(trained, state.step)
    else:
        publisher.stopped()
    sample = ["ddpm-hf", "sample", "--prompt", prompts[0]]
    log(accelerator, ending(config, state, f"accelerate launch {Path(__file__).name}", finished, sample))
    end_training(accelerator)


def run(config: Text2ImageConfig) -> None:
    """Train; a mistake that the user can mend is one line and exit code 2."""
    with ends_in_one_line(Path(__file__).name, config.output_dir, DataError):
        train(config)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and train."""
    run(parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    run(CONFIG)
