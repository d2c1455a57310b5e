"""What a dataset's values mean: its labels, its pixels, its captions; and that what looks wrong is said once."""

import contextlib
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline
from ddpm_hf.cli import app
from ddpm_hf.cli.conditions import read_conditions
from ddpm_hf.common.errors import DataError, ImageMismatchError
from ddpm_hf.data import ImageTransform
from ddpm_hf.data.dataset import ImageDataset, describe_pixels
from ddpm_hf.data.images import decode_row
from ddpm_hf.data.labels import classes_of_resumed, label_ids, label_warnings, name_classes
from ddpm_hf.data.reading import _as_named
from ddpm_hf.data.rows import Rows
from ddpm_hf.data.texts import check_captions, count_empty
from ddpm_hf.inference.studio import Studio
from ddpm_hf.latents.cache import SMALL_FILE, file_key
from ddpm_hf.portable.text_encoding_ddpm_hf import cut_off, tokenize
from ddpm_hf.publishing.card.facts import read_facts
from ddpm_hf.publishing.card.sections import first_class, limits, use
from ddpm_hf.text.captions import fit_tokenizer, warn_of_cut_captions
from tests.support.fixtures_text import tiny_text_pipeline
from tests.support.pictures import encoded, image_rows, quiet, random_pixels, write_images, write_rows, write_unet
from tests.support.runs import attempt, parse, run_script, train, words

FLAGS = {
    "train_data_dir": "{shop}", "resolution": 8, "train_batch_size": 4, "num_epochs": 1, "ddpm_num_steps": 10,
    "ddpm_num_inference_steps": 2, "eval_batch_size": 4, "cpu_threads": 1, "seed": 0, "logger": "none",
    "lr_warmup_steps": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    """The config of a tiny UNet."""
    return write_unet(tmp_path_factory.mktemp("unet"))


def warnings_of(run) -> list[str]:
    """The lines of a run that warn."""
    return [line for line in (run.out + run.err).splitlines() if "warning: " in line]


# Labels


def labelled(names: list[str], by_name: bool = False) -> Rows:
    """Rows of which only the classes matter."""
    return Rows(None, "photos", "image", "kind", names, labels_are_names=by_name)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 20, 30, 10], ["10", "20", "30"]),
        ([100, 9], ["9", "100"]),
        ([2.0, 10.0], ["2", "10"]),
        ([True, False], ["False", "True"]),
        (["10", "9"], ["10", "9"]),
        (["b", "a", "a"], ["a", "b"]),
        ([10**30, 0], ["0", str(10**30)]),
    ],
)
def test_distinct_values_are_the_classes(values, names):
    """Else there are classes that no image has, or an image gets the id of another class."""
    assert name_classes(values, "kind", "photos") == names
    ids = label_ids(values, labelled(names, by_name=True))
    assert [names[number] for number in ids] == [str(int(v)) if isinstance(v, float) else str(v) for v in values]


def test_an_integer_of_a_declared_class_is_its_id():
    """Else a ClassLabel whose names are digits in another order trains every image as another class."""
    assert label_ids([0, 1, "7"], labelled(["7", "1"])).tolist() == [0, 1, 0]
    assert label_ids([7, 1, "7"], labelled(["1", "7"], by_name=True)).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("names", "labels", "held_out", "fragments"),
    [
        (["a", "b", "c"], [0, 0, 2], None, ("1 of 3 classes", "'b'", "untrained")),
        (["a", "b"], [0, 0], [1, 1, 0], ("2 held-out images", "'b'")),
        ([str(n) for n in range(40)], list(range(40)), None, ("40 classes of 40 images", "'kind'", "--label_column")),
        (["Cat", "cat ", "dog"], [0, 1, 2], None, ("'Cat', 'cat '", "case or spaces")),
        (["é", "e\u0301"], [0, 1], None, ("case or spaces",)),
    ],
)
def test_what_looks_wrong_about_classes_is_said(names, labels, held_out, fragments):
    """Else a mistaken column, a misspelt class or an empty one trains without a word."""
    held_out = None if held_out is None else np.array(held_out)
    said = " / ".join(label_warnings(labelled(names), np.array(labels), held_out))
    assert all(fragment in said for fragment in fragments), said


