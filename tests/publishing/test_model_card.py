"""The model card: what it says is so, and what people write into it stays."""

import ast
import dataclasses
import hashlib
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.evaluation.results import read_metrics, record_result
from ddpm_hf.publishing.card.facts import Facts, all_results, read_facts
from ddpm_hf.publishing.card.illustrations import loss_curve
from ddpm_hf.publishing.card.merging import make_card, newer_card, parse_card
from ddpm_hf.publishing.card.metadata import merge_metadata
from ddpm_hf.publishing.card.sections import use
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_text import tiny_text_pipeline

RUN = {
    "dataset": {"name": "user/photos", "on_hub": True, "images": 1234, "fingerprint": "0123456789abcdef"},
    "held_out": 100,
    "seed": 7,
    "batch": 32,
    "parameters": 1000,
    "rows": ["cat", "dog"],
    "base_model": None,
    "settings": {"learning_rate": 0.01, "objective": "hybrid"},
    "step": 20,
    "sessions": [
        {"first_step": 0, "last_step": 12, "seconds": 3600.0, "date": "2026-01-01", "hardware": "8 × GPU",
         "versions": {"torch": "2.13.0"}},
        {"first_step": 10, "last_step": 20, "seconds": 120.0, "date": "2026-01-02", "hardware": "CPU",
         "versions": {"torch": "2.13.0"}},
    ],
}  # fmt: skip
METRICS = [
    {"step": 10, "epoch": 1, "loss": 0.5},
    {"step": 10, "epoch": 1, "validation_loss": 0.4},
    {"step": 20, "epoch": 2, "loss": 0.3, "validation_loss": 0.25},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved unconditional model."""
    folder = tmp_path_factory.mktemp("model")
    DDPMPipeline(tiny_unet(), DDPMScheduler(num_train_timesteps=10)).save_pretrained(folder)
    return folder


@pytest.fixture
def facts(folder):
    """All that can be known of one."""
    pipeline = DDPMPipeline(tiny_unet(), DDPMScheduler(num_train_timesteps=10))
    return Facts("user/model", pipeline, folder, RUN, METRICS, license="mit")


def head(card):
    """The card's metadata, read as the Hub reads it."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def test_the_head_says_what_the_hub_asks_for(facts):
    """Else the Hub shows no task, dataset, license or result, and nobody finds the model."""
    data = head(make_card(facts))
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["license"] == "mit"
    assert data["datasets"] == ["user/photos"]
    assert {"ddpm", "ddpm_hf"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "held_out_loss", "value": 0.25, "name": "held-out loss (100 images)"}]
    assert ModelCard(make_card(facts)).data.eval_results[0].metric_value == 0.25


def test_the_training_is_told_as_it_was(facts):
    """Else nobody can repeat it, or knows what it cost."""
    card = make_card(facts)
    for told in ("1,234 images", "`0123456789abcdef`", "| steps | 20 |", "| seed | 7 |", "| batch | 32 |", "hybrid"):
        assert told in card
    assert "1 h 2 min" in card  # both sessions
    assert "8 × GPU; CPU" in card
    assert "| 0 to 12 | 2026-01-01 | 1 h 0 min | 8 × GPU |" in card
    assert "| 10 to 20 | 2026-01-02 | 2 min 0 s | CPU |" in card


def test_one_session_is_no_lineage(facts):
    """Else each card says that its run was resumed."""
    run = {**RUN, "sessions": RUN["sessions"][:1]}
    assert "resumed" not in make_card(dataclasses.replace(facts, run=run))


def test_a_model_of_unknown_training_has_a_card_without(facts):
    """Else a pipeline saved from Python cannot be published, or its card has blanks."""
    card = make_card(Facts("user/model", facts.pipeline, facts.folder))
    assert "## Training" not in card
    assert "## Evaluation" not in card
    assert "None" not in card
    assert 'DiffusionPipeline.from_pretrained("user/model")' in card


def test_no_picture_is_named_that_is_not_there(facts):
    """Else the model's page has holes."""
    assert "![" not in make_card(facts)


