"""The flags of improved-diffusion and guided-diffusion: what a checkpoint's shapes do not tell of it."""

from typing import Any, NamedTuple

from .flags import number, parse_words, whole
from .openai_layout import Layout

IMPROVED, GUIDED = "improved-diffusion", "guided-diffusion"

_GUIDED = "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --resblock_updown True"
_GUIDED += " --use_scale_shift_norm True"
_ADM_256 = f"{_GUIDED} --image_size 256 --noise_schedule linear --num_channels 256 --num_head_channels 64"
_ADM_256 += " --num_res_blocks 2"
_IDDPM = "--num_channels 128 --num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine"
_LSUN = "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True"
_LSUN += " --use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear"
_LSUN += " --rescale_learned_sigmas False --rescale_timesteps False"
_CLASSIFIER = "--classifier_attention_resolutions 32,16,8 --classifier_width 128 --classifier_pool attention"
_CLASSIFIER += " --classifier_resblock_updown True --classifier_use_scale_shift_norm True --diffusion_steps 1000"

# The published files and the flags that their READMEs sample them with
PUBLISHED: dict[str, tuple[str, str]] = {
    "imagenet64_uncond_100M_1500K.pt": (IMPROVED, f"{_IDDPM} --image_size 64"),
    "imagenet64_uncond_vlb_100M_1500K.pt": (IMPROVED, f"{_IDDPM} --image_size 64 --use_kl True"),
    "cifar10_uncond_50M_500K.pt": (IMPROVED, f"{_IDDPM} --image_size 32 --dropout 0.3"),
    "cifar10_uncond_vlb_50M_500K.pt": (IMPROVED, f"{_IDDPM} --image_size 32 --dropout 0.3 --use_kl True"),
    "imagenet64_cond_270M_250K.pt": (
        IMPROVED,
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True"
        " --diffusion_steps 4000 --noise_schedule cosine --rescale_learned_sigmas False --rescale_timesteps False",
    ),
    "upsample_cond_500K.pt": (
        IMPROVED,
        "--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True --diffusion_steps 4000"
        " --noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False",
    ),
    "lsun_uncond_100M_1200K_bs128.pt": (IMPROVED, _LSUN),
    "lsun_uncond_100M_2400K_bs64.pt": (IMPROVED, _LSUN),
    "64x64_diffusion.pt": (
        GUIDED,
        f"{_GUIDED} --class_cond True --dropout 0.1 --image_size 64 --noise_schedule cosine --num_channels 192"
        " --num_head_channels 64 --num_res_blocks 3 --use_new_attention_order True",
    ),
    "128x128_diffusion.pt": (
        GUIDED,
        f"{_GUIDED} --class_cond True --image_size 128 --noise_schedule linear --num_channels 256 --num_heads 4"
        " --num_res_blocks 2",
    ),
    "256x256_diffusion.pt": (GUIDED, f"{_ADM_256} --class_cond True"),
    "256x256_diffusion_uncond.pt": (GUIDED, f"{_ADM_256} --class_cond False"),
    "512x512_diffusion.pt": (
        GUIDED, f"{_ADM_256.replace('--image_size 256', '--image_size 512')} --class_cond True"
    ),
    "64_256_upsampler.pt": (
        GUIDED,
        f"{_GUIDED} --class_cond True --large_size 256 --small_size 64 --noise_schedule linear --num_channels 192"
        " --num_heads 4 --num_res_blocks 2",
    ),
    "128_512_upsampler.pt": (
        GUIDED,
        f"{_GUIDED.replace('32,16,8', '32,16')} --class_cond True --large_size 512 --small_size 128"
        " --noise_schedule linear --num_channels 192 --num_head_channels 64 --num_res_blocks 2",
    ),
    **{
        f"lsun_{name}.pt": (GUIDED, f"{_ADM_256} --class_cond False --dropout {dropout}")
        for name, dropout in (("bedroom", 0.1), ("cat", 0.1), ("horse", 0.1), ("horse_nodropout", 0.0))
    },
    "64x64_classifier.pt": (GUIDED, f"{_CLASSIFIER} --image_size 64 --classifier_depth 4 --noise_schedule cosine"),
    **{
        f"{size}x{size}_classifier.pt": (
            GUIDED, f"{_CLASSIFIER} --image_size {size} --classifier_depth 2 --noise_schedule linear"
        )
        for size in (128, 256, 512)
    },
}  # fmt: skip

