"""A saved folder: what it says, and that a stranger without this package loads it and gets the same images."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import ddpm_hf.portable
from ddpm_hf import DDPMPipeline, DDPMScheduler
from ddpm_hf.portable import hub_ddpm_hf
from tests.support import warm
from tests.support.fixtures_hub import DRAWING, WITHOUT, bare_environment
from tests.support.fixtures_pipeline import tiny_pipeline, tiny_vae
from tests.support.runs import contents, read

PORTABLE = Path(ddpm_hf.portable.__file__).parent
FILES = sorted(path.name for path in PORTABLE.glob("*.py") if path.name != "__init__.py")
IN_PIPELINE = ("pipeline_ddpm_hf.py", "hub_ddpm_hf.py", "scheduling_ddpm_hf.py")  # the least that must lie there

# what stock samples as ours does, and what it does not
STOCK_RIGHT = {
    "plain": {},
    "cosine": {"beta_schedule": "cosine", "prediction_type": "v_prediction"},
    "fixed_large": {"variance_type": "fixed_large"},
    "fixed_small_log": {"variance_type": "fixed_small_log"},
    "learned_range": {"variance_type": "learned_range"},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "sample", "timestep_spacing": "trailing"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "const": {"beta_schedule": "const", "beta_end": 0.01, "variance_type": "fixed_large"},
}
STOCK_WRONG = {
    "posterior_mean": {"prediction_type": "posterior_mean"},
    "learned": {"variance_type": "learned"},
    "fixed_large_log": {"variance_type": "fixed_large_log"},
    "vae": {},
}
MODELS = STOCK_RIGHT | STOCK_WRONG


def make_pipeline(name):
    return tiny_pipeline(4, tiny_vae(), **MODELS[name]) if name == "vae" else tiny_pipeline(3, **MODELS[name])


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(2, torch.Generator().manual_seed(0), 5, "np").images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each model, by name."""
    root = tmp_path_factory.mktemp("saved")
    for name in MODELS:
        make_pipeline(name).save_pretrained(root / name)
    return root


# What the folder says


@pytest.mark.parametrize("name", MODELS)
def test_index_names_what_loads_anywhere(saved, name):
    """Else the Hub refuses a component of a foreign library, or stock draws other images without saying so."""
    index = read(saved / name / "model_index.json")
    expected = "DDPMPipeline" if name in STOCK_RIGHT else ["pipeline_ddpm_hf", "DDPMPipeline"]
    assert index.pop("_class_name") == expected
    assert index.pop("_diffusers_version") == diffusers.__version__
    components = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    if name == "vae":
        components["vae"] = ["diffusers", "AutoencoderKL"]
    assert index == components  # no path of this machine, no absent component


@pytest.mark.parametrize("name", MODELS)
def test_scheduler_config_is_one_that_stock_reads(saved, name):
    """Else stock warns of keys it does not know, or cannot make the schedule."""
    config = read(saved / name / "scheduler" / "scheduler_config.json")
    known = inspect.signature(diffusers.DDPMScheduler.__init__).parameters
    assert {key for key in config if not key.startswith("_")} <= set(known)
    assert config["_class_name"] == "DDPMScheduler"
    assert (config["trained_betas"] is not None) == (name in ("sigmoid", "const"))
    betas = DDPMScheduler(**MODELS[name]).exact_tables.betas.numpy()
    if config["trained_betas"] is not None:
        np.testing.assert_array_equal(config["trained_betas"], betas)


@pytest.mark.parametrize("name", MODELS)
def test_the_code_lies_beside_and_is_the_packages(saved, name):
    """Else a stranger has weights and no class to run them, or an older one."""
    there = {path.name for path in (saved / name).glob("*.py")}
    assert set(IN_PIPELINE) <= there <= set(FILES)
    for file in there:
        assert (saved / name / file).read_bytes() == (PORTABLE / file).read_bytes()
        assert relative_imports(file) <= {other.removesuffix(".py") for other in there}


@pytest.mark.parametrize(
    "sampler", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"]
)
def test_a_folder_saved_with_another_sampler_never_pretends(sampler, tmp_path):
    """Stock's pipeline scales no input and hands no generator to each: it must draw ours, or not be named."""
    pipeline = make_pipeline("plain")
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    index = read(tmp_path / "model_index.json")
    assert index["scheduler"] == ["diffusers", sampler]
    if index["_class_name"] == "DDPMPipeline":
        np.testing.assert_allclose(draw(diffusers.DDPMPipeline.from_pretrained(tmp_path)), draw(pipeline), atol=1e-3)
    np.testing.assert_allclose(draw(DDPMPipeline.from_pretrained(tmp_path)), draw(pipeline), atol=1e-3)


