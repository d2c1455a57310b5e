"""Generated wrong calls: of the scheduler and the pipelines from Python, and of `ddpm-hf sample` with any option.

A call either does what it says, without NaN, or raises a ValueError or TypeError that says what was wrong; the command
says it in one line with exit code 2.
"""

import inspect
import itertools
import math
import sys
from unittest import mock

import diffusers
import huggingface_hub.constants
import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, cli
from ddpm_hf.inference import kinds as drawing
from ddpm_hf.portable.schedules_ddpm_hf import BETA_SCHEDULES
from ddpm_hf.portable.scheduling_ddpm_hf import PREDICTION_TYPES, VARIANCE_TYPES
from tests.support.fixtures_generated import HOSTILE, TIMES, Tally, ended, generated, report
from tests.support.fixtures_pipeline import generators, randn, tiny_unet
from tests.support.fixtures_text import tiny_text_pipeline

T = 20
SAID = (ValueError, TypeError, NotImplementedError)  # with words for whoever called


@pytest.fixture(scope="module")
def tally(request):
    """How the calls of this file ended."""
    counted = Tally()
    yield counted
    report(request, counted, "calls and commands")


def outcome(tally, call, *arguments, **options):
    """What a call returns, or None where it was refused in words."""
    try:
        returned = call(*arguments, **options)
    except SAID as error:
        tally["refused in words"] += 1
        return None if str(error).strip() else pytest.fail("an error without a word")
    tally["answered"] += 1
    return returned


# The scheduler

NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 0.5, -0.5, 1e-4, 0.02, 0.999, 1.5, math.nan, math.inf, -math.inf, 1e300, 10**20]
)
STRANGE = st.sampled_from([None, "", "many", [], {}, (), b"x", True])
CONSTRUCTOR = {
    "num_train_timesteps": st.sampled_from([0, 1, 2, 3, T, -5, 2.5, "20", None, math.nan, [5], True]),
    "beta_start": NUMBERS | STRANGE,
    "beta_end": NUMBERS | STRANGE,
    "beta_schedule": st.sampled_from([*BETA_SCHEDULES, "nonesuch", None, 5, ["linear"]]),
    "trained_betas": st.lists(NUMBERS, max_size=4) | STRANGE | st.just([0.1] * T),
    "variance_type": st.sampled_from([*VARIANCE_TYPES, "nonesuch", None]),
    "prediction_type": st.sampled_from([*PREDICTION_TYPES, "nonesuch", None, 5, []]),
    "clip_sample_range": NUMBERS,
    "thresholding": st.booleans(),
    "dynamic_thresholding_ratio": NUMBERS,
    "sample_max_value": NUMBERS,
    "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing", "nonesuch", None]),
    "steps_offset": st.sampled_from([0, 1, -1, 50, 0.5, None]),
    "rescale_betas_zero_snr": st.booleans(),
}


def some_of(table: dict, most: int) -> st.SearchStrategy[dict]:
    """Up to `most` of a table's arguments, with values."""
    chosen = st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=most, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: table[name] for name in names}))


def makes_sense(scheduler) -> bool:
    """Whether the tables are a diffusion's; stock makes others too, which ours does as well, and says so."""
    betas = scheduler.betas
    return 0 < betas.numel() == scheduler.config.num_train_timesteps and bool(((betas > 0) & (betas <= 1)).all())


@generated(250)
@given(options=some_of(CONSTRUCTOR, 3))
def test_a_scheduler_is_made_or_refused_in_words(options, tally):
    """Else a wrong argument is an error deep in numpy, or a table of NaN that no one notices."""
    with np.errstate(all="ignore"):
        scheduler = outcome(tally, DDPMScheduler, **{"num_train_timesteps": T, **options})
    if scheduler is not None and makes_sense(scheduler):
        assert scheduler.exact_tables.betas.isfinite().all()
        assert scheduler.exact_tables.alphas_cumprod.isfinite().all()


@pytest.mark.filterwarnings("ignore")
@generated(150)
@given(options=some_of({name: CONSTRUCTOR[name] for name in sorted(CONSTRUCTOR)}, 2))
def test_what_stock_makes_ours_makes(options, tally):
    """Else who swaps the import finds that a config of theirs no longer loads."""
    try:
        with np.errstate(all="ignore"):
            stock = diffusers.DDPMScheduler(**{"num_train_timesteps": T, **options})
    except Exception:  # of whatever kind: what stock refuses, ours may
        return
    if not makes_sense(stock) or stock.config.prediction_type not in PREDICTION_TYPES:
        return
    ours = outcome(tally, DDPMScheduler, **{"num_train_timesteps": T, **options})
    assert ours is not None
    torch.testing.assert_close(ours.exact_tables.betas, stock.betas.double(), rtol=1e-3, atol=1e-7)


