"""No message that names a flag is forgotten by the rows of tests/support/ways_out.py."""

import ast
import dataclasses
import re

import typer.main

from ddpm_hf import cli
from tests.support import ROOT
from tests.support.ways_out import PROGRAMS, ROWS, flags_in

SOURCES = [
    *sorted((ROOT / "ddpm_hf").rglob("*.py")),
    *sorted(ROOT.glob("train_*.py")),
]
SOURCES = [path for path in SOURCES if "converters" not in path.parts]  # other programs' flags: test_convert.py

# Strings with flags that advise nothing
NO_ADVICE = (
    "then ddpm-hf sample ddpm-model-64", "Example", "ddpm-hf: error: {} (see --help)",
    "a classifier of noised images, for",
    "an autoencoder, for", "become -1 to 1  (--pixel_range)", "Train a classifier of noised images, whose",
    "Supported samplers", "only its recipe counts", "[--flag value", "--config {}", "Hyphens work as well",
    "accelerate's --", "--mixed_precision fp16", "the time limit of", "a prompt of --validation_prompts is too long",
    " with --dataset_config_name {}", " instead of --overwrite_output_dir",
)  # fmt: skip

# Tried elsewhere: by the tables of refusals in tests/cli/test_evaluate.py, test_few_steps.py, test_ema.py,
# test_image_to_image.py, in tests/restoration/test_conditional_training.py and in tests/ablation
APART = (
    "ddpm_hf/cli/evaluat", "ddpm_hf/evaluation/", "ddpm_hf/cli/fit_", "ddpm_hf/few_steps/", "ddpm_hf/cli/ema",
    "ddpm_hf/training/post_hoc", "ddpm_hf/cli/abl", "ddpm_hf/ablation/", "ddpm_hf/cli/image_conditions",
    "ddpm_hf/cli/restore_trained", "ddpm_hf/models/conditioning",
)  # fmt: skip