def test_ordinary_classes_are_no_reason_to_warn():
    """Else warnings are noise."""
    names = ["cat", "cat tree", "0", "1"]
    assert label_warnings(labelled(names), np.arange(12) % 4, np.array([0, 3])) == []
    numbered = labelled(["0", "1", "2"], by_name=True)
    assert label_warnings(numbered, np.arange(12) % 3) == []
    few = labelled([str(n) for n in range(9)], by_name=True)
    assert label_warnings(few, np.arange(9)) == []


def test_a_run_of_numbered_classes_keeps_its_embeddings(unet, tmp_path):
    """Else a run whose classes were every integer up to the highest label cannot be resumed."""
    old = [str(number) for number in range(31)]
    rows = labelled(["10", "20", "30"], by_name=True)
    assert classes_of_resumed(rows, old) == old
    for other in (None, "10", ["10", "20"], [str(n) for n in range(30)]):
        assert classes_of_resumed(rows, other) == rows.label_names
    assert classes_of_resumed(labelled(["10", "20", "30"]), old) == ["10", "20", "30"]

    files, out = [encoded(one) for one in random_pixels(4)], tmp_path / "run"
    with quiet():
        declared = datasets.ClassLabel(names=["0", "1", "2"])
        image_rows(files, label=[2, 0, 2, 0]).cast_column("label", declared).save_to_disk(str(tmp_path / "declared"))
    by_label = {"model_config_name_or_path": unet, "label_column": "label"}
    train(tmp_path / "declared", out, FLAGS, **by_label, num_epochs=2, checkpointing_steps=1)
    now = write_rows(tmp_path / "plain", files, label=[2, 0, 2, 0])
    run = train(
        now,
        out,
        FLAGS,
        model_config_name_or_path=unet,
        label_column="label",
        num_epochs=3,
        resume_from_checkpoint="latest",
    )
    index = run.json("model_index.json")
    assert list(index["id2label"].values()) == ["0", "1", "2"]
    assert index["trained_classes"] == [0, 2]


@pytest.fixture(scope="module")
def partly_trained(unet, tmp_path_factory):
    """A run on three declared classes, of which the second has no image: (folder, the run)."""
    root = tmp_path_factory.mktemp("classes")
    with quiet():
        declared = datasets.ClassLabel(names=["ant", "bee", "cat"])
        rows = image_rows([encoded(one) for one in random_pixels(4)], label=[2, 0, 2, 0])
        rows.cast_column("label", declared).save_to_disk(str(root / "data"))
    run = train(root / "data", root / "run", FLAGS, model_config_name_or_path=unet, label_column="label")
    return root / "run", run


def test_an_empty_class_is_said_and_kept_out_of_what_is_shown(partly_trained, monkeypatch):
    """Else noise of an untrained embedding is shown as a class in grids, the card, a Space and by default."""
    folder, run = partly_trained
    assert len([line for line in warnings_of(run) if "1 of 3 classes" in line and "'bee'" in line]) == 1
    index = run.json("model_index.json")
    assert list(index["id2label"].values()) == ["ant", "bee", "cat"]
    assert index["trained_classes"] == [0, 2]
    assert run.json("run.json")["rows"] == ["ant", "cat"]

    pipeline = ClassConditionalDDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.default_classes == [0, 2]
    assert first_class(pipeline) == "ant"
    assert "bee" in limits(read_facts(folder, "me/model", pipeline))
    assert Studio(str(folder)).classes == ["ant", "cat"]
    assert read_conditions(pipeline, None, None, None, None, (None, 0.0, None), None).given == [0, 2]
    asked = []
    predict = pipeline.predict

    def watched(latents, timestep, class_labels):
        asked.append(class_labels.tolist())
        return predict(latents, timestep, class_labels=class_labels)

    monkeypatch.setattr(pipeline, "predict", watched)
    assert len(pipeline(num_inference_steps=1).images) == 2
    assert asked == [[0, 2]]


