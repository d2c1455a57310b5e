"""The flags of the UNet, and of trained weights to start from."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from ..common.arguments import FIXED, FREE, HfArg, Need, synonyms
from ..common.errors import UsageError
from .presets import MODEL_PRESETS

# What other programs call these flags
UNET = synonyms("""
--model_preset: preset arch architecture model model_name network unet
--model_config_name_or_path: unet_config model_config config_name_or_path
--model_preset or --model_config_name_or_path (a UNet2DModel config): num_channels model_channels base_channels dim
--model_preset or --model_config_name_or_path (a UNet2DModel config): dim_mults channel_mult ch_mult num_res_blocks
--model_preset or --model_config_name_or_path (a UNet2DModel config): attention_resolutions num_heads attn_resolutions
--model_preset or --model_config_name_or_path (a UNet2DModel config): num_head_channels attn_heads attn_dim_head
--model_preset or --model_config_name_or_path (a UNet2DModel config): dropout block_out_channels layers_per_block
--model_preset or --model_config_name_or_path (a UNet2DModel config): use_scale_shift_norm resblock_updown full_attn
--model_preset or --model_config_name_or_path (a UNet2DModel config): attention_head_dim norm_num_groups
""")
START_FROM = synonyms("""
--pretrained_model_name_or_path: pretrained pretrained_model init_from finetune fine_tune pretrained_unet
--pretrained_model_name_or_path: unet_name_or_path pretrained_path load_from init_checkpoint pretrained_model_path
--pretrained_model_name_or_path: model_name_or_path base_model init_checkpoint_path checkpoint_path
""")
ATTENTION = synonyms("""
--enable_xformers_memory_efficient_attention: xformers use_xformers flash_attn flash_attention
""")


@dataclass
class UNetFlags:
    """Which UNet."""

    title: ClassVar[str] = "Model"
    meanings: ClassVar[dict[str, str]] = UNET

    model_preset: str | None = HfArg(
        instead_of="model_config_name_or_path",
        resume=FREE,
        default=None,
        help=f"A UNet by name, with its paper's recipe: {', '.join(MODEL_PRESETS)}.",
    )
    model_config_name_or_path: str | None = HfArg(
        instead_of="model_preset",
        resume=FREE,
        default=None,
        help="A UNet2DModel's config on the Hub or on disk; trained from scratch.",
    )

    def check(self, flags: Any) -> None:
        """Raise UsageError for two models."""
        if self.model_preset and self.model_config_name_or_path:
            raise UsageError("--model_preset and --model_config_name_or_path name two models; give one of them")


ON_THE_HUB = Need(
    lambda run: not os.path.isdir(run.pretrained_model_name_or_path or ""),
    "has no effect on {pretrained_model_name_or_path}, which is a folder on this machine",
)


@dataclass
class StartFlags:
    """Which trained weights to start from."""

    title: ClassVar[str] = "Starting from trained weights"
    meanings: ClassVar[dict[str, str]] = START_FROM
    needs: ClassVar[dict[str, Need]] = {"revision": ON_THE_HUB}

    pretrained_model_name_or_path: str | None = HfArg(
        resume=FIXED,
        default=None,
        help="Start from trained weights: the folder of a pipeline, of a checkpoint-N (its averaged weights where it"
        " has them) or of a UNet2DModel, or a model on the Hub. Its diffusion, size and autoencoder are the defaults.",
    )
    revision: str | None = HfArg(resume=FIXED, default=None, help="Branch, tag or commit of that model on the Hub.")
    variant: str | None = HfArg(resume=FIXED, default=None, help="Variant of its weights, such as fp16 or non_ema.")
    subfolder: str | None = HfArg(
        resume=FIXED, default=None, help="The folder within it: checkpoint-500/unet, for example."
    )

    def check(self, flags: Any) -> None:
        """Raise UsageError for two models, and for what only concerns one to start from."""
        starts = self.pretrained_model_name_or_path is not None
        for name in ("revision", "variant", "subfolder"):
            if not starts and getattr(self, name) is not None:
                raise UsageError(f"--{name} is of the model to start from: give --pretrained_model_name_or_path")
        if starts and flags.model_config_name_or_path is not None:
            raise UsageError(
                "--model_config_name_or_path and --pretrained_model_name_or_path name two models; give one of them"
            )


@dataclass
class AttentionFlags:
    """Flags of the UNet's attention."""

    title: ClassVar[str] = "Speed and memory"
    meanings: ClassVar[dict[str, str]] = ATTENTION

    enable_xformers_memory_efficient_attention: bool = HfArg(
        default=False, help="xFormers' attention; torch's own is memory-efficient too."
    )
