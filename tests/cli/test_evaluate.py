"""`ddpm-hf evaluate` and `compare`: each option changes something, and what cannot work is refused before any work."""

import functools
import hashlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import datasets
import numpy as np
import pytest

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler, TextToImageDDPMPipeline
from tests.support.evaluation import register
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.fixtures_text import tiny_text_pipeline
from tests.support.flag_rows import fits
from tests.support.pictures import encoded, quiet, random_pixels, write_images

T = 20
NAMES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Tiny saved models, folders of images, and a table with classes and captions."""
    root = tmp_path_factory.mktemp("evaluated")
    scheduler = DDPMScheduler(T, beta_schedule="cosine")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(root / "plain")
    by_class = ClassConditionalDDPMPipeline(tiny_unet(num_class_embeds=4), scheduler, dict(enumerate(NAMES)))
    by_class.save_pretrained(root / "classes")
    TextToImageDDPMPipeline(**tiny_text_pipeline().components, guidance_scale=3.0).save_pretrained(root / "text")
    for number, name in enumerate(("unet", "unet_ema")):
        tiny_unet(seed=number).save_pretrained(root / "checkpoint-2" / name)
    facts = {
        "scheduler": json.loads(scheduler.to_json_string()),
        "classes": [],
        "step": 2,
        "files": {},
        "settings": {},
    }
    (root / "checkpoint-2/manifest.json").write_text(json.dumps(facts))
    write_images(root / "images", random_pixels(6, 8, 8))
    write_images(root / "others", random_pixels(7, 8, 8, seed=1))
    write_images(root / "gray", random_pixels(6, 8, 8)[..., 0])
    write_images(root / "one", random_pixels(1, 8, 8))
    write_images(root / "both", random_pixels(3, 8, 8))
    write_images(root / "both", random_pixels(3, 8, 8)[..., 0], "gray-{}.png")
    whole = io.BytesIO()
    np.savez(whole, arr_0=random_pixels(6, 8, 8))
    (root / "cut.npz").write_bytes(whole.getvalue()[:-300])
    flipped = bytearray(whole.getvalue())
    flipped[400] ^= 255
    (root / "flipped.npz").write_bytes(flipped)
    (root / "whole.npz").write_bytes(whole.getvalue())
    with (root / "single.npz").open("wb") as file:
        np.save(file, random_pixels(6, 8, 8))
    write_images(root / "wide", random_pixels(6, 8, 12))
    write_images(root / "mixed", random_pixels(2, 8, 8))
    write_images(root / "mixed", random_pixels(1, 8, 9), "wide-{}.png")
    write_images(root / "broken", random_pixels(4, 8, 8))
    (root / "broken/9.png").write_bytes(encoded(random_pixels(1, 8, 8)[0])[:60])
    for seed, name in enumerate(("train", "validation", "test")):
        write_images(root / f"thirds/{name}", random_pixels(6, 8, 8, seed=10 + seed))
    write_images(root / "splits/train", random_pixels(4, 8, 8))
    write_images(root / "splits/test", random_pixels(5, 8, 8, seed=3))
    columns = {"label": [0, 0, 0, 1, 1, 1], "text": ["red", "blue", "green"] * 2}
    types = {"label": datasets.ClassLabel(names=NAMES), "text": datasets.Value("string")}
    for seed, name in enumerate(("image", "second")):
        cells = [{"bytes": encoded(one), "path": None} for one in random_pixels(6, 8, 8, seed=seed)]
        columns, types = {**columns, name: cells}, {**types, name: datasets.Image()}
    (root / "table").mkdir()
    with quiet():
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
        rows.to_parquet(str(root / "table/data.parquet"))
    return root


class Seen(NamedTuple):
    """How a command ended, what it said and wrote, and what it handed on."""

    code: int
    out: str
    err: str
    folder: Path
    calls: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.json").read_text())

    def files(self) -> list[Path]:
        return sorted(self.folder.rglob("samples/*/*.npy"))


@pytest.fixture
def observe(shop, tmp_path, run, monkeypatch):
    """Runs a command in a new folder, with features that need no weights."""
    from ddpm_hf.cli import evaluation_samples
    from ddpm_hf.data import reading
    from ddpm_hf.inference import loading

    monkeypatch.delenv("HF_TOKEN", raising=False)
    calls, options = {}, register(monkeypatch)
    monkeypatch.setattr("ddpm_hf.evaluation.features.cache.cache_folder", lambda: tmp_path / "cache")

    def noted(name, function):
        def call(*args, **kwargs):
            calls[name] = (args, kwargs)
            return function(*args, **kwargs)

        return call

    load, open_dataset = loading.load, reading.open_dataset
    local = functools.partial(load, shop / "plain")
    monkeypatch.setattr(
        loading, "load", noted("load", lambda name, **more: local() if name == "user/it" else load(name, **more))
    )
    unnamed = lambda name, folder, config, *more: open_dataset(name, folder, None, *more)  # noqa: E731
    monkeypatch.setattr(reading, "open_dataset", noted("data", unnamed))
    monkeypatch.setattr(evaluation_samples, "autocast", noted("autocast", evaluation_samples.autocast))
    made = iter(range(10))

    def call(words: str) -> Seen:
        folder = tmp_path / str(next(made))
        calls.clear()
        options.clear()
        monkeypatch.chdir(tmp_path)
        filled = words.replace("{pixels}", PIXELS).format(shop=shop, out=folder)
        code, out, err = run(*(word.replace("~", " ") for word in filled.split()))
        return Seen(code, out, err, folder, {**calls, "features": options[-1] if options else {}})

    return call


class Row(NamedTuple):
    """An option, given on top of a command, and what it changes from what to what."""

    option: str
    given: str
    see: Any
    model: str = "{shop}/plain"
    more: str = ""
    before: Any = None  # None: anything
    after: Any = None


def sampled(seen):
    """The digest of the sampled images."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in seen.files())).hexdigest()