def test_an_empty_class_is_sampled_on_request_with_a_warning(partly_trained, capsys):
    """Else a declared class cannot be asked for, or its noise comes without a word."""
    pipeline = ClassConditionalDDPMPipeline.from_pretrained(partly_trained[0])
    pipeline.set_progress_bar_config(disable=True)
    logger = "ddpm_hf.portable.pipeline_class_conditional_ddpm_hf.logger.warning"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(logger, said.append)
        assert len(pipeline(["ant", "bee"], num_inference_steps=1).images) == 2
        assert len(said) == 1
        assert "bee" in said[0]
        pipeline(["ant", None], num_inference_steps=1)
        assert len(said) == 1
    conditions = read_conditions(pipeline, None, ["bee"], None, None, (None, 0.0, None), None)
    assert conditions.given == [1]
    assert "'bee'" in capsys.readouterr().err


def test_a_model_whose_classes_are_all_trained_says_nothing_of_it(unet, tmp_path):
    """Else every saved model gets a key that its readers must know."""
    data = write_rows(tmp_path / "data", [encoded(one) for one in random_pixels(4)], label=[10, 20, 30, 10])
    run = train(data, tmp_path / "run", FLAGS, model_config_name_or_path=unet, label_column="label")
    index = run.json("model_index.json")
    assert list(index["id2label"].values()) == ["10", "20", "30"]
    assert "trained_classes" not in index
    pipeline = ClassConditionalDDPMPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.class_ids(["20", 0]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="'10', '20', '30'"):
        pipeline.class_ids([10])
    with pytest.raises(ValueError, match="trained_classes"):
        ClassConditionalDDPMPipeline(pipeline.unet, pipeline.scheduler, pipeline.config.id2label, trained_classes=[3])


# Pixels


def levels(array: np.ndarray, channels: int = 1, **options) -> np.ndarray:
    """What an array becomes, as it is stored for training: [H, W, C]."""
    return ImageTransform(*array.shape[:2], channels, **options).resize(decode_row(array, "cell"))


