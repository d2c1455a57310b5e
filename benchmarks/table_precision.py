"""How exact the diffusion tables are: the largest relative error of any, against 50 digits, as a Markdown table.

    python benchmarks/table_precision.py            # every timestep; about two minutes
    python benchmarks/table_precision.py --quick    # the timesteps that the tests check

`ours, float64` and `ours, float32` are `ddpm_hf.DDPMScheduler`'s values as its public methods return them for samples
of that dtype; `stock` is `diffusers.DDPMScheduler`, which keeps float32 tables (schedules that it does not know are
passed as `trained_betas`). The worst table is named with its error.
"""

import argparse
import sys
from pathlib import Path

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ddpm_hf import BETA_SCHEDULES, DDPMScheduler
from tests.support.reference_tables import (
    checked_timesteps,
    our_tables,
    reference_betas,
    reference_tables,
    relative_errors,
)

STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


def stock_tables(name: str, T: int, timesteps: list[int]) -> dict[str, list[float]]:
    """The tables of stock's full chain as its own public methods give them, in float32."""
    config = {"num_train_timesteps": T, "clip_sample": False, "variance_type": "learned"}
    if name in STOCK_SCHEDULES:
        config["beta_schedule"] = name
    else:
        config["trained_betas"] = DDPMScheduler(num_train_timesteps=T, beta_schedule=name).exact_tables.betas.tolist()
    scheduler = diffusers.DDPMScheduler(**config)
    t = torch.tensor(timesteps)
    one, zero = torch.ones(len(timesteps), 1), torch.zeros(len(timesteps), 1)
    tables = {
        "beta": scheduler.betas[t],
        "alpha": scheduler.alphas[t],
        "alpha_bar": scheduler.alphas_cumprod[t],
        "one_minus_alpha_bar": 1 - scheduler.alphas_cumprod[t],
        "sqrt_alpha_bar": scheduler.add_noise(one, zero, t),
        "sqrt_one_minus_alpha_bar": scheduler.add_noise(zero, one, t),
    }
    # stock clamps the variance of the last step to 1e-20, where the exact one is 0
    tables["posterior_variance"] = torch.stack(
        [scheduler._get_variance(each, variance_type="fixed_small") * (each > 0) for each in timesteps]
    )

    def step(scheduler, each, output, sample):
        """Mean and x̂_0 of stock's step; a learned variance of 0 takes its noise away."""
        output, sample = torch.tensor([[output, 0.0]]), torch.tensor([[sample]])
        return torch.stack(scheduler.step(output, each, sample, return_dict=False)).flatten()

    for prediction_type in ("epsilon", "sample", "v_prediction"):
        scheduler = diffusers.DDPMScheduler(**config, prediction_type=prediction_type)
        from_output = torch.stack([step(scheduler, each, 1.0, 0.0) for each in timesteps])  # [S, 2]: mean, x̂_0
        from_sample = torch.stack([step(scheduler, each, 0.0, 1.0) for each in timesteps])
        tables[f"x0_from_output, {prediction_type}"] = from_output[:, 1]
        tables[f"x0_from_sample, {prediction_type}"] = from_sample[:, 1]
        if prediction_type == "sample":
            tables["posterior_mean_from_x0"] = from_output[:, 0]
            tables["posterior_mean_from_sample"] = from_sample[:, 0]
    return {name: table.flatten().tolist() for name, table in tables.items()}


def worst(tables, reference) -> str:
    """The largest error and the table it is in."""
    errors = relative_errors(tables, reference)
    name = max(errors, key=errors.get)
    return f"{errors[name]:.1e} ({name})"


def main():
    """Print the Markdown table, a row for each schedule and T."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the timesteps that the tests check")
    parser.add_argument("--num_train_timesteps", type=int, nargs="+", default=[10, 100, 1000, 4000])
    args = parser.parse_args()
    print("| schedule | T | ours, float64 | ours, float32 | stock |")
    print("|---|---|---|---|---|")
    seen = set()
    for name, function in BETA_SCHEDULES.items():
        if function in seen:  # an alias
            continue
        seen.add(function)
        for T in args.num_train_timesteps:
            timesteps = checked_timesteps(T) if args.quick else list(range(T))
            previous = [t - 1 for t in timesteps]
            reference = reference_tables(reference_betas(name, T), timesteps, previous)
            config = {"num_train_timesteps": T, "beta_schedule": name}
            figures = [
                worst(our_tables(config, timesteps, previous, d), reference) for d in (torch.float64, torch.float32)
            ]
            figures.append(worst(stock_tables(name, T, timesteps), reference))
            print(f"| {name} | {T} | " + " | ".join(figures) + " |", flush=True)


if __name__ == "__main__":
    main()
