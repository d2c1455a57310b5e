"""Starting a training from trained weights: what they decide, and how they are fitted to classes and variances."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UsageError, one_line, why_not_loaded
from ..common.locations import find_location
from ..objectives.names import TRAINED_BETAS
from .conditioning import flags_of_conditioning
from .flags import StartFlags
from .sources import Source, find_source

if TYPE_CHECKING:  # else imported where it is used, so that --help is quick
    import torch
    from diffusers import UNet2DModel

    from ..portable.conditioning_ddpm_hf import Conditioning
    from ..portable.scheduling_ddpm_hf import DDPMScheduler

FLAG = "--pretrained_model_name_or_path"
SAID_ELSEWHERE = ("objective", "variance_type", "resolution")  # where they differ from the trained model's
SHOWN = 6  # class names in a line


def read_source(start: StartFlags, token: str | None) -> Source:
    """The trained model that `--pretrained_model_name_or_path` names.

    Raises:
        UsageError: there is none, or it is no unconditional or class-conditional model of a diffusion by betas.
    """
    name = str(start.pretrained_model_name_or_path)
    try:
        source = find_source(find_location(name, start.revision, start.subfolder, token))
        check_source(source)
    except ValueError as error:
        raise UsageError(f"{FLAG} {name}: {error}") from error
    return source


def source_of(start: StartFlags, token: str | None, checkpoint: Path | None) -> Source | None:
    """The trained model to start from, or None.

    Args:
        checkpoint: of a run that is resumed, which needs no other model.

    Raises:
        UsageError: what `read_source` raises.
    """
    if not start.pretrained_model_name_or_path:
        return None
    return find_source(find_location(str(checkpoint))) if checkpoint else read_source(start, token)


def revision_of_vae(start: StartFlags, vae_name: str) -> str | None:
    """The revision of --vae_name_or_path: that of the model to start from, where it is a part of that."""
    return start.revision if vae_name == start.pretrained_model_name_or_path else None


def check_source(source: Source) -> None:
    """Raise ValueError for a model that cannot be trained here."""
    from ..portable.scheduling_ddpm_hf import DDPMScheduler

    if source.unet.get("condition_channels"):
        raise ValueError("an upsampler of OpenAI's, which is sampled here and not trained")
    inputs, outputs = source.channels, source.unet["out_channels"]
    if outputs not in (inputs, 2 * inputs):
        raise ValueError(
            f"its UNet reads {inputs} channels and predicts {outputs}; an unconditional one predicts as many as it"
            " reads, or twice as many with a learned variance"
        )
    if source.unet["class_embed_type"] is not None:
        raise ValueError(f"its UNet has class_embed_type {source.unet['class_embed_type']!r}, which is not supported")
    kind = (source.scheduler or {}).get("_class_name", "DDPMScheduler")
    if kind not in {"DDPMScheduler", *DDPMScheduler._compatibles}:
        raise ValueError(f"it was trained with {kind}, which is not a diffusion by betas")


def trained_scheduler(source: Source) -> "DDPMScheduler | None":
    """The diffusion that the model was trained with, without what was fitted to it; None where nothing is known.

    Raises:
        UsageError: one that no scheduler can be made of.
    """
    from ..portable.scheduling_ddpm_hf import DDPMScheduler
    from .fits import without_fits

    if source.scheduler is None:
        return None
    try:
        return DDPMScheduler.from_config(without_fits(source.scheduler))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"{FLAG}: the scheduler of {source.title}: {one_line(error)}") from error


def trained_settings(source: Source) -> dict[str, Any]:
    """What a trained model decides where the flags say nothing, by flag."""
    from ..portable.conditioning_ddpm_hf import Conditioning
    from ..portable.scheduling_ddpm_hf import LEARNED_VARIANCE_TYPES

    settings: dict[str, Any] = {}
    scheduler = trained_scheduler(source)
    if scheduler is not None:
        settings = {flag: scheduler.config[key] for flag, key in CONFIG_KEYS.items()}
        settings["ddpm_beta_schedule"] = _schedule_name(scheduler)
        settings["variance_type"] = scheduler.variance_type
        if scheduler.variance_type in LEARNED_VARIANCE_TYPES:
            settings["objective"] = "hybrid"  # the simple one does not train the variance
    if source.vae is not None:
        settings["vae_name_or_path"] = source.vae
    if source.conditioning is not None:
        settings |= flags_of_conditioning(Conditioning.from_config(source.conditioning))
    if source.size is not None:
        height, width = source.size
        settings["resolution"] = str(height) if height == width else f"{height}x{width}"
    return settings


CONFIG_KEYS = {
    "ddpm_num_steps": "num_train_timesteps",
    "ddpm_beta_schedule": "beta_schedule",
    "prediction_type": "prediction_type",
    "variance_type": "variance_type",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
}  # of a scheduler, by flag


def changed_scheduler(trained: "DDPMScheduler", before: Mapping[str, Any], now: Mapping[str, Any]) -> "DDPMScheduler":
    """The trained model's diffusion with what the flags change of it.

    Args:
        before: what `trained_settings` says of it.
        now: the flags.

    Raises:
        UsageError: changes that cannot be made.
    """
    changes = {key: now[flag] for flag, key in CONFIG_KEYS.items() if now[flag] != before[flag]}
    if now["ddpm_beta_schedule"] == TRAINED_BETAS:
        if "beta_schedule" in changes:
            raise UsageError(
                f"--ddpm_beta_schedule {TRAINED_BETAS}: {FLAG}'s model has the named schedule"
                f" {before['ddpm_beta_schedule']}; leave the flag out"
            )
        if "num_train_timesteps" in changes:
            raise UsageError(
                f"--ddpm_num_steps {now['ddpm_num_steps']}: the diffusion of {FLAG} is a list of"
                f" {before['ddpm_num_steps']} betas; leave the flag out, or name a --ddpm_beta_schedule"
            )
    elif "beta_schedule" in changes:
        changes["trained_betas"] = None
    try:
        return trained.from_config(trained.config, **changes)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(one_line(error)) from error


def _schedule_name(scheduler: "DDPMScheduler") -> str:
    """The name that a scheduler's betas go by, also where its config lists them for other samplers."""
    from ..portable.schedules_ddpm_hf import BETA_SCHEDULES

    config = scheduler.config
    if config.beta_schedule not in BETA_SCHEDULES:
        return TRAINED_BETAS
    named = scheduler if config.trained_betas is None else scheduler.from_config(config, trained_betas=None)
    return config.beta_schedule if named.betas.equal(scheduler.betas) else TRAINED_BETAS