@pytest.mark.parametrize("name", ["a`b```c", "<b> *x* [y](z) | #", 'q"$(id)"', "two\nlines"])
def test_words_of_the_data_mean_nothing_but_themselves(folder, name):
    """Else a caption breaks the card, or the line that a stranger pastes into a shell runs it."""
    text = use(Facts("user/model", tiny_text_pipeline(), folder, {**RUN, "rows": [name]}))
    words = " ".join(name.split())
    (line,) = re.findall("ddpm-hf sample .*", text)
    assert shlex.split(line)[3:5] == ["--prompt", words]
    for call in re.findall(r"= pipeline\((.*)\)\.images", text):
        assert "`" not in call
        assert ast.literal_eval(call.partition(", num_inference_steps")[0]) == words


@pytest.mark.parametrize(
    ("names", "call"),
    [({0: 'a "cat"', 1: "dog"}, '["a \\"cat\\""]'), ({0: "Straße", 1: "x"}, '["Straße"]'), (None, '["0"]')],
)
def test_the_example_by_class_is_python(tmp_path, names, call):
    """Else a class of an odd name makes the example a syntax error."""
    unet = tiny_unet(num_class_embeds=3)
    pipeline = ClassConditionalDDPMPipeline(unet, DDPMScheduler(), names)
    pipeline.save_pretrained(tmp_path)
    card = make_card(read_facts(tmp_path, "user/model", pipeline))
    examples = re.findall("```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        compile(example, "example", "exec")
        assert f"pipeline({call})" in example


# Results


def test_a_recorded_result_is_shown_with_its_number_of_images(facts, folder):
    """Else a figure stands without what it was measured on."""
    record_result(folder, "FID", 12.345, 5000, "user/photos", settings="DDIM, 50 steps")
    record_result(folder, "bits/dim", 3.7, 100, "user/photos")
    record_result(folder, "FID", 10.5, 10_000, "user/photos", settings="DDIM, 50 steps")  # replaces the first
    record_result(folder, "FID", 11.5, 5000, "user/photos")  # of other settings: stays beside it
    results = read_facts(folder, "user/model", facts.pipeline).results
    (folder / "evaluation.json").unlink()
    assert [(one["metric"], one["value"]) for one in results] == [("bits/dim", 3.7), ("FID", 10.5), ("FID", 11.5)]
    card = make_card(dataclasses.replace(facts, results=results, run={}))
    assert "| FID | 10.5 | 10,000 | user/photos, test, DDIM, 50 steps |" in card
    metrics = [metric for one in head(card)["model-index"][0]["results"] for metric in one["metrics"]]
    assert {"type": "fid", "value": 10.5, "name": "FID (10,000 images, DDIM, 50 steps)"} in metrics
    assert {"type": "bits_dim", "value": 3.7, "name": "bits/dim (100 images)"} in metrics


def test_a_result_of_other_weights_is_not_shown(tmp_path, facts):
    """Else a model that was trained on is published with the figures of an earlier one."""
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    record_result(tmp_path, "FID", 12.0, 5000, "user/photos")
    assert "| FID | 12 |" in make_card(read_facts(tmp_path, "user/model", facts.pipeline))
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "step": 30}))
    assert "FID" not in make_card(read_facts(tmp_path, "user/model", facts.pipeline))


