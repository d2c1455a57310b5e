"""What is said of a model that cannot be loaded."""


def why_not_loaded(error: Exception) -> str:
    """Why a model cannot be loaded, and the way out where there are but pickled weights, which can run code."""
    reason = " ".join(str(error).split())[:250]
    if ".safetensors" in reason and "no file" in reason.lower():
        reason += (
            "; weights are read from safetensors alone: load pickled ones with the library that wrote them, if you"
            " trust them, and save_pretrained(folder, safe_serialization=True)"
        )
    return reason
