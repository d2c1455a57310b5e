"""`ddpm-hf restore` with a model that was trained for the task."""

from typing import TYPE_CHECKING, Any

from ..restoration.tasks import Settings

if TYPE_CHECKING:
    import torch

    from ..portable.pipeline_image_to_image_ddpm_hf import DDPMImageToImagePipeline

TRAINED_FOR = {"factor": "factor", "filter": "filter", "blur_size": "blur_size"}  # of Settings, by Conditioning's
ONLY_UNTRAINED = ("eta", "weight", "iterations", "time_travel")


class TrainedRestorer:
    """A pipeline that reads the image, as the command calls one that is guided by it.

    Args:
        exact: whether the observation has no noise: then all that it says is kept, where its operator is known.
    """

    def __init__(self, pipeline: "DDPMImageToImagePipeline", exact: bool):
        known = pipeline.conditioning.task == "inpaint" or pipeline.conditioning.operator(pipeline.sample_shape)
        self.pipeline, self.correction = pipeline, "observation" if exact and known else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def pixels(self, x_start: "torch.Tensor") -> "torch.Tensor":
        """x_0 as images in [-1, 1]: itself."""
        return x_start

    def check_size(self, operator: Any) -> None:
        """Raise ValueError for an operator whose images the model cannot make."""
        expected, found = tuple(self.pipeline.sample_shape), tuple(operator.shape)
        if found != expected:
            raise ValueError(
                f"the restored image would have {found[0]} channels and {found[1]}x{found[2]} pixels, and the model"
                f" makes {expected[0]} channels and {expected[1]}x{expected[2]}; resize it with --fit"
            )

    def __call__(
        self,
        y: "torch.Tensor",
        operator: Any,
        sigma_y: float,
        num_solutions: int,
        generator: Any,
        output_type: str,
        **options: Any,
    ) -> Any:
        """The solutions of observations y [N, ...] in [-1, 1]."""
        pipeline, labels = self.pipeline, options.get("class_labels")
        known = operator.mask[:1] if pipeline.conditioning.task == "inpaint" else None  # [1, H, W]
        return pipeline.solve(
            y.to(pipeline.device),
            known=pipeline.read_mask(known, len(y)),
            labels=pipeline.class_condition(labels, len(y)),
            num_solutions=num_solutions,
            sigma_y=sigma_y,
            correction=self.correction,
            generator=generator,
            num_inference_steps=options["num_inference_steps"],
            output_type=output_type,
        )


def settings_of_model(pipeline: Any, task: str, given: dict[str, Any], settings: Settings) -> Settings:
    """The settings of the task as the model was trained for it.

    Args:
        given: the settings that the command line says, None where it does not.

    Raises:
        ValueError: another task, or other settings.
    """
    conditioning = pipeline.conditioning
    if task != conditioning.task:
        raise ValueError(
            f"--task {task}: this model was trained for {conditioning.task}; use --task {conditioning.task}"
        )
    if given.get("blur") not in (None, "gaussian"):
        raise ValueError(f"--blur {given['blur']}: this model was trained for gaussian")
    for name, field in TRAINED_FOR.items():
        trained = getattr(conditioning, field)
        if trained is None:
            continue
        if given.get(name) not in (None, trained):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {given[name]}: this model was trained for {trained}; leave it out")
        settings = settings._replace(**{name: trained})
    return settings


def check_options(method: str, start: float, options: dict[str, Any]) -> None:
    """Raise ValueError for options of the methods, which a trained model does not use."""
    used = {"method": method if method != "ddnm" else None, "start": start if start != 1 else None}
    used |= {name: options.get(name) for name in ONLY_UNTRAINED}
    for name, value in used.items():
        if value is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is for models that were not trained for the task; leave it out"
            )