def test_only_the_saved_steps_held_out_loss_is_its_result(facts):
    """Else a card shows the loss of other weights than it publishes."""
    assert [one["value"] for one in all_results(facts)] == [0.25]
    assert [one["value"] for one in all_results(dataclasses.replace(facts, run={**RUN, "step": 10}))] == [0.4]
    assert all_results(dataclasses.replace(facts, run={**RUN, "step": 15})) == []


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    """Else an upload beside training fails by half a line of metrics."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 2}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "epoch": 1, "loss": 2}]


@pytest.mark.parametrize("metrics", [METRICS, METRICS[:1], [{"step": 1, "loss": -1.0}, {"step": 2, "loss": 0.0}]])
def test_the_loss_curve_is_a_picture_of_any_losses(metrics):
    """Else a run of one logged step, or of a loss below 0, cannot be published."""
    assert loss_curve(metrics).startswith(b"\x89PNG")


# What people write

NOTE = "Trained for a **paper**; ask me for the data."


def leave_out(card, *sections):
    """The card after its user has named these sections in the mark."""
    return card.replace("Sections left out: none.", f"Sections left out: {', '.join(sections)}.")


def test_writing_again_changes_nothing(facts):
    """Else each push makes a commit, or repeats the block."""
    card = make_card(facts)
    assert make_card(facts, card) == card
    assert not parse_card(card).was_edited()
    assert parse_card(card).above == parse_card(card).below == ""


@pytest.mark.parametrize("side", ["above", "below"])
def test_text_around_the_block_stays(facts, side):
    """Else a push removes what a person wrote."""
    card = make_card(facts)
    edited = {"above": card.replace("<!-- ddpm_hf:", f"{NOTE}\n\n<!-- ddpm_hf:"), "below": card + f"\n{NOTE}\n"}[side]
    assert parse_card(edited).was_edited()
    again = make_card(dataclasses.replace(facts, run={**RUN, "seed": 8}), edited.replace("\n", "\r\n"))
    assert again.count(NOTE) == 1
    assert "| seed | 8 |" in again
    assert "| seed | 7 |" not in again
    assert getattr(parse_card(again), side) == NOTE


def test_a_section_that_the_user_leaves_out_stays_out(facts):
    """Else it comes back with each push, and stands there twice if the user wrote another one."""
    card = make_card(facts, leave_out(make_card(facts), "limits", "training"))
    assert "## Limits" not in card
    assert "## Training" not in card
    assert "## Use" in card
    assert make_card(facts, card) == card


def test_without_its_end_mark_a_block_is_text(facts):
    """Else all that stands between it and the next block is taken for ours, and replaced."""
    card = make_card(facts).replace("<!-- /ddpm_hf -->", NOTE)
    again = make_card(facts, make_card(facts, card))
    assert again.count(NOTE) == 1
    assert again.count("## Use") == 2


def test_a_name_in_the_data_does_not_end_the_block(facts):
    """Else what follows the name becomes the user's text, and is doubled by each push."""
    run = {**RUN, "dataset": {**RUN["dataset"], "name": "a <!-- /ddpm_hf --> b", "on_hub": False}}
    card = make_card(dataclasses.replace(facts, run=run))
    assert parse_card(card).below == ""


def test_a_section_that_is_new_is_added(facts):
    """Else a later evaluation never shows."""
    before = make_card(dataclasses.replace(facts, metrics=[]))
    assert "## Evaluation" not in before
    assert "## Evaluation" in make_card(facts, before)


# A card of version 0.1, which marked each section by itself

OLD_HEAD = "---\nlicense: mit\ntags:\n- ddpm\n- art\n---\n\n"
OLD_SECTIONS = {
    "about": "# model\n\nA model.",
    "training": "## Training\n\n| seed | 7 |",
    "limits": "## Limits\n\nMany.",
}


def short_digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def old_card(above="", between="", below="", deleted=()):
    """What version 0.1 wrote, with a user's text around its sections, in the state of the last push."""
    shown = {name: text for name, text in OLD_SECTIONS.items() if name not in deleted}
    marked = [
        f"<!-- ddpm_hf:{name} {short_digest(text)} -->\n{text}\n<!-- /ddpm_hf -->" for name, text in shown.items()
    ]
    body = "\n\n".join(part for part in (above, marked[0], between, *marked[1:], below) if part)
    text = re.sub("<!-- ddpm_hf:.*?<!-- /ddpm_hf -->", "", body, flags=re.DOTALL).strip()
    head = {"license": "mit", "tags": ["ddpm", "art"]}
    state = short_digest(json.dumps([head, list(shown), text], sort_keys=True))
    return f"{OLD_HEAD}{body}\n\n<!-- ddpm_hf wrote {' '.join(OLD_SECTIONS)} beside {state} -->\n"


def test_an_old_card_gets_one_block(facts):
    """Else each section stands there twice after an upgrade."""
    card = make_card(facts, old_card())
    assert not parse_card(old_card()).was_edited()
    assert card.count("<!-- ddpm_hf") == 1
    assert card.count("# model") == card.count("## Training") == card.count("## Limits") == 1
    assert "art" in head(card)["tags"]
    assert make_card(facts, card) == card


