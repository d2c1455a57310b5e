"""Training by class: labels of every kind, dropped labels, balanced epochs, grids, exact resume, learned variances."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from safetensors.torch import load_file

import train_unconditional
from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline
from ddpm_hf.common.pictures import image_grid
from ddpm_hf.common.randomness import StepKeys, keyed_seed
from ddpm_hf.data.batches import make_batches, open_images
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.data.images import to_model_range
from ddpm_hf.data.orders import keyed_balanced_order
from ddpm_hf.models.diffusion import make_scheduler
from ddpm_hf.objectives.flags import ObjectiveFlags, ScheduleFlags
from ddpm_hf.training.plan import StepPlan
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.pictures import encoded, image_rows, quiet, random_pixels, write_images, write_unet
from tests.support.runs import (
    GRAY,
    assert_same_run,
    attempt,
    command,
    parse,
    records,
    run_script,
    train,
    training_run,
    words,
)


def level(row: int) -> int:
    """The gray that row `row`'s image is filled with."""
    return 10 + 20 * row


def gray_squares(count: int) -> np.ndarray:
    """Images that show which row they are: uint8 [count, 8, 8]."""
    return np.stack([np.full((8, 8), level(row), dtype=np.uint8) for row in range(count)])


def write_labelled(folder: Path, pixels: np.ndarray, values: list, names: list[str] | None = None) -> Path:
    """A `save_to_disk` folder with a column `label` of values as they are, or as a ClassLabel of these names."""
    rows = image_rows([encoded(one) for one in pixels], label=values)
    with quiet():
        if names is not None:
            rows = rows.cast_column("label", datasets.ClassLabel(names=names))
        rows.save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Datasets and models to train with, by name."""
    root = tmp_path_factory.mktemp("world")
    gray = {"in_channels": 1, "out_channels": 1}
    write_unet(root / "unet", **gray)
    write_unet(root / "unet-dropout", **gray, dropout=0.2)
    noise = random_pixels(100, 8, 8)
    write_labelled(root / "three", noise[:22], [row % 3 for row in range(22)], ["dog", "ant", "cat"])
    write_labelled(root / "uneven", noise, [0] * 90 + [1] * 9 + [2], ["many", "few", "one"])
    write_labelled(root / "all-different", noise[:8], list("hgfedcba"))
    return root


USUAL = {
    **GRAY, "train_data_dir": "{shop}/three", "label_column": "label", "eval_batch_size": 3, "max_train_steps": 3,
    "lr_warmup_steps": 0,
}  # fmt: skip


def load(folder, pipeline_class=ClassConditionalDDPMPipeline):
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels_of(picture):
    return np.asarray(picture).astype(int)


@pytest.fixture
def batches(monkeypatch):
    """The batches of whatever is trained in the test, in order."""
    seen, compute_loss = [], train_unconditional.compute_loss

    def watched(model, batch, keys, **kwargs):
        seen.extend([batch] if not keys.validation else [])
        return compute_loss(model, batch, keys, **kwargs)

    monkeypatch.setattr(train_unconditional, "compute_loss", watched)
    return seen


@pytest.fixture
def class_ids(monkeypatch):
    """The class ids that the UNet is called with in the test, in order: training's and, in eval mode, the others'."""
    seen, forward = SimpleNamespace(training=[], looking=[]), UNet2DModel.forward

    def watched(self, sample, timestep, class_labels=None, **options):
        (seen.training if self.training else seen.looking).extend(class_labels.tolist())
        return forward(self, sample, timestep, class_labels, **options)

    monkeypatch.setattr(UNet2DModel, "forward", watched)
    return seen


# Labels

ROWS = 9
CYCLE = [row % 3 for row in range(ROWS)]

# kind of labels -> what the column holds, the names of a ClassLabel, the class names of the rows, those by id
LABELS = {
    "class-names": (CYCLE, ["dog", "ant", "cat"], ["dog", "ant", "cat"] * 3, ["dog", "ant", "cat"]),
    "class-never-seen": ([2 * (one > 0) for one in CYCLE], list("abc"), list("acc") * 3, list("abc")),
    "integers": (CYCLE[::-1], None, ["2", "1", "0"] * 3, ["0", "1", "2"]),
    "integers-with-gaps": ([5, 2, 2] * 3, None, ["5", "2", "2"] * 3, ["2", "5"]),
    "large-integers": ([30, 10, 20] * 3, None, ["30", "10", "20"] * 3, ["10", "20", "30"]),
    "whole-floats": ([2.0, 0.0, 10.0] * 3, None, ["2", "0", "10"] * 3, ["0", "2", "10"]),
    "booleans": ([True, False, True] * 3, None, ["True", "False", "True"] * 3, ["False", "True"]),
    "strings": (["dog", "ant", "Äpfel"] * 3, None, ["dog", "ant", "Äpfel"] * 3, ["ant", "dog", "Äpfel"]),
    "numbers-as-strings": (["10", "9", "10"] * 3, None, ["10", "9", "10"] * 3, ["10", "9"]),
    "one-class": (["only"] * ROWS, None, ["only"] * ROWS, ["only"]),
    "class-folders": (None, None, ["dog", "ant", "cat"] * 3, ["ant", "cat", "dog"]),
    "stream": (CYCLE, ["dog", "ant", "cat"], ["dog", "ant", "cat"] * 3, ["dog", "ant", "cat"]),
}
KINDS = [pytest.param(kind, 0.1, "label_column", id=kind) for kind in LABELS]
KINDS.append(pytest.param("strings", 0, "dataset_class_label_column_name", id="without dropout"))


@pytest.mark.every(4)
@pytest.mark.parametrize(("kind", "dropout", "spelling"), KINDS)
def test_the_saved_names_are_those_of_the_labels(kind, dropout, spelling, world, batches, tmp_path):
    """Else whoever asks the saved model for a dog gets what was labelled a cat."""
    values, class_names, spoken, names = LABELS[kind]
    folder = tmp_path / "data"
    if values is None:
        for row, pixels in enumerate(gray_squares(ROWS)):
            write_images(folder / spoken[row], pixels[None], f"{row}.png")
    else:
        write_labelled(folder, gray_squares(ROWS), values, class_names)
    flags = {"label_column": None, spelling: "label", "class_dropout": dropout, "streaming": kind == "stream"}
    flags |= {"train_data_dir": folder, "cache_dir": tmp_path / "cache"}
    out = train(world, tmp_path / "run", USUAL, **flags).folder

    pipeline = load(out)
    assert pipeline.config.id2label == {str(number): name for number, name in enumerate(names)}
    assert json.loads((out / "model_index.json").read_text())["id2label"] == pipeline.config.id2label
    assert pipeline.unet.config.num_class_embeds == len(names) + (dropout > 0)
    assert pipeline.null_class == (len(names) if dropout else None)
    shown = [(batch["images"][:, 0, 0, 0].tolist(), batch["labels"].tolist()) for batch in batches]
    pairs = [pair for grays, labels in shown for pair in zip(grays, labels)]
    assert {gray for gray, _ in pairs} == {level(row) for row in range(ROWS)}
    for gray, label in pairs:
        assert pipeline.config.id2label[str(label)] == spoken[(gray - level(0)) // 20]

    def draw(what):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(len(names))]
        return pipeline(what, generator=seeds, num_inference_steps=2, output_type="np").images

    assert np.array_equal(draw(names), draw(list(range(len(names)))))


BAD_LABELS = {
    "unlabelled": ([0, -1, 1, 0], ["a", "b"], {}, ("label -1", "row 1", "'label'", "2 classes", "there is none")),
    "missing": ([0, None, 1, 0], ["a", "b"], {}, ("label None", "row 1", "'label'", "2 classes", "there is none")),
    "missing-integer": ([0, None, 1, 0], None, {}, ("row 1", "'label'", "None", "remove such rows")),
    "missing-string": (["a", None, "b", "a"], None, {}, ("row 1", "'label'", "None", "remove such rows")),
    "blank-string": (["a", "b", " ", "a"], None, {}, ("row 2", "'label'", "' '", "remove such rows")),
    "all-missing": ([None] * 4, None, {}, ("row 0", "'label'", "None")),
    "negative": ([0, -1, 1, 0], None, {}, ("label -1", "row 1", "'label'", "from 0", "as strings")),
    "not-a-number": ([0.0, float("nan"), 1.0, 0.0], None, {}, ("row 1", "'label'", "nan", "remove such rows")),
    "fractions": ([0.0, 0.5, 1.0, 0.0], None, {}, ("label 0.5", "row 1", "'label'", "integers from 0, strings")),
    "several-labels": ([[0], [0, 1], [1], [0]], None, {}, ("'label'", "list")),
    "the-images": ([0, 1, 0, 1], None, {"label_column": "image"}, ("'image'", "dict")),
    "uncounted-stream": ([0, 1, 0, 1], None, {"streaming": True}, ("'label'", "class names", "stream")),
    "unlabelled-in-a-stream": ([0, -1, 1, 0], ["a", "b"], {"streaming": True}, ("label -1", "'label'", "2 classes")),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_bad_label_is_named_in_one_line(case, world, tmp_path):
    """Else a missing label trains as some class, or ends in a traceback from inside torch."""
    values, names, flags, fragments = BAD_LABELS[case]
    data = write_labelled(tmp_path / "data", gray_squares(4), values, names)
    out = tmp_path / "run"
    run = attempt(world, out, USUAL, train_data_dir=data, **flags)
    assert run.code == 2
    assert "Traceback" not in run.out + run.err
    for fragment in fragments:
        assert fragment in run.error()
    assert not (out / "model_index.json").exists()


@pytest.mark.parametrize("balanced", [False, True])
def test_a_class_that_is_only_held_out_keeps_its_name_and_place(balanced, world, batches, tmp_path):
    """Else the ids of the classes shift with the split, or the validation meets an id that has no embedding."""
    flags = {"validation_split": 0.25, "validation_steps": 3, "class_balanced": balanced}
    folder = train(world, tmp_path / "run", USUAL, train_data_dir="{shop}/all-different", **flags).folder
    trained = {label for batch in batches for label in batch["labels"].tolist()}
    assert len(trained) == 6
    assert load(folder).config.id2label == {str(number): name for number, name in enumerate("abcdefgh")}
    assert np.isfinite(records(folder)[-1]["validation_loss"])


# Dropped labels


class Listener(torch.nn.Module):
    """A network that remembers what it was asked, and answers 0."""

    def __init__(self):
        super().__init__()
        self.timesteps, self.classes = [], []

    def forward(self, x, timesteps, class_labels=None):
        self.timesteps += timesteps.tolist()
        self.classes += class_labels.tolist()
        return UNet2DOutput(sample=torch.zeros_like(x))


def loss_of(model, labels, keys, images=None, **flags):
    """`compute_loss` on a batch of labels (None for an unconditional one), with three classes."""
    config = parse(words({"seed": keys.seed, "ddpm_num_steps": 1000, **flags}))
    if images is None:
        images = torch.zeros(keys.count, 1, 1, 1, dtype=torch.uint8)
    return train_unconditional.compute_loss(
        model,
        {"images": images} if labels is None else {"images": images, "labels": torch.as_tensor(labels)},
        keys,
        run=training_run(SimpleNamespace(device=torch.device("cpu"))),
        class_dropout=config.class_dropout,
        loss_options=config[ObjectiveFlags].loss_options(),
        scheduler=make_scheduler(config[ScheduleFlags], config[ObjectiveFlags]),
        sampler=train_unconditional.UniformTimestepSampler(config.ddpm_num_steps),
        null_class=3,
    )


def dropped_in(steps, count, share):
    """Whether each of `count` samples lost its label, and its timestep: bool [steps, count], int [steps, count]."""
    listener = Listener()
    for step in range(steps):
        loss_of(listener, [1] * count, StepKeys(7, step, 0, count), class_dropout=share)
    classes = np.array(listener.classes).reshape(steps, count)
    assert set(classes.flatten()) <= {1, 3}
    return classes == 3, np.array(listener.timesteps).reshape(steps, count)


@pytest.mark.every(3)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_labels_are_dropped_as_often_as_asked_and_at_all_noise_levels(share):
    """Else guidance lacks its unconditional half, wholly or at some noise levels or places of the batch."""
    dropped, timesteps = dropped_in(40, 64, share)
    spread = np.sqrt(share * (1 - share))
    assert abs(dropped.mean() - share) < 4 * spread / np.sqrt(dropped.size)
    assert np.abs(dropped.mean(0) - share).max() < 5 * spread / np.sqrt(len(dropped))  # 64 places
    assert np.abs(dropped.mean(1) - share).max() < 5 * spread / np.sqrt(dropped.shape[1])  # 40 steps
    for ours, theirs in ((dropped, timesteps), (dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1])):
        assert abs(np.corrcoef(ours.flatten(), theirs.flatten())[0, 1]) < 4 / np.sqrt(ours.size)


def test_no_label_is_dropped_where_none_should_be():
    """Else a model without a null class is asked for one, an index out of range."""
    dropped, _ = dropped_in(40, 64, 0)
    assert not dropped.any()


def test_what_is_dropped_depends_on_seed_step_and_place_alone():
    """Else two ranks of B drop other labels than one of 2B, or the labels themselves decide."""

    def classes(seed, step, first, count, labels):
        listener = Listener()
        loss_of(listener, labels[first : first + count], StepKeys(seed, step, first, count), class_dropout=0.5)
        return listener.classes

    labels, others = [0, 1, 2, 0, 1, 2, 0, 1] * 4, [2] * 32
    for step in range(5):
        at_once = classes(7, step, 0, 32, labels)
        assert classes(7, step, 0, 16, labels) + classes(7, step, 16, 16, labels) == at_once
        keys = StepKeys(7, step, 0, 32).uniform("class_dropout")
        assert at_once == [3 if one < 0.5 else label for one, label in zip(keys.tolist(), labels)]
        assert [one == 3 for one in classes(7, step, 0, 32, others)] == [one == 3 for one in at_once]
        assert at_once != classes(8, step, 0, 32, labels)
        assert at_once != classes(7, step + 1, 0, 32, labels)


def test_accumulated_batches_drop_as_one_large_batch(world, class_ids, tmp_path):
    """Else the micro-batches of a step all lose the label at the same places."""
    train(world, tmp_path / "parts", USUAL, gradient_accumulation_steps=2, class_dropout=0.5)
    parts = class_ids.training[4:]  # the first batch is the rehearsal's
    class_ids.training.clear()
    train(world, tmp_path / "at_once", USUAL, train_batch_size=8, class_dropout=0.5)
    assert class_ids.training[8:] == parts
    assert set(parts) == {0, 1, 2, 3}


def test_only_training_drops_labels(world, batches, class_ids, tmp_path):
    """Else grids and held-out losses show the unconditional model, or training never does."""
    flags = {"class_dropout": 0.7, "validation_split": 0.2, "validation_steps": 1, "eval_batch_size": 9}
    train(world, tmp_path / "run", USUAL, max_train_steps=4, **flags)
    rehearsed, *batches = batches
    labels = [label for batch in batches for label in batch["labels"].tolist()]
    dropped = [
        one < 0.7
        for step, batch in enumerate(batches)
        for one in StepKeys(3, step, 0, len(batch["labels"])).uniform("class_dropout").tolist()
    ]
    assert class_ids.training[len(rehearsed["labels"]) :] == [
        3 if out else label for out, label in zip(dropped, labels)
    ]
    assert any(dropped)
    assert len(class_ids.looking) == 4 * 4 + 2 * 9  # 4 held out, each step; 9 drawn in 2 steps
    assert set(class_ids.looking) == {0, 1, 2}


def test_the_loss_of_one_class_is_that_of_the_network_told_so():
    """Else labels reach the network by another way than samplers use, or other classes learn from them too."""
    by_class = tiny_unet(num_class_embeds=4).train()
    images = torch.from_numpy(random_pixels(6, 8, 8)[:, None, :, :, 0])  # [6, 1, 8, 8]
    keys = StepKeys(7, 2, 0, 6)
    told = loss_of(by_class, [2] * 6, keys, images, class_dropout=0).losses
    told.mean().backward()

    # by hand
    config = parse(words({"ddpm_num_steps": 1000}))
    scheduler = make_scheduler(config[ScheduleFlags], config[ObjectiveFlags])
    x_start = to_model_range(images)
    timesteps, noise = (keys.uniform("timestep") * 1000).long(), keys.normal_like(x_start)
    x_t = scheduler.add_noise(x_start, noise, timesteps)
    output = by_class(x_t, timesteps, class_labels=torch.full((6,), 2)).sample
    expected = F.mse_loss(output, noise, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(told, expected, rtol=1e-6, atol=0)

    # an unconditional network whose time embedding ends in the class's
    plain = tiny_unet().train()
    state, bias = by_class.state_dict(), "time_embedding.linear_2.bias"
    embedding = state.pop("class_embedding.weight")
    plain.load_state_dict(state | {bias: state[bias] + embedding[2]})
    untold = loss_of(plain, None, keys, images).losses
    untold.mean().backward()
    torch.testing.assert_close(told, untold, rtol=1e-5, atol=1e-6)
    ours = dict(by_class.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    gradient = ours["class_embedding.weight"].grad
    torch.testing.assert_close(gradient[2], plain.time_embedding.linear_2.bias.grad, rtol=1e-4, atol=1e-6)
    assert not gradient[[0, 1, 3]].any()


def test_a_dropped_label_is_the_null_class():
    """Else the label leaks into what is to be the unconditional model."""
    unet = tiny_unet(num_class_embeds=4)
    keys = StepKeys(7, 2, 0, 6)
    images = torch.from_numpy(random_pixels(6, 8, 8)[:, None, :, :, 0])  # [6, 1, 8, 8]
    dropped = loss_of(unet, [0, 1, 2, 0, 1, 2], keys, images, class_dropout=1 - 1e-12).losses
    assert torch.equal(dropped, loss_of(unet, [3] * 6, keys, images, class_dropout=0).losses)


# Balanced epochs


def balanced_batches(world, batch, world_size=1, rank=0, step=0):
    """A rank's batches of the uneven data, from a step on."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        process_index=rank,
        is_main_process=rank == 0,
        local_main_process_first=contextlib.nullcontext,
    )
    config = parse(command(world, "unused", USUAL, train_data_dir="{shop}/uneven", train_batch_size=batch))
    run = training_run(accelerator, config.seed, train_batch_size=batch)
    with quiet():
        images = open_images(run, config[DataFlags], 1)
    plan = StepPlan(images.count, batch, world_size, 1)
    return make_batches(run, images, plan, step, class_balanced=True)


