"""DDPMs in the Hub's first layout: all at the root, old keys, old names of layers, pickled weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddpm_hf import DDPMPipeline, DDPMScheduler, load
from ddpm_hf.portable.networks_ddpm_hf import OpenAIUNet2DModel, build_unet
from ddpm_hf.publishing.files import files_to_publish
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_hub import TOKEN
from tests.support.fixtures_hub import run as in_a_process
from tests.support.fixtures_pipeline import tiny_unet
from tests.support.hub_server import Hub
from tests.support.pictures import random_pixels, write_images
from tests.support.runs import contents, read, run_script

ATTENDS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}
OLD_LAYERS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(2, torch.Generator().manual_seed(0), 5, "np").images


def pipeline_of_today():
    return DDPMPipeline(tiny_unet(3, **ATTENDS), DDPMScheduler(variance_type="fixed_large"))


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Folders as `google/ddpm-cifar10-32` was uploaded in 2022, with safetensors and with a .bin file."""
    root = tmp_path_factory.mktemp("old")
    unet = pipeline_of_today().unet
    state = {}
    for name, value in unet.state_dict().items():
        for new, before in OLD_LAYERS.items():
            name = name.replace(f".{new}.", f".{before}.")
        state[name] = value.contiguous()
    config = {key: value for key, value in unet.config.items() if key not in ("resnet_time_scale_shift", "dropout")}
    config |= {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "center_input_sample": False,
    }
    scheduler = {
        "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
        "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "timestep_values": None,
        "trained_betas": None, "variance_type": "fixed_large", "tensor_format": "pt",
    }  # fmt: skip
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1", "scheduler": ["diffusers", "DDPMScheduler"],
             "unet": ["diffusers", "UNet2DModel"]}  # fmt: skip
    for name in ("safe", "pickled"):
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
        (folder / "model_index.json").write_text(json.dumps(index))
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nMy words.\n")
    save_file(state, root / "safe" / "diffusion_pytorch_model.safetensors")
    torch.save(state, root / "pickled" / "diffusion_pytorch_model.bin")
    return root


def test_it_loads_and_samples_as_today(old, run, tmp_path):
    """Else the Hub's best-known DDPMs do not load, or sample with another variance."""
    pipeline = load(old / "safe")
    assert pipeline.scheduler.config.variance_type == "fixed_large"
    np.testing.assert_allclose(draw(pipeline), draw(pipeline_of_today()), atol=1e-5)
    code, _, err = run("sample", old / "safe", "--steps", 2, "--num-images", 2, "--out", tmp_path / "out")
    assert code == 0, err
    code, out, _ = run("info", old / "safe")
    assert code == 0
    assert "8×8, 3 channels" in out
    assert "T = 1,000, linear" in out


def test_it_is_evaluated_and_restores(old, run, tmp_path):
    """Else the Hub's first models can be sampled and nothing more."""
    pictures = write_images(tmp_path / "images", random_pixels(2, 8, 8))
    words = ["--dataset", pictures, "--metrics", "none", "--likelihood-calls", 4, "--out", tmp_path / "evaluation"]
    code, out, err = run("evaluate", old / "safe", *words)
    assert code == 0, err
    assert "bits/dim" in out
    words = ["--task", "denoise", "--sigma-y", 0.2, "--steps", 2, "--num-solutions", 2, "--out", tmp_path / "restored"]
    code, _, err = run("restore", old / "safe", "--image", pictures / "0.png", *words)
    assert code == 0, err


def test_pickled_weights_are_refused_with_the_way_that_works(old, run, tmp_path):
    """Else a stranger's pickle is read, or the way out of the message leads nowhere."""
    result = run("sample", old / "pickled", "--steps", 2, "--out", tmp_path / "out")
    assert_one_line(result, "ddpm-hf convert MODEL --to FOLDER")
    assert_one_line(run("convert", old / "pickled", "--to", tmp_path / "new", "--flags", "--image_size 8"), "--flags")
    before = contents(old / "pickled")
    code, _, err = run("convert", old / "pickled", "--to", tmp_path / "new")
    assert code == 0, err
    assert contents(old / "pickled") == before
    np.testing.assert_allclose(draw(load(tmp_path / "new")), draw(pipeline_of_today()), atol=1e-5)


KEYS = {
    "predict_epsilon": ({"predict_epsilon": False}, ("sample", 1000)),
    "timesteps": ({"timesteps": 40, "num_train_timesteps": None}, ("epsilon", 40)),
    "both, of DDIM": (
        {"predict_epsilon": False, "timesteps": 40, "num_train_timesteps": None, "_class_name": "DDIMScheduler"},
        ("sample", 40),
    ),
    "of now beside": ({"predict_epsilon": False, "prediction_type": "v_prediction"}, ("v_prediction", 1000)),
}


@pytest.mark.parametrize("name", KEYS)
def test_old_keys_of_the_diffusion_count(name, old, run, tmp_path):
    """Else a model that predicts x_0, or has another T, samples as one that it is not."""
    changes, expected = KEYS[name]
    shutil.copytree(old / "safe", tmp_path / "model")
    path = tmp_path / "model" / "scheduler_config.json"
    config = {key: value for key, value in (read(path) | changes).items() if value is not None}
    path.write_text(json.dumps(config))
    code, _, err = run("convert", tmp_path / "model", "--to", tmp_path / "new")
    assert code == 0, err
    for folder in ("model", "new"):
        scheduler = load(tmp_path / folder).scheduler
        assert (scheduler.config.prediction_type, len(scheduler.alphas_cumprod)) == expected
        assert not {"predict_epsilon", "timesteps"} & set(scheduler.config)


