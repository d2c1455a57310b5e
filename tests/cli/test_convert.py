"""`ddpm-hf convert`: other programs' checkpoints become folders that load and sample, or are refused in one line."""

import json
import pickle
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_hf import ClassConditionalDDPMPipeline, DDPMImageToImagePipeline, DDPMPipeline, DDPMScheduler, load
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.converters import attention_check, openai, openai_flags
from ddpm_hf.models.converters.openai_back import export_openai
from ddpm_hf.portable.networks_ddpm_hf import build_unet
from tests.support.fixtures_cli import assert_one_line
from tests.support.fixtures_hub import DRAWING, TOKEN, WITHOUT
from tests.support.fixtures_hub import run as in_a_process
from tests.support.fixtures_pipeline import tiny_unet, tiny_unet_config, tiny_vae
from tests.support.ho_network import variables, write_bundle
from tests.support.hub_server import Hub
from tests.support.openai_networks import Classifier, UNet, randomized
from tests.support.pictures import random_pixels, write_images
from tests.support.runs import contents, read

SMALL = {"width": 32, "levels": (1, 2), "layers": 1, "attention": {1}}
DIFFUSION = "--diffusion_steps 100 --noise_schedule linear"
FLAGS = f"--image_size 16 --num_head_channels 32 {DIFFUSION}"
NETWORKS = {  # file: (network, flags)
    "adm": (
        lambda: UNet(**SMALL, head_channels=32, legacy=False, resnet=True, classes=3),
        f"{FLAGS} --use_new_attention_order True",
    ),
    "iddpm": (lambda: UNet(**SMALL, heads=4, t_scale=10), f"--image_size 16 --num_heads 4 {DIFFUSION}"),
    "classifier": (lambda: Classifier(**SMALL, image_size=16, classes=2), DIFFUSION),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a checkpoint of each network, and the names of two classes."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (make, _) in NETWORKS.items():
        torch.save(randomized(make()).state_dict(), root / f"{name}.pt")
    (root / "labels.txt").write_text("cat\ndog\n")
    write_bundle(root / "model.ckpt-1", {f"{name}/ExponentialMovingAverage": value for name, value in
                                          variables(attends=(True, False)).items()})  # fmt: skip
    return root


def flags_of(name):
    return ["--flags", NETWORKS[name][1], *(["--from", "improved-diffusion"] if name == "iddpm" else [])]


@pytest.fixture
def converted(files, tmp_path, run):
    """A folder by a file's name, as the command writes it."""

    def convert(name, *more):
        words = flags_of(name) if name in NETWORKS else ["--flags", "--model_var_type fixedlarge"]
        source = files / (f"{name}.pt" if name in NETWORKS else name)
        code, out, err = run("convert", source, "--to", tmp_path / name, *words, *more)
        assert code == 0, err
        return tmp_path / name, out

    return convert


def test_a_folder_is_what_it_was_in_its_program(converted):
    """Else a conversion has the right weights and the wrong diffusion or pipeline, and samples otherwise."""
    folder, out = converted("adm")
    assert "guided-diffusion: UNet of 3 classes" in out
    assert "heads of 32 channels, in the new order" in out
    pipeline = load(folder)
    assert type(pipeline) is ClassConditionalDDPMPipeline
    config = pipeline.scheduler.config
    assert (config.variance_type, config.prediction_type) == ("learned_range", "epsilon")
    betas = pipeline.scheduler.exact_tables.betas  # scaled to T
    np.testing.assert_allclose(betas, np.linspace(1e-4 * 10, 0.02 * 10, 100), rtol=1e-12)

    folder, _ = converted("iddpm")
    pipeline = load(folder)
    assert type(pipeline) is DDPMPipeline
    assert pipeline.unet.config.timestep_scale == 10  # improved-diffusion rescales by default
    folder, _ = converted("model.ckpt-1")
    assert load(folder).unet.config.sample_size == 16


def test_the_way_back_is_the_same_file(files, converted, run, tmp_path):
    """Else who goes back to OpenAI's code has another network, or none."""
    for name, more in (("adm", ["--flags", "--use_new_attention_order True"]), ("iddpm", []), ("classifier", [])):
        folder, _ = converted(name)
        code, out, err = run("convert", folder, "--to", tmp_path / f"{name}.pt", *more)
        assert code == 0, err
        before, after = torch.load(files / f"{name}.pt"), torch.load(tmp_path / f"{name}.pt")
        assert list(before) == list(after) or set(before) == set(after)
        assert all(torch.equal(before[key], after[key]) for key in before)
        (line,) = [line for line in out.splitlines() if line.startswith("--")]
        flags = " ".join([line, *([DIFFUSION] if name == "classifier" else [])])
        again = run("convert", tmp_path / f"{name}.pt", "--to", tmp_path / f"{name}-2", "--flags", flags)
        assert again[0] == 0, again[2]  # the flags that it prints describe the file
        assert ("new order" in again[1]) == (name == "adm")
        assert_one_line(run("convert", folder, "--to", tmp_path / f"{name}.pt", *more), "already exists")


OPENAI = {"norm_num_groups": 32, "attn_norm_num_groups": 32, "block_out_channels": (32, 64), "attention_head_dim": 32}


def theirs(scheduler=None, vae=None, **changes):
    """A pipeline that OpenAI's format can hold, but for the changes."""
    scheduler = scheduler or DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
    return DDPMPipeline(tiny_unet(**{"channels": 4 if vae else 3, **OPENAI, **changes}), scheduler, vae)


UNWRITTEN = {
    "groups": (lambda: theirs(norm_num_groups=4), ("norm_num_groups 4", "32")),
    "not square": (lambda: theirs(sample_size=(8, 16)), ("square",)),
    "no norm": (lambda: theirs(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=None), ("attn_norm",)),
    "v": (lambda: theirs(DDPMScheduler(100, prediction_type="v_prediction")), ("predicts v_prediction",)),
    "betas": (lambda: theirs(DDPMScheduler(100)), ("noise schedule",)),
    "sigmoid": (lambda: theirs(DDPMScheduler(100, beta_schedule="sigmoid")), ("noise schedule",)),
    "gray": (lambda: theirs(channels=1), ("reads 1 channels",)),
    "fixed_small": (
        lambda: theirs(
            downsample_type="resnet",
            down_block_types=["ResnetDownsampleBlock2D"] * 2,
            upsample_type="resnet",
            up_block_types=["ResnetUpsampleBlock2D"] * 2,
        ),
        ("fixed_small",),
    ),
    "latents": (lambda: theirs(vae=tiny_vae()), ("latents",)),
}


@pytest.mark.parametrize("case", UNWRITTEN)
def test_what_openai_does_not_have_is_not_written(case, run, tmp_path):
    """Else a file is written that their code refuses, or reads as another network."""
    make, says = UNWRITTEN[case]
    make().save_pretrained(tmp_path / "model")
    assert_one_line(run("convert", tmp_path / "model", "--to", tmp_path / "x.pt"), *says)
    assert not (tmp_path / "x.pt").exists()


def test_a_classifier_of_other_heads_is_not_written(run, tmp_path):
    """Else OpenAI's code reads it with heads of 64, and guides otherwise."""
    unet = {key: value for key, value in tiny_unet(channels=3, **OPENAI).config.items() if not key.startswith("_")}
    NoisyClassifier(unet=unet, num_classes=2, num_train_timesteps=10).save_pretrained(tmp_path / "model")
    assert_one_line(run("convert", tmp_path / "model", "--to", tmp_path / "x.pt"), "heads of 64")
    assert not (tmp_path / "x.pt").exists()


def test_the_way_back_says_what_is_predicted_and_of_which_size(run, tmp_path):
    """Else the printed line builds another model, or none, in their scripts."""
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    theirs(scheduler).save_pretrained(tmp_path / "x_0")
    code, out, err = run("convert", tmp_path / "x_0", "--to", tmp_path / "x.pt")
    assert code == 0, err
    assert "improved-diffusion's scripts" in out
    (line,) = [line for line in out.splitlines() if line.startswith("--")]
    assert "--predict_xstart True" in line
    assert "--sigma_small True" in line  # their default is the larger one
    assert not {"--resblock_updown", "--num_head_channels", "--channel_mult"} & set(line.split())
    assert "(for 32, 64, 256 pixels and their own widths; its network itself takes channel_mult=(1.0, 2.0))" in out
    upsampler = build_unet(tiny_unet_config(channels=3, condition_channels=3, num_class_embeds=2, **OPENAI))
    DDPMImageToImagePipeline(upsampler, DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")).save_pretrained(
        tmp_path / "up"
    )
    code, out, err = run("convert", tmp_path / "up", "--to", tmp_path / "up.pt")
    assert code == 0, err
    assert "--large_size 8 --small_size 2" in out
    assert "--image_size" not in out
    assert "(with NUM_CLASSES = 2 in script_util.py)" in out
    result = run("convert", tmp_path / "up", "--to", tmp_path / "new.pt", "--flags", "--use_new_attention_order True")
    assert_one_line(result, "legacy order alone")


CIFAR, ADM = (1, 2, 2, 2), (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("size", "multiples", "changes", "scripts", "has", "has_not"),
    [
        (32, CIFAR, {}, "improved", ["--num_heads 1"], ["--num_head_channels", "--resblock_updown", "--channel_mult"]),
        (32, ADM, {}, "guided", ["--channel_mult 1,2,3,4", "--resblock_updown False"], []),
        (64, ADM, {"attention_head_dim": 32}, "guided", ["--num_head_channels 32"], ["--channel_mult", "--num_heads"]),
        (64, ADM, {"attends": False}, "guided", ["--attention_resolutions 1 "], []),
    ],
)
def test_the_flags_of_the_way_back_are_those_of_one_repository(size, multiples, changes, scripts, has, has_not):
    """Else the scripts refuse them: each repository has flags and sizes of its own."""
    attends = [level == 1 and changes.get("attends", True) for level in range(4)]
    unet = tiny_unet(
        channels=3, size=size, **{**OPENAI, "attention_head_dim": changes.get("attention_head_dim")} | {
            "block_out_channels": tuple(32 * one for one in multiples),
            "down_block_types": ["AttnDownBlock2D" if one else "DownBlock2D" for one in attends],
            "up_block_types": ["AttnUpBlock2D" if one else "UpBlock2D" for one in attends[::-1]],
        },
    )  # fmt: skip
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large")
    text = export_openai(unet, "", scheduler)[1]
    assert text.startswith(f"{scripts}-diffusion's scripts")
    assert all(one in text for one in has)
    assert not any(one in text for one in has_not)


def test_the_weights_that_are_not_averaged_go_back(run, tmp_path):
    """Else --no-ema is accepted, and the file holds the averaged ones."""
    run_folder = tmp_path / "run/checkpoint-1"
    for name, seed in (("unet", 1), ("unet_ema", 2)):
        tiny_unet(channels=3, seed=seed, **OPENAI).save_pretrained(run_folder / name)
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large")
    manifest = {"step": 1, "settings": {"conditioning": None}, "scheduler": dict(scheduler.config)}
    (run_folder / "manifest.json").write_text(json.dumps(manifest))
    for more in ((), ("--no-ema",)):
        code, _, err = run("convert", run_folder, "--to", tmp_path / f"{len(more)}.pt", *more)
        assert code == 0, err
    averaged, raw = (torch.load(tmp_path / f"{number}.pt") for number in (0, 1))
    assert not torch.equal(averaged["out.2.weight"], raw["out.2.weight"])


def guided_diffusion():
    """A stand-in for the original's package, of our reference networks."""

    def unet(in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, channel_mult, num_heads,
             use_scale_shift_norm, image_size, num_head_channels, resblock_updown, use_new_attention_order,
             num_classes):  # fmt: skip
        return UNet(width=model_channels, levels=channel_mult, layers=num_res_blocks,
                    attention={rate.bit_length() - 1 for rate in attention_resolutions}, in_channels=in_channels,
                    out_channels=out_channels, heads=num_heads, head_channels=num_head_channels,
                    legacy=not use_new_attention_order, resnet=resblock_updown, scale_shift=use_scale_shift_norm,
                    classes=num_classes)  # fmt: skip

    return SimpleNamespace(UNetModel=unet)


def test_parity_is_printed_where_the_original_can_be_built(files, run, tmp_path, monkeypatch):
    """Else nobody sees that a conversion is right, or a wrong one is saved."""
    package, module = ModuleType("guided_diffusion"), guided_diffusion()
    monkeypatch.setitem(sys.modules, "guided_diffusion", package)
    monkeypatch.setitem(sys.modules, "guided_diffusion.unet", module)
    words = ["convert", files / "adm.pt", "--to", tmp_path / "a", *flags_of("adm")]
    code, out, _ = run(*words)
    assert code == 0
    figure = float(out.partition("parity: ")[2].partition(",")[0])
    assert figure < 1e-5
    for each in (openai, attention_check):
        monkeypatch.setattr(each, "load_openai", mistaken(each.load_openai))
    result = run(*[tmp_path / "b" if word == tmp_path / "a" else word for word in words])
    assert result[0] == 2
    assert "is not the original" in result[2]
    assert not (tmp_path / "b").exists()


def test_parity_knows_that_improved_diffusion_rescales_outside_its_network(files, run, tmp_path, monkeypatch):
    """Else every such model is refused where the original is installed."""

    def unet(**arguments):
        built = guided_diffusion().UNetModel(**arguments, image_size=16, num_head_channels=-1, resblock_updown=False,
                                             use_new_attention_order=False)  # fmt: skip
        built.t_scale = 1  # as in their package, where the diffusion gives t·1000/T
        return built

    package = SimpleNamespace(UNetModel=unet)
    monkeypatch.setitem(sys.modules, "improved_diffusion", ModuleType("improved_diffusion"))
    monkeypatch.setitem(sys.modules, "improved_diffusion.unet", package)
    code, out, err = run("convert", files / "iddpm.pt", "--to", tmp_path / "a", *flags_of("iddpm"))
    assert code == 0, err
    assert float(out.partition("parity: ")[2].partition(",")[0]) < 1e-4
    monkeypatch.setitem(sys.modules, "improved_diffusion.unet", SimpleNamespace())  # of another version
    code, out, err = run("convert", files / "iddpm.pt", "--to", tmp_path / "b", *flags_of("iddpm"))
    assert code == 0, err
    assert "not compared: the original's package that is installed here does not build this network" in out


def mistaken(load_openai):
    """A conversion with the attention's order mistaken, as if by a bug."""

    def load(network, config, state, legacy, encoder=False):
        load_openai(network, config, state, not legacy, encoder)

    return load


def test_published_files_are_known_by_name(files, run, tmp_path, monkeypatch):
    """Else everyone types the README's flags; or flags that make another network of a known file are believed."""
    row = (openai_flags.GUIDED, f"{NETWORKS['adm'][1]} --class_cond True")
    monkeypatch.setitem(openai_flags.PUBLISHED, "adm.pt", row)
    code, out, _ = run("convert", files / "adm.pt", "--to", tmp_path / "a")
    assert code == 0
    assert "flags of the published adm.pt" in out
    for wrong in ("--num_heads 4", "--num_head_channels 16 --use_new_attention_order True", "--num_head_channels 32"):
        result = run(
            "convert", files / "adm.pt", "--to", tmp_path / "b", "--flags", f"--image_size 16 {wrong} {DIFFUSION}"
        )
        assert_one_line(result, "adm.pt has", "these flags say")
    assert not (tmp_path / "b").exists()


BAD = {
    "no flags": ("adm.pt", [], ["--image_size", "--num_heads or --num_head_channels", "--diffusion_steps"]),
    "a flag is missing": ("adm.pt", ["--flags", f"--image_size 16 {DIFFUSION}"], ["--num_heads or"]),
    "which repository": (
        "iddpm.pt", ["--flags", f"--image_size 16 --num_heads 4 {DIFFUSION}"], ["--rescale_timesteps"]
    ),
    "width": ("adm.pt", ["--flags", f"{FLAGS} --num_channels 64"], ["--num_channels 64", "the file has 32"]),
    "classes": ("adm.pt", ["--flags", f"{FLAGS} --class_cond False"], ["--class_cond False", "True"]),
    "attention": ("adm.pt", ["--flags", f"{FLAGS} --attention_resolutions 16,8"], ["attends at 8"]),
    "heads": ("adm.pt", ["--flags", FLAGS.replace("channels 32", "channels 48")], ["--num_head_channels 48", "[64]"]),
    "no number": ("adm.pt", ["--flags", FLAGS.replace("size 16", "size x")], ["--image_size x", "number"]),
    "unknown flag": ("adm.pt", ["--flags", "--imagesize 16"], ["--imagesize"]),
    "no value": ("adm.pt", ["--flags", "--image_size"], ["--image_size has no value"]),
    "quotes": ("adm.pt", ["--flags", "--image_size '16"], ["--flags"]),
    "schedule": ("adm.pt", ["--flags", FLAGS.replace("linear", "sine")], ["--noise_schedule sine", "cosine"]),
    "another program": ("adm.pt", ["--flags", FLAGS, "--from", "ho"], ["not a network of Ho et al."]),
    "labels": ("adm.pt", ["--flags", FLAGS, "--labels", "one.txt"], ["names of classes", "embeds 3"]),
    "labels twice": ("adm.pt", ["--flags", FLAGS, "--labels", "twice.txt"], ["'cat' is on lines 1 and 3"]),
    "no heads": ("adm.pt", ["--flags", FLAGS.replace("channels 32", "channels 0")], ["--num_head_channels 0"]),
    "half a head": ("adm.pt", ["--flags", FLAGS.replace("channels 32", "channels 2.5")], ["whole number"]),
    "few steps": ("adm.pt", ["--flags", FLAGS.replace("steps 100", "steps 10")], ["β up to 2"]),
    "another size of a classifier": ("classifier.pt", ["--flags", f"--image_size 32 {DIFFUSION}"], ["is of 16"]),
    "labels of none": ("iddpm.pt", [*flags_of("iddpm"), "--labels", "labels.txt"], ["has none"]),
    "classifier of none": ("iddpm.pt", [*flags_of("iddpm"), "--classifier", "."], ["no classes"]),
    "one kind of weights": ("adm.pt", ["--flags", FLAGS, "--no-ema"], ["--no-ema"]),
    "size": ("adm.pt", ["--flags", FLAGS.replace("size 16", "size 15")], ["--image_size 15", "multiple of 2"]),
    "names of a classifier": (
        "classifier.pt", ["--flags", DIFFUSION, "--labels", "one.txt"], ["names of classes", "2"]
    ),
    "here": (".", [], ["--model_var_type"]),  # which holds a TensorFlow checkpoint
    "no file": ("nowhere.pt", [], ["no such file"]),
    "another format": ("labels.txt", [], [".safetensors", ".index"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, files, run, tmp_path, monkeypatch):
    """Else a layout is guessed, or the user gets a traceback."""
    monkeypatch.chdir(files)
    (files / "one.txt").write_text("cat\n")
    (files / "twice.txt").write_text("cat\ndog\ncat\n")
    name, words, named = BAD[case]
    assert_one_line(run("convert", name, "--to", tmp_path / "out", *words), *named)
    assert not (tmp_path / "out").exists()


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def truncated(path, files, marker):
    path.write_bytes((files / "adm.pt").read_bytes()[:-5000])


def lucidrains(path, files, marker):
    names = {
        "init_conv.weight": (8, 3, 7, 7),
        "time_mlp.1.weight": (8, 8),
        "mid_block1.block1.proj.weight": (8, 8, 3, 3),
        "downs.0.2.to_out.1.g": (1, 8, 1, 1),
        "downs.0.2.mem_kv": (2, 4, 8, 4),
    }
    state = {f"model.{name}": torch.zeros(shape) for name, shape in names.items()}
    torch.save({"step": 1, "model": state, "ema": {f"ema_{name}": value for name, value in state.items()}}, path)


FILES = {
    "code in a zip": (lambda path, _, marker: torch.save({"a": Attack(marker)}, path), "holds more than tensors"),
    "code": (lambda path, _, marker: path.write_bytes(pickle.dumps({"a": Attack(marker)})), "executed"),
    "truncated": (truncated, "not a complete file"),
    "empty": (lambda path, *_: path.write_bytes(b""), "not a complete file"),
    "text": (lambda path, *_: path.write_text("<html>not found</html>"), "file"),
    "a list": (lambda path, *_: torch.save([torch.zeros(1)], path), "not a state dict"),
    "a tensor": (lambda path, *_: torch.save({"x": torch.zeros(1)}, path), "it has 1 tensors, such as x"),
    "lucidrains": (lucidrains, "its first convolution is 7×7"),
    "a layer is missing": (lambda path, files, _: torch.save(changed(files, drop="out.0.bias"), path), "out.0.bias"),
    "a layer too many": (
        lambda path, files, _: torch.save(changed(files, extra=torch.zeros(1)), path), "extra left over"
    ),
    "not finite": (
        lambda path, files, _: torch.save(changed(files, **{"out.0.bias": torch.full((32,), torch.nan)}), path),
        "not finite, such as out.0.bias",
    ),
    "another shape": (
        lambda path, files, _: torch.save(changed(files, **{"out.0.bias": torch.zeros(7)}), path), "out.0.bias"
    ),
}  # fmt: skip


def averaged(path, files, marker):
    """A file of averaged weights alone, as such."""
    torch.save({"ema": torch.load(files / "adm.pt")}, path)


def test_averaged_weights_are_taken_as_such(files, run, tmp_path):
    """Else --no-ema is ignored, and the averaged weights pass for the others."""
    averaged(tmp_path / "x.pt", files, None)
    words = ["convert", tmp_path / "x.pt", "--to", tmp_path / "out", *flags_of("adm")]
    assert_one_line(run(*words, "--no-ema"), "--no-ema")
    assert run(*words)[0] == 0


def test_a_classifiers_heads_are_its_own(files, run, tmp_path):
    """Else the flags of the UNet beside it, as in their command line, make another classifier of it."""
    code, out, err = run("convert", files / "classifier.pt", "--to", tmp_path / "out", "--flags",
                         f"--num_head_channels 32 --use_new_attention_order True {DIFFUSION}")  # fmt: skip
    assert code == 0, err
    assert "heads of 64 channels, in the legacy order" in out
    assert NoisyClassifier.from_pretrained(tmp_path / "out").config.unet["attention_head_dim"] == 64


def changed(files, drop=None, **tensors):
    """The state dict of a good file, with other tensors."""
    return {key: value for key, value in {**torch.load(files / "adm.pt"), **tensors}.items() if key != drop}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_one_line_and_nothing_of_it_is_executed(case, files, run, tmp_path):
    """Else a downloaded checkpoint runs code, or half of one is converted."""
    make, says = FILES[case]
    make(tmp_path / "x.pt", files, tmp_path / "executed")
    before = contents(tmp_path)
    assert_one_line(run("convert", tmp_path / "x.pt", "--to", tmp_path / "out", *flags_of("adm")), says)
    assert contents(tmp_path) == before


def test_a_folder_of_someone_else_stays(files, converted, run, tmp_path):
    """Else a conversion replaces a model that it did not write; its own it may replace."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/model_index.json").write_text("{}")
    result = run("convert", files / "adm.pt", "--to", tmp_path / "theirs", *flags_of("adm"))
    assert_one_line(result, "model_index.json that this command did not write")
    assert contents(tmp_path / "theirs") == {"model_index.json": b"{}"}
    (tmp_path / "run/checkpoint-5").mkdir(parents=True)
    assert_one_line(
        run("convert", files / "adm.pt", "--to", tmp_path / "run", *flags_of("adm")), "holds a training run"
    )
    converted("adm")
    converted("adm")


STRANGER = (
    WITHOUT
    + DRAWING
    + """
record, pipeline = attempt(sys.argv[1], "user/adm", trust_remote_code=True)
both = {"classifier": pipeline.classifier, "classifier_scale": 3.0, "guidance_scale": 2.0}
np.save(sys.argv[2], draw(pipeline, **both))
print(json.dumps(record | {"unet": named(pipeline.unet), "classifier": named(pipeline.classifier)}))
"""
)
PUSH = """
import json, sys
from ddpm_hf import cli
sys.argv = ["ddpm-hf", "push", *sys.argv[1:]]
cli.main()
print(json.dumps(True))
"""


@pytest.fixture
def with_classifier(files, converted):
    """The folder of a model by class with its classifier."""
    classifier, _ = converted("classifier", "--labels", files / "labels.txt")
    folder, _ = converted("adm", "--labels", files / "labels.txt", "--classifier", classifier)
    return folder


def images(pipeline, **options):
    generator = torch.Generator().manual_seed(0)
    return pipeline([0, 1], generator=generator, num_inference_steps=5, output_type="np", **options).images


def test_a_converted_model_is_guided_both_ways(with_classifier, run, tmp_path):
    """Else a converted classifier, or an embedding of no class, is kept and does nothing."""
    pipeline = load(with_classifier)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.null_class == 2  # three embeddings and two names
    by_classifier = {"classifier": pipeline.classifier, "classifier_scale": 3.0}
    plain, guided, free = images(pipeline), images(pipeline, **by_classifier), images(pipeline, guidance_scale=2.0)
    both = images(pipeline, **by_classifier, guidance_scale=2.0)
    for one, other in ((plain, guided), (plain, free), (guided, both), (free, both)):
        assert np.abs(one - other).max() > 0.01
    words = ["sample", with_classifier, "--class", "dog", "--steps", 3, "--num-images", 2, "--out"]
    for name, more in (("a", []), ("b", ["--classifier-scale", 3]), ("c", ["--guidance-scale", 2])):
        code, _, err = run(*words, tmp_path / name, *more)
        assert code == 0, err
    assert len({(tmp_path / name / "0001.png").read_bytes() for name in "abc"}) == 3


def test_its_likelihood_is_measured(with_classifier, run, tmp_path):
    """Else a converted model by class cannot be compared with the published bits/dim."""
    for number, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "images" / name, random_pixels(2, 16, 16, number))
    words = ["--dataset", tmp_path / "images", "--label-column", "label", "--metrics", "none", "--likelihood-calls", 4]
    code, out, err = run("evaluate", with_classifier, *words, "--out", tmp_path / "evaluation")
    assert code == 0, err
    assert re.search(r"likelihood of 4 images of .*: \d+\.\d+ bits/dim", out)


@pytest.mark.slow
def test_it_is_published_and_strangers_sample_the_same(with_classifier, tmp_path):
    """Else a conversion works on the machine that made it alone."""
    pipeline = load(with_classifier)
    pipeline.set_progress_bar_config(disable=True)
    with Hub({TOKEN: "user"}) as hub:
        assert in_a_process(hub, tmp_path / "home", PUSH, with_classifier, "user/adm", "--token", TOKEN)
        published = set(hub.files("user/adm"))
        assert {"unet/config.json", "classifier/networks_ddpm_hf.py", "model_index.json", "README.md"} <= published
        arguments = (tmp_path / "plain.npy", tmp_path / "both.npy")
        record = in_a_process(hub, tmp_path / "stranger", STRANGER, *arguments, isolated=True)
    assert record["classifier"].startswith("diffusers_modules")
    assert "error" not in record
    both = images(pipeline, classifier=pipeline.classifier, classifier_scale=3.0, guidance_scale=2.0)
    np.testing.assert_allclose(np.load(tmp_path / "plain.npy"), images(pipeline), atol=1e-4)
    np.testing.assert_allclose(np.load(tmp_path / "both.npy"), both, atol=1e-3)
    assert "trained with ddpm_hf" not in hub.files("user/adm")["README.md"].decode()


def test_the_folder_says_what_diffusers_reads(converted):
    """Else stock Diffusers cannot load a network that it could express."""
    folder, _ = converted("adm")
    assert read(folder / "model_index.json")["unet"] == ["diffusers", "UNet2DModel"]
    folder, _ = converted("iddpm")
    index = read(folder / "model_index.json")
    assert (index["_class_name"], index["unet"]) == ("DDPMPipeline", ["networks_ddpm_hf", "OpenAIUNet2DModel"])
    assert json.loads((folder / "unet/config.json").read_text())["timestep_scale"] == 10
