"""The whole card, over what is there already."""

import hashlib
import json
import re
from typing import Any

from .facts import Facts
from .metadata import merge_metadata, metadata
from .sections import SECTIONS

_HEAD = re.compile(r"\A---[ \t]*\n(.*?\n|)---[ \t]*\n", re.DOTALL)
_SECTION = re.compile(r"<!-- ddpm_hf:(\w+) (\w{8}) -->\n(.*?)\n<!-- /ddpm_hf -->", re.DOTALL)
_SEAL = re.compile(r"\n*<!-- ddpm_hf wrote ([\w ]*) beside (\w{8}) -->\n*")
NO_DIGEST = "0" * 8  # of a card with edits that have not been to the Hub


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _marked(name: str, text: str) -> str:
    return f"<!-- ddpm_hf:{name} {_digest(text)} -->\n{text}\n<!-- /ddpm_hf -->"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text.

    Raises:
        ValueError: metadata that are not YAML, or no mapping.
    """
    import yaml

    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    head = _HEAD.match(card)
    try:
        said = (yaml.safe_load(head[1]) if head else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the head of README.md is not YAML ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(said, dict):
        raise ValueError("the head of README.md is not YAML of names and values; mend it")
    return said, card[head.end() :] if head else card


def personal_text(card: str) -> str:
    """What of a card's text is a person's: the sections that were edited, and what stands around the sections."""
    text = _SEAL.sub("\n", _split(card)[1])
    return _SECTION.sub(lambda found: found[3] if _digest(found[3]) != found[2] else "", text).strip()


def _state(card: str) -> str:
    """A digest of all that a person may change: metadata, text, and which sections there are."""
    said, text = _split(card)
    there = [found[1] for found in _SECTION.finditer(text)]
    return _digest(json.dumps([said, there, personal_text(card)], sort_keys=True, default=str))


def was_edited(card: str) -> bool:
    """Whether a person changed the card since it was last the same in the folder and on the Hub."""
    seal = _SEAL.search(_split(card)[1])
    return _state(card) != seal[2] if seal else bool(card.strip())


def newer_card(here: str, on_hub: str) -> str:
    """Of the card in the folder and that on the Hub, the one with what a person wrote last.

    Raises:
        ValueError: both were edited since they were the same.
    """
    if not here or not on_hub or not was_edited(here):
        return on_hub or here
    if was_edited(on_hub) and _state(on_hub) != _state(here):
        raise ValueError(
            "README.md was edited here and on the Hub; copy what is to stay of it into the Hub's, and remove it here"
        )
    return here


def merge_sections(own: dict[str, str | None], before: str) -> str:
    """Our sections in the places where a card has them, but for those that a person edited or took out.

    A section is marked with a digest of its text, so that an edited one is known by its own. What stands between or
    around the sections is a person's, and stays. The last line names what was written, to know what was taken out.

    Args:
        own: the sections' texts; an empty one goes, and None stays as it is.
    """
    seal = _SEAL.search(before)
    known = seal[1].split() if seal else []
    there = {found[1] for found in _SECTION.finditer(before)}

    def renewed(found: re.Match) -> str:
        name, edited = found[1], _digest(found[3]) != found[2]
        if edited or own.get(name) is None:
            return found[0]
        return _marked(name, own[name]) + found[4] if own[name] else ""

    text = re.sub(_SECTION.pattern + r"(\n*)", renewed, _SEAL.sub("\n", before), flags=re.DOTALL).strip("\n")
    new = [_marked(name, section) for name, section in own.items() if section and name not in there | set(known)]
    left = {found[1] for found in _SECTION.finditer(text)}
    taken_out = set(known) - there
    names = " ".join(name for name in SECTIONS if name in left | taken_out or own.get(name))
    return "\n\n".join([*([text] if text else []), *new, f"<!-- ddpm_hf wrote {names} beside {NO_DIGEST} -->"]) + "\n"


def make_card(facts: Facts, before: str = "", to_hub: bool = True) -> str:
    """The card's text.

    Args:
        before: a card that is there, of which all that a person wrote stays.
        to_hub: whether it goes there, so that the folder's card and the Hub's are the same.

    Raises:
        ValueError: one whose head is not YAML.
    """
    import yaml

    said, text = _split(before)
    model = facts.repository.split("/")[-1]
    head = yaml.safe_dump(merge_metadata(metadata(facts), said, model), sort_keys=False, allow_unicode=True)
    sections = {name: write(facts) for name, write in SECTIONS.items()}
    if not facts.run:  # not known here, and so left as they are
        sections |= {name: sections[name] or None for name in ("training", "evaluation")}
    card = f"---\n{head}---\n\n{merge_sections(sections, text.strip())}"
    sealed = to_hub or not before or not was_edited(before)
    return card.replace(f"beside {NO_DIGEST} -->", f"beside {_state(card)} -->") if sealed else card