# By flag, what both repositories' scripts take where it is left out; without a row, it must be given or be told by the
# shapes
DEFAULTS: dict[str, Any] = {
    "dropout": 0.0,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
    "predict_xstart": False,
    "sigma_small": False,
}
TOLD_BY_SHAPES = (
    "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "learn_sigma", "class_cond",
    "use_scale_shift_norm", "resblock_updown", "classifier_width", "classifier_depth",
    "classifier_attention_resolutions", "classifier_use_scale_shift_norm", "classifier_resblock_updown",
    "classifier_pool",
)  # fmt: skip
NEEDED = (
    "image_size", "large_size", "small_size", "num_heads", "num_head_channels", "diffusion_steps", "noise_schedule",
    "rescale_timesteps",
)  # fmt: skip
OF_TRAINING_AND_SAMPLING = (
    "use_kl", "rescale_learned_sigmas", "timestep_respacing", "use_fp16", "use_checkpoint", "classifier_use_fp16",
    "batch_size", "num_samples", "use_ddim", "model_path", "classifier_path", "classifier_scale", "base_samples",
    "clip_denoised", "lr", "microbatch", "ema_rate", "schedule_sampler", "weight_decay", "lr_anneal_steps",
    "log_interval", "save_interval", "data_dir", "resume_checkpoint", "fp16_scale_growth", "iterations", "anneal_lr",
)  # fmt: skip
KNOWN = (*TOLD_BY_SHAPES, *NEEDED, *DEFAULTS, *OF_TRAINING_AND_SAMPLING)
ONLY_IMPROVED, ONLY_GUIDED = ("sigma_small",), ("num_head_channels", "resblock_updown", "use_new_attention_order")
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
EXAMPLE = "--flags '--image_size 64 --num_head_channels 64 --diffusion_steps 1000 --noise_schedule cosine'"


class Flags(NamedTuple):
    """What is known of a network besides its shapes."""

    image_size: int
    num_heads: int
    num_head_channels: int
    legacy_order: bool
    dropout: float
    diffusion_steps: int
    noise_schedule: str
    rescale_timesteps: bool
    predict_xstart: bool
    sigma_small: bool
    timestep_respacing: str

    @property
    def timestep_scale(self) -> float:
        """What the network's t is multiplied by."""
        return 1000 / self.diffusion_steps if self.rescale_timesteps else 1.0


def parse_flags(text: str) -> dict[str, str]:
    """A command line of the repositories' scripts as a mapping.

    Raises:
        ValueError: a flag that the scripts do not have, or one without a value.
    """
    return parse_words(text, KNOWN, "improved- or guided-diffusion")