# Not tried: why
EXCEPTIONS = {
    "holds texts that name no files": "of a table of texts: test_bad_input.py",
    "holds names of files, which a stream does not open": "needs a table of names: test_sources.py",
    "the autoencoder in {} reads images of {}": "of a resumed run: test_text_resuming.py",
    "warning: --validation_split chooses the held-out images anew": "of a resumed run: test_resumed_settings.py",
    "{} has no figures; evaluate it with --metrics": "needs an evaluation without any",
    "this model always has a class: give --class": "of ddpm-hf restore: test_restore.py",
    "--class {}: this model has no classes; leave it out": "of ddpm-hf restore: test_restore.py",
    "--{} {}: holds {} and {} for {}; remove one of them": "of ddpm-hf restore: test_restore.py",
    "{} is of other weights than {}, and not uploaded": "of a folder saved again: test_other_weights.py",
    "--mask {}: hides nothing that --fit keeps": "of a mask outside of the crop: test_restore.py",
    "--mask {}: {}": "the reader's own words: test_restore.py",
    "--features {}: {}": "the network's own words: test_restore.py",
    "--sigma-y {}: must be at most {}": "of ddpm-hf restore: test_restore.py",
    "; --degrade takes the colours away first": "of ddpm-hf restore: test_restore.py",
    "--image {}: its results cannot have a folder of this name": "of ddpm-hf restore: test_restore.py",
    "--image {} and {} would have results of one name": "of ddpm-hf restore: test_restore.py",
    "was trained with another noise schedule than the model's": "needs another classifier: test_classifier.py",
    "--save-model {}: holds another model, which stays": "of ddpm-hf sample: test_image_to_image.py",
    "--image_column {}: the images of {} are in 'image'": "of the embedded digits: test_needs.py",
    "was not trained for one task: give --task": "of ddpm-hf restore: test_restore.py",
    "--task inpaint requires --mask": "of ddpm-hf restore: test_restore.py",
    "--{} {} is for --task {}; leave --{} out": "of ddpm-hf restore: test_restore.py",
    "--hidden {} is for --mask box and --mask random": "of ddpm-hf restore: test_restore.py",
    "--truth and --degrade, which makes the truth of --image": "of ddpm-hf restore: test_restore.py",
    "; for a gray image, --task colorize": "of ddpm-hf restore: test_restore.py",
    "--task colorize requires a model of colour images": "needs another model",
    "--features {} compares with the truth": "of ddpm-hf restore: test_cli_options.py gives --degrade",
    "--factor {}: must be 2 or more": "of ddpm-hf restore: its default is 2",
    "--hidden {}: must be above 0 and below 1": "of ddpm-hf restore: its default is 0.5",
    "--blur-size {}: must be above 0": "of ddpm-hf restore: its default is 1",
    "--sigma-y {}: must be 0 or more": "of ddpm-hf restore: test_restore.py gives 0",
    "--sigma-y is estimated": "says what was estimated, and advises nothing",
    "--mask {}: not an image that can be read": "a damaged file, which has no way out",
    "--{} {}: not an image that can be read": "a damaged file, which has no way out",
    "--{} {} has {} channels, not {}": "test_restore.py",
    "--{} {}: there is no such file or folder": "test_restore.py",
    "--{} {}: the folder holds no file that ends with": "test_restore.py",
    "--{} {}: holds no {}.png for {}": "test_restore.py",
    "--resolution {}x{}: the autoencoder requires multiples": "the scripts check the size before; for other callers",
    "column {} makes {} classes of {} images": "asks, and advises nothing: test_values.py",
    "--output_dir {} cannot be written": "needs a disk that refuses: test_faults.py",
    "ddpm-hf train-text2image --output_dir {} --resume_from_checkpoint latest": "needs a trained text run",
    "has no effect": "of what a flag needs, which its field states: test_needs.py",
    "--guidance-rescale {}": "part of a message that has a row",
    "--dataset_split {}": "part of a message that has a row",
    "out of memory": "needs memory to run out: test_faults.py",
    "token: none; log in": "test_commands.py, test_a_dry_run_without_a_token_says_so",
    "a process that reads the data was killed": "needs a worker that is killed: test_faults.py",
    "leave --validation_steps out": "part of messages that have rows",
    "give --validation_split {}, for example": "part of messages that have rows",
    "try --model_preset {}; or {}": "needs a slow model: test_reporting.py",
    "train for fewer --max_train_steps": "needs a slow model: test_reporting.py",
    "and another --output_dir": "of checkpoints of Diffusers: test_pretrained.py",
    "save_pretrained(START) and --pretrained_model_name_or_path START": "of checkpoints of Diffusers",
    "go on with --resume_from_checkpoint latest": "of stopped runs: test_resuming.py, test_stops.py",
    "had a loss or gradient that is not finite": "of runs that diverge: test_stops.py",
    "the order goes on where it was if": "needs another number of processes: test_several_processes.py",
    "--logger {} does not start": "needs a tracker that fails: test_replaced_runs.py",
    "uploading requires a token": "test_commands.py, test_each_way_to_a_token_is_one",
    "is a flag of `accelerate launch`": "test_commands.py, test_a_flag_of_the_launcher_without_dashes_is_answered_...",
    "the embedded digits are not installed": "test_the_digits_are_not_needed_where_data_is_named, below",
    "--label_column {}: the labels of {} are in 'label'": "reading the digits takes seconds",
    "--resolution {}: {}": "a ValueError of text_unet_config, which has rows of its own for each size",
    "the validation split declares other classes": "of streams from the Hub alone",
    "the caption of {} of {} is {}": "of columns without a declared type: a stream, as of the Hub",
    "the UNet has no class embeddings, so the model is for": "of the Python API, whose way is tried below",
    "guidance_scale={} needs a model that also learned no class": "of the Python API; the command's own has a row",
    "--push_to_hub: {} cannot be written to": "needs a Hub: test_publishing.py",
    "--hub_best_metric {}: neither more nor less of it is better": "advises nothing: test_in_training.py",
    "--hub_strategy best requires held-out images": "--validation_steps without held-out images is refused before",
    "the Space {} exists": "needs a Hub: test_spaces.py",
    "check the name, your network, and --token": "needs a Hub: test_spaces.py",
    "process {} trains there": "needs another process: test_replaced_runs.py",
    "an Accelerator of this process computes in": "test_launcher.py, test_an_accelerator_of_the_callers_stays_...",
    "not with FSDP": "needs several processes",
    "--resume_from_checkpoint: the seed in the checkpoint's manifest is not": "a damaged file, which has no way out",
    "is of another run than that in --output_dir": "test_lost_parts.py",
    ", or go on from {} with --resume_from_checkpoint latest": "part of that message: test_lost_parts.py",
    "--resume_from_checkpoint latest: the checkpoints of the run in {} are gone": "test_lost_parts.py",
    "is another autoencoder than that of {}": "test_lost_parts.py, which resumes it in a new folder",
    "the warm-up of --lr_warmup_steps {} takes all": "says what happens, and advises nothing",
    "--use_8bit_adam requires bitsandbytes": "needs a GPU",
    "--optimizer must be one of": "needs a library: test_bad_input.py, test_optimizers.py",
    "--use_8bit_adam is AdamW's": "needs a library: test_optimizers.py",
    "--optimizer schedulefree averages": "needs a library: test_optimizers.py",
    "--optimizer schedulefree requires --adam_beta1": "needs a library: test_optimizers.py",
    "--optimizer {} requires pytorch_optimizer": "needs a library to be missing: test_optimizers.py",
    "requires all weights on each rank": "needs several processes: test_optimizers.py",
    "--ema_snapshot_steps: `ddpm-hf ema` averages pipelines": "of a classifier: test_classifier.py",
    "would be lost; resume with --ema_snapshot_steps": "of checkpoints without settings: test_post_hoc.py",
    "has no power averages; resume without": "of checkpoints without settings: test_post_hoc.py",
    "--acceleration: with {}, gradients differ by {}": "needs kernels that are wrong: test_gradient_gate.py",
    "the checkpoint's timestep sampler remembers": "of checkpoints without settings; the flag is refused before",
    "has no EMA; resume without --use_ema": "of checkpoints without settings; the flag itself is refused before",
    "has an EMA, which would be lost": "of checkpoints without settings; the flag itself is refused before",
    "are not for the way back to a .pt file": "test_convert.py",
    "has the layout of the Hub's first models": "test_hub_layouts.py",
    "`ddpm-hf convert MODEL --to FOLDER`": "test_hub_layouts.py",
    "--{} {}: a file; name a folder": "of files in the way: test_convert.py",
    "--{} {}: holds a": "of runs and other files in the way: test_convert.py, test_image_to_image.py",
    "--to {}: ": "of folders and files in the way: test_convert.py",
    "{} --image IMAGE": "part of what convert ends with, and advises nothing",
    "--cascade is of two or three models": "test_image_to_image.py",
    "{} models ({}): give one, or --cascade": "test_image_to_image.py",
    "--save-model {} is for --cascade": "test_image_to_image.py",
    "--classifier guides a single model, not a cascade": "test_image_to_image.py",
    "is for models that read an image, and this one does not": "test_image_to_image.py",
    "needs a model by class that also learned no class": "of the Python API; the command's own is tried",
    "needs a cascade by class that also learned no class": "of the Python API: test_cascade.py",
    "{} reads an image, which the app has no field for": "of push-space: test_image_to_image.py",
    "--labels {}: ": "of a malformed file: test_convert.py",
    "--classifier is kept with a model by class": "test_convert.py",
    "guides by it": "says what was done, and advises nothing",
    "its text encoder {} trained": "of checkpoints without settings; the flag itself is refused before",
    "give the file with --features_weights FILE": "part of a message that needs no network: test_inception.py",
    "a TorchScript file is a program": "of the Python API: test_features.py, test_a_script_is_not_loaded_...",
}


