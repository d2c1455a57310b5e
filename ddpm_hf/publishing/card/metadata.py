"""The metadata of a model card."""

import re
from typing import Any

from ...inference.kinds import KINDS
from .facts import Facts, all_results, datasets_of

OURS = re.compile(r" \([\d,]+ images(, .*)?\)$")  # the name of a figure that a push writes
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
        datasets=[one["name"] for one in datasets_of(facts.run) if one.get("on_hub")] or None,
        base_model=facts.run.get("base_model"),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_dict()


def after_comma(text: str | None) -> str:
    """The text after a comma; empty for none."""
    return f", {text}" if text else ""


def merge_metadata(new: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """`new` over a card's metadata: lists are joined, and the user's other entries stay.

    What an earlier push said of other weights, under whatever name, is removed: its results, the task of another kind.
    """
    merged = {name: value for name, value in before.items() if name != "model-index"}
    if merged.get("pipeline_tag") in PIPELINE_TAGS and "pipeline_tag" not in new:
        del merged["pipeline_tag"]
    other_kinds = {kind.task for kind in KINDS.values()} - set(new.get("tags") or [])
    for name, value in ((name, value) for name, value in new.items() if name != "model-index"):
        existing = before.get(name)
        if isinstance(value, list) and existing is not None:
            existing = existing if isinstance(existing, list) else [existing]
            value = [one for one in existing if str(one) not in other_kinds] + [
                one for one in value if one not in existing
            ]
        merged[name] = value
    merged["model-index"] = merge_index(new.get("model-index", []), before.get("model-index"))
    return {name: value for name, value in merged.items() if name != "model-index" or value}


def merge_index(new: list[dict[str, Any]], before: Any) -> list[Any]:
    """The models with their results: those that others recorded stay, beside ours of the same model."""
    ours = {entry["name"]: entry for entry in new}
    kept = []
    for entry in before if isinstance(before, list) else []:
        known = isinstance(entry, dict) and isinstance(entry.get("results"), list)
        if not (known and isinstance(entry.get("name", ""), str)):
            kept.append(entry)
            continue
        others = [result for result in (without_ours(one) for one in entry["results"]) if result is not None]
        if entry.get("name") in ours:
            ours[entry["name"]] = {**ours[entry["name"]], "results": [*ours[entry["name"]]["results"], *others]}
        elif others:
            kept.append({**entry, "results": others})
    return kept + list(ours.values())


def without_ours(result: Any) -> Any:
    """A result without the figures of an earlier push, which say their number of images; None if none is left."""
    if not (isinstance(result, dict) and isinstance(result.get("metrics"), list)):
        return result
    others = [
        one for one in result["metrics"] if not (isinstance(one, dict) and OURS.search(str(one.get("name", ""))))
    ]
    return {**result, "metrics": others} if others else None