def stamped(name):
    return lambda seen: seen.record["stamp"][name]


def handed(call, place):
    return lambda seen: seen.calls[call][isinstance(place, str)][place]


def loaded(name):
    return lambda seen: seen.calls["features"][name]


CLASSES, TEXT, HUB = "{shop}/classes", "{shop}/text", "user/it"
PIXELS = "--features quarters --metrics fid --out {out}"
QUICK = "--dataset {shop}/images {pixels} --num-samples 4 --steps 2"
ROWS = [
    Row("dataset", "--dataset {shop}/others", stamped("real_images"), before=6, after=7),
    Row("dataset_config_name", "--dataset-config-name small", handed("data", 2), before=None, after="small"),
    Row("split", "--split test", stamped("real_images"), more="--dataset {shop}/splits", before=4, after=5),
    Row("held_out_split", "--held-out-split test", stamped("held_out_images"), before=None,
        more="--dataset {shop}/splits", after=5),
    Row("image_column", "--image-column second", stamped("dataset_fingerprint"), more="--dataset {shop}/table"),
    Row("label_column", "--label-column label", sampled, CLASSES, "--dataset {shop}/table"),
    Row("resolution", "--resolution 6", stamped("image"), "{shop}/others", "--dataset {shop}/images",
        [3, 8, 8], [3, 6, 6]),
    Row("metrics", "--metrics colour", lambda seen: list(seen.record["results"][0]["figures"]), before=["fid"],
        after=["colour"]),
    Row("features", "--features fourths", stamped("features"), before="quarters", after="fourths"),
    Row("features_weights", "--features-weights w.pt", loaded("weights"), before=None, after="w.pt"),
    Row("trust_remote_code", "--trust-remote-code", loaded("trust_remote_code"), before=False, after=True),
    Row("protocol", "--protocol clean-fid", stamped("protocol"), before="adm", after="clean-fid"),
    Row("likelihood_calls", "--likelihood-calls 4", lambda seen: seen.record.get("likelihood", {}).get("calls"),
        before=None, after=4),
    Row("likelihood_images", "--likelihood-images 3", lambda seen: seen.record["likelihood"]["images"],
        more="--likelihood-calls 4", before=6, after=3),
    Row("likelihood_steps", "--likelihood-steps 3", lambda seen: seen.record["likelihood"]["timesteps"],
        more="--likelihood-calls 0", before=20, after=3),
    Row("num_samples", "--num-samples 5", stamped("samples"), before=4, after=5),
    Row("sampler", "--sampler ddim", sampled),
    Row("steps", "--steps 3", lambda seen: seen.record["results"][0]["network_calls"], before=2, after=3),
    Row("sweep", "--sweep ddim:2~heun:2,3", lambda seen: [one["network_calls"] for one in seen.record["results"]],
        before=[2], after=[2, 3, 5]),
    Row("eta", "--eta 0.5", sampled, more="--sampler ddim"),
    Row("class_", "--class dog", sampled, CLASSES),
    Row("prompt", "--prompt blue", sampled, TEXT),
    Row("guidance_scale", "--guidance-scale 3", lambda seen: seen.record["results"][0]["network_calls"], CLASSES,
        before=2, after=4),
    Row("guidance_rescale", "--guidance-rescale 0.7", sampled, CLASSES, "--guidance-scale 3"),
    Row("guidance_interval", "--guidance-interval 0 5", sampled, CLASSES, "--guidance-scale 3"),
    Row("seed", "--seed 1", sampled),
    Row("batch_size", "--batch-size 3", lambda seen: len(seen.files()), before=1, after=2),
    Row("precision", "--precision bf16", handed("autocast", 1), before="fp32", after="bf16"),
    Row("ema", "--no-ema", sampled, "{shop}/checkpoint-2"),
    Row("revision", "--revision v1", handed("load", "revision"), HUB, before=None, after="v1"),
    Row("token", "--token hf_mine", handed("load", "token"), HUB, before=None, after="hf_mine"),
]  # fmt: skip
# What the rows do not show, and the tests here that do
APART = {
    "caption_column": "test_captions_are_the_prompts_of_a_model_by_text",
    "acceleration": "test_sampling_is_accelerated_unless_it_is_turned_off",
    "device": "test_a_device_is_checked",
    "out": "test_a_second_call_samples_nothing_again",
    "record": "test_figures_of_a_run_are_recorded_for_its_card",
}