def choose_flags(given: dict[str, str], layout: Layout, repository: str | None) -> tuple[Flags, str]:
    """The flags of a network, and of which repository it is: given, told by the shapes, or the scripts' defaults.

    Args:
        given: by the user; those that the shapes tell are compared with these.
        repository: `IMPROVED` or `GUIDED`; None to see it from shapes and flags.

    Raises:
        ValueError: a flag that is missing, malformed, or contradicts the shapes.
    """
    repository = repository or _repository_of(given, layout)
    sizes = [whole(given, name) for name in ("large_size", "image_size") if name in given]
    if not sizes and layout.positions:
        sizes = [round(layout.positions**0.5) * 2 ** (len(layout.widths) - 1)]
    if not sizes and repository == IMPROVED and layout.upsampler:
        sizes = [256]  # the scripts' default of an upsampler
    missing = [] if sizes else ["--image_size"]
    heads_told = layout.positions or repository == IMPROVED  # a classifier's heads are 64 wide
    if not heads_told and not {"num_heads", "num_head_channels"} & set(given):
        missing.append("--num_heads or --num_head_channels")
    missing += [f"--{name}" for name in ("diffusion_steps", "noise_schedule") if name not in given]
    steps = whole(given, "diffusion_steps") if "diffusion_steps" in given else 1000
    if steps != 1000 and repository is None and "rescale_timesteps" not in given:
        missing.append("--rescale_timesteps")
    if missing:
        raise ValueError(
            f"its shapes do not tell {', '.join(missing)}: give the flags that it was trained with, such as {EXAMPLE}"
        )
    told = round(layout.positions**0.5) * 2 ** (len(layout.widths) - 1)
    if layout.positions and sizes[0] != told:
        raise ValueError(f"--image_size {sizes[0]}: the file is of {told}, by the positions of its last level")
    if layout.upsampler and truth(given, "use_new_attention_order"):
        raise ValueError("--use_new_attention_order: upsamplers have the legacy order alone; leave it out")
    classifier = bool(layout.positions)  # its heads and order are fixed; these flags are those of the UNet beside it
    halvings = 2 ** (len(layout.widths) - 1)
    if sizes[0] % halvings:
        raise ValueError(
            f"--image_size {sizes[0]}: the file has {len(layout.widths)} levels: a multiple of {halvings}"
        )
    flags = Flags(
        image_size=sizes[0],
        num_heads=whole(given, "num_heads", 4),
        num_head_channels=64 if classifier else whole(given, "num_head_channels", -1),
        legacy_order=classifier or not truth(given, "use_new_attention_order"),
        dropout=number(given, "dropout", DEFAULTS["dropout"]),
        diffusion_steps=steps,
        noise_schedule=given["noise_schedule"],
        rescale_timesteps=truth(given, "rescale_timesteps", repository == IMPROVED),
        predict_xstart=truth(given, "predict_xstart"),
        sigma_small=truth(given, "sigma_small"),
        timestep_respacing=given.get("timestep_respacing", ""),
    )
    if flags.noise_schedule not in ("linear", "cosine"):
        raise ValueError(f"--noise_schedule {flags.noise_schedule}: must be linear or cosine")
    if flags.image_size < 1 or steps < 1 or not 0 <= flags.dropout < 1:
        raise ValueError("--image_size and --diffusion_steps must be 1 or more, --dropout from 0 to 1")
    if number(given, "num_heads_upsample", -1) not in (-1, flags.num_heads):
        raise ValueError("--num_heads_upsample: another number of heads in the decoder is not supported")
    _compare(given, layout, flags.image_size)
    return flags, repository or f"{IMPROVED} or {GUIDED}"


def _repository_of(given: dict[str, str], layout: Layout) -> str | None:
    if layout.resblock_updown or layout.positions or set(ONLY_GUIDED) & set(given):
        return GUIDED
    return IMPROVED if set(ONLY_IMPROVED) & set(given) else None


def _compare(given: dict[str, str], layout: Layout, image_size: int) -> None:
    """Raise ValueError for flags that contradict the shapes."""
    classifier = "classifier_" if layout.positions else ""
    rates = [2**level for level, attends in enumerate(layout.attention) if attends]
    told: dict[str, Any] = {
        "classifier_width" if classifier else "num_channels": layout.channels,
        "classifier_depth" if classifier else "num_res_blocks": layout.layers,
        f"{classifier}use_scale_shift_norm": layout.scale_shift,
        f"{classifier}resblock_updown": layout.resblock_updown,
    }
    if classifier:
        told["classifier_pool"] = "attention"
    else:
        told["class_cond"] = layout.classes is not None
        told["learn_sigma"] = layout.learned_variance
    for name, value in told.items():
        if name not in given:
            continue
        said = truth(given, name) if isinstance(value, bool) else given[name]
        if str(said) != str(value):
            raise ValueError(f"--{name} {given[name]}: the file has {value}")
    name = f"{classifier}attention_resolutions"
    if name in given:
        sides = [whole({name: one}, name) for one in given[name].split(",")]
        levels = len(layout.widths)
        said_rates = sorted({image_size // side for side in sides if side > 0} & {2**level for level in range(levels)})
        if said_rates != rates:
            of_file = ",".join(str(image_size // rate) for rate in rates) or "none"
            raise ValueError(f"--{name} {given[name]}: the file attends at {of_file} of --image_size {image_size}")
    if given.get("channel_mult"):
        widths = [round(number({"channel_mult": one}, "channel_mult") * layout.channels) for one in
                  given["channel_mult"].split(",")]  # fmt: skip
        if tuple(widths) != layout.widths:
            raise ValueError(
                f"--channel_mult {given['channel_mult']}: the file's levels are {list(layout.widths)} wide"
            )


def truth(given: dict[str, str], name: str, default: bool | None = None) -> bool:
    """A flag's value as True or False.

    Raises:
        ValueError: it is neither.
    """
    value = given.get(name)
    if value is None:
        return bool(DEFAULTS.get(name, False) if default is None else default)
    if value.lower() not in TRUE + FALSE:
        raise ValueError(f"--{name} {value}: must be True or False")
    return value.lower() in TRUE