# With the package


@pytest.mark.parametrize("name", MODELS)
def test_our_class_loads_it_without_trust_and_saves_it_the_same(saved, name, tmp_path):
    """Else who has the package must trust remote code, or a model passed on changes on the way."""
    pipeline = DDPMPipeline.from_pretrained(saved / name)
    assert type(pipeline) is DDPMPipeline
    assert type(pipeline.scheduler) is DDPMScheduler
    np.testing.assert_allclose(draw(pipeline), draw(make_pipeline(name)), atol=1e-3)
    pipeline.save_pretrained(tmp_path)
    assert contents(saved / name) == contents(tmp_path)


class UsersPipeline(DDPMPipeline):
    """Stands in for a class that a user derived."""


def test_a_users_subclass_is_saved_as_the_class_it_derives_from(tmp_path):
    """Else the folder names a class, or lacks a file, that nobody else has."""
    plain = make_pipeline("posterior_mean")
    UsersPipeline(**plain.components).save_pretrained(tmp_path / "users")
    plain.save_pretrained(tmp_path / "plain")
    assert contents(tmp_path / "users") == contents(tmp_path / "plain")
    assert type(UsersPipeline.from_pretrained(tmp_path / "users")) is UsersPipeline


def test_an_interrupted_save_leaves_the_old_index_and_no_scraps(tmp_path, monkeypatch):
    """Else a full disk or a kill leaves half a model_index.json, and the model no longer loads."""
    make_pipeline("plain").save_pretrained(tmp_path)
    before = contents(tmp_path)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(hub_ddpm_hf.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        make_pipeline("posterior_mean").to_json_file(tmp_path / "model_index.json")
    with pytest.raises(OSError, match="no space"):
        make_pipeline("posterior_mean").save_config(tmp_path)
    assert contents(tmp_path) == before


def test_the_upload_has_the_whole_contract(tmp_path, monkeypatch):
    """Else `push_to_hub=True` uploads before the index is rewritten and the code is copied."""
    uploaded = {}

    class Repository:
        repo_id = "user/model"

    module = importlib.import_module("diffusers.pipelines.pipeline_utils")
    monkeypatch.setattr(module, "create_repo", lambda *_, **__: Repository())
    monkeypatch.setattr(module, "load_or_create_model_card", lambda *_, **__: None)
    monkeypatch.setattr(module, "populate_model_card", lambda *_, **__: type("Card", (), {"save": lambda *_: None})())
    monkeypatch.setattr(
        DDPMPipeline, "_upload_folder", lambda self, folder, *_, **__: uploaded.update(contents(Path(folder)))
    )
    pipeline = make_pipeline("posterior_mean")
    pipeline.save_pretrained(str(tmp_path / "pushed"), push_to_hub=True)
    pipeline.save_pretrained(tmp_path / "kept")
    assert uploaded == contents(tmp_path / "kept")


# The code itself


def imports_of(file):
    """The import statements of a portable file."""
    tree = ast.parse((PORTABLE / file).read_text())
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def relative_imports(file):
    return {node.module for node in imports_of(file) if isinstance(node, ast.ImportFrom) and node.level}


@pytest.mark.parametrize("file", FILES)
def test_portable_files_import_only_what_a_stranger_has(file):
    """Else the code fails where this package is not installed."""
    assert file.endswith("_ddpm_hf.py")  # one folder holds the remote code of all repositories
    for node in imports_of(file):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert f"{node.module}.py" in FILES  # `from . import x` and folders are not copied
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                root = name.split(".")[0]
                assert root in {"torch", "numpy", "diffusers", "transformers"} or root in sys.stdlib_module_names


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("pipeline_")])
def test_pipelines_import_directly_all_they_need(file):
    """From a local folder only direct imports are copied: else the second level is missing at the stranger's."""
    needed, pending = set(), relative_imports(file)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending |= relative_imports(f"{name}.py")
    assert needed == relative_imports(file)