@pytest.mark.every(3)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.given.split()[0])
def test_an_option_changes_what_is_seen(row, observe):
    """Else an option is accepted and ignored, or does something else than it says."""
    quick = QUICK.replace("--steps 2", "") if row.option in ("sweep", "resolution") else QUICK
    command = f"evaluate {row.model} {quick} {row.more}"
    steps = " --steps 2" if row.option == "sweep" else ""
    prompt = " --prompt red" if row.model == TEXT else ""
    without = observe(command + steps + prompt)
    given = observe(f"{command} {row.given}")
    assert (without.code, given.code) == (0, 0), without.err + given.err
    before, after = row.see(without), row.see(given)
    assert before != after
    assert fits(before, row.before), before
    assert fits(after, row.after), after


def test_captions_are_the_prompts_of_a_model_by_text(observe):
    """Else a model by text is measured on other texts than the dataset's."""
    from ddpm_hf.cli import evaluation_samples

    kept = []
    original = evaluation_samples.of_chain
    spy = mock.Mock(side_effect=lambda *args: kept.append(args[3]) or original(*args))
    with mock.patch("ddpm_hf.cli.evaluate.of_chain", spy):
        seen = observe(f"evaluate {TEXT} {QUICK} --dataset {{shop}}/table --caption-column text")
    assert seen.code == 0, seen.err
    assert sorted(kept[0].given) == ["blue", "blue", "green", "green", "red", "red"]