def take(batches, count):
    """(index, label, pixels) of each sample of the next batches, by batch."""
    taken = []
    for batch in itertools.islice(batches, count):
        pixels = [one.numpy().tobytes() for one in batch["images"]]
        taken.append(list(zip(batch["index"].tolist(), batch["labels"].tolist(), pixels)))
    return taken


def test_an_epoch_shows_rare_classes_as_often_as_frequent_ones(world):
    """Else the one image of a class is seen once an epoch, and the frequent class is all that is learnt."""
    batches = balanced_batches(world, 8)
    epochs = [[sample for batch in take(batches, 13) for sample in batch] for _ in range(3)]
    frequent = []
    for epoch in epochs:
        assert len(epoch) == 100
        shown = [[index for index, label, _ in epoch if label == one] for one in range(3)]
        assert sorted(map(len, shown)) == [33, 33, 34]
        assert len(set(shown[0])) == len(shown[0])  # 33 or 34 of the 90, none twice
        assert set(shown[1]) == set(range(90, 99))
        assert set(shown[2]) == {99}
        frequent.append(set(shown[0]))
    assert frequent[0] != frequent[1] != frequent[2]


def test_the_sample_that_is_left_over_goes_to_every_class_in_turn():
    """Else one class is drawn more often than the others after all, epoch after epoch."""
    labels = np.array([0] * 90 + [1] * 9 + [2])
    extra = [np.bincount(labels[keyed_balanced_order(3, epoch, labels)]).argmax() for epoch in range(300)]
    counts = np.bincount(extra, minlength=3)
    assert np.abs(counts - 100).max() < 4 * np.sqrt(300 * 1 / 3 * 2 / 3)