@pytest.mark.parametrize("file", FILES)
def test_one_pipeline_class_a_file(file):
    """Diffusers takes the one pipeline class that it finds in a file, also an imported one: else it finds two."""
    module = importlib.import_module(f"ddpm_hf.portable.{file.removesuffix('.py')}")
    found = {
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, diffusers.DiffusionPipeline)
        and value is not diffusers.DiffusionPipeline
    }
    assert len(found) == file.startswith("pipeline_")


# Without the package, in a fresh process

STRANGER = (
    WITHOUT
    + DRAWING
    + """
root, out = map(Path, sys.argv[1:])
results = {}
try:
    import ddpm_hf
except ImportError:
    results["package"] = "absent"


def keep(label, folder, **options):
    results[label], pipeline = attempt(out / f"{label}.npy", folder, **options)
    if pipeline is not None and type(pipeline).__module__.endswith("_ddpm_hf"):
        pipeline.save_pretrained(out / label)


for folder in sorted(root.iterdir()):
    keep(f"{folder.name}-plainly", folder)
    if json.loads((folder / "model_index.json").read_text())["_class_name"] == "DDPMPipeline":
        keep(f"{folder.name}-ours", folder, custom_pipeline="pipeline_ddpm_hf", trust_remote_code=True)
    else:
        keep(f"{folder.name}-ours", folder, trust_remote_code=True)
keep("untrusted", root / "plain", custom_pipeline="pipeline_ddpm_hf")
keep("again", out / "learned-ours", trust_remote_code=True)
(out / "results.json").write_text(json.dumps(results))
"""
)


@pytest.fixture(scope="module")
def stranger(saved, tmp_path_factory):
    """What a process without this package makes of the folders: the records, and where its files lie."""
    home = tmp_path_factory.mktemp("stranger")
    (home / "out").mkdir()
    environment = bare_environment(home / "hf", HF_HUB_OFFLINE="1")
    done = warm.run("-c", STRANGER, saved, home / "out", cwd=home, env=environment, isolated=True)
    assert done.returncode == 0, done.stderr
    return read(home / "out" / "results.json"), home / "out"


def test_the_stranger_is_one(stranger):
    """Else the tests below show nothing."""
    assert stranger[0]["package"] == "absent"


@pytest.mark.parametrize("name", STOCK_RIGHT)
def test_stock_loads_without_a_warning_and_draws_our_images(stranger, name):
    """Else a model published from here is second-rate for everyone who only has Diffusers."""
    records, out = stranger
    record = records[f"{name}-plainly"]
    assert "error" not in record
    assert record["said"] == ""
    assert record["pipeline"].startswith("diffusers.pipelines.")
    assert record["scheduler"].startswith("diffusers.schedulers.")
    np.testing.assert_allclose(np.load(out / f"{name}-plainly.npy"), draw(make_pipeline(name)), atol=1e-3)


@pytest.mark.parametrize("name", STOCK_WRONG)
def test_what_stock_gets_wrong_is_refused_without_trust(stranger, name):
    """Else stock would draw something else from the folder, without a word."""
    record = stranger[0][f"{name}-plainly"]
    assert "trust_remote_code" in record["error"]


@pytest.mark.parametrize("name", MODELS)
def test_our_code_runs_from_the_folder(stranger, name):
    """Else the files beside the weights are not enough to run them."""
    records, out = stranger
    record = records[f"{name}-ours"]
    assert "error" not in record
    assert record["pipeline"].endswith("pipeline_ddpm_hf.DDPMPipeline")
    assert record["scheduler"].endswith("scheduling_ddpm_hf.DDPMScheduler")
    assert record["pipeline"].startswith("diffusers_modules.")
    np.testing.assert_allclose(np.load(out / f"{name}-ours.npy"), draw(make_pipeline(name)), atol=1e-3)


def test_running_the_folders_code_takes_trust(stranger):
    """Else code from a repository runs unasked."""
    assert "trust_remote_code" in stranger[0]["untrusted"]["error"]


@pytest.mark.parametrize("name", MODELS)
def test_what_the_folders_code_saves_is_the_same_folder(saved, stranger, name):
    """Else a model passed on by a stranger loses its code or its contract."""
    assert contents(saved / name) == contents(stranger[1] / f"{name}-ours")


def test_a_folder_passed_on_loads_again(stranger):
    """Else the second stranger cannot use it."""
    records, out = stranger
    assert "error" not in records["again"]
    np.testing.assert_array_equal(np.load(out / "again.npy"), np.load(out / "learned-ours.npy"))