CHAIN = {
    "num_inference_steps": st.sampled_from([0, -1, 1, 2, T, T + 1, 1.5, 2.0, "5", math.nan, None, [5], True, 10**20]),
    "timesteps": st.lists(st.integers(-3, T + 3) | st.sampled_from([1.5, math.nan, "5", None]), max_size=4)
    | st.sampled_from([None, 5, "abc", {}, torch.tensor([5, 3]), np.array([5, 3]), np.array([[5, 3]])]),
    "device": st.sampled_from([None, "cpu", "nowhere", torch.device("cpu")]),
}


@generated(200)
@given(options=some_of(CHAIN, 2), spacing=st.sampled_from(["leading", "linspace", "trailing"]))
def test_a_chain_is_set_or_refused_in_words(options, spacing, tally):
    """Else a wrong number of steps is an IndexError while sampling, or silently another number of them."""
    scheduler = DDPMScheduler(T, timestep_spacing=spacing)
    before = scheduler.timesteps.tolist()
    try:
        outcome(tally, scheduler.set_timesteps, **options)
    except RuntimeError:  # torch's word for a device that is none
        if options.get("device") != "nowhere":
            raise
    visited = scheduler.timesteps.tolist()
    assert visited
    assert all(isinstance(t, int) and 0 <= t < T for t in visited)
    assert all(high > low for high, low in itertools.pairwise(visited))
    x = torch.zeros(1, 1, 2, 2)
    for t in visited:
        assert scheduler.step(x, t, x).prev_sample.isfinite().all()
    assert options.get("num_inference_steps") is not None or "timesteps" in options or visited == before


TENSORS = {
    "fits": randn(2, 3, 4, 4),
    "one": randn(1, 3, 4, 4),
    "flat": randn(2, 3),
    "of other channels": randn(2, 6, 4, 4),
    "of another size": randn(2, 3, 5, 5),
    "of another batch": randn(3, 3, 4, 4),
    "empty": torch.zeros(0, 3, 4, 4),
    "a number": torch.tensor(1.0),
    "half": randn(2, 3, 4, 4).half(),
    "double": randn(2, 3, 4, 4).double(),
}
TIMESTEPS = [0, 5, T - 1, T, -1, 10**12, 2.5, math.nan, "5", None, torch.tensor(3), torch.tensor([3, 4]),
             torch.tensor([3.5, 4.0]), torch.tensor([3, 4, 5]), torch.tensor([-5, 2]), torch.tensor([]), [3, 4],
             torch.tensor([True, False])]  # fmt: skip
FORMULAS = ("add_noise", "get_velocity", "q_posterior_mean_variance", "predict_original_sample", "predict_epsilon",
            "p_mean_variance", "training_target", "step")  # fmt: skip


@generated(350)
@given(
    name=st.sampled_from(FORMULAS),
    first=st.sampled_from(sorted(TENSORS)),
    second=st.sampled_from(sorted(TENSORS)),
    t=st.sampled_from(range(len(TIMESTEPS))),
    prediction=st.sampled_from(PREDICTION_TYPES),
)
def test_a_formula_answers_or_says_what_does_not_fit(name, first, second, t, prediction, tally):
    """Else timesteps outside the chain are read from the tables' other end, and the sample is quietly wrong."""
    scheduler, x, y, t = DDPMScheduler(T, prediction_type=prediction), TENSORS[first], TENSORS[second], TIMESTEPS[t]
    in_order = (
        (x, t, y) if name in ("predict_original_sample", "predict_epsilon", "p_mean_variance", "step") else (x, y, t)
    )
    try:
        answer = outcome(tally, getattr(scheduler, name), *in_order)
    except (RuntimeError, IndexError) as error:  # torch's words for shapes that do not broadcast
        tally["refused in words"] += 1
        if any(word in str(error) for word in ("size", "shape", "dimension", "broadcast")):
            return
        raise
    if answer is None:
        return
    inside = torch.as_tensor(-1 if t is None else int(t) if isinstance(t, str) else t)
    answers = answer.values() if isinstance(answer, dict) else [answer] if isinstance(answer, torch.Tensor) else answer
    if name != "training_target":
        assert inside.numel() == 0 or (inside.min() >= 0 and inside.max() < T), (name, t)
    for part in answers:
        assert not part.isnan().any(), (name, t)


# Pipelines