def differences(settings: Mapping[str, Any], source: Source) -> list[str]:
    """Warnings for flags that say something else than the trained model.

    Args:
        settings: all flags of the run and their values.
    """
    trained = trained_settings(source)
    lines = []
    if settings["model_preset"]:
        lines.append(
            f"warning: --model_preset {settings['model_preset']}: only its recipe counts, the UNet is that of {FLAG}"
        )
    if source.scheduler is None:
        lines.append(f"warning: nothing says which diffusion {source.title} was trained with: the flags decide")
    for name, value in trained.items():
        now = settings[name]
        if name in SAID_ELSEWHERE or now == value:
            continue
        lines.append(f"warning: --{name} {now}: {source.title} was trained with {value}")
    if source.vae is None and settings["vae_name_or_path"]:
        lines.append(f"warning: {source.title} is a model of pixels; in latents, it learns most of it anew")
    return lines


def check_channels(source: Source, channels: int, of: str) -> None:
    """Raise UsageError for images or latents that the model cannot read."""
    trained = source.channels
    if channels != trained:
        way = f"leave --channels out (images are converted to {trained})" if of == "images" else "use its autoencoder"
        raise UsageError(
            f"{FLAG}: {source.title} reads {trained} channels, and the {of} have {channels}; weights are not fitted to"
            f" other channels: {way}"
        )


