"""Ours in the place of `diffusers.DDPMScheduler`: a user who swaps the import must notice nothing.

What stock's own scheduler tests exercise, for both classes, and ours against stock step by step.
"""

import inspect
import json
import logging
import math

import diffusers
import numpy as np
import pytest
import torch

from ddpm_hf import DDPMScheduler
from tests.support.fixtures_pipeline import randn

Stock = diffusers.DDPMScheduler
CLASSES = pytest.mark.parametrize("scheduler_class", [DDPMScheduler, Stock], ids=["ours", "stock"])
STOCK_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

# every configuration that stock's own tests construct
STOCK_CONFIGS = [
    *({"num_train_timesteps": T} for T in (1, 5, 100, 1000)),
    *({"beta_start": start, "beta_end": 20 * start} for start in (0.0001, 0.001, 0.01, 0.1)),
    *({"beta_schedule": name} for name in ("linear", "squaredcos_cap_v2")),
    *({"variance_type": name} for name in ("fixed_small", "fixed_large", "other")),
    *({"clip_sample": clip} for clip in (True, False)),
    *({"prediction_type": name} for name in STOCK_PREDICTION_TYPES),
    *(
        {"thresholding": True, "prediction_type": name, "sample_max_value": maximum}
        for name in STOCK_PREDICTION_TYPES
        for maximum in (0.5, 1.0, 2.0)
    ),
]
stock_configs = pytest.mark.parametrize("config", STOCK_CONFIGS, ids=str)


def model(sample, t):
    """Stands in for a network: any function of both arguments."""
    return sample * t / (t + 1) + 0.1 * torch.sin(3 * sample)