def test_classes_are_sampled_as_often_as_they_occur(observe):
    """Else FID compares another mixture of classes with the dataset's."""
    from ddpm_hf.cli.evaluation_samples import conditions_of

    pipeline = SimpleNamespace(
        has_classes=True, null_class=3, default_classes=[0, 1, 2],
        config=SimpleNamespace(id2label={str(i): name for i, name in enumerate(NAMES)}),
    )  # fmt: skip
    labels = np.array([0] * 5 + [1] * 3)
    real = SimpleNamespace(name="it", labels=labels, label_names=["owl", "cat"], count=8)
    conditions = conditions_of(pipeline, real, None, None, (None, 0.0, None), seed=0)
    assert sorted(conditions.labels(8)) == [0] * 3 + [2] * 5  # by their names, not their numbers
    assert conditions.labels(16)[8:] == conditions.labels(8)
    with pytest.raises(ValueError, match="'cow'"):
        conditions_of(pipeline, SimpleNamespace(**{**vars(real), "label_names": ["cow", "cat"]}), None, None,
                      (None, 0.0, None), seed=0)  # fmt: skip


def test_samples_are_those_of_the_sample_command(observe, shop, tmp_path):
    """Else figures are of other images than `ddpm-hf sample` shows."""
    from tests.support.fixtures_cli import images

    seen = observe(f"evaluate {CLASSES} {QUICK} --sampler ddim --seed 5 --batch-size 3 --class owl")
    assert (
        observe("sample {shop}/classes --num-images 4 --steps 2 --sampler ddim --seed 5 --class owl --out {out}")[0]
        == 0
    )
    stored = np.concatenate([np.load(path) for path in seen.files()])
    assert np.array_equal(stored[:, 0], images(tmp_path / "1"))


def test_a_second_call_samples_nothing_again(observe, tmp_path):
    """Else other metrics of the same samples, or a killed evaluation, cost all of the sampling again."""
    words = f"evaluate {{shop}}/plain {QUICK} --batch-size 2 --out {tmp_path}/kept"
    assert observe(words).code == 0
    first = json.loads((tmp_path / "kept/metrics.json").read_text())
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept/samples").rglob("*.np?")}
    victim = min(path for path in times if path.suffix == ".npy")
    victim.unlink()  # as if it had been killed before
    assert observe(words).code == 0
    again = json.loads((tmp_path / "kept/metrics.json").read_text())
    assert first["results"] == again["results"]
    for path, time in times.items():
        assert path == victim or path.stat().st_mtime_ns == time


def test_features_of_real_images_are_kept_in_parts(observe):
    """Else what a stopped evaluation computed of a large dataset is lost."""
    from tests.support.evaluation import PixelFeatures

    sizes, original = [], PixelFeatures.__call__

    def stops(self, images):
        if len(sizes) == 2:
            raise KeyboardInterrupt
        sizes.append(len(images))
        return original(self, images)

    words = "evaluate {shop}/others --dataset {shop}/images {pixels}"
    with mock.patch("ddpm_hf.evaluation.evaluate.CACHED_AT_ONCE", 2):
        with mock.patch.object(PixelFeatures, "__call__", stops):
            seen = observe(words)
        assert (seen.code, sizes) == (130, [2, 2])
        assert "nothing was sampled yet" in seen.err
        sizes.clear()
        counts = lambda self, images: sizes.append(len(images)) or original(self, images)  # noqa: E731
        with mock.patch.object(PixelFeatures, "__call__", counts):
            assert observe(words).code == 0
    assert sizes == [2, 7]  # the rest of the real images, and the samples


def test_a_folder_of_images_is_measured_and_one_equal_to_the_real_has_no_distance(observe):
    """Else images of other programs cannot be measured; or a distance is not one."""
    seen = observe("evaluate {shop}/images --dataset {shop}/images {pixels}")
    assert seen.code == 0, seen.err
    assert abs(seen.record["results"][0]["figures"]["fid"]["value"]) < 1e-6
    assert seen.record["stamp"]["samples"] == 6
    page = (seen.folder / "report.html").read_text()
    assert "quarters" in page
    assert page.count("data:image/png;base64,") == 2