# That no message is forgotten


def text_of(node: ast.AST) -> str:
    """A string expression's text, {} for each value in it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "{}"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body)} {text_of(node.orelse)}"
    return "{}"


HELP = {"HfArg", "Option", "Argument", "option", "synonyms"}  # calls whose strings are help texts


def messages() -> dict[str, str]:
    """The texts that name a flag, raised or put together elsewhere, with where they are; docstrings and help aside."""
    found = {}
    for path in SOURCES:
        seen = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):  # outer nodes come first
            is_help = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in HELP
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if id(node) in seen:
                continue
            if is_help or is_docstring:
                seen |= set(map(id, ast.walk(node)))
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                found[" ".join(map(text_of, node.exc.args))] = f"{path.relative_to(ROOT)}:{node.lineno}"
                seen |= set(map(id, ast.walk(node)))
            elif isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)):
                text = text_of(node)
                seen |= set(map(id, ast.walk(node)))
                if " " in text.strip():
                    found[text] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return {text: where for text, where in found.items() if re.search(r"(?<!\w)--[\w{]", text)}


def test_every_message_that_names_a_flag_has_a_row():
    # Breaks if somebody adds an error whose advice nobody has tried.
    texts = messages()
    assert len(texts) > 100  # the sources are read
    known = [*(row.says for row in ROWS), *EXCEPTIONS, *NO_ADVICE]
    texts = {text: where for text, where in texts.items() if not where.startswith(APART)}
    missing = [f"{where}: {text}" for text, where in texts.items() if not any(one in text for one in known)]
    assert not missing, "\n".join(missing)


def test_no_row_or_exception_outlives_its_message():
    texts = messages()
    known = [*(row.says for row in ROWS), *EXCEPTIONS, *NO_ADVICE]
    stale = [one for one in known if not any(one in text for text in texts)]
    assert not stale


def test_every_flag_that_a_message_names_is_one():
    # Breaks if a flag is renamed, and a message goes on advising the old one.
    kinds = [kind for program in PROGRAMS for kind in program.flags]
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)} | {"config", "help", "flag"}
    command = typer.main.get_command(cli.app)
    for one in command.commands.values():
        names = [name for each in one.params for name in [*each.opts, *each.secondary_opts]]
        known |= {name.strip("-").replace("-", "_") for name in names}
    known |= {"num_processes", "multi_gpu", "downcast_bf16"}  # of `accelerate launch`
    for text, where in messages().items():
        assert set(flags_in(text)) <= known, f"{where}: {text}"
