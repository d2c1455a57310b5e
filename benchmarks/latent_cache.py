"""An epoch of text to image with cached latents and embeddings against one without: time and memory.

    python benchmarks/latent_cache.py MODEL [--rounds 3] [--train_data_dir FOLDER --steps 63]

MODEL is a text-to-image folder, trained on as a checkpoint: its autoencoder and text encoder are frozen. The two kinds
alternate; reported are the seconds of the steps (the seconds of the run include filling the cache), the median of the
rounds' ratios, and the peak memory of a run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "train_text2image.py"


def run(model: str, steps: int, data: list[str], folder: Path, cached: bool) -> tuple[float, float, float]:
    """Seconds of the training steps, seconds of the run, and its peak memory in MiB."""
    argv = [
        "--pretrained_model_name_or_path", model, "--resolution", "32", "--center_crop", "true", "--seed", "0",
        "--train_batch_size", "64", "--max_train_steps", str(steps), "--output_dir", str(folder), "--logger", "none",
        "--eval_batch_size", "1", "--num_inference_steps", "1", "--validation_prompts", "a", "--cache_latents",
        str(cached).lower(), *data,
    ]  # fmt: skip
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(SCRIPT), *argv], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(argv)} ended with {os.waitstatus_to_exitcode(status)}")
    lines = (folder / "timings.jsonl").read_text().splitlines()
    seconds = sum(json.loads(line)["seconds"] for line in lines)
    return seconds, time.perf_counter() - begin, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=63, help="of 64; by default an epoch of the embedded digits")
    parser.add_argument("--train_data_dir")
    arguments = parser.parse_args()
    data = ["--train_data_dir", arguments.train_data_dir] if arguments.train_data_dir else []
    print(f"{arguments.steps} steps of 64 images, {os.cpu_count()} cores\n")
    print("| round | | seconds of the steps | seconds of the run | peak memory, MiB |\n|---|---|---|---|---|")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            seconds = {}
            for cached in (False, True):
                output = Path(folder) / f"{number}-{cached}"
                seconds[cached], total, memory = run(arguments.model, arguments.steps, data, output, cached)
                kind = "cached" if cached else "not cached"
                print(f"| {number + 1} | {kind} | {seconds[cached]:.1f} | {total:.1f} | {memory:.0f} |", flush=True)
            ratios.append(seconds[False] / seconds[True])
    print(f"\nmedian ratio of the steps: {statistics.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})")


if __name__ == "__main__":
    main()
