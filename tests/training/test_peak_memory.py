"""The peak memory that --dry_run says is that of the run, activations included."""

import json
import re

import pytest

from ddpm_hf.training import rehearsal
from tests.support import warm
from tests.support.pictures import encoded, random_pixels, write_rows, write_unet
from tests.support.runs import train, words

PEAK = """
import json, resource, sys
import train_unconditional
from tests.support import cheap
cheap.install()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train_unconditional.main(sys.argv[1:])
print(json.dumps([before / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""
LARGE = {
    "resolution": 32, "train_batch_size": 64, "eval_batch_size": 4, "max_train_steps": 2, "cpu_threads": 1, "seed": 0,
    "ddpm_num_inference_steps": 2, "logger": "none", "use_ema": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Those of a run whose activations take a hundred MiB."""
    root = tmp_path_factory.mktemp("large")
    write_rows(root / "images", [encoded(one) for one in random_pixels(64, 8, 8)])
    write_unet(root / "unet", sample_size=32, block_out_channels=[16, 16])
    return {**LARGE, "train_data_dir": root / "images", "model_config_name_or_path": root / "unet"}


@pytest.mark.slow
def test_the_peak_of_a_dry_run_is_that_of_the_run(flags, tmp_path):
    """Else a run whose memory seemed to suffice ends for want of it, after hours of waiting for the machine."""

    def peak(**more):
        done = warm.run("-c", PEAK, *words({**flags, "output_dir": tmp_path / "run", **more}), resident=True)
        assert done.returncode == 0, done.stderr
        before, most = json.loads(done.stdout.splitlines()[-1])
        return done.stdout, before, most

    said, before, _ = peak(dry_run=True)
    (expected,) = re.findall(r"peak  ([\d,]+) MiB of memory measured", said)
    _, _, most = peak()
    assert most - before > 100  # else imports alone are compared
    assert float(expected.replace(",", "")) - before == pytest.approx(most - before, rel=0.2)


def test_moments_that_no_step_has_made_are_added(flags, tmp_path, monkeypatch):
    """Else the estimate is too low where a step takes too long to be tried."""
    monkeypatch.setattr(rehearsal, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(rehearsal, "peak_memory", lambda device: 2**30)
    run = train(tmp_path, tmp_path / "run", {**flags, "train_batch_size": 2}, dry_run=True)
    (said,) = re.findall(r"peak  ([\d,]+) MiB of memory measured, the moments of Adam added", run.out)
    parameters = int(re.search(r"([\d,]+) parameters", run.out)[1].replace(",", ""))
    assert float(said.replace(",", "")) == pytest.approx(1024 + 8 * parameters / 2**20, abs=0.5)