def sample_loop(scheduler, sample, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        sample = scheduler.step(model(sample, t), t, sample, generator=generator).prev_sample
    return sample


def exact_stock(**config):
    """Stock with our float64 ᾱ in the place of its float32 table: what is left to differ is rounding and formulas."""
    scheduler = Stock(**config)
    scheduler.alphas_cumprod = DDPMScheduler(**config).exact_tables.alphas_cumprod
    scheduler.one = scheduler.one.double()
    return scheduler


def settings(scheduler):
    """The config without the list of untouched settings: that is a set's, in an order of its own in every process."""
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


def first_steps(scheduler, t=0):
    sample = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return scheduler.step(0.1 * sample, t, sample, generator=torch.Generator().manual_seed(0))


# Construction, saving and loading


@CLASSES
@stock_configs
def test_configs_are_saved_and_loaded(config, scheduler_class, tmp_path):
    """Else a configuration that works in stock cannot be made, or comes back from disk as another."""
    scheduler = scheduler_class(**config)
    scheduler.save_config(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    assert settings(loaded) == settings(scheduler)
    assert torch.equal(first_steps(loaded).prev_sample, first_steps(scheduler).prev_sample)


@stock_configs
def test_configs_load_in_stock_and_back(config, tmp_path):
    """Else a model saved here means something else in stock, or the other way round."""
    ours = DDPMScheduler(**config)
    ours.save_pretrained(tmp_path / "ours")
    in_stock = Stock.from_pretrained(tmp_path / "ours")
    in_stock.save_pretrained(tmp_path / "stock")
    back = DDPMScheduler.from_pretrained(tmp_path / "stock")
    for other in (in_stock, back):
        torch.testing.assert_close(first_steps(other).prev_sample, first_steps(ours).prev_sample, rtol=0, atol=1e-5)
    assert torch.equal(back.exact_tables.betas, ours.exact_tables.betas)


def steps_to_compare(config):
    """Timesteps of the chain; where β > 1, stock's ᾱ turns negative after the first."""
    T = 1 if config.get("beta_end", 0) > 1 else config.get("num_train_timesteps", 1000)
    return [t for t in (0, 1, 500, 999) if t < T]


@pytest.mark.parametrize(("config", "t"), [(c, t) for c in STOCK_CONFIGS for t in steps_to_compare(c)], ids=str)
def test_one_step_is_that_of_stock(t, config):
    """Else images change when the import is swapped."""
    ours, stock = first_steps(DDPMScheduler(**config), t), first_steps(exact_stock(**config), t)
    assert isinstance(ours, type(stock))
    torch.testing.assert_close(ours.prev_sample, stock.prev_sample.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.pred_original_sample, stock.pred_original_sample.float(), rtol=1e-5, atol=1e-6)


def test_defaults_and_signatures_are_those_of_stock():
    """Else a call that names its arguments, or relies on a default, does something else here."""
    for name in ("__init__", "set_timesteps", "step", "add_noise", "get_velocity", "scale_model_input"):
        ours = inspect.signature(getattr(DDPMScheduler, name)).parameters
        stock = inspect.signature(getattr(Stock, name)).parameters
        assert list(ours) == list(stock), name
        assert [each.default for each in ours.values()] == [each.default for each in stock.values()], name
    assert DDPMScheduler.order == Stock.order
    assert DDPMScheduler._compatibles == Stock._compatibles


@CLASSES
def test_arrays_are_accepted_as_trained_betas(scheduler_class, tmp_path):
    """Stock takes an array, of any length: its config must go to JSON and the betas come back."""
    scheduler = scheduler_class(num_train_timesteps=1000, trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    assert loaded.betas.tolist() == scheduler.betas.tolist() == pytest.approx([0.1, 0.3])
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["trained_betas"] == [0.1, 0.3]


@CLASSES
def test_compatible_samplers_make_and_give_back_the_config(scheduler_class):
    """Else `pipe.scheduler = X.from_config(pipe.scheduler.config)` loses a setting."""
    scheduler = scheduler_class(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)
    assert all(scheduler.compatibles)
    available = [other for other in scheduler.compatibles if not hasattr(other, "_backends")]  # not installed
    assert len(available) > 8
    for other in available:
        back = scheduler_class.from_config(other.from_config(scheduler.config).config)
        assert {key: back.config.get(key) for key in settings(scheduler)} == settings(scheduler), other
        assert set(back.config["_use_default_values"]) == set(scheduler.config["_use_default_values"]), other
        unknown = set(back.config) - set(scheduler.config)
        assert not unknown & set(inspect.signature(scheduler_class.__init__).parameters), other


def test_stock_from_our_config_and_back_is_the_same_chain():
    """Else a pipeline that converts a stock scheduler samples differently."""
    stock = Stock(beta_schedule="scaled_linear", beta_end=0.012, steps_offset=1, prediction_type="v_prediction")
    ours = DDPMScheduler.from_config(stock.config)
    again = Stock.from_config(ours.config)
    said = settings(stock)  # ours says more
    assert {key: again.config[key] for key in said} == said
    assert torch.equal(again.alphas_cumprod, stock.alphas_cumprod)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(20)
    assert torch.equal(ours.timesteps, stock.timesteps)
    x = randn(2, 3, 8, 8)
    torch.testing.assert_close(sample_loop(ours, x), sample_loop(stock, x), rtol=0, atol=1e-4)


@CLASSES
def test_attributes_of_the_config_warn_and_others_do_not(scheduler_class):
    """Else code that stores something on the scheduler breaks, or reads of the config go unnoticed."""
    scheduler = scheduler_class()
    scheduler.dummy_attribute = 5
    scheduler.register_to_config(test_attribute=6)
    assert scheduler.dummy_attribute == 5
    with pytest.warns(FutureWarning):
        assert scheduler.test_attribute == 6
    with pytest.raises(AttributeError, match="does_not_exist"):
        _ = scheduler.does_not_exist


def test_unknown_variance_type_warns_and_is_fixed_small(caplog):
    """A subclass may pass one: it samples as in stock, and says so."""

    class Subclass(DDPMScheduler):
        pass

    with caplog.at_level(logging.WARNING):
        scheduler = Subclass(variance_type="other")
    assert "'other'" in caplog.text
    assert scheduler.config.variance_type == "other"
    expected = first_steps(DDPMScheduler(variance_type="fixed_small"), 500).prev_sample
    assert torch.equal(first_steps(scheduler, 500).prev_sample, expected)
    assert scheduler._get_variance(500) == DDPMScheduler()._get_variance(500)


def test_unknown_prediction_type_is_refused_with_the_known():
    """Else a typing error shows at the first step of sampling, as in stock."""
    with pytest.raises(ValueError, match=r"epsilon.*'eps'"):
        DDPMScheduler(prediction_type="eps")


# What pipelines call


@CLASSES
def test_what_pipelines_call(scheduler_class):
    """Else a stock pipeline with our scheduler inside stops with an AttributeError."""
    scheduler, x = scheduler_class(num_train_timesteps=123), randn(2, 3, 4, 4)
    assert len(scheduler) == 123
    assert scheduler.init_noise_sigma == 1.0
    assert torch.equal(scheduler.scale_model_input(x, 5), x)
    assert torch.equal(scheduler.scale_model_input(x), x)
    assert scheduler.timesteps.tolist() == list(range(122, -1, -1))
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(scheduler, name).shape == (123,)
    assert scheduler.num_inference_steps is None
    scheduler.set_timesteps(20, device="cpu")
    assert scheduler.num_inference_steps == 20


@CLASSES
def test_custom_timesteps_and_their_successors(scheduler_class):
    """Else Euler-style loops that ask for the next timestep go astray."""
    scheduler, timesteps = scheduler_class(), [100, 87, 50, 1, 0]
    assert scheduler.previous_timestep(5) == 4  # the full chain, before set_timesteps
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps
    following = [scheduler.previous_timestep(t).item() for t in scheduler.timesteps]
    assert following == [87, 50, 1, 0, -1]
    scheduler.set_timesteps(10)
    assert [scheduler.previous_timestep(t).item() for t in scheduler.timesteps] == [*range(800, -1, -100), -1]


@CLASSES
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": [100, 87, 50, 51, 0]}, "`custom_timesteps` must be in descending order."),
        (
            {"num_inference_steps": 5, "timesteps": [100, 87, 50, 1, 0]},
            "Can only pass one of `num_inference_steps` or `custom_timesteps`.",
        ),
        ({"timesteps": [1000]}, "`timesteps` must start before `self.config.train_timesteps`: 1000."),
        ({"num_inference_steps": 1001}, "`num_inference_steps`: 1001 cannot be"),
    ],
    ids=["ascending", "both", "too large", "too many"],
)
def test_refusals_have_the_words_of_stock(arguments, message, scheduler_class):
    """Else code that reads the message, as stock's tests do, fails."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        scheduler_class().set_timesteps(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("t", [0, 1, 487, 999])
def test_get_variance_is_the_closed_form(t):
    """β̃_t and β_t of the linear schedule: stock's tests look at 0, 487 and 999."""
    betas = np.linspace(0.0001, 0.02, 1000)
    alphas_cumprod = np.cumprod(1 - betas)
    before = alphas_cumprod[t - 1] if t > 0 else 1.0
    posterior_variance = (1 - before) / (1 - alphas_cumprod[t]) * betas[t]
    scheduler = DDPMScheduler()
    assert scheduler._get_variance(t).item() == pytest.approx(posterior_variance, rel=1e-10, abs=0)
    assert scheduler._get_variance(t, variance_type="fixed_small").item() == scheduler._get_variance(t).item()
    assert float(Stock()._get_variance(t)) == pytest.approx(posterior_variance, rel=1e-3, abs=1e-5)
    if t > 0:
        assert scheduler._get_variance(t, variance_type="fixed_large").item() == pytest.approx(betas[t], rel=1e-10)


def test_learned_variance_through_get_variance():
    """Stock hands the network's output on under this name; here it is the variance that it stands for."""
    scheduler, output = DDPMScheduler(variance_type="learned_range"), torch.tensor([-1.0, 0.0, 1.0])
    small, large = DDPMScheduler()._get_variance(500), DDPMScheduler(variance_type="fixed_large")._get_variance(500)
    expected = torch.stack([small, (small * large).sqrt(), large]).float()
    torch.testing.assert_close(scheduler._get_variance(500, predicted_variance=output), expected)
    as_stock = torch.exp(Stock(variance_type="learned_range")._get_variance(500, predicted_variance=output))
    torch.testing.assert_close(as_stock, expected, rtol=1e-3, atol=0)


@CLASSES
@pytest.mark.parametrize("t", [0, 1, 999])
def test_step_as_a_tuple(t, scheduler_class):
    """Else `return_dict=False`, which pipelines use, gives other tensors."""
    sample, scheduler = randn(4, 3, 8, 8), scheduler_class()
    as_dict = scheduler.step(0.1 * sample, t, sample, generator=torch.Generator().manual_seed(0))
    as_tuple = scheduler.step(0.1 * sample, t, sample, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], as_dict.prev_sample)
    assert torch.equal(as_tuple[1], as_dict.pred_original_sample)
    assert as_dict.prev_sample.shape == sample.shape


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_noising_is_that_of_stock(method, schedule):
    """Else a model trained here has seen other inputs than one trained in stock."""
    t = torch.arange(1000)
    x, noise = randn(1000, 3), randn(1000, 3, seed=1)
    ours = getattr(DDPMScheduler(beta_schedule=schedule), method)(x, noise, t)
    in_float32 = Stock(beta_schedule=schedule)
    stock = getattr(in_float32, method)(x, noise, t)
    # √(1-ᾱ) of stock's float32 ᾱ is off by up to eps/√(1-ᾱ), so where ᾱ is near 1 only this much can be asked
    slack = 4 * torch.finfo(torch.float32).eps / torch.sqrt(1 - in_float32.alphas_cumprod)[:, None]
    assert ((ours - stock).abs() <= 1e-6 + slack * (x.abs() + noise.abs())).all()
    in_float64 = getattr(exact_stock(beta_schedule=schedule), method)(x.double(), noise.double(), t)
    torch.testing.assert_close(ours.double(), in_float64, rtol=0, atol=1e-6)


