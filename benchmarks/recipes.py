"""What a recipe gains against the defaults of Diffusers' script, at equal steps, network and data.

    python benchmarks/recipes.py --data emoji --preset small-32 --steps 1400 --seeds 0 1 2 --out recipes

Trains each row with each seed, then samples and measures: the colour shift (W1 of per-image channel means, in levels
of 255), the Fréchet distance of `--features`, and the seconds that training took. `--rows` chooses rows by name, and a
row that is done is not done again; `--table` only prints. Rows named `steps/N` train N times fewer steps, for the time
to a quality; the row `recipe` keeps the snapshots that `ddpm-hf ema` makes averages of any width of (`--widths`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from ddpm_hf.models.presets import MODEL_PRESETS

ROOT = Path(__file__).resolve().parent.parent
# Diffusers' train_unconditional.py where a user says nothing
DIFFUSERS = {
    "learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 500, "adam_beta1": 0.95,
    "adam_weight_decay": 1e-6, "use_ema": False, "prediction_type": "epsilon",
}  # fmt: skip
WEIGHTINGS, OPTIMIZERS = ("min_snr", "soft_min_snr", "p2", "debiased"), ("muon", "soap", "schedulefree")
# Flags of a row; the preset's recipe decides the others
ROWS: dict[str, dict] = {
    "diffusers": DIFFUSERS,
    "diffusers+ema": {**DIFFUSERS, "use_ema": True},
    "recipe": {"ema_snapshot_steps": True},
    "recipe-ema": {"use_ema": False},
    "recipe, epsilon": {"prediction_type": "epsilon"},
    **{f"recipe+{name}": {"loss_weighting": name} for name in WEIGHTINGS},
    **{f"recipe+{name}": {"optimizer": name} for name in OPTIMIZERS},
    **{f"recipe, steps/{share}": {"share": share} for share in (2, 4, 8, 16)},
}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="A folder that train_unconditional.py reads.")
    parser.add_argument("--resolution", default="32")
    parser.add_argument("--channels", default="3")
    parser.add_argument("--preset", default="small-32")
    parser.add_argument("--model", type=Path, help="A UNet's config in place of the preset's; its recipe stays.")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--sampling-steps", type=int, default=250)
    parser.add_argument("--metrics", default="colour,fid")
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("--widths", default="", help="Of the row `recipe`, such as 0.05,0.10,0.15.")
    parser.add_argument("--flags", default="", help="More flags for every row, such as '--mixed_precision bf16'.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="Train nothing: print what is there.")
    return parser.parse_args()


def call(*words: object) -> None:
    """A command of this checkout, with its output at the end if it fails."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, words)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stderr[-2000:]}")


def train(arguments: argparse.Namespace, row: str, seed: int, folder: Path) -> None:
    """Train a row, or go on with it."""
    flags = dict(ROWS[row])
    steps = arguments.steps // flags.pop("share", 1)
    if flags.get("ema_snapshot_steps"):
        flags["ema_snapshot_steps"] = max(1, steps // 20)  # as many as widths from 0.02 to 0.25 require
    if arguments.model:
        flags = MODEL_PRESETS[arguments.preset].recipe | {"model_config_name_or_path": arguments.model} | flags
    else:
        flags["model_preset"] = arguments.preset
    flags |= {
        "train_data_dir": arguments.data, "resolution": arguments.resolution, "channels": arguments.channels,
        "train_batch_size": arguments.batch, "max_train_steps": steps, "seed": seed,
        "save_images_epochs": 0, "save_model_epochs": 10**6, "checkpointing_steps": 10**6, "logger": "none",
        "validation_split": 0.1, "validation_steps": 10**6, "output_dir": folder,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    call(
        "train_unconditional.py" if Path.cwd() == ROOT else ROOT / "train_unconditional.py",
        *words,
        *arguments.flags.split(),
    )


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Sample from a row's model, and measure."""
    how = [
        "--metrics", arguments.metrics, "--features", arguments.features, "--num-samples", arguments.num_samples,
        "--sampler", arguments.sampler, "--steps", arguments.sampling_steps, "--batch-size", 500,
    ]  # fmt: skip
    call("-m", "ddpm_hf", "evaluate", folder, *how, "--out", folder / "evaluation")
    if arguments.widths and (folder / "ema-snapshots").is_dir():
        call("-m", "ddpm_hf", "ema", folder, "--sweep", arguments.widths, *how, "--out", folder / "widths")


def figures(folder: Path) -> dict[str, float]:
    """A row's figures of one seed, by their names."""
    record = json.loads((folder / "evaluation" / "metrics.json").read_text())
    found = {name: figure["value"] for name, figure in record["results"][0]["figures"].items()}
    timings = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {**found, "seconds": sum(one["seconds"] for one in timings), "held-out": metrics[-1]["validation_loss"]}


def spread(values: list[float]) -> str:
    """A mean, and the range where there are several."""
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.3g}" + (f" ({low:.3g}–{high:.3g})" if len(values) > 1 else "")


def table(arguments: argparse.Namespace) -> str:
    """The figures so far, as Markdown."""
    measured = arguments.metrics.split(",")
    names = [*measured, "held-out", "seconds"]
    lines = [f"| | {' | '.join(names)} | seeds |", "|---" * (len(names) + 2) + "|"]
    widths: dict[str, list[list[float]]] = {}
    for row in arguments.rows:
        folders = [arguments.out / f"{row.replace(' ', '').replace('/', '-')}-{seed}" for seed in arguments.seeds]
        done = [figures(one) for one in folders if (one / "evaluation" / "metrics.json").is_file()]
        for one in folders:
            if (one / "widths" / "metrics.json").is_file():
                for result in json.loads((one / "widths" / "metrics.json").read_text())["results"]:
                    values = [result["figures"][name]["value"] for name in measured]
                    widths.setdefault(f"EMA width {result['ema_std'] or 'own'}", []).append(values)
        if done:
            shown = [spread([one[name] for one in done]) for name in names]
            lines.append(f"| {row} | {' | '.join(shown)} | {len(done)} |")
    for name, values in widths.items():
        shown = [spread(list(column)) for column in zip(*values)]
        lines.append(f"| {name} | {' | '.join([*shown, '', ''])} | {len(values)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, measure, print."""
    arguments = options()
    for seed in arguments.seeds if not arguments.table else []:
        for row in arguments.rows:
            folder = arguments.out / f"{row.replace(' ', '').replace('/', '-')}-{seed}"
            if (folder / "evaluation" / "metrics.json").is_file():
                continue
            print(f"{row}, seed {seed}", file=sys.stderr, flush=True)
            if not (folder / "model_index.json").is_file():
                train(arguments, row, seed, folder)
            measure(arguments, folder)
    print(table(arguments))


if __name__ == "__main__":
    main()