@pytest.fixture(scope="module")
def pipelines():
    """One of each kind, tiny and untrained."""
    scheduler = DDPMScheduler(T)
    made = {
        "plain": DDPMPipeline(tiny_unet(), scheduler),
        "by class": ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=4), scheduler, dict(enumerate("abc"))),
        "by text": tiny_text_pipeline(),
    }
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


def labels_of(x, t):
    """A classifier of three classes."""
    return x.flatten(1)[:, :3]


# For each argument, words that it was not made for among some that it was
ARGUMENTS = {
    "batch_size": [0, -1, 1, 2, 1.5, "1", None, True, [1], math.nan],
    "generator": [None, 5, "x", [], generators(0), generators(0, 1, 2), [None, None], [1, 2]],
    "num_inference_steps": [0, -1, 1, 2, T, T + 1, 1.5, "5", math.nan, None, [2], 10**20, True],
    "output_type": ["pil", "np", "pt", "latent", "jpeg", None, 5, [], ""],
    "latents": [None, randn(1, 1, 8, 8), randn(2, 1, 8, 8), randn(1, 1, 9, 9), randn(8),
                torch.full((1, 1, 8, 8), math.nan), torch.ones(1, 1, 8, 8, dtype=torch.int64),
                randn(1, 1, 8, 8).double(), "x", 5, [[1.0]], np.zeros((1, 1, 8, 8))],
    "timesteps": [None, [], [5], [5, 5], [0, 5], [T], [-1], [5.5, 2], "abc", 5, [T - 1, 0], [None],
                  torch.tensor([5, 0])],
    "eta": [0, 0.0, 1, 0.5, -1, 2, math.nan, math.inf, "x", None],
    "num_frames": [0, 1, 2, -1, 1.5, "x", None, 10**6],
    "callback_on_step_end": [None, 5, "x"],
    "callback_on_step_end_tensor_inputs": [("latents",), ["x"], "latents", None, 5],
    "classifier": [None, 5, "x", labels_of],
    "classifier_scale": [0, 1.0, -1, math.nan, math.inf, 1e300, "x", None],
    "class_labels": [None, [0], [1], [-1], [3], [99], 1, "a", ["a"], ["nobody"], [None], [0.5], [True], [], {}, [[0]],
                     torch.tensor([1]), torch.tensor([1.5]), [0, 1, 2]],
    "guidance_scale": [0, 1, 3.0, -1, math.nan, math.inf, 1e300, "x", None, [2]],
    "guidance_rescale": [0, 0.5, 1, 2, -1, math.nan, "x", None],
    "guidance_interval": [None, (0, 5), (5, 0), (0,), "ab", 5, (math.nan, 1), (None, None), ("a", "b")],
    "prompt": [None, "", "a", ["a"], ["a", "b"], [], 5, [5], [None], b"a", {"a": 1}, "x" * 5000, "\x00\udcff"],
    "negative_prompt": [None, "", "a", ["a"], ["a", "b"], 5, [5], []],
    "height": [None, 16, 15, 0, -2, 1.5, "16", 2],
    "width": [None, 16, 15, 0, -2, 1.5, "16"],
    "num_images_per_prompt": [1, 2, 0, -1, 1.5, "x", None],
    "prompt_embeds": [None, torch.zeros(1, 16, 32), torch.zeros(1, 16, 31), torch.zeros(32), "x",
                      torch.full((1, 16, 32), math.nan)],
    "negative_prompt_embeds": [None, torch.zeros(1, 16, 32), torch.zeros(2, 16, 32), "x"],
}  # fmt: skip
STARTS = {
    "plain": {"num_inference_steps": 2},
    "by class": {"class_labels": [1], "num_inference_steps": 2},
    "by text": {"prompt": "a", "num_inference_steps": 2},
}


@st.composite
def wrong_calls(draw):
    """A kind of pipeline and arguments for its call, up to two of them from the table."""
    kind = draw(st.sampled_from(sorted(STARTS)))
    cls = {"plain": DDPMPipeline, "by class": ClassConditionalDDPMPipeline, "by text": type(tiny())}[kind]
    known = [name for name in inspect.signature(cls.__call__).parameters if name in ARGUMENTS]
    names = draw(st.lists(st.sampled_from(known), min_size=1, max_size=2, unique=True))
    return kind, {**STARTS[kind], **{name: draw(st.sampled_from(ARGUMENTS[name])) for name in names}}


def tiny(made=[]):  # noqa: B006  (made once)
    """A pipeline by text, for its signature."""
    made or made.append(tiny_text_pipeline())
    return made[0]


