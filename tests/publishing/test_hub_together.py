"""Several repositories in one process, and what becomes of a model that is loaded, saved and published again."""

import json
from pathlib import Path

import numpy as np
import pytest

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from ddpm_hf.portable import hub_ddpm_hf
from tests.support.drawing_hub import draw
from tests.support.fixtures_hub import DRAWING, ROOT, TOKEN, WITHOUT, run
from tests.support.fixtures_pipeline import tiny_unet, tiny_vae
from tests.support.fixtures_text import tiny_text_pipeline
from tests.support.hub_server import Hub

pytestmark = pytest.mark.slow  # `test_hub.py` does the same for one kind of model

PORTABLE = Path(hub_ddpm_hf.__file__).parent
# An earlier version of our code, which gave the image's negative
OLDER = ("return self.image_processor.postprocess(latents.float()", "return self.image_processor.postprocess(-latents")


def make_plain():
    """What stock samples as we do."""
    return DDPMPipeline(tiny_unet(3), DDPMScheduler(beta_schedule="sigmoid", num_train_timesteps=20))


def make_by_class():
    """Two classes and none, in pixels."""
    unet = tiny_unet(3, num_class_embeds=3, seed=1)
    scheduler = DDPMScheduler(num_train_timesteps=20, prediction_type="posterior_mean")
    return ClassConditionalDDPMPipeline(unet, scheduler, {0: "cat", 1: "dog"})


def make_latents():
    """Unconditional, in latents."""
    scheduler = DDPMScheduler(num_train_timesteps=20, clip_sample=False)
    return DDPMPipeline(tiny_unet(4, seed=2), scheduler, tiny_vae(scaling_factor=0.5))


