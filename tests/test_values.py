"""What a dataset's values mean: its labels, its pixels, its captions; and that what looks wrong is said once."""

from pathlib import Path

import datasets
import numpy as np
import pytest

from ddpm_hf import ClassConditionalDDPMPipeline
from ddpm_hf.cli.conditions import read_conditions
from ddpm_hf.data import Rows, label_ids, label_warnings
from ddpm_hf.data.labels import classes_of_resumed, name_classes
from ddpm_hf.model_card import first_class, limits, read_facts
from ddpm_hf.space.drawing import Studio
from tests.fixtures_unconditional import (
    encoded,
    image_rows,
    quiet,
    random_pixels,
    run_script,
    words,
    write_rows,
    write_unet,
)

FLAGS = {
    "resolution": 8, "train_batch_size": 4, "num_epochs": 1, "ddpm_num_steps": 10, "ddpm_num_inference_steps": 2,
    "eval_batch_size": 4, "cpu_threads": 1, "seed": 0, "logger": "none", "lr_warmup_steps": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    """The config of a tiny UNet."""
    return write_unet(tmp_path_factory.mktemp("unet"))


def trained(data: Path, unet: Path | None, out: Path, **flags):
    """A run of the script, which must succeed unless `code` says otherwise."""
    code = flags.pop("code", 0)
    chosen = {"train_data_dir": data, "output_dir": out, **FLAGS, "model_config_name_or_path": unet, **flags}
    run = run_script(words(chosen), out)
    assert run.code == code, run.out + run.err
    return run


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
    trained(tmp_path / "declared", unet, out, label_column="label", num_epochs=2, checkpointing_steps=1)
    now = write_rows(tmp_path / "plain", files, label=[2, 0, 2, 0])
    run = trained(now, unet, out, label_column="label", num_epochs=3, resume_from_checkpoint="latest")
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
    run = trained(root / "data", unet, root / "run", label_column="label")
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
    assert read_conditions(pipeline, None, None, None, None, (None, 0.0, None), 1.0).given == [0, 2]
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
    conditions = read_conditions(pipeline, None, ["bee"], None, None, (None, 0.0, None), 1.0)
    assert conditions.given == [1]
    assert "'bee'" in capsys.readouterr().err


def test_a_model_whose_classes_are_all_trained_says_nothing_of_it(unet, tmp_path):
    """Else every saved model gets a key that its readers must know."""
    data = write_rows(tmp_path / "data", [encoded(one) for one in random_pixels(4)], label=[10, 20, 30, 10])
    run = trained(data, unet, tmp_path / "run", label_column="label")
    index = run.json("model_index.json")
    assert list(index["id2label"].values()) == ["10", "20", "30"]
    assert "trained_classes" not in index
    pipeline = ClassConditionalDDPMPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.class_ids(["20", 0]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="'10', '20', '30'"):
        pipeline.class_ids([10])
    with pytest.raises(ValueError, match="trained_classes"):
        ClassConditionalDDPMPipeline(pipeline.unet, pipeline.scheduler, pipeline.config.id2label, trained_classes=[3])