def load_weights(source: Source, variant: str | None = None) -> dict[str, "torch.Tensor"]:
    """The state of the trained UNet, in float32.

    Raises:
        UsageError: no safetensors there, or not all of the weights.
    """
    from ..portable.networks_ddpm_hf import unet_class

    place = source.place
    options = {"variant": variant, "use_safetensors": True, "output_loading_info": True}
    if not place.local:
        options |= {"subfolder": place.subfolder or None, "revision": place.revision, "token": place.token}
    try:
        model, info = unet_class(source.unet).from_pretrained(place.root, **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise UsageError(f"{FLAG} {place}: cannot be loaded ({why_not_loaded(error)})") from error
    absent = [*info["missing_keys"], *(str(one) for one in info["mismatched_keys"])]
    if absent:
        raise UsageError(f"{FLAG} {place}: the weights are incomplete, {absent[0]} and {len(absent) - 1} more missing")
    return model.float().state_dict()


def start_from(
    model: "UNet2DModel",
    source: Source,
    class_names: Sequence[str],
    scheduler: "DDPMScheduler",
    variant: str | None,
    conditioning: "Conditioning | None" = None,
) -> list[str]:
    """Give a new UNet the trained weights, fitted to its classes and its variance.

    Args:
        model: of the trained one's config, but for size, class embeddings and a learned variance.
        class_names: by id; empty for an unconditional model. Where it embeds one more, that is the null class.
        scheduler: of this run.
        variant: of the weights.
        conditioning: what the new one reads besides x_t.

    Returns:
        What was fitted, in lines to log.

    Raises:
        UsageError: weights that cannot be loaded, or classes that cannot be mapped.
    """
    weights = load_weights(source, variant)
    lines = [f"starting from {source.title}"]
    lines += fit_classes(weights, source, class_names, model.config.num_class_embeds or 0)
    lines += fit_variance(weights, source, model.config.out_channels, scheduler)
    lines += fit_condition(weights, source, model.config.in_channels, conditioning)
    model.load_state_dict(weights)
    return lines


def fit_condition(
    weights: dict[str, "torch.Tensor"], source: Source, inputs: int, conditioning: "Conditioning | None"
) -> list[str]:
    """Fit the input of a UNet's state to what it reads besides x_t; what was done, in lines.

    New channels begin at zero: the model then is the trained one until it learns to read them.
    """
    import torch

    before, after = source.conditioning, conditioning and conditioning.config()
    if before == after or (
        before and after and before["task"] == after["task"] and inputs == source.unet["in_channels"]
    ):
        return []
    first = weights["conv_in.weight"]  # [D, channels, 3, 3]
    kept = first[:, : source.channels]
    weights["conv_in.weight"] = torch.cat(
        [kept, first.new_zeros(len(kept), inputs - source.channels, *kept.shape[2:])], 1
    )
    if after is None:
        return ["the model read an image and goes on without"]
    return [f"the model learns to read an image ({after['task']}): its new input channels begin at zero"]


def fit_classes(
    weights: dict[str, "torch.Tensor"], source: Source, class_names: Sequence[str], embeddings: int
) -> list[str]:
    """Fit the class embeddings in a UNet's state to other classes; what was done, in lines.

    The embedding of a class is added to that of the timestep. So zeros make an unconditional model of every class,
    and a class that is always the same is a bias.
    """
    import torch

    key, bias = "class_embedding.weight", "time_embedding.linear_2.bias"
    before = weights.pop(key, None)  # [K or K + 1, D]
    if before is None and not class_names:
        return []
    if before is None:
        weights[key] = torch.zeros(embeddings, len(weights[bias]))
        return [f"{len(class_names)} classes are new: each begins as the unconditional model"]
    names = source.classes
    named = class_names if names is None and class_names else names  # without names, they are the same by their ids
    count = len(before) if named is None else len(named)
    if len(before) not in (count, count + 1):
        how = "without names" if names is None else f"and names {len(names)}"
        raise UsageError(
            f"{FLAG}: {source.title} embeds {len(before)} classes {how}, and the images have {len(class_names)};"
            " start from a pipeline's folder, which names them, or leave --label_column out"
        )
    has_null = len(before) == count + 1
    no_class = before[-1] if has_null else before.mean(dim=0)  # [D]
    what = "the null class" if has_null else "the mean of the classes"
    if not class_names:
        weights[bias] = weights[bias] + no_class
        return [f"the model was trained by class and goes on without: it begins as {what}"]
    rows = dict(zip(named or [], before))
    new = [name for name in class_names if name not in rows]
    weights[key] = torch.stack(
        [rows.get(name, no_class) for name in class_names] + [no_class] * (embeddings - len(class_names))
    )
    gone = len(rows) - (len(class_names) - len(new))
    parts = [f"{len(class_names) - len(new)} classes kept" + (" by their ids" if names is None else "")]
    if new:
        parts.append(f"{len(new)} new, which begin as {what} ({_some(new)})")
    if gone:
        parts.append(f"{gone} left out ({_some([name for name in rows if name not in class_names])})")
    return [", ".join(parts)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def fit_variance(
    weights: dict[str, "torch.Tensor"], source: Source, outputs: int, scheduler: "DDPMScheduler"
) -> list[str]:
    """Fit the output of a UNet's state to a variance that is learned, no more, or otherwise; what was done, in lines.

    A new variance begins as the one that the model was sampled with: at an end of the range of `learned_range`
    (Nichol & Dhariwal 2021, Eq. 15), or for `learned`, whose range has none, at its mean over the timesteps.
    """
    import torch

    channels, trained = source.channels, trained_scheduler(source)
    kept = {name: weights[name][:channels] for name in ("conv_out.weight", "conv_out.bias")}
    before = trained.config.variance_type if trained is not None else None
    now = scheduler.config.variance_type
    if outputs == channels:
        weights |= kept
        return ["the learned variance is left out"] if source.unet["out_channels"] > channels else []
    if source.unet["out_channels"] == outputs and before in (now, None):
        return []
    large = before in ("fixed_large", "fixed_large_log")
    if now == "learned_range":
        value = 1.0 if large else -1.0
    else:
        everywhere = torch.arange(len(scheduler))
        zeros = torch.zeros(len(scheduler), 1, dtype=torch.float64)
        posterior = scheduler.q_posterior_mean_variance(zeros, zeros, everywhere).log_variance
        value = float(scheduler.betas.double().log().mean() if large else posterior.mean())
    weights["conv_out.weight"] = torch.cat([kept["conv_out.weight"], torch.zeros_like(kept["conv_out.weight"])])
    weights["conv_out.bias"] = torch.cat([kept["conv_out.bias"], torch.full_like(kept["conv_out.bias"], value)])
    return [f"the variance is {now} and was {before or 'not learned'}: it begins as {'β' if large else 'β̃'}"]
