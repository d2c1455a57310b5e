"""What the tests of text to image share: tiny models, captioned pictures, and runs of its script in-process."""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DConditionModel

import train_text2image
from ddpm_hf.portable.pipeline_text2image_ddpm_hf import STABLE_DIFFUSION_SETTINGS, TextToImageDDPMPipeline
from ddpm_hf.portable.scheduling_ddpm_hf import DDPMScheduler
from ddpm_hf.text.captions import fit_tokenizer, make_text_encoder
from ddpm_hf.training.flags import Flags
from ddpm_hf.training.parsing import parse_flags
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.pictures import encoded, random_pixels
from tests.support.runs import Run, run_script

COLOURS = ("red", "green", "blue", "white", "black", "pink", "brown", "gray")
CAPTIONS = [f"a {colour} square" for colour in COLOURS]
WIDTH = 32  # of the text encoder


def tiny_text_unet_config(size=8, channels=4, **more):
    """The arguments of a UNet of two levels, the coarser of which reads the text."""
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        **more,
    }


def tiny_text_unet(size=8, channels=4, seed=0, **more):
    """An untrained UNet in eval mode: its outputs are of no use, and depend on x_t, t and the text."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**tiny_text_unet_config(size, channels, **more)).eval()
    for name, parameter in unet.named_parameters():
        if "attn2" in name:  # else the text is hardly heard
            parameter.data.mul_(4)
    return unet


def tiny_text_encoder(seed=0):
    """A tokenizer of the captions, and an untrained text encoder whose embeddings differ by the prompt."""
    tokenizer = fit_tokenizer(CAPTIONS)
    torch.manual_seed(seed)
    return tokenizer, make_text_encoder(tokenizer, width=WIDTH, layers=1).eval()


def stable_diffusion_scheduler(cls=DDPMScheduler, **config):
    """A scheduler that no pipeline of Stable Diffusion has to mend."""
    return cls(**{**STABLE_DIFFUSION_SETTINGS, **config})


def tiny_text_pipeline(scheduler=None, vae=None, seed=0, **more):
    """Our pipeline around the tiny models, of 16×16 pixels in latents of 8×8."""
    tokenizer, text_encoder = tiny_text_encoder(seed)
    scheduler = scheduler or stable_diffusion_scheduler()
    vae = vae or tiny_vae(scaling_factor=0.5)
    pipeline = TextToImageDDPMPipeline(vae, text_encoder, tokenizer, tiny_text_unet(seed=seed, **more), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_pipeline(pipeline, scheduler):
    """Stock's pipeline around the same models."""
    stock = diffusers.StableDiffusionPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=pipeline.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    return stock


def write_captioned(folder: Path, count=8, height=16, width=16, captions=CAPTIONS, column="text", seed=0) -> Path:
    """A folder of PNG files with their captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, pixels in enumerate(random_pixels(count, height, width, seed)):
        (folder / f"{number}.png").write_bytes(encoded(pixels))
        lines.append(json.dumps({"file_name": f"{number}.png", column: captions[number % len(captions)]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_text_unet(folder: Path, **changed) -> Path:
    """The config of a tiny UNet for a text encoder made from scratch, which is 128 wide."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "UNet2DConditionModel", **tiny_text_unet_config(cross_attention_dim=128), **changed}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_text_script(argv: list[str], folder: Path) -> Run:
    """`train_text2image.main(argv)` in this process."""
    return run_script(argv, folder, train_text2image.main)


def parse_text(argv: list[str]) -> Flags:
    """The settings that a command line stands for."""
    return parse_flags(train_text2image.PROGRAM, argv)
