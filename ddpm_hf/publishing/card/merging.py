"""A model card has one marked block, which each push renews; the text around it belongs to the user."""

import hashlib
import json
import re
from typing import Any, NamedTuple

from ...common.errors import one_line
from .facts import Facts
from .metadata import merge_metadata, metadata
from .sections import SECTIONS

MARK = "<!-- ddpm_hf: a push renews all text up to the end mark. Sections left out: {}. State: {} -->"
END_MARK = "<!-- /ddpm_hf -->"
_BLOCK = re.compile(
    r"<!-- ddpm_hf: [^>]*left out: ([\w, ]*)\. State: (\w{8}) -->\n((?:(?!<!-- ddpm_hf: ).)*?)\n" + END_MARK, re.DOTALL
)
NOT_IN_SYNC = "0" * 8  # the state of a card with edits that the Hub has not seen

# Version 0.1 marked each section with a digest of its text; the last line named the sections, and had the card's state
_OLD_SECTION = re.compile(r"<!-- ddpm_hf:(\w+) (\w{8}) -->\n(.*?)\n<!-- /ddpm_hf -->", re.DOTALL)
_OLD_STATE = re.compile(r"\n*<!-- ddpm_hf wrote ([\w ]*) beside (\w{8}) -->\n*")


def _digest(*parts: Any) -> str:
    text = parts[0] if len(parts) == 1 else json.dumps(list(parts), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Card(NamedTuple):
    """A model card: its metadata, the user's text above and below the block, and the block as it was last written."""

    head: dict[str, Any]
    above: str
    below: str = ""
    block: str = ""
    left_out: tuple[str, ...] = ()  # sections that the user does not want in the block
    state: str | None = None  # `current_state` when folder and Hub last had the same card

    def current_state(self) -> str:
        """A digest of all that a user can change."""
        return _digest(self.head, self.above, self.below, self.left_out)

    def was_edited(self) -> bool:
        """Whether the user changed it since folder and Hub last had the same card."""
        return self.state != self.current_state()


def parse_card(text: str) -> Card:
    """Take a card apart; without a block, all of its text is the user's.

    Raises:
        ValueError: the metadata are not a YAML mapping.
    """
    import yaml
    from huggingface_hub import RepoCard  # ModelCard would rewrite the results that other tools recorded

    text = text.replace("\r\n", "\n")
    try:
        card = RepoCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"the metadata of README.md are not YAML ({one_line(error)}); fix them") from error
    head = card.data.to_dict()
    if "language" in head:
        head["language"] = norwegian(head["language"])
    if match := _BLOCK.search(card.text):
        above, below = card.text[: match.start()].strip(), card.text[match.end() :].strip()
        left_out = set(re.findall(r"\w+", match[1])) & set(SECTIONS)
        return Card(head, above, below, match[3], tuple(sorted(left_out)), match[2])
    if _OLD_SECTION.search(card.text) or _OLD_STATE.search(card.text):
        return _from_sections(head, card.text)
    return Card(head, card.text.strip())


def norwegian(language: Any) -> Any:
    """A language, or a list of them, with "no", which YAML reads as false, as it was meant."""
    if isinstance(language, list):
        return [norwegian(one) for one in language]
    return "no" if language is False else language


def _from_sections(head: dict[str, Any], text: str) -> Card:
    """A card of version 0.1: edited sections become the user's text, and neither they nor deleted ones are renewed."""
    recorded = _OLD_STATE.search(text)
    sections = {match[1]: match[3] for match in _OLD_SECTION.finditer(text)}
    edited = {match[1] for match in _OLD_SECTION.finditer(text) if _digest(match[3]) != match[2]}
    deleted = set(recorded[1].split() if recorded else ()) - set(sections)
    text = _OLD_SECTION.sub(lambda match: match[3] if match[1] in edited else "\0", _OLD_STATE.sub("\n", text))
    old_state = _digest(head, list(sections), text.replace("\0", "").strip())
    above, _, below = (re.sub(r"[\n\0]*\0\n*", "\n\n", part).strip() for part in text.partition("\0"))
    block = "\n\n".join(section for name, section in sections.items() if name not in edited)
    card = Card(head, above, below, block, tuple(sorted(edited | deleted)), NOT_IN_SYNC)
    return card._replace(state=card.current_state()) if recorded and recorded[2] == old_state else card


def newer_card(here: str, on_hub: str) -> str:
    """Of the card in the folder and that on the Hub, the one with the user's last edits.

    Raises:
        ValueError: both were edited since they were the same.
    """
    if not here.strip() or not on_hub.strip():
        return on_hub if on_hub.strip() else here
    local, remote = parse_card(here), parse_card(on_hub)
    if local.was_edited() and remote.was_edited() and local.current_state() != remote.current_state():
        raise ValueError(
            "README.md was edited here and on the Hub; merge your changes into the Hub's README.md, delete the one"
            " here, and push again"
        )
    return here if local.was_edited() else on_hub


def make_card(facts: Facts, before: str = "", to_hub: bool = True) -> str:
    """The card's text.

    Args:
        before: the card so far: all that the user wrote in it stays.
        to_hub: whether it is uploaded, so that folder and Hub have the same card from then on.

    Raises:
        ValueError: the metadata of `before` are not YAML.
    """
    from huggingface_hub import CardData

    card = parse_card(before)
    sections = {name: write(facts) for name, write in SECTIONS.items() if name not in card.left_out}
    for title in ("Training", "Evaluation"):  # what the folder does not know of the training stays as the card has it
        known = re.search(rf"^## {title}$.*?(?=\n+## |\Z)", card.block, re.DOTALL | re.MULTILINE)
        if title.lower() in sections and not facts.run and known:
            sections[title.lower()] = sections[title.lower()] or known[0]
    # a name in the data must not end the block
    block = re.sub("<!-- /?ddpm_hf", "", "\n\n".join(text for text in sections.values() if text))
    head = merge_metadata(metadata(facts), card.head)
    new = card._replace(head=head)
    in_sync = to_hub or not before.strip() or not card.was_edited()
    mark = MARK.format(", ".join(card.left_out) or "none", new.current_state() if in_sync else NOT_IN_SYNC)
    body = "\n\n".join(text for text in (card.above, f"{mark}\n{block}\n{END_MARK}", card.below) if text)
    return f"---\n{CardData(**head).to_yaml()}\n---\n\n{body}\n"
