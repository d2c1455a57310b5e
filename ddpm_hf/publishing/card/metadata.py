"""The metadata of a model card."""

import re
from typing import Any

from ...inference.kinds import KINDS
from .facts import Facts, all_results

PIPELINE_TAGS = {kind.task for kind in KINDS.values() if kind.known_task}


def metadata(facts: Facts) -> dict[str, Any]:
    """The card's YAML head, as the Hub reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    name = facts.repository.split("/")[-1]
    results = [
        EvalResult(
            task_type=facts.kind,
            dataset_type=one["dataset"],
            dataset_name=one["dataset"],
            dataset_split=one["split"],
            metric_type=re.sub(r"\W+", "_", one["metric"].lower()).strip("_"),
            metric_name=f"{one['metric']} ({one['samples']:,} images{after_comma(one['settings'])})",
            metric_value=one["value"],
        )
        for one in all_results(facts)
    ]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=facts.kind if facts.kind in PIPELINE_TAGS else None,
        license=facts.license,
        tags=["ddpm", "ddpm_hf", "diffusion", facts.kind],
        datasets=[facts.dataset["name"]] if facts.dataset.get("on_hub") else None,
        base_model=facts.run.get("base_model"),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_dict()


def after_comma(text: str | None) -> str:
    return f", {text}" if text else ""


def merge_metadata(own: dict[str, Any], before: dict[str, Any], model: str = "") -> dict[str, Any]:
    """Ours over what a card says already: lists are joined, and what is not ours stays, its license too.

    What we said of other weights goes: the results of the same `model`, the task of another kind of it.
    """
    merged = {name: value for name, value in before.items() if name != "model-index"}
    if merged.get("pipeline_tag") in PIPELINE_TAGS and "pipeline_tag" not in own:
        del merged["pipeline_tag"]
    other_kinds = {kind.task for kind in KINDS.values()} - set(own.get("tags") or [])
    for name, value in ((name, value) for name, value in own.items() if name != "model-index"):
        there = before.get(name)
        if isinstance(value, list) and there is not None:
            there = there if isinstance(there, list) else [there]
            value = [one for one in there if str(one) not in other_kinds] + [one for one in value if one not in there]
        merged[name] = value
    listed = before.get("model-index") if isinstance(before.get("model-index"), list) else []
    results = [entry for entry in listed if not (isinstance(entry, dict) and entry.get("name") == model)]
    merged["model-index"] = results + own.get("model-index", [])
    return {name: value for name, value in merged.items() if name != "model-index" or value}
