"""The report of an evaluation: one file that a browser shows without any other."""

import json
import re

import numpy as np
import pytest
import torch

from ddpm_hf.common.image_sets import ImageSet
from ddpm_hf.evaluation.evaluate import Measure, Reference, Samples, evaluate
from ddpm_hf.evaluation.protocols import PROTOCOLS
from ddpm_hf.evaluation.ranks import Ranks
from ddpm_hf.evaluation.report import read_record, write_report
from tests.support.evaluation import PixelFeatures
from tests.support.fixtures_browser import browser, need_browser


def image_set(seed, count=60):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    return ImageSet(f"set {seed} <&>", f"print-{seed}", (3, 8, 8), count, lambda indices: pixels[list(indices)])


@pytest.fixture
def report(tmp_path, monkeypatch):
    """The folder of a report with a sweep, nearest pairs and a plot of pixels; and what the command says."""
    monkeypatch.setattr("ddpm_hf.evaluation.features.cache.cache_folder", lambda: tmp_path / "cache")
    measure = Measure(("fid", "nearest", "colour"), PixelFeatures(), PROTOCOLS["adm"])
    reference = Reference(measure, image_set(0), image_set(1))
    labels = [{"sampler": "ddim", "steps": steps, "network_calls": steps, "seed": 0} for steps in (5, 10)]
    everything = [Samples(60, one, images=image_set(2 + index)) for index, one in enumerate(labels)]
    results = evaluate(reference, everything, Ranks(), lambda line: None)
    return tmp_path / "out", write_report(tmp_path / "out", "a model <&>", reference, everything, results)


def test_the_table_the_record_and_the_page_say_the_same(report):
    """Else two of them disagree, or what a figure was computed from is not said."""
    folder, table = report
    record = read_record(folder)
    page = (folder / "report.html").read_text()
    for result in record["results"]:
        for figure in result["figures"].values():
            assert f"{figure['value']:.5g}" in table
            assert f"{figure['value']:.5g}" in page
    stamp = record["stamp"]
    said = [stamp[name] for name in ("protocol", "features", "real_images", "samples")]
    assert said == ["adm", "quarters", 60, 60]
    for word in ("adm", "quarters-of-an-image", "print-0", "set 0 &lt;&amp;&gt;", "a model &lt;&amp;&gt;"):
        assert word in page
    assert "<&>" not in page
    assert not re.search(r"""(src|href|url\()\s*=?["']?\s*https?:""", page)  # it loads nothing


def test_a_folder_without_an_evaluation_is_named(tmp_path):
    """Else `compare` fails with an error of JSON."""
    (tmp_path / "metrics.json").write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match=r"holds no metrics\.json"):
        read_record(tmp_path)


@pytest.mark.slow
def test_a_browser_shows_all_pictures(report, tmp_path):
    """Else the page is broken where nobody looks."""
    need_browser()
    with browser(tmp_path / "profile") as driver:
        driver.get((report[0] / "report.html").as_uri())
        pictures = driver.find_elements("tag name", "img")
        assert len(pictures) == 5  # real, two sets of samples, two sets of pairs
        assert all(one.get_property("naturalWidth") > 0 for one in pictures)
        plots = driver.find_elements("tag name", "svg")
        assert len(plots) == 5  # three metrics against calls, two plots of colours
        assert all(one.size["width"] > 100 for one in plots)
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert not [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]


def test_sets_in_another_order_have_the_same_figures(tmp_path, monkeypatch):
    """Else a figure depends on how files are named."""
    monkeypatch.setattr("ddpm_hf.evaluation.features.cache.cache_folder", lambda: tmp_path / "cache")
    first, measure = image_set(0), Measure(("fid",), PixelFeatures(), PROTOCOLS["adm"])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    turned = ImageSet("turned", "print-t", (3, 8, 8), 60, lambda indices: first.read([order[i] for i in indices]))
    values = []
    for samples in (first, turned):
        results = evaluate(Reference(measure, image_set(1)), [Samples(60, images=samples)], Ranks(), lambda line: None)
        values.append(results[0]["figures"]["fid"]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_a_star_marks_a_figure_that_is_better_beyond_its_interval():
    """Else noise is taken for a difference."""
    from ddpm_hf.evaluation.compare import Column, best

    def column(value, width):
        return Column("x", {"fid": {"value": value, "low": value - width, "high": value + width}})

    assert best("fid", [column(5, 1), column(9, 1)]) == 0
    assert best("fid", [column(9, 1), column(5, 1), column(7, 0.5)]) == 1
    assert best("fid", [column(5, 1), column(6, 1)]) is None
    assert best("fid", [column(5, 1)]) is None
    for name in ("likelihood", "bits/dim"):
        bounds = [Column("x", {name: column(value, 0.1).figures["fid"]}) for value in (9, 1)]
        assert best(name, bounds) == 1