OTHERS = {
    "score sde": ({"_class_name": "ScoreSdeVePipeline"}, {}, {}, "a ScoreSdeVePipeline"),
    "consistency": ({}, {"_class_name": "CMStochasticIterativeScheduler"}, {}, "a CMStochasticIterativeScheduler"),
    "noise levels": ({}, {}, {"time_embedding_type": "fourier"}, "noise levels"),
    "latents": ({"vqvae": ["diffusers", "VQModel"]}, {}, {}, "not a pipeline of a UNet2DModel"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_models_of_other_kinds_are_not_converted(case, old, run, tmp_path):
    """Else a DDPM is made of them that samples noise, without a word."""
    *changes, says = OTHERS[case]
    folder = shutil.copytree(old / "pickled", tmp_path / "model")
    for name, change in zip(("model_index.json", "scheduler_config.json", "config.json"), changes):
        (folder / name).write_text(json.dumps(read(folder / name) | change))
    assert_one_line(run("convert", folder, "--to", tmp_path / "new"), says)
    assert not (tmp_path / "new").exists()


def test_weights_that_the_config_does_not_describe_are_an_error(old, run, tmp_path):
    """Else weights are left out, and the converted network is another one."""
    folder = shutil.copytree(old / "pickled", tmp_path / "model")
    state = torch.load(folder / "diffusion_pytorch_model.bin", weights_only=True)
    torch.save({**state, "class_embedding.weight": torch.zeros(3, 32)}, folder / "diffusion_pytorch_model.bin")
    assert_one_line(
        run("convert", folder, "--to", tmp_path / "new"), "not in the network of its config", "class_embedding.weight"
    )


def test_an_old_name_of_the_timesteps_is_read(old, run, tmp_path):
    """Else a model of 4000 timesteps is sampled with 1000."""
    folder = shutil.copytree(old / "pickled", tmp_path / "model")
    config = read(folder / "scheduler_config.json")
    config["timesteps"] = 4 * config.pop("num_train_timesteps")
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    index = read(folder / "model_index.json")
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": {"1": "cat", "2": "dog"}}))
    code, _, err = run("convert", folder, "--to", tmp_path / "new")
    assert code == 0, err
    assert len(load(tmp_path / "new").scheduler) == 4000


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_pickle_with_code_is_not_converted(old, run, tmp_path):
    """Else the way out executes what the refusal kept out."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("config.json", "scheduler_config.json", "model_index.json"):
        (folder / name).write_bytes((old / "safe" / name).read_bytes())
    torch.save({"a": Attack(tmp_path / "executed")}, folder / "diffusion_pytorch_model.bin")
    assert_one_line(run("convert", folder, "--to", tmp_path / "new"), "holds more than tensors")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "new").exists()


PUSH = """
import json, sys
from ddpm_hf import cli
sys.argv = ["ddpm-hf", "push", *sys.argv[1:]]
cli.main()
print(json.dumps(True))
"""


@pytest.mark.slow
def test_it_is_published_in_the_layout_of_today(old, tmp_path):
    """Else the repository has an index and no weights."""
    assert "config.json" not in files_to_publish(old / "safe")
    before = contents(old / "safe")
    with Hub({TOKEN: "user"}) as hub:
        in_a_process(hub, tmp_path / "home", PUSH, old / "safe", "user/old", "--token", TOKEN)
        files = hub.files("user/old")
    assert {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"} <= set(
        files
    )
    assert "My words." in files["README.md"].decode()
    assert contents(old / "safe") == before


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--model_config_name_or_path"])
@pytest.mark.parametrize("layout", ["root", "folders"])
def test_training_starts_from_it(flag, layout, old, tmp_path):
    """Else a model that samples cannot be fine-tuned, or its architecture not be trained anew."""
    folder = old / "safe"
    if layout == "folders":
        folder = tmp_path / "today"
        pipeline_of_today().save_pretrained(folder)
    write_images(tmp_path / "images", random_pixels(4, 8, 8, 3))
    argv = ["--train_data_dir", tmp_path / "images", "--output_dir", tmp_path / "run", flag, folder, "--seed", 0,
            "--train_batch_size", 4, "--max_train_steps", 1, "--ddpm_num_inference_steps", 2, "--cpu_threads", 1,
            "--eval_batch_size", 1, "--logger", "none", "--channels", 3]  # fmt: skip
    done = run_script([str(word) for word in argv], tmp_path / "run")
    assert done.code == 0, done.err
    trained = load(tmp_path / "run")
    assert trained.unet.config.attention_head_dim is None
    assert trained.unet.config.sample_size == 8


def test_training_continues_with_a_network_that_diffusers_does_not_have(tmp_path):
    """Else a converted network cannot be fine-tuned, or becomes stock's of another function."""
    own = {"num_attention_heads": 2, "timestep_scale": 0.25}
    unet = build_unet({**tiny_unet(3, **ATTENDS).config, **own})
    DDPMPipeline(unet, DDPMScheduler(20, beta_schedule="cosine")).save_pretrained(tmp_path / "start")
    write_images(tmp_path / "images", random_pixels(4, 8, 8))
    argv = ["--train_data_dir", tmp_path / "images", "--output_dir", tmp_path / "run", "--seed", 0, "--use_ema",
            "--pretrained_model_name_or_path", tmp_path / "start", "--train_batch_size", 4, "--max_train_steps", 1,
            "--ddpm_num_inference_steps", 2, "--cpu_threads", 1, "--eval_batch_size", 1, "--logger", "none",
            "--checkpointing_steps", 1]  # fmt: skip
    done = run_script([str(word) for word in argv], tmp_path / "run")
    assert done.code == 0, done.err
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        trained = load(folder).unet
        assert type(trained) is OpenAIUNet2DModel
        assert {name: trained.config[name] for name in own} == own
