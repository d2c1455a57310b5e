"""Training an autoencoder on the images (Rombach et al. 2022, sec. 3.1)."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..common.errors import UsageError
from ..common.layout import AUTOENCODER, layout
from ..common.ownership import claim_files
from ..common.pictures import save_image
from ..common.randomness import StepKeys
from ..data.batches import Images, make_batches, plan_steps
from ..data.images import to_model_range
from ..models.autoencoder import frozen, load_autoencoder
from ..models.saving import save_model
from ..objectives.gaussians import mean_flat
from ..portable.sampling_ddpm_hf import downscaling
from ..training.checkpointing import find_checkpoint
from ..training.complete_checkpoints import part_of_run
from ..training.earlier_run import remove_unfinished
from ..training.flags import GridFlags, TrainingFlags
from ..training.logs import track_image
from ..training.loop import training_loop
from ..training.meter import Losses
from ..training.rehearsal import rehearse
from ..training.reporting import parameter_count
from ..training.run import Run
from ..training.setup.accelerator import start_accelerator
from ..training.setup.begin import begin_training, run_facts
from ..training.setup.claiming import check_resumable, check_unchanged, claim_output_dir, find_run
from ..training.state import averaged_weights, unwrap
from .autoencoder import make_autoencoder
from .cache import network_digest
from .flags import AutoencoderFlags


class Reconstruction(torch.nn.Module):
    """The autoencoder as what is trained: images and noise to what came out, and the latents' KL."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(
        self, images: torch.Tensor, noise_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, C, H, W] -> the same, and nats [N]; `noise_of` samples noise in a tensor's shape."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise_of(posterior.mean)
        return self.vae.decode(latents).sample, posterior.kl()


def compute_loss(
    model: torch.nn.Module, batch: dict, keys: StepKeys, *, kl_weight: float, device: torch.device
) -> Losses:
    """Mean absolute error, and the KL a pixel (Rombach et al. 2022, Eq. 25, without the adversary)."""
    images = to_model_range(batch["images"].to(device, non_blocking=True))  # [N, C, H, W]
    output, kl = model(images, functools.partial(keys.normal_like, name="posterior"))
    return Losses(mean_flat((output.float() - images).abs()) + kl_weight * kl.float() / images[0].numel())