@CLASSES
def test_add_noise_at_one_timestep_of_the_chain(scheduler_class):
    """Image-to-image noises to `scheduler.timesteps[i][None]`: else it fails, or gets another shape."""
    scheduler, x = scheduler_class(), randn(4, 3, 8, 8)
    scheduler.set_timesteps(100)
    noised = scheduler.add_noise(x, randn(4, 3, 8, 8, seed=1), scheduler.timesteps[5][None])
    assert noised.shape == x.shape
    assert noised.dtype == x.dtype


@CLASSES
def test_a_list_has_one_generator_for_each_sample(scheduler_class):
    """Else an image depends on the batch it is sampled in."""
    scheduler, x = scheduler_class(), randn(2, 3, 4, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    batch = scheduler.step(x, 500, x, generator=generators).prev_sample
    for i, seed in enumerate((3, 4)):
        alone = scheduler.step(x[i : i + 1], 500, x[i : i + 1], generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(batch[i : i + 1], alone.prev_sample)


# Whole loops


@pytest.mark.every(5)
@pytest.mark.parametrize("n", [200, 50, None], ids=["all", "50", "without set_timesteps"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", STOCK_PREDICTION_TYPES)
def test_full_loop_is_that_of_stock(prediction_type, variance_type, schedule, n):
    """Same generator, same images: else swapping the import changes what a seed gives."""
    config = {"prediction_type": prediction_type, "variance_type": variance_type, "beta_schedule": schedule}
    same_as_stock(n, num_train_timesteps=1000 if n == 50 else 200, **config)


def test_a_thousand_steps_are_those_of_stock():
    """Else what is right for short chains adds up over long ones."""
    same_as_stock(1000)


def same_as_stock(n, **config):
    """Compare a chain of n steps with stock's, and with stock's on exact tables."""
    schedulers = DDPMScheduler(**config), exact_stock(**config), Stock(**config)
    if n is not None:
        for scheduler in schedulers:
            scheduler.set_timesteps(n)
    ours, exact, stock = (sample_loop(scheduler, randn(1, 3, 4, 4)) for scheduler in schedulers)
    assert torch.isfinite(exact).all()
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5)
    # stock's own tables are good to 1e-3, and the last images to this
    torch.testing.assert_close(
        ours, stock, rtol=0, atol=1e-4 if config.get("beta_schedule", "linear") == "linear" else 5e-4
    )


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", STOCK_PREDICTION_TYPES)
def test_loop_of_other_spacings_is_that_of_stock(prediction_type, spacing):
    """Else few-step sampling differs from stock, where trailing ends above timestep 0."""
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    ours, stock = DDPMScheduler(**config), Stock(**config)
    ours.set_timesteps(20)
    stock.set_timesteps(20)
    assert torch.equal(ours.timesteps, stock.timesteps)
    x = randn(1, 3, 4, 4)
    torch.testing.assert_close(sample_loop(ours, x), sample_loop(stock, x), rtol=0, atol=1e-4)


def test_loop_of_custom_timesteps_is_that_of_stock():
    """Else `timesteps=[...]` samples another chain."""
    ours, stock, x = DDPMScheduler(), Stock(), randn(1, 3, 4, 4)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(timesteps=[999, 700, 650, 200, 3, 0])
    torch.testing.assert_close(sample_loop(ours, x), sample_loop(stock, x), rtol=0, atol=1e-4)


def test_loop_from_the_middle_is_that_of_stock():
    """Image-to-image starts at a noised sample inside the chain."""
    ours, stock, x = DDPMScheduler(), Stock(), randn(1, 3, 4, 4)
    results = []
    for scheduler in (ours, stock):
        generator = torch.Generator().manual_seed(0)
        timesteps = scheduler.timesteps[-200:]
        sample = scheduler.add_noise(x, randn(1, 3, 4, 4, seed=1), timesteps[:1])
        for t in timesteps:
            sample = scheduler.step(model(sample, t), t, sample, generator=generator).prev_sample
        results.append(sample)
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_one_step_chains():
    """A chain of one step gives x̂_0 and no noise, in both."""
    x = randn(2, 3, 4, 4)
    for scheduler in (DDPMScheduler(num_train_timesteps=1), DDPMScheduler()):
        if len(scheduler) > 1:
            scheduler.set_timesteps(timesteps=[700])
        t = int(scheduler.timesteps[0])
        ours = scheduler.step(0.3 * x, t, x)
        torch.testing.assert_close(ours.prev_sample, ours.pred_original_sample)
        alpha_bar = scheduler.alphas_cumprod[t].item()
        x_0 = ((x - math.sqrt(1 - alpha_bar) * 0.3 * x) / math.sqrt(alpha_bar)).clamp(-1, 1)
        torch.testing.assert_close(ours.prev_sample, x_0)
    stock = Stock(num_train_timesteps=1).step(0.3 * x, 0, x).prev_sample
    torch.testing.assert_close(DDPMScheduler(num_train_timesteps=1).step(0.3 * x, 0, x).prev_sample, stock)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_learned_range_and_doubled_channels_sample_as_in_stock(variance_type):
    """improved-diffusion checkpoints: else stock's learned_range models give other images here."""
    ours, stock = DDPMScheduler(variance_type="learned_range"), Stock(variance_type="learned_range")
    x = randn(1, 3, 4, 4)
    half = {"fixed_small": torch.full_like(x, -1.0), "learned_range": torch.tanh(randn(1, 3, 4, 4, seed=2))}
    output = torch.cat([0.5 * x, half[variance_type]], dim=1)
    for t in (999, 500, 1):
        results = [each.step(output, t, x, torch.Generator().manual_seed(0)).prev_sample for each in (ours, stock)]
        torch.testing.assert_close(*results, rtol=0, atol=1e-4)
        if variance_type == "fixed_small":  # -1 is the lower end
            small = DDPMScheduler().step(0.5 * x, t, x, torch.Generator().manual_seed(0)).prev_sample
            torch.testing.assert_close(results[0], small, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", STOCK_PREDICTION_TYPES)
def test_stock_pipeline_samples_the_same_with_ours_inside(prediction_type):
    """Else our scheduler does not work in `diffusers.DDPMPipeline`."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    images = []
    for scheduler_class in (DDPMScheduler, Stock):
        pipe = diffusers.DDPMPipeline(unet, scheduler_class(prediction_type=prediction_type))
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(batch_size=2, generator=generator, num_inference_steps=10, output_type="np").images)
    assert images[0].std() > 0.01
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=1e-4)


# Code that indexes, compiles, maps or checks a stock scheduler


def test_public_tables_are_stocks_in_value_and_precision():
    """Else noise mixed by hand is float64, and a float32 network refuses it; a buffer of them doubles in size."""
    ours, stock = DDPMScheduler(), Stock()
    for name in ("betas", "alphas", "alphas_cumprod"):
        table, theirs = getattr(ours, name), getattr(stock, name)
        assert table.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(table, theirs, rtol=1e-5, atol=1e-7)
        assert torch.equal(table, getattr(ours.exact_tables, name).float())
        assert getattr(ours.exact_tables, name).dtype == torch.float64


def test_saved_betas_are_exact(tmp_path):
    """Else a schedule that stock does not know is rounded to float32 each time it is saved."""
    ours = DDPMScheduler(beta_schedule="sigmoid_alpha_bar")
    ours.save_pretrained(tmp_path)
    assert torch.equal(DDPMScheduler.from_pretrained(tmp_path).exact_tables.betas, ours.exact_tables.betas)


def test_ours_is_a_stock_scheduler_with_no_method_of_stocks():
    """Else `isinstance` checks fail; or stock's formulas, in float32 and without our chain, are used unnoticed."""
    assert issubclass(DDPMScheduler, Stock)
    defined = {name for name, value in vars(Stock).items() if inspect.isfunction(value)}
    assert defined - {"__module__"} <= set(vars(DDPMScheduler))


def test_dream_training_of_diffusers_takes_our_scheduler():
    """Diffusers' helper indexes `alphas_cumprod` by hand: else its noise is float64 and the network refuses it."""
    from diffusers.training_utils import compute_dream_and_update_latents, compute_snr

    class Network(torch.nn.Conv2d):
        def forward(self, x, t, text):
            return type("Output", (), {"sample": super().forward(x)})()

    ours, t = DDPMScheduler(), torch.tensor([3, 700])
    x, noise = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1)
    network = Network(3, 3, 1)
    moved, target = compute_dream_and_update_latents(
        network, ours, t, noise, ours.add_noise(x, noise, t), noise.clone(), None
    )
    assert moved.dtype == target.dtype == torch.float32
    torch.testing.assert_close(compute_snr(ours, t), compute_snr(Stock(), t), rtol=1e-4, atol=0)


LOOKUPS = {
    "add_noise": lambda s, x, y, t: s.add_noise(x, y, t),
    "get_velocity": lambda s, x, y, t: s.get_velocity(x, y, t),
    "predict_original_sample": lambda s, x, y, t: s.predict_original_sample(x, t, y),
    "p_mean_variance": lambda s, x, y, t: s.p_mean_variance(x, t, y).mean,
    "q_posterior_mean_variance": lambda s, x, y, t: s.q_posterior_mean_variance(x, y, t).mean,
    "strided": lambda s, x, y, t: s.p_mean_variance(x, t, y, t - 2).mean,
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_compile_whole_and_map(name):
    """Else `fullgraph=True` stops at a range check, and `vmap` at reading a value."""
    scheduler, call = DDPMScheduler(), LOOKUPS[name]
    x, y, t = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), torch.tensor([2, 500, 999])
    expected = call(scheduler, x, y, t)
    compiled = torch.compile(lambda *inputs: call(scheduler, *inputs), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, t), expected)
    mapped = torch.func.vmap(lambda *inputs: call(scheduler, *(i[None] for i in inputs))[0])
    torch.testing.assert_close(mapped(x, y, t), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_read_nothing_back_from_a_device(name, monkeypatch):
    """Each read makes a GPU's host wait, and a graph break."""
    scheduler, call = DDPMScheduler(), LOOKUPS[name]
    inputs = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), torch.tensor([2, 500, 999])
    for reading in ("item", "tolist", "__int__", "__bool__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(
            torch.Tensor, reading, lambda *_, reading=reading: pytest.fail(f"{reading} reads a tensor")
        )
    call(scheduler, *inputs)


@pytest.mark.parametrize("name", LOOKUPS)
@pytest.mark.parametrize("t", [[0, 1000], [-1, 5], 1000, -1], ids=str)
def test_timesteps_outside_the_chain_are_named(name, t):
    """Else -1 wraps to the last timestep, silently; the lookup itself notices it."""
    x = randn(2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"0\.\.999"):
        LOOKUPS[name](DDPMScheduler(), x, x, torch.tensor(t) if isinstance(t, list) else t)


def test_tables_made_without_gradients_serve_a_training_step():
    """Else sampling under inference_mode leaves tables that no later backward pass may use."""
    scheduler, t = DDPMScheduler(), torch.tensor([5, 600])
    with torch.inference_mode():
        scheduler.p_mean_variance(randn(2, 2, 4, 4), t, randn(2, 2, 4, 4))
    output = randn(2, 2, 4, 4).requires_grad_(True)
    scheduler.p_mean_variance(output, t, randn(2, 2, 4, 4)).mean.sum().backward()
    assert output.grad.isfinite().all()


def test_integers_are_noised_as_by_stock():
    """Else masks and label maps are trained on with the noise cut off to whole numbers."""
    noise, timesteps = torch.randn(2, 1, 4, 4), torch.tensor([3, 500])
    for dtype in (torch.uint8, torch.int64):
        x_start = torch.randint(0, 2, (2, 1, 4, 4)).to(dtype)
        ours = DDPMScheduler().add_noise(x_start, noise, timesteps)
        torch.testing.assert_close(ours, DDPMScheduler().add_noise(x_start.float(), noise, timesteps))
        assert ours.dtype == torch.float32


def test_a_named_schedule_replaces_betas_of_ones_own():
    """Else `beta_schedule=...` is ignored without a word."""
    own = DDPMScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3])
    changed = DDPMScheduler.from_config(own.config, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(changed.betas, DDPMScheduler(3, beta_schedule="squaredcos_cap_v2").betas)
    assert DDPMScheduler.from_config(own.config).betas.tolist() == own.betas.tolist()