def test_ranks_share_out_one_balanced_order(world):
    """Else two ranks balance each its own half, show samples twice, or train as no single process does."""
    first, second = (take(balanced_batches(world, 4, 2, rank), 26) for rank in (0, 1))
    at_once = take(balanced_batches(world, 8), 26)
    for step, batch in enumerate(at_once):
        partial = step % 13 == 12  # 4 samples are left, all the first rank's
        assert batch == first[step] + ([] if partial else second[step])


@pytest.mark.parametrize("step", [7, 12, 13, 20])
def test_balanced_batches_go_on_where_they_stopped(step, world):
    """Else a resumed run repeats or leaves out part of a balanced epoch."""
    assert take(balanced_batches(world, 8, step=step), 10) == take(balanced_batches(world, 8), step + 10)[step:]


# Grids


@pytest.mark.parametrize(("count", "rows", "columns"), [(3, 3, 1), (7, 3, 2), (9, 3, 3), (2, 2, 1), (1, 1, 1)])
def test_a_grid_has_a_row_for_each_class(count, rows, columns, world, monkeypatch, tmp_path):
    """Else the picture shows a class in another one's row, and progress is judged by the wrong images."""

    def paint(self, sample, timestep, class_labels):  # a network that knows x_0: a gray for each class
        gray = (class_labels.float() / 3 - 0.5).view(-1, 1, 1, 1)
        trainable = sum(parameter.sum() for parameter in self.parameters())
        return UNet2DOutput(sample=gray.expand_as(sample) + 0 * trainable)

    monkeypatch.setattr(UNet2DModel, "forward", paint)
    flags = {"prediction_type": "sample", "eval_batch_size": count, "save_images_epochs": 1}
    folder = train(world, tmp_path / "run", USUAL, max_train_steps=8, **flags).folder
    grids = sorted((folder / "samples").glob("step-*"))
    assert [grid.name for grid in grids] == ["step-000006.png", "step-000008.png"]
    for grid in grids:
        width = 2 + 66 * columns
        legend, picture = np.split(pixels_of(Image.open(grid)), [-width], axis=1)
        assert [legend[2 + 66 * row : 66 + 66 * row].min() < 100 for row in range(rows)] == [
            True
        ] * rows  # black on white
        assert picture.shape == (2 + 66 * rows, width)  # 8 pixels enlarged 8 times, and gaps of 2
        for row, column in itertools.product(range(rows), range(columns)):
            cell = picture[2 + 66 * row :, 2 + 66 * column :][:64, :64]
            assert np.abs(cell - (row / 3 + 0.5) / 2 * 255).max() <= 1