def test_an_old_card_keeps_its_users_text(facts):
    """Else an upgrade of the package deletes what people wrote."""
    old = old_card(above="Above.", between="Between.", below="Below.")
    assert not parse_card(old).was_edited()
    card = make_card(facts, old)
    assert parse_card(card).above == "Above."
    assert parse_card(card).below == "Between.\n\nBelow."


def test_an_old_cards_edited_section_stays_and_is_not_written_again(facts):
    """Else a correction is undone, or stands below what it corrects."""
    old = old_card().replace("| seed | 7 |", "| seed | seven |")
    assert parse_card(old).was_edited()
    card = make_card(facts, old)
    assert "| seed | seven |" in card
    assert card.count("## Training") == 1
    assert "## Limits" in card
    assert parse_card(card).left_out == ("training",)


def test_an_old_cards_deleted_section_stays_out(facts):
    """Else it comes back with the first push of a new version."""
    old = old_card(deleted=["limits"])
    assert not parse_card(old).was_edited()
    card = make_card(facts, old)
    assert "## Limits" not in card
    assert parse_card(card).left_out == ("limits",)


def test_an_old_card_and_its_edit_on_the_hub_are_told_apart():
    """Else an upgrade brings back the folder's old text over a newer one on the Hub, or stops the push."""
    edited = old_card() + f"\n{NOTE}\n"
    assert newer_card(old_card(), edited) == newer_card(edited, old_card()) == edited
    with pytest.raises(ValueError, match="edited here and on the Hub"):
        newer_card(edited, old_card().replace("Many.", "Few."))


def test_a_card_of_other_origin_is_kept_whole(facts):
    """Else the first push over a hand-written card deletes it."""
    before = "---\nlicense: cc-by-4.0\ntags:\n- art\nco2: 12\n---\n# My model\n\n" + NOTE
    card = make_card(dataclasses.replace(facts, license=None), before)
    assert "# My model\n\n" + NOTE in card
    data = head(card)
    assert data["license"] == "cc-by-4.0"
    assert data["co2"] == 12
    assert data["tags"][0] == "art"
    assert "ddpm_hf" in data["tags"]


def test_a_head_that_is_not_yaml_is_refused(facts):
    """Else the upload is refused by the Hub with a page of errors, or the head is lost."""
    with pytest.raises(ValueError, match="not YAML"):
        make_card(facts, "---\ntags: [\n---\ntext")


@given(
    st.dictionaries(st.sampled_from(["tags", "license", "x"]), st.one_of(st.text(), st.lists(st.text()), st.none())),
    st.dictionaries(st.sampled_from(["tags", "license", "x"]), st.one_of(st.text(), st.lists(st.text()))),
)
def test_no_entry_of_a_head_is_lost(before, own):
    """Else tags that a person added vanish."""
    merged = merge_metadata(own, before)
    assert set(merged) == set(before) | set(own)
    for name, value in own.items():
        if isinstance(value, list):
            there = before.get(name)
            there = [] if there is None else there if isinstance(there, list) else [there]
            assert set(merged[name]) == set(value) | set(there)


LINES = st.lists(st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=20), max_size=4).map("\n".join)


@given(LINES, LINES)
def test_all_text_of_the_user_stays(above, below):
    """Else some text, however odd, is lost or doubled when a card is written again."""
    bare = Facts("user/model", SimpleNamespace(), Path())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_hf.publishing.card.merging.SECTIONS", {"use": lambda facts: "## Use"})
        patch.setattr("ddpm_hf.publishing.card.merging.metadata", lambda facts: {"tags": ["ddpm"]})
        card = make_card(bare, f"---\ntags: []\n---\n{above}\n")
        again = make_card(bare, f"{card}\n{below}\n")
        assert (parse_card(again).above, parse_card(again).below) == (above.strip(), below.strip())
        assert make_card(bare, again) == again


