#!/usr/bin/env python
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "numpy>=1.26", "diffusers>=0.38", "accelerate>=1.10", "transformers>=5.0", "tokenizers>=0.20",
#     "datasets>=4.0", "pandas>=2.0", "pyarrow>=15.0", "huggingface_hub>=1.0", "safetensors>=0.5", "pillow>=10.0",
#     "psutil>=5.9", "pyyaml>=6.0", "tqdm>=4.66", "matplotlib>=3.8", "typer>=0.15", "tensorboard>=2.16",
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

import functools
import json
import sys
from pathlib import Path
from typing import Any

from ddpm_hf.common.layout import AUTOENCODER, COMPONENTS, layout
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.evaluation.flags import EvaluationFlags
from ddpm_hf.latents.flags import AutoencoderFlags, LatentFlags, cache_folder
from ddpm_hf.models.flags import AttentionFlags
from ddpm_hf.objectives.flags import ScheduleFlags
from ddpm_hf.publishing.flags import HubFlags, PublishingFlags
from ddpm_hf.text.flags import OTHERWISE, CaptionFlags, PromptFlags, TextModelFlags, TextObjectiveFlags
from ddpm_hf.text.recipes import weaker_layers
from ddpm_hf.training.flags import Flags, GridFlags, TrainingFlags
from ddpm_hf.training.parsing import Program, parse_flags

# The settings that the model card shows
SHOWN = (
    "use_ema", "optimizer", "learning_rate", "train_batch_size", "prediction_type", "loss_type", "loss_weighting",
    "snr_gamma", "caption_dropout", "train_text_encoder", "resolution",
)  # fmt: skip
PROGRAM = Program(
    (
        DataFlags, TextModelFlags, CaptionFlags, AutoencoderFlags, LatentFlags, ScheduleFlags, TextObjectiveFlags,
        PromptFlags, TrainingFlags, GridFlags, EvaluationFlags, AttentionFlags, PublishingFlags, HubFlags,
    ),
    weaker_layers,
    __doc__,
    **OTHERWISE,
    stages=("", AUTOENCODER),
)  # fmt: skip


parse = functools.partial(parse_flags, PROGRAM)  # the words of a command line -> the flags

if __name__ == "__main__":  # before torch is imported, so that --help and an unknown flag are answered at once
    FLAGS = parse(sys.argv[1:])

import torch

from ddpm_hf.common.errors import DataError
from ddpm_hf.common.randomness import StepKeys, to_device
from ddpm_hf.data.batches import held_out_loss, make_batches, plan_steps
from ddpm_hf.data.upright import real_images
from ddpm_hf.evaluation.in_training import evaluation_of
from ddpm_hf.inference.components import Components, assemble
from ddpm_hf.latents.encoding import x_start_of
from ddpm_hf.latents.training import train_autoencoder
from ddpm_hf.models.acceleration import accelerate_for_training
from ddpm_hf.models.gradient_gate import recorded_call
from ddpm_hf.objectives.losses import QUARTILES, quartile_of, training_losses
from ddpm_hf.objectives.timestep_samplers import UniformTimestepSampler
from ddpm_hf.portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline
from ddpm_hf.portable.text_encoding_ddpm_hf import tokenize
from ddpm_hf.publishing.publisher import Publisher, reserve_repository
from ddpm_hf.text.components import build, design_parts, load_parts, save_tokenizer
from ddpm_hf.text.conditioning import TextConditioned, caption_input, dream_noise, trained_model
from ddpm_hf.text.prepare import cached, check_parts, default_prompts, describe, log_cut_texts, open_captioned
from ddpm_hf.training.ending import end_training, ends_in_one_line
from ddpm_hf.training.loop import training_loop
from ddpm_hf.training.meter import Losses
from ddpm_hf.training.previews import draw_grid
from ddpm_hf.training.rehearsal import rehearse, show_dry_run
from ddpm_hf.training.reporting import parameter_count
from ddpm_hf.training.run import Run
from ddpm_hf.training.setup.begin import begin_training, run_facts, start_run
from ddpm_hf.training.setup.claiming import check_resumable, start_writing


def compute_loss(
    model: torch.nn.Module,
    batch: dict,
    keys: StepKeys,
    *,
    run: Run,
    components: Components,
    null_embedding: torch.Tensor | None,
    caption_dropout: float,
    learns: bool,
    objective: TextObjectiveFlags,
) -> Losses:
    """Draw t and noise, add it to the latents, predict from the caption, compare (Rombach et al. 2022, Eq. 3)."""
    scheduler = components.scheduler
    x_start = x_start_of(batch, keys, components.vae, run.device)  # [N, C, h, w]
    timesteps = to_device(UniformTimestepSampler(len(scheduler)).sample(keys.uniform("timestep"))[0], x_start.device)
    noise = keys.normal_like(x_start)
    text = caption_input(batch, keys, components, null_embedding, run.device, caption_dropout, learns)
    if objective.noise_offset and not keys.validation:
        noise = noise + objective.noise_offset * keys.normal_like(x_start[:, :, :1, :1].clone(), "noise_offset")
    if objective.dream_training and not keys.validation:
        noise = dream_noise(model, scheduler, x_start, noise, timesteps, text, objective.dream_detail_preservation)
    added = noise
    if objective.input_perturbation and not keys.validation:  # Ning et al. 2023
        added = noise + objective.input_perturbation * keys.normal_like(x_start, "input_perturbation")
    output = model(scheduler.add_noise(x_start, added, timesteps), timesteps, text).float()
    losses = training_losses(scheduler, output, x_start, noise, timesteps, **objective.loss_options())
    return Losses(losses, groups=quartile_of(timesteps, len(scheduler)))


