"""An average of any width from the snapshots of a run (Karras et al. 2024, Algorithm 3)."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from ..common.errors import UsageError
from ..common.layout import EMA_SNAPSHOTS
from .power_averages import exponent, read_about


class Snapshot(NamedTuple):
    """A file of averaged weights: of which part of the model, how wide, and after how many steps."""

    path: Path
    part: str
    std: float
    step: int


def read_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots of a run, by step.

    Raises:
        UsageError: there are none, or one is malformed.
    """
    found = []
    for path in sorted((folder / EMA_SNAPSHOTS).glob("*.safetensors")):
        try:
            about = read_about(path)
            found.append(Snapshot(path, about["part"], float(about["std"]), int(about["step"])))
        except Exception as error:  # whatever a stranger's file makes the library raise
            raise UsageError(f"{path} is not a snapshot of averaged weights; remove it") from error
    if not found:
        raise UsageError(
            f"{folder} has no {EMA_SNAPSHOTS}, and averages cannot be computed without them; train with"
            " --ema_snapshot_steps, such as a tenth of the steps"
        )
    return sorted(found, key=lambda one: (one.step, one.std))


def inner_products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """∫ p_a p_b of the profiles p(τ) = (γ + 1) τ^γ / t^(γ + 1) on [0, t]; the shapes broadcast."""
    ratio = t_a / t_b
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**power / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def solve_coefficients(stds: Sequence[float], steps: Sequence[int], std: float, step: int) -> np.ndarray:
    """The combination of snapshots whose profile is nearest to that of a width at a step: least squares [n].

    Args:
        stds, steps: of the snapshots, [n].
    """
    t = np.array(steps, np.float64)[:, None]
    gamma = np.array([exponent(one) for one in stds])[:, None]
    wanted = inner_products(t, gamma, np.array([[float(step)]]), np.array([[exponent(std)]]))
    return np.linalg.solve(inner_products(t, gamma, t.T, gamma.T), wanted)[:, 0]


def synthesize(snapshots: Sequence[Snapshot], std: float, step: int) -> dict[str, torch.Tensor]:
    """The average of a width at a step, of one part of the model, by the names of its parameters."""
    coefficients = solve_coefficients([one.std for one in snapshots], [one.step for one in snapshots], std, step)
    total: dict[str, torch.Tensor] = {}
    for snapshot, coefficient in zip(snapshots, coefficients):
        for name, value in load_file(snapshot.path).items():
            term = value.double() * coefficient
            total[name] = total[name] + term if name in total else term
    return {name: value.float() for name, value in total.items()}


MOST_OFF = 0.02  # from 1, of a combination's sum: beyond, the snapshots are too few for the width
Weights = dict[str, torch.Tensor]  # by the names of a model's parameters


class Averages:
    """Averages of any width at a step of a run.

    Args:
        folder: the run's.
        step: where they end; by default the last snapshot's.

    Raises:
        UsageError: no snapshots, or none up to the step.
    """

    def __init__(self, folder: Path, step: int | None = None):
        self.folder, there = folder, read_snapshots(folder)
        self.step = there[-1].step if step is None else step
        if not there[0].step <= self.step <= there[-1].step:
            raise UsageError(
                f"--step {step}: the snapshots of {folder} are of steps {there[0].step:,} to {there[-1].step:,}"
            )
        self.snapshots = [one for one in there if one.step <= self.step]
        self.parts = sorted({one.part for one in self.snapshots})

    def check(self, std: float) -> None:
        """Raise UsageError for a width that the snapshots are too few for: their combination shrinks the weights."""
        for part in self.parts:
            ours = [one for one in self.snapshots if one.part == part]
            steps = len({one.step for one in ours})
            total = solve_coefficients([one.std for one in ours], [one.step for one in ours], std, self.step).sum()
            if abs(total - 1) > MOST_OFF:
                raise UsageError(
                    f"width {std:g}: the snapshots of {steps} steps in {self.folder} are too few for it; take"
                    " one nearer to 0.05 or 0.10, or train with more of them (--ema_snapshot_steps)"
                )

    @property
    def digest(self) -> str:
        """Of what the averages are computed from."""
        files = [f"{one.path.name} {one.path.stat().st_size} {one.path.stat().st_mtime_ns}" for one in self.snapshots]
        return hashlib.sha256("\n".join([*files, str(self.step)]).encode()).hexdigest()

    def put(self, models: Mapping[str, Any], std: float, own: Mapping[str, Weights] | None = None) -> None:
        """Give models, by the names of the run's parts, the weights of a width; of width 0, their `own`.

        Raises:
            UsageError: a snapshot of another network.
        """
        for part in self.parts:
            if std:
                weights = synthesize([one for one in self.snapshots if one.part == part], std, self.step)
            else:
                weights = (own or {})[part]
            parameters = dict(models[part].named_parameters())
            if {name: one.shape for name, one in parameters.items()} != {name: w.shape for name, w in weights.items()}:
                raise UsageError(f"the snapshots in {self.folder} are of another network than its {part}")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(weights[name])

    @staticmethod
    def copy(model: torch.nn.Module) -> Weights:
        """A model's own weights, to put back."""
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