@torch.no_grad()
def draw_reconstructions(model: torch.nn.Module, step: int, *, run: Run, images: Images) -> Path | None:
    """A picture of eight images, and what the autoencoder makes of them."""
    from diffusers.image_processor import VaeImageProcessor

    from ..common.pictures import image_grid

    if not run.accelerator.is_main_process:
        return None
    shown = images.held_out or images.indexed
    batch = shown.__getitems__([(0, index) for index in range(min(8, len(shown)))])
    originals = to_model_range(batch["images"].to(run.device))
    with run.accelerator.autocast():
        rebuilt = model.vae.decode(model.vae.encode(originals).latent_dist.mode()).sample.float()
    gray = originals.shape[1] == 1
    processor = VaeImageProcessor(vae_scale_factor=1, do_convert_grayscale=gray, do_convert_rgb=not gray)
    shown_channels = originals.shape[1] if originals.shape[1] <= 4 else 3  # PIL has no more than four
    both = processor.postprocess(torch.cat([originals, rebuilt])[:, :shown_channels], output_type="pil")
    picture = image_grid(both, len(originals), scale=max(1, 64 // both[0].width))
    path = run.folder / "samples" / f"step-{step:06d}.png"
    claim_files(run.folder, [f"samples/{path.name}"])
    save_image(picture, path)
    track_image(run, "reconstructions", picture, step)
    return path


@torch.no_grad()
def measure_scaling_factor(vae: AutoencoderKL, images: Images, batch_size: int, seed: int) -> float:
    """1 / the standard deviation of the latents, so that the diffusion's data has unit variance (Rombach, app. G)."""
    count = min(len(images.indexed), 2048)
    total = torch.zeros(3, dtype=torch.float64)
    for first in range(0, count, batch_size):
        indices = range(first, min(first + batch_size, count))
        batch = images.indexed.__getitems__([(0, index) for index in indices])
        posterior = vae.encode(to_model_range(batch["images"].to(vae.device))).latent_dist
        noise = StepKeys(seed, 0, first, len(indices), validation=True).normal_like(posterior.mean)
        latents = (posterior.mean + posterior.std * noise).cpu().double()
        total += torch.tensor([latents.numel(), latents.sum(), (latents**2).sum()])
    variance = total[2] / total[0] - (total[1] / total[0]) ** 2
    return round(float(variance**-0.5), 5)


def autoencoder_of(checkpoint: Path, output_dir: str | Path) -> Path:
    """The folder of the autoencoder that a checkpoint's model was trained in: no other has the same latents.

    Raises:
        UsageError: there is none in the folder of the checkpoint's run, or the output folder holds another one.
    """
    there = part_of_run(checkpoint, "autoencoder", f"{AUTOENCODER}/config.json", "vae/config.json")
    here = Path(output_dir).resolve() / AUTOENCODER
    if here == there or not (here / "config.json").is_file():
        return there
    if len({network_digest(load_autoencoder(str(folder))) for folder in (here, there)}) > 1:
        raise UsageError(f"{here} is another autoencoder than that of {checkpoint}; name another --output_dir")
    return there


def take_over_autoencoder(run: Run, checkpoint: Path) -> None:
    """Copy the autoencoder of a checkpoint's run into the output folder, if it has none. All ranks take part."""
    folder = run.folder / AUTOENCODER
    if not (folder / "config.json").is_file():
        vae = load_autoencoder(str(autoencoder_of(checkpoint, run.folder)))
        run.must_write(lambda: save_model(vae, folder, within=folder), "the autoencoder")


def train_autoencoder(
    run: Run, flags: AutoencoderFlags, images: Images, size: tuple[int, int], rehearse_only: bool = False
) -> AutoencoderKL | None:
    """Train an autoencoder in a folder within the run's, or take the one that was finished; frozen. None if stopped.

    With `rehearse_only` it is not trained: only its first batch is computed.

    Args:
        run: that of the model which it is for.
        size: (height, width) of the images.

    Raises:
        UsageError: a stream, whose steps cannot be counted, or a size that the autoencoder cannot halve.
    """
    folder, resumes = run.folder / AUTOENCODER, run.flags.resume_from_checkpoint
    if run.resumed is not None:
        take_over_autoencoder(run, run.resumed.checkpoint)
    if (folder / "config.json").is_file() and resumes:
        before = find_checkpoint(folder, "latest", lambda line: None)
        check_unchanged(run.settings, before and before.manifest)
        if run.accelerator.is_main_process and not rehearse_only:
            remove_unfinished(folder)
        return frozen(load_autoencoder(str(folder)), run.device)
    factor = downscaling(flags.widths())
    if size[0] % factor or size[1] % factor:
        raise UsageError(f"--resolution {size[0]}x{size[1]}: the autoencoder requires multiples of {factor}")
    run = dataclasses.replace(
        run,
        flags=flags_of_autoencoder(run.flags, flags),
        grids=run.grids and grids_of_autoencoder(run.grids, flags),
        accelerator=start_accelerator(run.flags),  # Accelerate's checkpoints hold all that one engine has prepared
        entries=layout(model=True),
    )
    run.resumed = find_run(run)
    vae = make_autoencoder(flags, images.transform.channels, size, run.seed)
    plan = plan_steps(run, images)
    facts = run_facts(run, images.count, plan)
    check_resumable(run, vae, facts, "vae")
    run.log(f"training an autoencoder first: {parameter_count(vae):,} parameters, {plan.total} steps")
    state = begin_training(run, Reconstruction(vae), plan, facts, {"vae": vae})
    loss_of = functools.partial(compute_loss, kl_weight=flags.vae_kl_weight, device=run.device)
    batches = rehearse(run, state, plan, make_batches(run, images, plan, state.step), loss_of)
    if rehearse_only:
        return vae.requires_grad_(False)
    claim_output_dir(run, state.step)
    draw = functools.partial(draw_reconstructions, run=run, images=images)
    if not training_loop(run, state, plan, batches, compute_loss=loss_of, draw=draw, name_of=images.name_of):
        return None
    with averaged_weights(state, unwrap(run.accelerator, state.model)) as averaged:
        trained = frozen(AutoencoderKL.from_config(vae.config), run.device)
        trained.load_state_dict(averaged.vae.state_dict())
    scale = measure_scaling_factor(trained, images, run.flags.eval_batch_size, run.seed)
    trained.register_to_config(scaling_factor=scale)
    run.must_write(lambda: save_model(trained, folder, within=folder), "the autoencoder")
    run.log(f"autoencoder saved to {folder}, scaling factor {scale}")
    return trained


def flags_of_autoencoder(training: TrainingFlags, flags: AutoencoderFlags) -> TrainingFlags:
    """The flags that an autoencoder is trained with, within the training of the model that it is for."""
    steps = flags.vae_train_steps
    return dataclasses.replace(
        training,
        output_dir=str(Path(training.output_dir) / AUTOENCODER),
        max_train_steps=steps,
        learning_rate=flags.vae_learning_rate,
        lr_scheduler="cosine",
        lr_warmup_steps=min(100, steps // 10),
        gradient_accumulation_steps=1,
        overwrite_output_dir=False,  # the model's own run, with all in this folder, has been set aside
        resume_from_checkpoint=training.resume_from_checkpoint and "latest",
        validation_steps=None,
        optimizer="adamw",
        use_ema=True,
        ema_snapshot_steps=None,
        ema_max_decay=0.995,
        ema_min_decay=0.0,
    )


def grids_of_autoencoder(grids: GridFlags, flags: AutoencoderFlags) -> GridFlags:
    """When its reconstructions are drawn: four times, where the model's training samples pictures."""
    wanted = grids.save_images_epochs or grids.save_images_steps
    return GridFlags(save_images_epochs=0, save_images_steps=max(1, flags.vae_train_steps // 4) if wanted else None)