def test_metrics_of_pixels_need_no_network(observe):
    """Else a shift of colours cannot be measured without the download of a network that is not used."""
    with mock.patch("ddpm_hf.evaluation.features.load_extractor", side_effect=AssertionError("a network is loaded")):
        seen = observe("evaluate {shop}/images --dataset {shop}/others --metrics colour,contrast --out {out}")
    assert seen.code == 0, seen.err
    assert set(seen.record["results"][0]["figures"]) == {"colour", "contrast"}
    assert seen.record["stamp"]["features"] is None


def test_the_grid_of_the_sample_command_is_not_a_sample(observe, tmp_path):
    """Else its folder cannot be measured, or the grid is measured as an image."""
    assert observe("sample {shop}/plain --steps 2 --num-images 3 --out {out}").code == 0
    seen = observe("evaluate 0 --dataset {shop}/gray {pixels}")
    assert seen.code == 0, seen.err
    assert seen.record["stamp"]["samples"] == 3
    write_images(tmp_path / "0", random_pixels(2, 8, 8)[..., 0], "mine-{}.png")
    assert observe("evaluate 0 --dataset {shop}/gray {pixels}").record["stamp"]["samples"] == 5  # none is passed over


def test_colours_are_compared_with_colours(observe):
    """Else samples that have lost all colour are without a fault, as the real ones are made gray for them."""
    seen = observe("evaluate {shop}/both --dataset {shop}/images {pixels} --metrics colour")
    assert seen.code == 0, seen.err
    assert seen.record["stamp"]["image"] == [3, 8, 8]
    assert seen.record["results"][0]["figures"]["colour"]["value"] > 0


def test_a_damaged_file_of_features_is_computed_anew(observe):
    """Else an evaluation that was cut off never ends."""
    first = observe(f"evaluate {{shop}}/plain {QUICK}")
    (kept,) = first.folder.glob("samples/*/features-*/*.npz")
    kept.write_bytes(kept.read_bytes()[:-100])
    again = observe(f"evaluate {{shop}}/plain {QUICK}".replace("{out}", str(first.folder)))
    assert again.code == 0, again.err


def test_adms_npz_files_are_read(observe, tmp_path):
    """Else the field's reference sets and the samples of `--format npz` cannot be measured."""
    np.savez(tmp_path / "real.npz", arr_0=random_pixels(6, 8, 8))
    seen = observe(f"evaluate {{shop}}/images --dataset {tmp_path}/real.npz {{pixels}}")
    assert abs(seen.record["results"][0]["figures"]["fid"]["value"]) < 1e-6


def test_images_of_an_npz_file_keep_their_size(observe, tmp_path):
    """Else --resolution is accepted and does nothing."""
    np.savez(tmp_path / "a.npz", arr_0=random_pixels(6, 8, 10))
    words = f"evaluate {tmp_path}/a.npz --dataset {{shop}}/images {{pixels}} --resolution 8"
    assert (observe(f"{words}x10").code, observe(words).code) == (0, 2)


def test_the_likelihood_alone_needs_no_samples(observe):
    """Else a likelihood costs sampling, and a network of features."""
    seen = observe("evaluate {shop}/plain --dataset {shop}/images --metrics none --likelihood-calls 0 --out {out}")
    assert seen.code == 0, seen.err
    assert seen.files() == []
    assert seen.record["results"] == []
    assert seen.record["likelihood"]["calls"] == T
    assert "bits/dim" in seen.out
    assert "(none is held out)" in seen.out
    assert seen.record["likelihood"]["held_out"] is False


