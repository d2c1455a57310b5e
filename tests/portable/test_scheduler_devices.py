"""Where the scheduler's math computes on devices that lack something, told by torch's fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_hf import DDPMScheduler, training_losses
from ddpm_hf.objectives.bound import prior_bpd
from ddpm_hf.objectives.weightings import min_snr_weights


class NoDoubleOnMPS(TorchDispatchMode):
    """Refuses every operation whose result is a float64 tensor on mps, however it came there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "mps" and leaf.dtype == torch.float64:
                raise TypeError(f"{function} makes a float64 tensor on mps")
        return output


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "posterior_mean"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_the_schedulers_math_stays_on_an_apple_gpu_without_float64(prediction_type, variance_type):
    """Torch's fake tensors tell on which device each result lies: else sampling or a likelihood fails on a Mac."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    channels = 6 if variance_type == "learned_range" else 3
    with FakeTensorMode(allow_non_fake_inputs=True), NoDoubleOnMPS():
        x, noise = (torch.empty(2, 3, 8, 8, device="mps") for _ in range(2))
        output = torch.empty(2, channels, 8, 8, device="mps")
        t = torch.empty(2, dtype=torch.int64, device="mps")
        results = {
            "add_noise": scheduler.add_noise(x, noise, t),
            "training_target": scheduler.training_target(x, noise, t),
            "predict_epsilon": scheduler.predict_epsilon(x, t, noise),
            "q_posterior": scheduler.q_posterior_mean_variance(x, noise, t).log_variance,
            "full chain": scheduler.p_mean_variance(output, t, x).variance,
            "strided chain": scheduler.p_mean_variance(output, t, x, t - 2).variance,
            "step": scheduler.step(output, 999, x).prev_sample,
            "last step": scheduler.step(output, 0, x).prev_sample,
            "vlb": training_losses(scheduler, output, x, noise, t, objective="vlb"),
            "min-SNR": min_snr_weights(scheduler, t, 5.0),
            "prior": prior_bpd(scheduler, x),
        }
    assert {name: result.device.type for name, result in results.items()} == dict.fromkeys(results, "mps")