def test_what_was_said_of_other_weights_goes(facts, tmp_path):
    """Else a model that was trained on keeps the figures and pictures of the earlier one."""
    before = make_card(facts)
    after = make_card(dataclasses.replace(facts, run={**RUN, "step": 30}), before)
    assert "## Evaluation" not in after
    assert not head(after).get("model-index")
    unknown = make_card(dataclasses.replace(facts, run={}, metrics=[]), before)
    assert "## Training" in unknown  # a folder that does not know how it was trained says nothing of that


def test_another_kind_of_model_is_listed_as_that(facts, tmp_path):
    """Else a model by class is found among the unconditional ones."""
    pipeline = ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=3), DDPMScheduler())
    data = head(make_card(Facts("user/model", pipeline, tmp_path), make_card(facts)))
    assert "pipeline_tag" not in data
    assert "class-conditional-image-generation" in data["tags"]
    assert "unconditional-image-generation" not in data["tags"]


# Between the folder and the Hub


@pytest.mark.parametrize("change", ["license", "tag", "section"])
def test_an_edit_of_any_kind_counts(facts, change):
    """Else a license or a tag that is changed, or a section left out, in one place comes back from the other."""
    published = make_card(facts)
    edited = {
        "license": published.replace("license: mit", "license: cc0-1.0"),
        "tag": published.replace("tags:", "tags:\n- art"),
        "section": leave_out(published, "limits"),
    }[change]
    assert edited != published
    assert parse_card(edited).was_edited()
    assert newer_card(edited, published) == newer_card(published, edited) == edited
    with pytest.raises(ValueError, match="edited here and on the Hub"):
        newer_card(edited, published + f"\n{NOTE}\n")
    plain = dataclasses.replace(facts, license=None)
    again = make_card(plain, edited)
    assert head(again)["license"] == ("cc0-1.0" if change == "license" else "mit")
    assert ("art" in head(again)["tags"]) == (change == "tag")
    assert ("## Limits" in again) == (change != "section")


def test_the_last_to_be_edited_is_taken(facts):
    """Else a push brings back an old text over a person's newer one."""
    published = make_card(facts)
    here, there = published + "\nedited here\n", published + "\nedited there\n"
    assert newer_card("", "") == ""
    assert newer_card(here, "") == here
    assert newer_card("", there) == there
    assert newer_card(published, there) == there
    assert newer_card(here, published) == here
    assert newer_card(here, here) == here


def test_edits_in_both_places_are_not_chosen_between(facts):
    """Else one of two people's texts is deleted."""
    published = make_card(facts)
    with pytest.raises(ValueError, match="edited here and on the Hub"):
        newer_card(published + "\nedited here\n", published + "\nedited there\n")


def test_a_card_that_is_written_here_alone_still_counts_as_edited(facts):
    """Else training again makes an edit in the folder look like the Hub's, and the next push drops it."""
    edited = make_card(facts) + f"\n{NOTE}\n"
    again = make_card(facts, edited, to_hub=False)
    assert parse_card(again).was_edited()
    assert newer_card(again, make_card(facts)) == again
    assert not parse_card(make_card(facts, again)).was_edited()


def test_json_that_is_broken_is_named(tmp_path, facts):
    """Else a push ends in a traceback."""
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run.json"))):
        read_facts(tmp_path, "user/model", facts.pipeline)


def test_the_facts_of_a_folder_are_those_of_its_files(tmp_path, facts):
    """Else the card tells of another run."""
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    found = read_facts(Path(tmp_path), "user/model", facts.pipeline)
    assert (found.run, found.metrics, found.results) == (RUN, METRICS, [])


def test_figures_of_the_training_have_their_units(tmp_path):
    """Else one figure has two names in a card: that of `ddpm-hf evaluate` with its unit, and one without."""
    about = {"samples": 5, "settings": "ddim", "dataset": "photos"}
    run = {"step": 3, "dataset": {"name": "photos"}, "evaluation": about}
    facts = Facts("me/it", None, tmp_path, run, [{"step": 3, "evaluation_colour": 2.0, "evaluation_fid": 9.0}])
    assert {one["metric"] for one in all_results(facts)} == {"colour shift (levels)", "FID"}