def test_all_metrics_are_those_that_can_be_measured_and_the_others_are_named(observe):
    """Else a reader looks for a figure that is not there."""
    seen = observe("evaluate {shop}/images --dataset {shop}/others --metrics all --features quarters --out {out}")
    assert seen.code == 0, seen.err
    measured = set(seen.record["results"][0]["figures"])
    assert {"fid", "colour"} <= measured
    assert not {"sfid", "is"} & measured
    (line,) = [line for line in seen.err.splitlines() if "does not serve" in line]
    assert "sFID" in line
    assert "Inception Score" in line
    seen = observe("evaluate {shop}/one --dataset {shop}/images --metrics all --features quarters --out {out}")
    assert seen.code == 2
    assert "--metrics all: too few images for any metric" in seen.err.splitlines()[-1]
    assert seen.files() == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("evaluate {shop}/plain {pixels}", ("no dataset", "--dataset")),
        ("evaluate {shop}/plain --dataset {shop}/nothing {pixels}", ("nothing",)),
        (f"evaluate {{shop}}/plain {QUICK} --num-samples 1", ("--metrics fid", "2 samples", "got 1")),
        (f"evaluate {{shop}}/plain {QUICK} --dataset {{shop}}/broken", ("9.png",)),
        (f"evaluate {{shop}}/plain {QUICK} --metrics fidd", ("--metrics fidd", "fid")),
        (f"evaluate {{shop}}/plain {QUICK} --metrics sfid", ("--metrics sfid", "spatial", "quarters")),
        (f"evaluate {{shop}}/plain {QUICK} --protocol adn", ("--protocol adn", "adm")),
        (f"evaluate {{shop}}/plain {QUICK} --features quarter", ("quarter",)),
        (f"evaluate {{shop}}/plain {QUICK} --steps 21", ("--steps 21", "20")),
        (f"evaluate {{shop}}/plain {QUICK} --sweep ddim:2", ("--sweep", "--steps 2")),
        ("evaluate {shop}/plain --dataset {shop}/images --sweep ddim=2 --out {out}", ("'ddim=2'", "SAMPLER:STEPS")),
        (f"evaluate {{shop}}/plain {QUICK} --eta 0.5", ("--eta 0.5", "ddim")),
        (f"evaluate {{shop}}/plain {QUICK} --resolution 16", ("--resolution", "plain")),
        (f"evaluate {{shop}}/plain {QUICK} --likelihood-calls 2", ("--likelihood-calls 2", "4 to 20")),
        (f"evaluate {{shop}}/plain {QUICK} --likelihood-steps 5", ("--likelihood-steps 5", "--likelihood-calls")),
        (f"evaluate {{shop}}/plain {QUICK} --likelihood-calls 0 --likelihood-steps 21", ("--likelihood-steps 21",)),
        (f"evaluate {{shop}}/plain {QUICK} --likelihood-calls 6 --likelihood-steps 5", ("--likelihood-calls 6", "5")),
        (f"evaluate {{shop}}/plain {QUICK} --sampler fitted", ("no fitted steps", "fit-timesteps")),
        (f"evaluate {{shop}}/plain {QUICK} --held-out-split validation", ("validation",)),
        (f"evaluate {TEXT} {QUICK}", ("--caption-column", "--prompt")),
        (f"evaluate {CLASSES} {QUICK} --likelihood-calls 4", ("--label-column",)),
        ("evaluate {shop}/mixed --dataset {shop}/images {pixels}", ("wide-0.png", "8x9")),
        ("evaluate {shop}/gray --dataset {shop}/images {pixels}", ("in colour", "gray", "convert")),
        ("evaluate {shop}/gray --dataset {shop}/images --resolution 4 {pixels}", ("in colour", "gray", "convert")),
        ("evaluate {shop}/cut.npz --dataset {shop}/images {pixels}", ("cut.npz", "not a complete npz")),
        ("evaluate {shop}/images --dataset {shop}/flipped.npz {pixels}", ("flipped.npz", "not a complete npz")),
        ("evaluate {shop}/images --dataset {shop}/single.npz {pixels}", ("single.npz", "a single array")),
        ("evaluate {shop}/images --dataset {shop}/whole.npz --held-out-split x {pixels}", ("--held-out-split x",)),
        ("evaluate {shop}/images --dataset {shop}/whole.npz --label-column x {pixels}", ("--label-column x",)),
        ("evaluate {shop}/plain --dataset {shop}/images --sweep ddim:00 --out {out}", ("'ddim:00'",)),
        ("evaluate {shop}/wide --dataset {shop}/images {pixels}", ("8x12", "--resolution")),
        ("evaluate {shop}/broken --dataset {shop}/images {pixels}", ("9.png",)),
        ("evaluate {shop}/images --dataset {shop}/images --steps 5 {pixels}", ("--steps",)),
        ("evaluate {shop}/images --dataset {shop}/images --guidance-scale 2 {pixels}", ("--guidance-scale",)),
        ("evaluate {shop}/images --dataset {shop}/images --sampler dpm++ {pixels}", ("--sampler",)),
        ("evaluate {shop}/images --dataset {shop}/images --sampler ddim --eta 1 {pixels}", ("--eta",)),
        ("evaluate {shop}/images --dataset {shop}/others --num-samples 9 --features quarters", ("--num-samples 9",)),
        ("compare {shop}/images {shop}/others", ("metrics.json",)),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_before_any_work(words, named, observe):
    """Else hours of sampling end in an error, or in a wrong figure."""
    seen = observe(words)
    assert_one_line(seen[:3], *named)
    assert not seen.folder.exists()


