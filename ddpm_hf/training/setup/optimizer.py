"""AdamW and the learning rate's schedule."""

import torch
from diffusers.optimization import get_scheduler

from ...common.errors import UsageError
from ..flags import TrainingFlags


def scaled_learning_rate(flags: TrainingFlags, world: int) -> float:
    """The peak learning rate that is trained with: with --scale_lr, that of the flag times the samples of a step."""
    scale = world * flags.train_batch_size * flags.gradient_accumulation_steps if flags.scale_lr else 1
    return flags.learning_rate * scale


def make_optimizer(flags: TrainingFlags, model: torch.nn.Module, world: int) -> torch.optim.Optimizer:
    """AdamW with the settings of the flags, over what of the model is trained."""
    make, options = torch.optim.AdamW, {"fused": True}
    if flags.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UsageError("--use_8bit_adam requires bitsandbytes: pip install bitsandbytes") from error
        make, options = AdamW8bit, {}
    return make(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=scaled_learning_rate(flags, world),
        betas=(flags.adam_beta1, flags.adam_beta2),
        weight_decay=flags.adam_weight_decay,
        eps=flags.adam_epsilon,
        **options,
    )


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
