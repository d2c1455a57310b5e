"""Which pipeline class a model is for, and loading it."""

from pathlib import Path

from ..common.errors import said_in_a_line


def pipeline_class(model: str, revision: str | None = None, token: str | None = None) -> type:
    """The class of ours that loads a folder or a model on the Hub, by its `model_index.json` alone.

    Raises:
        ValueError: no such model, or not one of ours.
    """
    from diffusers import DiffusionPipeline

    from ..portable.hub_ddpm_hf import SAMPLED_BY
    from ..portable.pipeline_class_conditional_ddpm_hf import ClassConditionalDDPMPipeline
    from ..portable.pipeline_ddpm_hf import DDPMPipeline
    from ..portable.pipeline_text2image_ddpm_hf import TextToImageDDPMPipeline

    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{model} holds no pipeline (no model_index.json); give the --output_dir of a training run")
    ours = {cls.__name__: cls for cls in (DDPMPipeline, ClassConditionalDDPMPipeline, TextToImageDDPMPipeline)}
    with said_in_a_line(model):
        name = DiffusionPipeline.load_config(model, revision=revision, token=token).get("_class_name")
        name = name[-1] if isinstance(name, list) and name else name  # [file, class] of our repositories' code
        if not isinstance(name, str) or name not in SAMPLED_BY:
            raise ValueError(f"it is a {name}, and must be one of {', '.join(SAMPLED_BY)}")
        return ours[SAMPLED_BY[name]]


def load_pipeline(model: str, revision: str | None = None, token: str | None = None):
    """Our pipeline from a folder or Hub name, of whatever kind, without executing anything from it.

    Raises:
        ValueError: no such model, or not one of ours.
    """
    cls = pipeline_class(model, revision, token)
    with said_in_a_line(model):
        return cls.from_pretrained(model, revision=revision, token=token, use_safetensors=True)
