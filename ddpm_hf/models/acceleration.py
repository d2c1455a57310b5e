"""How a model is executed: with another attention."""

from ..common.errors import UsageError


def use_xformers(model) -> None:
    """Attention by xFormers.

    Raises:
        UsageError: it is not installed, or has no GPU.
    """
    try:
        model.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError) as error:
        raise UsageError(
            "--enable_xformers_memory_efficient_attention: xFormers is not installed or has no GPU; leave the flag"
            " out, torch's own attention is memory-efficient"
        ) from error