# Resuming

RESUMED = {
    "plain": {},
    "balanced": {"class_balanced": True, "random_flip": True, "cache_dataset": "never"},
    "accumulated": {
        "model_config_name_or_path": "{shop}/unet-dropout",
        "gradient_accumulation_steps": 2,
        "class_balanced": True,
    },
    "held-out": {"validation_split": 0.2, "validation_steps": 2, "class_dropout": 0.5},
    "without-dropping": {"class_dropout": 0},
    "stream": {"streaming": True},
    "importance-sampling": {
        "objective": "vlb",
        "variance_type": "learned_range",
        "timestep_sampler": "loss_second_moment",
        "ddpm_num_steps": 3,
        "train_batch_size": 12,
        "checkpointing_steps": 7,
    },
}


@pytest.mark.every(3)
@pytest.mark.parametrize("case", RESUMED)
def test_resuming_by_class_is_never_having_stopped(case, world, tmp_path):
    """Else an interrupted run drops other labels or draws other classes than it would have."""
    flags = {"use_ema": True, "checkpointing_steps": 4, "max_train_steps": 10, **RESUMED[case]}
    whole, resumed = train(world, tmp_path / "whole", USUAL, **flags).folder, tmp_path / "resumed"
    name = f"checkpoint-{flags['checkpointing_steps']}"
    shutil.copytree(whole / name, resumed / name)
    shutil.copy(whole / "metrics.jsonl", resumed)  # with lines that were logged after the checkpoint
    train(world, resumed, USUAL, resume_from_checkpoint="latest", **flags)
    assert_same_run(resumed, whole)
    assert (resumed / "model_index.json").read_bytes() == (whole / "model_index.json").read_bytes()


