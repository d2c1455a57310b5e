"""The optimizer and the learning rate's schedule."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler

from ...common.errors import UsageError
from ..flags import TrainingFlags

if TYPE_CHECKING:
    from accelerate import Accelerator


def scaled_learning_rate(flags: TrainingFlags, world: int) -> float:
    """The peak learning rate that is trained with: with --scale_lr, that of the flag times the samples of a step."""
    scale = world * flags.train_batch_size * flags.gradient_accumulation_steps if flags.scale_lr else 1
    return flags.learning_rate * scale


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What of a model is trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adam_options(flags: TrainingFlags, world: int) -> dict[str, Any]:
    """The settings that every optimizer here has."""
    return {
        "lr": scaled_learning_rate(flags, world),
        "betas": (flags.adam_beta1, flags.adam_beta2),
        "weight_decay": flags.adam_weight_decay,
        "eps": flags.adam_epsilon,
    }


def adamw(flags: TrainingFlags, model: torch.nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    """torch's AdamW, fused; or with 8-bit moments, that of bitsandbytes."""
    if not flags.use_8bit_adam:
        return torch.optim.AdamW(trained_parameters(model), fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UsageError("--use_8bit_adam requires bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(trained_parameters(model), **options)


def library() -> ModuleType:
    """pytorch_optimizer, which only some optimizers require.

    Raises:
        ImportError: it is not installed.
    """
    import pytorch_optimizer

    return pytorch_optimizer


def muon(flags: TrainingFlags, model: torch.nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Muon for weights of hidden layers, convolutions as matrices [out, in · k · k]; AdamW for the rest.

    Steps have AdamW's usual size (Liu et al. 2025, "Muon is scalable"), so that both have one learning rate.
    """
    matrices = hidden_matrices(model)
    known = {id(one) for one in matrices}
    rest = [one for one in trained_parameters(model) if id(one) not in known]
    of_muon = {name: options[name] for name in ("lr", "weight_decay")}
    groups = [
        {"params": matrices, "use_muon": True, "use_adjusted_lr": True, **of_muon},
        {"params": rest, "use_muon": False, **options},
    ]
    return library().Muon([group for group in groups if group["params"]])


def soap(flags: TrainingFlags, model: torch.nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    """SOAP (Vyas et al. 2024): Adam in the eigenbases of the gradient's second moments, renewed every ten steps."""
    return library().SOAP(trained_parameters(model), **options)


def schedulefree(flags: TrainingFlags, model: torch.nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024)."""
    return library().ScheduleFreeAdamW(trained_parameters(model), **options)


MAKERS = {"adamw": adamw, "muon": muon, "soap": soap, "schedulefree": schedulefree}
# What an optimizer counts in its groups; their other entries are settings
COUNTED = ("step", "train_mode", "weight_sum", "lr_max")
OUTER_LAYERS = ("conv_in", "conv_out")  # of Diffusers' models; Muon is for what lies between


def hidden_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained weights that are matrices or kernels, but for embeddings and the layers that meet the data."""
    apart = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or name.rpartition(".")[2] in OUTER_LAYERS
        for parameter in module.parameters(recurse=False)
    }
    return [one for one in trained_parameters(model) if one.ndim >= 2 and id(one) not in apart]


def make_optimizer(flags: TrainingFlags, model: torch.nn.Module, world: int) -> torch.optim.Optimizer:
    """The optimizer of the flags, over what of the model is trained.

    Raises:
        UsageError: a library that is not installed.
    """
    try:
        return MAKERS[flags.optimizer](flags, model, adam_options(flags, world))
    except ImportError as error:
        raise UsageError(
            f"--optimizer {flags.optimizer} requires pytorch_optimizer; install it with: pip install"
            " 'ddpm_hf[optimizers]'"
        ) from error


def check_engine(flags: TrainingFlags, accelerator: "Accelerator") -> None:
    """Raise UsageError for flags that an engine which shards weights, or steps by itself, cannot serve."""
    engine = accelerator.distributed_type.value
    if engine not in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        return
    if flags.optimizer != "adamw":
        raise UsageError(f"--optimizer {flags.optimizer} requires all weights on each rank; use adamw with {engine}")
    if flags.ema_snapshot_steps:
        raise UsageError(f"--ema_snapshot_steps requires all weights on each rank; leave it out with {engine}")


def make_lr_scheduler(
    flags: TrainingFlags, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate's schedule over optimizer steps, whatever the processes and the accumulation."""
    return get_scheduler(
        flags.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=min(flags.lr_warmup_steps, total_steps),  # Diffusers' script would not reach the rate
        num_training_steps=total_steps,
    )


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments that a checkpoint brought the memory layout of their parameters, as fused kernels require."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if getattr(value, "shape", None) == parameter.shape and value.stride() != parameter.stride():
                moments[name] = value.new_empty_strided(parameter.shape, parameter.stride()).copy_(value)