@pytest.mark.filterwarnings("ignore")
@generated(250)
@given(call=wrong_calls())
def test_a_pipeline_draws_or_says_what_is_wrong(call, pipelines, tally):
    """Else a wrong argument is an IndexError in torch, or black images of NaN."""
    kind, options = call
    if options.get("guidance_scale") == 1e300:
        options = {**options, "guidance_scale": -1e300}
    drawn = outcome(tally, pipelines[kind], **options)
    if drawn is None:
        return
    images = drawn.images
    if isinstance(images, list):
        images = np.stack([np.asarray(image) for image in images])
    assert np.isfinite(np.asarray(images, dtype=np.float64)).all()


def test_every_argument_of_a_pipeline_is_tried():
    """Else an argument is added, and nobody tries what it does with the wrong value."""
    for cls in (DDPMPipeline, ClassConditionalDDPMPipeline, type(tiny())):
        assert set(inspect.signature(cls.__call__).parameters) - set(ARGUMENTS) == {"self", "return_dict"}


# The command

SAMPLE = typer.main.get_command(cli.app).commands["sample"]
OPTIONS = {parameter.opts[-1]: parameter for parameter in SAMPLE.params if parameter.opts[-1].startswith("--")}


@pytest.fixture
def loaded(pipelines, monkeypatch, tmp_path_factory):
    """Models by their kind instead of folders; the command runs in an empty folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    real = drawing.load_pipeline

    def load(model, revision, token):
        if model not in pipelines:
            return real(model, revision, token)
        found = pipelines[model]
        return type(found)(
            **{**found.components, **({"id2label": found.config.id2label} if model == "by class" else {})}
        )

    monkeypatch.setattr(drawing, "load_pipeline", load)
    verbosity = diffusers.utils.logging.get_verbosity()
    folder = tmp_path_factory.mktemp("command")
    monkeypatch.chdir(folder)
    yield folder
    diffusers.utils.logging.set_verbosity(verbosity)


def commanded(loaded, tally, kind: str, *argv: str, names: tuple[str, ...]) -> None:
    """`ddpm-hf sample`: it draws pictures, or says one line that has one of the names and leaves nothing."""
    out = loaded / "out"
    given = ["ddpm-hf", "sample", "--steps=2", "--num-images=1", "--out", str(out)]
    given += ["--prompt=a"] if kind == "by text" else []
    with mock.patch.object(sys, "argv", [*given, *argv, kind]):
        end = ended(cli.main)
    if tally.check(end, *names):
        pictures = [*loaded.rglob("grid.png")]
        assert pictures
        assert np.ptp(np.asarray(Image.open(pictures[0]))[2:-2, 2:-2]) > 0
    else:
        assert not list(loaded.iterdir())
    for path in sorted(loaded.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


SLOW = {"--num-images": ("1_000", "１２", "64x")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_takes_a_word_or_names_itself(option, loaded, tally):
    """Else a slip in an option is a traceback, or a folder to clean up."""
    place = list(OPTIONS).index(option)
    for number, word in enumerate((*HOSTILE, "meta", "cuda:99", "ddim", "fp16")):
        outside = option == "--out" and word in ("../../x", "/etc/passwd", "/dev/null", "~", "$HOME", "--seed")
        if "\0" in word or outside or word in SLOW.get(option, ()) or (TIMES == 1 and (number + place) % 5):
            continue
        argv = (f"{option}={word}",)
        if OPTIONS[option].nargs == 2:
            argv = (option, word, "7")
        names = (option[2:], "got_unexpected_extra", "MODEL", "model")
        commanded(loaded, tally, "by class", *argv, names=names)


@pytest.mark.filterwarnings("ignore")
@generated(60)
@given(
    kind=st.sampled_from(["plain", "by class", "by text"]),
    first=st.sampled_from(sorted(OPTIONS)),
    second=st.sampled_from(sorted(OPTIONS)),
    words=st.tuples(
        *[st.sampled_from(["0", "1", "2", "0.5", "a", "ddim", "unipc", "bf16", "cpu", "3", "nobody"])] * 2
    ),
)
def test_any_two_options_draw_or_one_is_named(kind, first, second, words, loaded, tally):
    """Else options that exclude each other draw something else than they say."""
    argv, names = [], []
    for option, word in zip((first, second), words):
        if option in ("--out",):
            continue
        switch = getattr(OPTIONS[option], "is_flag", False)
        argv += [option] if switch else [option, word, "7"] if OPTIONS[option].nargs == 2 else [f"{option}={word}"]
        names.append(option[2:])
    commanded(loaded, tally, kind, *argv, names=(*names, "--prompt", "--class", "sampler", "timestep"))