def make_pipeline(model: TextConditioned, components: Components) -> TextToImageDDPMPipeline:
    """The pipeline that samples from the model."""
    text_encoder = model.text_encoder or components.text_encoder
    return assemble(components._replace(unet=model.unet, text_encoder=text_encoder))


def train(flags: Flags) -> None:
    """From flags to a trained, saved and, if asked, published pipeline."""
    flags.check()
    (
        data, model_flags, captions, autoencoder, latents, _, objective, prompt_flags, training, _, evaluated,
        attention, publishing, hub,
    ) = flags  # fmt: skip
    token, learns = hub.hub_token, model_flags.trains_text_encoder
    from_scratch = model_flags.pretrained_model_name_or_path is None
    new_autoencoder = from_scratch and not latents.vae_name_or_path
    written = layout(*COMPONENTS, autoencoder=new_autoencoder)
    run = start_run(flags, written, (data.train_data_dir, data.dataset_name), stages=[AUTOENCODER])
    start = design_parts(run) if from_scratch else load_parts(run)
    images = open_captioned(run, data, captions, start, latents.cache_latents, token)
    plan = plan_steps(run, images)
    components = start if isinstance(start, Components) else build(run, start, images)
    log_cut_texts(run, prompt_flags.validation_prompts, images, components.tokenizer)
    xformers = attention.enable_xformers_memory_efficient_attention
    model = trained_model(components, learns, run.device, training, xformers)
    facts = run_facts(run, images.count, plan, scheduler=json.loads(components.scheduler.to_json_string()))
    check_resumable(run, model.unet, facts, "unet")
    check_parts(run, model.parts())
    repository = reserve_repository(run, publishing, token, bool(images.held_out))
    evaluation = evaluation_of(evaluated, run, *real_images(images, data))

    state = begin_training(run, model, plan, facts, model.parts(), QUARTILES)
    shared: dict[str, Any] = {"run": run, "learns": learns, "objective": objective}
    shared["caption_dropout"] = captions.caption_dropout
    loss_of = functools.partial(compute_loss, components=components, null_embedding=None, **shared)
    with recorded_call(model.unet) as call:
        batches = rehearse(run, state, plan, make_batches(run, images, plan, state.step), loss_of)
    lines = describe(run, images, plan, parameter_count(model), learns)
    lines["acceleration"] = accelerate_for_training(model.unet, call, *run.execution(plan))
    if training.dry_run:
        if new_autoencoder and run.resumed is None:
            train_autoencoder(run, autoencoder, images, data.size(), rehearse_only=True)
        show_dry_run(run, lines, state, plan, batches, loss_of)
        return
    start_writing(run, state.step, lines, Path(__file__).stem)
    if new_autoencoder:
        vae = train_autoencoder(run, autoencoder, images, data.size())
        if vae is None:  # stopped, and said so
            return
        components = components._replace(vae=vae)
    null_embedding = None
    if latents.cache_latents:
        folder = cache_folder(data.cache_dir, training.output_dir)
        images, null_embedding = cached(run, images, folder, components, with_captions=not learns)
        batches = make_batches(run, images, plan, state.step)
    tokenize(components.tokenizer, [""])  # it is saved as it was last used, which a run that only saves it did not
    if from_scratch:
        run.must_write(lambda: save_tokenizer(components.tokenizer, run.folder), "the tokenizer")

    loss_of = functools.partial(compute_loss, components=components, null_embedding=null_embedding, **shared)
    pipeline_of = functools.partial(make_pipeline, components=components)
    prompts = default_prompts(prompt_flags.validation_prompts, data.embedded, images)
    publisher = Publisher(run, publishing, token, repository, state, plan, images, pipeline_of, SHOWN, prompts)
    publisher.record_evaluation(None if evaluation is None else evaluation.record())
    steps = min(prompt_flags.num_inference_steps, len(components.scheduler))
    finished = training_loop(
        run,
        state,
        plan,
        batches,
        compute_loss=loss_of,
        validate=held_out_loss(run, images, loss_of),
        draw=lambda model, step: draw_grid(run, pipeline_of(model), step, prompts, prompts, num_inference_steps=steps),
        save=publisher.save,
        saves_checkpoints=publishing.hub_strategy != "end",
        evaluation=None if evaluation is None else evaluation.during(run, pipeline_of),
        name_of=images.name_of,
    )
    publisher.close(finished)
    sample = ["ddpm-hf", "sample", "--prompt", prompts[0]]
    end_training(run, state, f"accelerate launch {Path(__file__).name}", finished, sample)


def main(argv: list[str] | None = None, flags: Flags | None = None) -> None:
    """Parse the flags, if they are not given, and train; what the user can mend is one line and exit code 2."""
    flags = flags or parse(sys.argv[1:] if argv is None else argv)
    with ends_in_one_line(Path(__file__).name, flags.output_dir, DataError):
        train(flags)


if __name__ == "__main__":
    main(flags=FLAGS)
