"""lucidrains' denoising-diffusion-pytorch: recognised, and refused with what stands in the way."""

from .conversion import Conversion, Options, State


def is_lucidrains(state: State) -> bool:
    """Whether a state dict is of its UNet, or of its diffusion around one."""
    names = {name.removeprefix("ema_model.").removeprefix("online_model.").removeprefix("model.") for name in state}
    return {"init_conv.weight", "time_mlp.1.weight", "mid_block1.block1.proj.weight"} <= names


def convert_lucidrains(state: State, options: Options) -> Conversion:
    """Refuse it.

    Raises:
        ValueError: always, with what of the network no `UNet2DModel` has.
    """
    named = {name.removeprefix("ema_model.").removeprefix("model."): value for name, value in state.items()}
    first = named["init_conv.weight"]
    kernel = "×".join(map(str, first.shape[2:]))
    reasons = [f"its first convolution is {kernel}"] if kernel != "3×3" else []
    if any(name.endswith(".norm.g") for name in named):
        reasons.append("it normalises each pixel (RMSNorm), after the convolutions")
    if any(name.endswith("to_out.1.g") for name in named):
        reasons.append("its upper levels attend linearly")
    if any(name.endswith("mem_kv") for name in named):
        reasons.append("its attention has learned keys and values besides the positions'")
    reasons.append("its time embedding has a GELU, and its last block reads the first convolution's output")
    raise ValueError(
        f"a network of denoising-diffusion-pytorch, which Diffusers' UNet2DModel cannot express: {'; '.join(reasons)}."
        " Sample from it there, or train here anew: ddpm-hf train --objective, --prediction_type and"
        " --ddpm_beta_schedule have the same choices"
    )