def test_features_that_are_not_finite_are_refused(observe):
    """Else a figure is NaN."""
    from tests.support.evaluation import Features, PixelFeatures

    bad = lambda self, images: Features(np.full((len(images), 4), np.nan, np.float32))  # noqa: E731
    with mock.patch.object(PixelFeatures, "__call__", bad):
        seen = observe(f"evaluate {{shop}}/plain {QUICK}")
    assert seen.code == 2
    assert "not finite" in seen.err.splitlines()[-1]
    assert seen.files() == []


def test_a_device_is_checked(observe):
    """Else --device is ignored."""
    assert_one_line(observe(f"evaluate {{shop}}/plain {QUICK} --device meta")[:3], "--device meta", "cpu")


def test_sampling_is_accelerated_unless_it_is_turned_off(observe):
    """Else --acceleration none is ignored, or nobody has what is the default."""
    with mock.patch.object(DDPMPipeline, "enable_acceleration") as enabled:
        assert observe(f"evaluate {{shop}}/plain {QUICK} --acceleration none").code == 0
        assert not enabled.called
        assert observe(f"evaluate {{shop}}/plain {QUICK}").code == 0
        assert enabled.called


def test_evaluations_are_compared_and_unlike_ones_refused(observe, run, tmp_path):
    """Else figures that mean different things stand side by side."""
    for words in ("", "--seed 1", "--protocol clean-fid", "--num-samples 5", "--dataset {shop}/others"):
        assert observe(f"evaluate {{shop}}/plain {QUICK} {words}").code == 0
    folders = [str(tmp_path / str(number)) for number in range(5)]
    code, out, err = run("compare", *folders[:2])
    assert code == 0, err
    for folder in folders[:2]:
        value = json.loads((Path(folder) / "metrics.json").read_text())["results"][0]["figures"]["fid"]["value"]
        assert folder in out
        assert f"{value:.5g}" in out
    for other, named in zip(
        folders[2:], (("protocol", "adm", "clean-fid"), ("number of samples", "4", "5"), ("real",))
    ):
        assert_one_line(run("compare", folders[0], other), folders[0], other, *named)


def test_likelihoods_are_compared(observe, run, tmp_path):
    """Else models of the same data cannot be compared by their bits."""
    for words in ("", "--seed 1"):
        of_one = f"--metrics none --likelihood-calls 4 --likelihood-images 2 {words} --out {{out}}"
        assert observe(f"evaluate {{shop}}/plain --dataset {{shop}}/images {of_one}").code == 0
    folders = [tmp_path / "0", tmp_path / "1"]
    code, out, err = run("compare", *folders)
    assert code == 0, err
    assert "likelihood (bits/dim)" in out
    for folder in folders:
        assert f"{json.loads((folder / 'metrics.json').read_text())['likelihood']['value']:.5g}" in out


