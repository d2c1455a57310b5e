"""A folder that is saved again, and files in it that are not a run's: what is published is of the weights there."""

import numpy as np
import pytest
import yaml
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMScheduler, record_result
from ddpm_hf.common.layout import SAMPLES
from ddpm_hf.evaluation.results import read_metrics
from ddpm_hf.inference.studio import Studio
from ddpm_hf.models.saving import save_half_precision
from ddpm_hf.publishing.card.facts import all_results, read_facts
from ddpm_hf.publishing.card.merging import make_card, parse_card
from ddpm_hf.publishing.card.metadata import merge_metadata
from ddpm_hf.publishing.files import files_to_publish, sample_missing_pictures
from ddpm_hf.publishing.hub import publishable
from tests.support.fixtures_pipeline import tiny_unet


def model(seed):
    return DDPMPipeline(tiny_unet(seed=seed), DDPMScheduler(num_train_timesteps=4))


@pytest.fixture
def folder(tmp_path):
    """A pipeline that was saved by Diffusers' own method."""
    model(0).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_what_is_of_earlier_weights_is_not_published(folder):
    """Else weights in half precision, pictures and figures of the earlier model go up with the new one."""
    save_half_precision(model(0), folder)
    sample_missing_pictures(Studio(str(folder)), folder)
    record_result(folder, "bits/dim", 3.7, samples=10, dataset="photos")
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    picture = np.asarray(Image.open(folder / SAMPLES))
    assert half in files_to_publish(folder)
    assert len(all_results(read_facts(folder, "user/mine", model(0)))) == 1
    sample_missing_pictures(Studio(str(folder)), folder)
    assert (np.asarray(Image.open(folder / SAMPLES)) == picture).all()
    model(1).save_pretrained(folder)
    assert half not in files_to_publish(folder)
    assert (folder / half).is_file()  # it stays the user's
    assert not all_results(read_facts(folder, "user/mine", model(1)))
    sample_missing_pictures(Studio(str(folder)), folder)
    assert (np.asarray(Image.open(folder / SAMPLES)) != picture).any()
    record_result(folder, "bits/dim", 3.5, samples=10, dataset="photos")
    assert [one["value"] for one in all_results(read_facts(folder, "user/mine", model(1)))] == [3.5]


def test_damaged_files_are_left_out_of_a_push(folder):
    """Else a truncated variant, or a picture that is none, ends in a traceback."""
    half = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    half.write_bytes(b"cut")
    assert half.relative_to(folder).as_posix() not in files_to_publish(folder)
    (folder / "assets").mkdir()
    (folder / SAMPLES).write_bytes(b"mine")
    sample_missing_pictures(Studio(str(folder)), folder)
    assert (folder / SAMPLES).read_bytes() == b"mine"


FOREIGN = {
    "metrics.jsonl": '{"epoch": 1, "loss": 0.5, "path": "/home/me"}\n',
    "run.json": '{"lr": 0.1}',
    "evaluation.json": '[{"metric": "fid", "value": 3}]',
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("text", [None, "[1]", '{"fid": 3.0}'])
def test_another_programs_records_stay_where_they_are(name, text, folder):
    """Else they are uploaded, or a push ends in a KeyError once a repository was made."""
    (folder / name).write_text(FOREIGN[name] if text is None else text)
    with publishable(folder) as files:
        assert name not in files
    facts = read_facts(folder, "user/mine", model(0))
    assert not facts.run
    assert not facts.results
    assert not read_metrics(folder)
    assert make_card(facts)
    if name == "evaluation.json":
        with pytest.raises(ValueError, match="does not hold results of ours"):
            record_result(folder, "FID", 1.0, samples=10, dataset="photos")


def test_the_users_files_in_a_components_folder_stay(folder):
    """Else notes, optimizer states and keys are published."""
    for name in ("unet/notes.txt", "unet/optimizer.safetensors", "scheduler/token.json", "LICENSE_KEY.txt"):
        (folder / name).write_bytes(b"mine")
    for name in ("LICENSE", "LICENSE.md", "LICENSE-MIT"):
        (folder / name).write_text("MIT")
    names = {name for name in files_to_publish(folder) if not name.endswith("_ddpm_hf.py")}
    assert names == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json", "LICENSE", "LICENSE.md", "LICENSE-MIT",
    }  # fmt: skip


def test_figures_are_of_one_push_and_others_stay(folder):
    """Else a model that is pushed under another name shows both names' figures, or loses what people added."""
    record_result(folder, "FID", 12.0, samples=100, dataset="photos")
    first = make_card(read_facts(folder, "user/mine", model(0)))
    theirs = {"task": {"type": "x"}, "dataset": {"name": "d", "type": "d"}, "metrics": [{"type": "p", "value": 1.0}]}
    head = parse_card(first).head
    head["model-index"][0]["results"].append(theirs)
    head["model-index"].append({"name": "someone's", "results": [theirs]})
    record_result(folder, "FID", 9.0, samples=100, dataset="photos")
    facts = read_facts(folder, "user/other", model(0))
    again = yaml.safe_load(make_card(facts, f"---\n{yaml.safe_dump(head)}---\n").split("---\n")[1])["model-index"]
    values = {one["name"]: [m["value"] for r in one["results"] for m in r["metrics"]] for one in again}
    assert values == {"mine": [1.0], "someone's": [1.0], "other": [9.0]}
    same = merge_metadata({"model-index": [{"name": "mine", "results": []}]}, head)["model-index"]
    assert {one["name"]: one["results"] for one in same} == {"someone's": [theirs], "mine": [theirs]}


def test_norwegian_stays_a_language():
    """Else `language: no` becomes false, which the Hub refuses."""
    for text, expected in (("no", "no"), ("[en, no]", ["en", "no"]), ("en", "en")):
        assert parse_card(f"---\nlanguage: {text}\n---\n").head["language"] == expected