MODELS = {"plain": make_plain, "by-class": make_by_class, "latents": make_latents, "text": tiny_text_pipeline}
WAYS = {
    "stock": ("plain", {}),
    "custom": ("plain", {"custom_pipeline": "pipeline_ddpm_hf", "trust_remote_code": True}),
    "older": ("older", {"custom_pipeline": "pipeline_ddpm_hf", "trust_remote_code": True}),
    "by-class": ("by-class", {"trust_remote_code": True}),
    "latents": ("latents", {"trust_remote_code": True}),
    "text": ("text", {}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub with a model of each kind, and one of an older version of our code; where they are drawn to."""
    root = tmp_path_factory.mktemp("together")
    with Hub({TOKEN: "user"}) as hub:
        for name, make in MODELS.items():
            pipeline = make()
            pipeline.save_pretrained(root / name)
            np.save(root / f"{name}.npy", draw(pipeline))
            hub.put(f"user/{name}", root / name)
        make_plain().save_pretrained(root / "older")
        code = root / "older" / "sampling_ddpm_hf.py"
        assert code.read_text().count(OLDER[0]) == 1
        code.write_text(code.read_text().replace(*OLDER))
        hub.put("user/older", root / "older")
        np.save(root / "older.npy", 1 - np.load(root / "plain.npy"))
        yield hub, root


# Together in one process

TOGETHER = """
root, source, ways, orders, samplers = Path(sys.argv[1]), sys.argv[2], *map(json.loads, sys.argv[3:])

def together(tag, order):
    if tag == "beside-the-package":  # as where it is installed
        del sys.modules["ddpm_hf"]
        sys.path.insert(0, source)
        import ddpm_hf
    records, pipelines = {}, {}
    for name in order:
        repository, options = ways[name]
        records[name], pipelines[name] = attempt(root / f"{tag}-{name}.npy", f"user/{repository}", **options)
    for name in (name for name in order if pipelines[name] is not None):
        np.save(root / f"{tag}-{name}-again.npy", draw(pipelines[name]))
        if tag == "forwards":
            records[name]["swapped"] = swapped(pipelines[name])
    return records

def swapped(pipeline):
    before, own, results = draw(pipeline), type(pipeline.scheduler), {}
    for sampler in samplers:
        try:
            pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
            drawn = draw(pipeline)
            results[sampler] = drawn.shape == before.shape and bool(np.isfinite(drawn).all())
        except Exception as error:
            results[sampler] = f"{type(error).__name__}: {error}"
        pipeline.scheduler = own.from_config(pipeline.scheduler.config)
        results[f"{sampler} and back"] = bool((draw(pipeline) == before).all())
    return results

print(json.dumps({tag: apart(together, tag, order) for tag, order in orders.items()}))
"""
SAMPLERS = [
    *("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    *("EulerDiscreteScheduler", "PNDMScheduler"),
]
EACH = [name for name in WAYS if name != "older"]
ORDERS = {"forwards": EACH, "backwards": EACH[::-1], "beside-the-package": EACH}
VERSIONS = {"newer-first": ["custom", "older"], "older-first": ["older", "custom"]}


@pytest.fixture(scope="module")
def together(world):
    """What processes make of several repositories, in several orders."""
    hub, root = world
    arguments = root, ROOT, *map(json.dumps, (WAYS, ORDERS | VERSIONS, SAMPLERS))
    return run(hub, root / "home", WITHOUT + DRAWING + TOGETHER, *arguments, isolated=True)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("order", ORDERS)
def test_repositories_in_one_process_do_not_disturb_each_other(world, together, order, name):
    """Else what a model draws depends on what else a program has loaded, before or since."""
    root = world[1]
    assert "error" not in together[order][name]
    assert together[order][name]["pipeline"].startswith(("diffusers.", "diffusers_modules."))
    expected = np.load(root / f"{WAYS[name][0]}.npy")
    np.testing.assert_allclose(np.load(root / f"{order}-{name}.npy"), expected, atol=1e-3)
    np.testing.assert_allclose(np.load(root / f"{order}-{name}-again.npy"), expected, atol=1e-3)


@pytest.mark.parametrize("name", EACH)
def test_samplers_swap_in_and_back_without_the_package(together, name):
    """Else what the documentation of Diffusers says of samplers does not hold for a model from the Hub."""
    results = together["forwards"][name]["swapped"]
    for sampler in SAMPLERS:
        assert results[f"{sampler} and back"] is True
        if name == "by-class":  # a posterior's mean
            assert "sample with ddpm_hf's DDPMScheduler" in results[sampler]
        elif name == "stock" and sampler in ("UniPCMultistepScheduler", "PNDMScheduler"):
            assert "'generator'" in results[sampler]  # which stock's unconditional pipeline hands to each of them
        else:
            assert results[sampler] is True


@pytest.mark.parametrize("order", VERSIONS)
def test_the_first_repositorys_version_of_our_code_draws(world, together, order):
    """Else a program that has loaded one model breaks with the next."""
    first = VERSIONS[order][0]
    expected = np.load(world[1] / f"{WAYS[first][0]}.npy")
    for moment in ("", "-again"):  # before and after the second
        np.testing.assert_allclose(np.load(world[1] / f"{order}-{first}{moment}.npy"), expected, atol=1e-3)


@pytest.mark.parametrize("order", VERSIONS)
def test_a_second_version_of_our_code_in_one_process_is_refused(world, together, order):
    """Else Diffusers mixes the two, and a model draws other images than it should, without a word."""
    error = together[order][VERSIONS[order][1]]["error"]
    assert "another version of sampling_ddpm_hf.py" in error
    assert "new process" in error


# Loaded, saved and published again

AGAIN = """
root, models, source, token = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
OURS = {"by-class": "ClassConditionalDDPMPipeline", "text": "TextToImageDDPMPipeline"}

def ours(model):
    del sys.modules["ddpm_hf"]  # as where it is installed
    sys.path.insert(0, source)
    import ddpm_hf
    return getattr(ddpm_hf, OURS.get(model, "DDPMPipeline"))

def publish(tag, model, options):
    cls, options = (ours(model), {}) if options == "ours" else (DiffusionPipeline, options)
    record, pipeline = attempt(root / f"{tag}-first.npy", f"user/{model}", cls, **options)
    if tag.endswith("at once"):
        pipeline.push_to_hub(f"user/{tag.replace(' ', '-')}", token=token)
    else:
        from huggingface_hub import HfApi
        pipeline.save_pretrained(root / tag)
        api = HfApi(token=token)
        api.create_repo(f"user/{tag}")
        api.upload_folder(repo_id=f"user/{tag}", folder_path=root / tag)
    return record

def load(tag, model, options):
    repository = f"user/{tag.replace(' ', '-')}"
    record = attempt(root / f"{tag}-second.npy", repository, **options)[0]
    return [record, attempt(root / f"{tag}-third.npy", repository, ours(model))[0]]

results = {}
for tag, (model, first, second) in models.items():
    results[tag] = [apart(publish, tag, model, first), *apart(load, tag, model, second)]
print(json.dumps(results))
"""
TRUST, CUSTOM = {"trust_remote_code": True}, WAYS["custom"][1]
# which model, how it is loaded before it is saved, and how a stranger loads what is published then
PASSED_ON = {
    "plain-by-stock": ("plain", {}, {}),
    "plain-by-its-code": ("plain", CUSTOM, CUSTOM),
    "plain-by-us": ("plain", "ours", {}),
    "by-class-by-its-code": ("by-class", TRUST, TRUST),
    "by-class-by-us at once": ("by-class", "ours", TRUST),
    "latents-by-its-code": ("latents", TRUST, TRUST),
    "text-by-stock": ("text", {}, {}),
    "text-by-us": ("text", "ours", {}),
}


@pytest.fixture(scope="module")
def passed_on(world):
    """What was said while models were loaded, published again, and loaded again."""
    hub, root = world
    arguments = root, json.dumps(PASSED_ON), ROOT, TOKEN
    return run(hub, root / "home", WITHOUT + DRAWING + AGAIN, *arguments, isolated=True)


@pytest.mark.parametrize("tag", PASSED_ON)
def test_a_model_passed_on_draws_the_same_images(world, passed_on, tag):
    """Else a model changes on its way through other hands, or no longer loads."""
    expected = np.load(world[1] / f"{PASSED_ON[tag][0]}.npy")
    for record, place in zip(passed_on[tag], ("first", "second", "third"), strict=True):
        assert "error" not in record
        np.testing.assert_allclose(np.load(world[1] / f"{tag}-{place}.npy"), expected, atol=1e-3)
    assert passed_on[tag][2]["pipeline"].startswith("ddpm_hf.portable.pipeline_")


@pytest.mark.parametrize("tag", [tag for tag in PASSED_ON if not tag.endswith("stock")])
def test_a_model_passed_on_by_our_code_is_the_same_repository(world, passed_on, tag):
    """Else its code, its class or its names are lost, or the second owner's folders are published."""
    hub, _ = world
    before, after = hub.files(f"user/{PASSED_ON[tag][0]}"), hub.files(f"user/{tag.replace(' ', '-')}")
    for scrap in (".gitattributes", "README.md"):
        after.pop(scrap, None)
    assert set(before) == set(after)
    changed = [path for path in before if before[path] != after[path]]
    assert [path for path in changed if not path.startswith("tokenizer/")] == []
    for path in changed:  # transformers notes how it was loaded, and how it last padded
        old, new = json.loads(before[path]), json.loads(after[path])
        noted = {"is_local", "local_files_only", "padding", "truncation"}
        assert {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} <= noted


@pytest.mark.parametrize("tag", [tag for tag in PASSED_ON if tag.endswith("stock")])
def test_a_model_passed_on_by_stock_is_still_stocks(world, passed_on, tag):
    """Stock leaves our code out; else it would say something that is no longer so."""
    hub, _ = world
    model = PASSED_ON[tag][0]
    before, after = (json.loads(hub.files(f"user/{name}")["model_index.json"]) for name in (model, tag))
    parts = {name: entry for name, entry in before.items() if not name.startswith("_diffusers")}
    if "_guidance_scale" in parts:  # of our pipelines alone
        assert after.get("_guidance_scale") is None
        del parts["_guidance_scale"]
    assert {name: after.get(name) for name in parts} == parts
    assert passed_on[tag][1]["said"] == ""