@pytest.mark.parametrize(
    ("kind", "values", "bytes_"),
    [
        ("bool", [0, 1], [0, 255]),
        ("uint8", [0, 1, 254, 255], [0, 1, 254, 255]),
        ("uint16", [0, 100, 255, 256, 1000, 40000, 65535], [0, 0, 1, 1, 4, 156, 255]),
        ("int16", [0, 1, 255], [0, 1, 255]),
        ("int64", [0, 1, 255], [0, 1, 255]),
        ("float16", [0, 0.5, 1], [0, 128, 255]),
        ("float32", [0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        ("float64", [0, 0.5, 1.00001], [0, 128, 255]),
    ],
)
def test_one_scale_for_all_images_of_a_type(kind, values, bytes_):
    """Else each image is scaled by what it happens to hold: 255 is white, and 256 black."""
    alone = [int(levels(np.full((2, 2), value, kind))[0, 0, 0]) for value in values]
    together = levels(np.array([values], kind))[0, :, 0].tolist()
    assert alone == together == bytes_


@pytest.mark.parametrize(
    ("kind", "values", "advised"),
    [
        ("float32", [-0.5, 0.5], (-1, 1)),
        ("float32", [0, 1.01], (0, 255)),
        ("float64", [0, 300.0], (0, 65535)),
        ("float32", [-1024.0, 3000.5], (-1024, 3001)),
        ("int64", [0, 256], (0, 65535)),
        ("int32", [-1, 0], (-1, 1)),
        ("int8", [-128, 127], (-128, 127)),
    ],
)
def test_values_outside_the_range_of_their_type_are_refused_with_a_way_out(kind, values, advised):
    """Else they are cut off or scaled by a rule that nobody was told; the advice must work."""
    array = np.array([values], kind)
    with pytest.raises(ImageMismatchError, match=f"--pixel_range {advised[0]} {advised[1]}$"):
        levels(array)
    low, high = advised
    got = levels(array, pixel_range=advised, keep_precision=True)[0, :, 0]
    assert np.allclose(got, (np.array(values) - low) / (high - low), atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_in_any_range(value):
    """Else a NaN becomes a pixel."""
    for options in ({}, {"pixel_range": (-1.0, 1.0)}):
        with pytest.raises(DataError, match="NaN or infinity"):
            levels(np.array([[0.0, value]]), **options)


def test_a_given_range_clips_and_leaves_files_of_8_bits_alone():
    """Else --pixel_range darkens the photos of a folder that holds 16-bit scans too."""
    half = (0.0, 4095.0)
    assert levels(np.array([[0, 4095, 65535]], np.uint16), pixel_range=half)[0, :, 0].tolist() == [0, 255, 255]
    deep = Image.fromarray(np.array([[0, 4095]], np.uint16))
    assert ImageTransform(1, 2, 1, pixel_range=half).resize(deep)[0, :, 0].tolist() == [0, 255]
    plain = Image.fromarray(np.array([[0, 100]], np.uint8))
    assert ImageTransform(1, 2, 1, pixel_range=half).resize(plain)[0, :, 0].tolist() == [0, 100]
    assert levels(np.array([[0, 1]], np.uint8), pixel_range=(0.0, 1.0))[0, :, 0].tolist() == [0, 255]


# (channels of the image, of the model) -> what a pixel of bands becomes
GRAY, COLOUR, WEIGHTS = [102], [255, 51, 0], [0.299, 0.587, 0.114]
CHANNELS = {
    (1, 2): (GRAY, [102, 255]),
    (1, 3): (GRAY, [102] * 3),
    (1, 4): (GRAY, [102, 102, 102, 255]),
    (2, 1): ([102, 51], [round(102 * 0.2 + 255 * 0.8)]),
    (3, 1): (COLOUR, [round(float(np.dot(COLOUR, WEIGHTS)))]),
    (3, 2): (COLOUR, [round(float(np.dot(COLOUR, WEIGHTS))), 255]),
    (3, 4): (COLOUR, [*COLOUR, 255]),
    (4, 3): ([255, 51, 0, 51], [255, round(51 * 0.2 + 255 * 0.8), round(255 * 0.8)]),
    (4, 4): ([255, 51, 0, 51], [255, 51, 0, 51]),
    (5, 5): ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("case", CHANNELS)
def test_bands_become_the_channels_of_the_model(case, kind):
    """Else a channel is lost, or an alpha becomes a colour; in both layouts, at any size."""
    given, wanted = CHANNELS[case]
    array = np.tile(np.array(given, "uint8"), (6, 9, 1))
    array = array if kind == "uint8" else (array / 255).astype(kind)
    for layout in (array, np.ascontiguousarray(np.moveaxis(array, 2, 0))):
        for side in (6, 8):
            pixels = ImageTransform(side, side, case[1]).resize(decode_row(layout, "cell"))
            assert pixels.shape == (side, pixels.shape[1], case[1])
            assert np.abs(pixels.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(
    ("mode", "value", "wanted"),
    [
        ("RGBA", (200, 30, 90, 128), [200, 30, 90, 128]),
        ("RGB", (200, 30, 90), [200, 30, 90, 255]),
        ("LA", (77, 40), [77, 77, 77, 40]),
        ("L", 77, [77, 77, 77, 255]),
        ("1", 1, [255, 255, 255, 255]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0, 255]),
        ("I;16", 257, [1, 1, 1, 255]),
        ("F", 1.0, [255, 255, 255, 255]),
    ],
)
def test_files_keep_their_alpha_in_models_that_have_one(mode, value, wanted):
    """Else a model of RGBA learns that everything is opaque, or that CMYK's black is alpha."""
    image = Image.new(mode, (4, 4), value)
    assert ImageTransform(4, 4, 4).resize(image)[0, 0].tolist() == wanted
    with_alpha = ImageTransform(4, 4, 2).resize(image)[0, 0].tolist()
    assert with_alpha[1] == wanted[3]
    assert abs(with_alpha[0] - np.dot(wanted[:3], WEIGHTS)) <= 1


def test_channels_that_cannot_become_the_models_are_refused_with_a_way_out():
    """Else a traceback from inside a convolution."""
    photo = Image.new("RGB", (8, 8))
    with pytest.raises(ImageMismatchError, match=r"3 channels and the model 5: .*--channels 3"):
        ImageTransform(8, 8, 5).resize(photo)
    assert ImageTransform(8, 8, 3).resize(photo).shape == (8, 8, 3)
    bands = np.zeros((8, 8, 7))
    with pytest.raises(ImageMismatchError, match=r"7 channels and the model 3: .*--channels 7"):
        ImageTransform(8, 8, 3).resize(bands)
    assert ImageTransform(8, 8, 7).resize(bands).shape == (8, 8, 7)


def array_rows(array: np.ndarray, feature=None) -> Rows:
    """A dataset of arrays [N, ...], as a column of this feature."""
    features = None if feature is None else datasets.Features({"image": feature})
    table = datasets.Dataset.from_dict({"image": array.tolist()}, features=features)
    return Rows(table, "arrays", "image")


@pytest.mark.parametrize("dtype", ["uint16", "uint8", "float32", "bool"])
def test_a_column_of_arrays_keeps_its_type(dtype):
    """Else lists of Python numbers lose the type that says how they are scaled."""
    top = {"uint16": 65535, "uint8": 255}.get(dtype, 1)
    array = np.full((2, 8, 8, 3), top, dtype)
    features = [datasets.Array3D((8, 8, 3), dtype), datasets.List(datasets.List(datasets.List(datasets.Value(dtype))))]
    for feature in features:
        rows = array_rows(array, feature)
        assert rows.array_type[0] == dtype
        batch = ImageDataset(rows, ImageTransform(8, 8, 3), 0, True).__getitems__([(0, 0), (0, 1)])
        assert batch["images"].shape == (2, 3, 8, 8)
        assert (batch["images"] == 255).all()
    assert Rows(image_rows([]), "files", "image").array_type is None


def test_the_log_says_how_values_are_scaled():
    """Else nobody knows which range was taken, or that 12-bit data trains as nearly black."""
    deep = array_rows(np.full((3, 8, 8), 4095), datasets.Array2D((8, 8), "uint16"))
    said = describe_pixels(deep, ImageTransform(8, 8, 1))
    assert said[0] == "pixels: uint16 values from 0 to 65535 become -1 to 1 (--pixel_range)"
    assert "warning: " in said[1]
    assert "--pixel_range 0 4095" in said[1]
    assert describe_pixels(deep, ImageTransform(8, 8, 1, pixel_range=(0.0, 4095.0))) == [
        "pixels: uint16 values from 0 to 4095 become -1 to 1"
    ]
    files = [encoded(Image.new(mode, (8, 8), 255)) for mode in ("L", "I;16")]
    mixed = Rows(image_rows(files).cast_column("image", datasets.Image(decode=False)), "files", "image")
    assert describe_pixels(mixed, ImageTransform(8, 8, 1))[0].startswith("pixels: 16-bit values")
    photos = Rows(image_rows(files[:1]).cast_column("image", datasets.Image(decode=False)), "files", "image")
    assert describe_pixels(photos, ImageTransform(8, 8, 3)) == []
    assert "8 bits" in describe_pixels(photos, ImageTransform(8, 8, 3, pixel_range=(0.0, 1.0)))[0]
    assert "--channels 3" in describe_pixels(photos, ImageTransform(8, 8, 4))[0]
    assert "first three of the 5" in describe_pixels(array_rows(np.zeros((1, 8, 8, 5))), ImageTransform(8, 8, 5))[-1]
    wide = array_rows(np.zeros((1, 8, 8, 5)), datasets.Array3D((8, 8, 5), "uint8"))
    with pytest.raises(ImageMismatchError, match=r"column 'image' of arrays.*--channels 5"):
        describe_pixels(wide, ImageTransform(8, 8, 3))


def write_arrays(folder: Path, array: np.ndarray, feature) -> Path:
    """A `save_to_disk` folder of arrays."""
    with quiet():
        array_rows(array, feature).dataset.save_to_disk(str(folder))
    return folder


def test_a_range_may_be_negative_wherever_it_is_given(tmp_path):
    """Else -1 is taken for a flag."""
    config = tmp_path / "run.yaml"
    config.write_text("train_data_dir: photos\npixel_range: [-1, 0.5]\n")
    for argv in (["--train_data_dir", "photos", "--pixel_range", "-1", "0.5"], ["--config", str(config)]):
        assert parse([*argv, "--resolution", "8"]).transform(1).pixel_range == (-1.0, 0.5)


def test_a_range_that_is_none_is_a_usage_error(tmp_path):
    """Else it divides by zero."""
    data = write_images(tmp_path / "data", random_pixels(2))
    for given, said in (("1 0", "1 0"), ("0", "0"), ("0 0", "0 0"), ("nan 1", "nan 1"), ("0 1 2", "0 1 2")):
        argv = [
            *words({**FLAGS, "train_data_dir": data, "output_dir": tmp_path / "o"}),
            "--pixel_range",
            *given.split(),
        ]
        run = run_script(argv, tmp_path / "o")
        assert run.code == 2
        assert f"--pixel_range {said}: give two numbers" in run.error()


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_any_number_of_channels_trains_saves_and_samples(channels, tmp_path):
    """Else the UNet's config fails with a traceback, or its advice --channels N is refused."""
    unet = write_unet(tmp_path / "unet", in_channels=channels, out_channels=channels)
    values = np.random.default_rng(0).integers(0, 65536, (4, channels, 8, 8)).astype(np.uint16)
    data = write_arrays(tmp_path / "data", values, datasets.Array3D((channels, 8, 8), "uint16"))
    flags = {"image_column": "image", "validation_split": 0.25, "validation_steps": 1}
    refused = attempt(data, tmp_path / "no", FLAGS, model_config_name_or_path=unet, **flags, channels=3)
    assert f"--channels {channels}" in refused.error()
    run = train(data, tmp_path / "run", FLAGS, model_config_name_or_path=unet, **flags, channels=channels)
    assert any((run.folder / "samples").glob("step-*.png"))
    assert "uint16 values from 0 to 65535" in run.out + run.err

    ours, stock = DDPMPipeline.from_pretrained(run.folder), DiffusionPipeline.from_pretrained(run.folder)
    for pipeline in (ours, stock):
        pipeline.set_progress_bar_config(disable=True)
    sampled = ours(batch_size=2, num_inference_steps=2, output_type="np").images
    assert sampled.shape == (2, 8, 8, channels)
    assert stock(batch_size=2, num_inference_steps=2, output_type="np").images.shape == sampled.shape
    card = use(read_facts(run.folder, str(run.folder), ours))
    code = card.partition("```python\n")[2].partition("```")[0]
    with contextlib.chdir(tmp_path):
        exec(compile(code, "card", "exec"), {})
    out = tmp_path / "pictures"
    argv = ["sample", str(run.folder), "--out", str(out), "--num-images", "2", "--steps", "2", "--progressive"]
    app(argv, standalone_mode=False)
    assert (out / "chain.gif").is_file()
    if channels <= 4:
        assert ours(num_inference_steps=1).images[0].mode == {2: "LA", 4: "RGBA"}[channels]
        assert Image.open(tmp_path / "sample.png").mode == {2: "LA", 4: "RGBA"}[channels]
        assert Image.open(out / "0000.png").mode == {2: "LA", 4: "RGBA"}[channels]
    else:
        with pytest.raises(ValueError, match="'np'"):
            ours(num_inference_steps=1)
        assert np.load(tmp_path / "sample.npy").shape == (8, 8, 5)
        assert Image.open(out / "0000.png").mode == "RGB"


# Captions


def captioned(texts: list, feature=None) -> Rows:
    """Rows of which only the captions matter; the column `title` holds texts."""
    rows = datasets.Dataset.from_dict({"image": [0] * len(texts), "title": ["a"] * len(texts), "text": texts})
    if feature is not None:
        rows = rows.cast_column("text", feature)
    return Rows(rows, "photos", "image", caption_column="text")


@pytest.mark.parametrize(
    ("texts", "fragments"),
    [
        ([1, 2], ("int64", "'text'", "strings are in title")),
        ([[1], [2]], ("int64", "'text'")),
        ([0.5, None], ("float64",)),
        ([b"a", b"b"], ("binary",)),
        ([{"a": "b"}], ("'text'",)),
        ([None, None], ("all 2 captions", "'text'", "--caption_column (strings are in title)")),
        (["", " "], ("all 2 captions", "train_unconditional.py")),
        ([[], ["", None]], ("all 2 captions",)),
    ],
)
def test_captions_that_teach_nothing_are_refused_early(texts, fragments):
    """Else an autoencoder trains for an hour before a number is no text, or a model learns from empty texts."""
    with pytest.raises(DataError) as raised:
        check_captions(captioned(texts))
    assert all(fragment in str(raised.value) for fragment in fragments), raised.value


def test_some_empty_captions_are_counted():
    """Else half a column that was not filled in trains as the empty prompt without a word."""
    assert check_captions(captioned(["a", "", None, " "])) == [
        "3 of 4 captions are empty, and train as the empty prompt"
    ]
    assert check_captions(captioned([["a", ""], ["b", None]])) == []
    assert check_captions(captioned(["a"], datasets.Value("large_string"))) == []
    stream = captioned([1, 2])
    stream.dataset = stream.dataset.to_iterable_dataset()
    with pytest.raises(DataError, match="int64"):
        check_captions(stream)
    with pytest.raises(DataError, match=r"the caption of 1 of photos is 5"):
        count_empty(["a", 5], captioned(["a", "b"]))


def test_texts_beyond_the_tokenizers_length_are_said():
    """Else the end of a prompt has no effect, and nobody knows."""
    tokenizer = fit_tokenizer(["red cat", "blue dog"])  # reads 16 tokens, start and end included
    short, long = "red cat", " ".join(["red"] * 14) + " blue dog"
    kept, rest = cut_off(tokenizer, [short, long])
    assert kept == ""
    assert rest == "blue dog"
    ids, mask = tokenize(tokenizer, [long])
    assert ids.shape == (1, 16)
    assert mask.all()
    assert warn_of_cut_captions(tokenizer, [short]) == []
    (line,) = warn_of_cut_captions(tokenizer, [short, long, long])
    assert "2 of 3 captions" in line
    assert "16 tokens" in line
    before = tokenizer.backend_tokenizer.to_str()
    cut_off(tokenizer, [long])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_the_pipeline_says_what_it_does_not_read(capsys):
    """Else a prompt's end is cut off in silence, where stock warns."""
    pipeline = tiny_text_pipeline()
    long = " ".join(["red"] * 14) + " blue square"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("ddpm_hf.portable.pipeline_text2image_ddpm_hf.logger.warning", said.append)
        pipeline(["a red square", long], num_inference_steps=1)
        assert len(said) == 1
        assert "['blue square']" in said[0]
        pipeline("a red square", num_inference_steps=1)
        assert len(said) == 1
    capsys.readouterr()
    read_conditions(pipeline, None, None, [long], None, (None, 0.0, None), None)
    assert "'blue square'" in capsys.readouterr().err


def test_an_edited_image_is_another_one_though_its_date_is_kept(tmp_path):
    """Else an image that was mended trains as its old latent."""
    path = tmp_path / "a.bin"

    def key_of(content: bytes) -> bytes:
        path.write_bytes(content)
        os.utime(path, (1, 1))
        return file_key(path)

    for size in (100, SMALL_FILE, SMALL_FILE + 1, 10 * SMALL_FILE):
        content = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        other = content.copy()
        other[-1] ^= 1
        keys = [key_of(one.tobytes()) for one in (content, other, content)]
        assert keys[0] == keys[2] != keys[1]
    moved = tmp_path / "b.bin"
    key = key_of(b"pixels")
    path.rename(moved)
    assert file_key(moved) == key


def test_a_split_of_other_declared_classes_is_matched_by_name():
    """Else held-out images are validated as the class that has their number in the training split."""
    declared = {"label": datasets.ClassLabel(names=["cat", "ant"]), "image": datasets.Value("int64")}
    columns = {"label": [0, 1, -1], "image": [0, 1, 2]}
    split = datasets.Dataset.from_dict(columns, features=datasets.Features(declared))
    named = _as_named(split, "label", ["ant", "bee", "cat"])
    assert named["label"] == ["cat", "ant", None]
    assert label_ids(named["label"][:2], labelled(["ant", "bee", "cat"])).tolist() == [2, 0]
    assert _as_named(split, "label", ["cat", "ant"]) is split
    with pytest.raises(DataError, match="other classes"):
        _as_named(split.to_iterable_dataset(), "label", ["ant"])
