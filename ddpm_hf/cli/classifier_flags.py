"""The flags of `ddpm-hf train-classifier`."""

from ..common.arguments import synonyms
from ..data.flags import DataFlags
from ..models.flags import UNetFlags
from ..models.recipes import weaker_layers
from ..objectives.flags import ScheduleFlags
from ..publishing.flags import HubFlags
from ..training.flags import Flags, TrainingFlags
from ..training.parsing import Program, parse_flags

CLASSIFIER_PROGRAM = "ddpm-hf train-classifier"
CLASSIFIER_DESCRIPTION = """Train a classifier of noised images, whose gradient guides sampling towards a class.

    ddpm-hf train-classifier --train_data_dir photos --label_column label --output_dir classifier
    ddpm-hf sample MODEL --class cat --classifier classifier

The images and the noise schedule must be those of the model that it is to guide."""
# Flags of the training scripts that a classifier does not have
NO_CLASSIFIER = synonyms("""
a classifier is not a pipeline, upload its folder with `hf upload`: push_to_hub hub_model_id hub_private_repo push
a classifier is not a pipeline, upload its folder with `hf upload`: upload hub_strategy hub_revision hub_license hub
a classifier is not a pipeline, upload its folder with `hf upload`: hub_best_metric
a classifier has one kind of weights, averaged with --use_ema: save_variants
a classifier samples no grids: save_images_epochs save_images_steps validation_epochs validation_prompts
a classifier samples no grids: ddpm_num_inference_steps num_inference_steps guidance_scale
a classifier uses torch's attention, which is memory-efficient too: enable_xformers_memory_efficient_attention xformers
a classifier predicts classes by cross-entropy: prediction_type variance_type objective loss_type snr_gamma vlb_weight
a classifier predicts classes by cross-entropy: loss_weighting
a classifier sees each image with its class, at uniform timesteps: class_dropout timestep_sampler class_balanced
a classifier reads pixels, not latents: vae_name_or_path cache_latents
a classifier is trained from scratch: pretrained_model_name_or_path
""")


CLASSIFIER = Program(
    (DataFlags, UNetFlags, ScheduleFlags, TrainingFlags, HubFlags),
    weaker_layers,
    CLASSIFIER_DESCRIPTION,
    CLASSIFIER_PROGRAM,
    defaults={"label_column": "label"},
    absent=NO_CLASSIFIER,
)


def parse_classifier_flags(argv: list[str]) -> Flags:
    """The settings of `ddpm-hf train-classifier` for a command line; a mistake is one line and exit code 2."""
    return parse_flags(CLASSIFIER, argv)