@pytest.mark.parametrize("change", [{"class_dropout": 0}, {"train_data_dir": "{shop}/all-different"}])
def test_a_run_does_not_go_on_with_other_classes(change, world, tmp_path):
    """Else embeddings are cut off or made up, and names are given to what others learnt."""
    out = train(world, tmp_path / "run", USUAL).folder
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    argv = command(world, out, USUAL, **{"max_train_steps": 6, "resume_from_checkpoint": "latest", **change})
    run = run_script(argv, out)
    assert run.code == 2
    assert "num_class_embeds" in run.error()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# Learned variances, from the flags to images

OBJECTIVES = {
    "hybrid": {"objective": "hybrid"},
    "vlb": {"objective": "vlb"},
    "importance-sampled": {
        "objective": "vlb",
        "timestep_sampler": "loss_second_moment",
        "ddpm_num_steps": 5,
        "train_batch_size": 12,
        "max_train_steps": 12,
    },
    "simple": {"objective": "simple", "adam_weight_decay": 0},
}


@pytest.mark.every(3)
@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("case", OBJECTIVES)
def test_learned_variances_train_save_and_sample(case, by_class, world, tmp_path):
    """Else half of the output channels is lost, never learnt, or shown as part of the image."""
    flags = {"variance_type": "learned_range", "use_ema": True, "ddpm_num_inference_steps": 5, "max_train_steps": 4}
    flags |= {"label_column": "label" if by_class else None, "checkpointing_steps": 1, **OBJECTIVES[case]}
    folder = train(world, tmp_path / "run", USUAL, **flags).folder
    assert all(np.isfinite(record["loss"]) for record in records(folder))
    last = folder / f"checkpoint-{flags['max_train_steps']}"
    if case == "importance-sampled":  # past its uniform beginning
        state = load_file(last / "timestep_sampler.safetensors")
        assert (state["counts"] == state["history"].shape[1]).all()
    first, final = (
        load_file(one / "unet" / "diffusion_pytorch_model.safetensors")["conv_out.weight"]
        for one in (folder / "checkpoint-1", last)
    )
    moved = (first != final).flatten(1).any(1).tolist()  # the channels of ε and of the variance
    assert moved == [True, case != "simple"]

    pipeline = load(folder, ClassConditionalDDPMPipeline if by_class else DDPMPipeline)
    assert pipeline.unet.config.out_channels == 2
    assert pipeline.scheduler.config.variance_type == "learned_range"
    what = [0, 1, 2] if by_class else 3
    generators = [torch.Generator().manual_seed(keyed_seed(3, "sample", 0, index)) for index in range(3)]
    rows = {"columns": 1, "legend": list(pipeline.config.id2label.values())} if by_class else {}
    drawn = image_grid(pipeline(what, generator=generators, num_inference_steps=5).images, scale=8, **rows)
    shown = Image.open(max((folder / "samples").glob("step-*")))
    assert shown.size == drawn.size
    assert np.abs(pixels_of(shown) - pixels_of(drawn)).max() <= 1

    index = json.loads((folder / "model_index.json").read_text())
    if by_class:
        assert index["_class_name"][1] == "ClassConditionalDDPMPipeline"  # which stock does not have
    else:
        assert type(diffusers.DiffusionPipeline.from_pretrained(folder)) is diffusers.DDPMPipeline


@pytest.mark.parametrize(
    ("change", "said"),
    [({"class_dropout": 0.4}, "class_dropout"), ({"class_balanced": True}, "class_balanced")],
    ids=str,
)
def test_a_run_that_goes_on_otherwise_says_so(change, said, world, tmp_path):
    """Else a continuation passes for an exact one."""
    out = train(world, tmp_path / "run", USUAL).folder
    argv = command(world, out, USUAL, **{"max_train_steps": 6, "resume_from_checkpoint": "latest", **change})
    run = run_script(argv, out)
    assert run.code == 0
    assert f"warning: {said} was" in run.err