def test_likelihoods_of_other_chains_or_images_are_not_compared(observe, run, tmp_path):
    """Else a bound over four steps, or of training images, stands beside one over all and of held-out ones."""
    base = "evaluate {shop}/plain --dataset {shop}/thirds --metrics none --likelihood-calls 4 --out {out} "
    words = ("", "--held-out-split test", "--likelihood-steps 4", "--likelihood-images 2")
    assert [observe(base + one).code for one in words] == [0] * 4
    for other, named in (("1", "held-out"), ("2", "steps of the chain"), ("3", "number of images")):
        assert_one_line(run("compare", tmp_path / "0", tmp_path / other), named)


def test_figures_of_other_held_out_images_are_not_compared(observe, run, tmp_path):
    """Else the share of copies is compared, though it rests on other images."""
    for split in ("test", "validation"):
        words = (
            f"--dataset {{shop}}/thirds --held-out-split {split} --metrics nearest --features quarters --out {{out}}"
        )
        seen = observe(f"evaluate {{shop}}/images {words}")
        assert seen.code == 0, seen.err
    assert_one_line(run("compare", tmp_path / "0", tmp_path / "1"), "held-out images")


def test_a_damaged_record_is_one_line(observe, run, tmp_path):
    """Else `compare` ends in a traceback."""
    record = json.loads((observe(f"evaluate {{shop}}/plain {QUICK}").folder / "metrics.json").read_text())
    figure = record["results"][0]["figures"]["fid"]
    for damaged in (
        {**record, "stamp": None},
        {**record, "results": [{"title": "x"}]},
        {**record, "results": [{"title": "x", "figures": {"fid": {"value": figure["value"]}}}]},
        {**record, "likelihood": {"value": 1.0}},
    ):
        (tmp_path / "metrics.json").write_text(json.dumps(damaged))
        assert_one_line(run("compare", tmp_path / "0", tmp_path / "metrics.json"), "metrics.json is damaged")


def test_a_likelihood_of_one_image_is_json(observe):
    """Else no other program reads metrics.json."""
    words = "--metrics none --likelihood-calls 4 --out {out}"
    seen = observe(f"evaluate {{shop}}/plain --dataset {{shop}}/one {words}")
    assert seen.code == 0, seen.err

    def refuse(word):
        raise AssertionError(word)

    record = json.loads((seen.folder / "metrics.json").read_text(), parse_constant=refuse)
    assert record["likelihood"]["low"] is None
    assert "(of 1 image" in seen.out


def test_what_was_sampled_otherwise_is_recorded_as_such(observe, shop, tmp_path):
    """Else a card shows figures of one class, or with guidance, as the model's own."""
    shutil.copytree(shop / "classes", tmp_path / "run")
    (tmp_path / "run/run.json").write_text(json.dumps({"step": 1}))
    usual = f"evaluate {tmp_path}/run {QUICK} --sampler ddim --class cat --class dog"
    for words in (
        usual,
        f"{usual} --guidance-scale 3",
        f"{usual} --guidance-scale 0",
        f"{usual} --eta 0.5",
        f"{usual} --class owl",
    ):
        assert observe(words).code == 0
    results = json.loads((tmp_path / "run/evaluation.json").read_text())
    settings = [one["settings"].partition(";")[0] for one in results]
    assert settings == [
        "ddim, 2 steps, classes cat, dog",
        "ddim, 2 steps, guidance scale 3.0, classes cat, dog",
        "ddim, 2 steps, guidance scale 0.0, classes cat, dog",
        "ddim, 2 steps, eta 0.5, classes cat, dog",
        "ddim, 2 steps, classes cat, dog, owl",
    ]


def test_figures_of_a_run_are_recorded_for_its_card(observe, shop, tmp_path):
    """Else the model's card does not say how good it is."""
    shutil.copytree(shop / "plain", tmp_path / "run")
    (tmp_path / "run/run.json").write_text(json.dumps({"step": 7, "sessions": []}))
    assert observe(f"evaluate {tmp_path}/run {QUICK} --no-record").code == 0
    assert not (tmp_path / "run/evaluation.json").exists()
    assert observe(f"evaluate {tmp_path}/run {QUICK}").code == 0
    (one,) = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert (one["metric"], one["samples"], one["step"], "adm" in one["settings"]) == ("FID", 4, 7, True)
