"""Captions of a dataset, and a CLIP text encoder of their own: a tokenizer fitted to them, and a small transformer."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..common.errors import UsageError
from ..data.batches import Images
from ..data.images import choose_caption
from ..portable.text_encoding_ddpm_hf import cut_off

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
LONGEST = 77  # tokens that CLIP reads, start and end included


def all_captions(column: Iterable[Any], name: str) -> list[str]:
    """The different captions of a column, sorted."""
    texts: set[str] = set()
    for value in column:
        several = (value or [None]) if isinstance(value, (list, tuple)) else [value]
        texts.update(choose_caption(one, 0, name) for one in several)
    return sorted(texts)


def captions_of(images: Images, first: int | None = None) -> list[str]:
    """The different captions of the images, or of the first, sorted.

    Raises:
        DataError: captions that are not strings.
    """
    return all_captions((images.indexed.captions or [])[:first], images.rows.name)


def warn_of_cut_captions(tokenizer: CLIPTokenizer, captions: Iterable[str], most: int = 100_000) -> list[str]:
    """A line for the log if captions are longer than the text encoder reads; of more than `most`, of the first."""
    looked_at = list(itertools.islice(captions, most))
    cut = sum(bool(rest) for rest in cut_off(tokenizer, looked_at))
    if not cut:
        return []
    return [
        f"{cut} of {len(looked_at)} captions are longer than the {tokenizer.model_max_length} tokens that the text"
        " encoder reads, and train without their ends"
    ]


def fit_tokenizer(captions: Iterable[str], vocabulary: int = 8192) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's layout, with merges learned from the captions.

    Its ids run as CLIP's do: 256 bytes, 256 bytes that end a word, the merges, start, end. Its length is that of the
    longest caption, in eights, from 16 up to CLIP's 77.
    """
    from tokenizers import Tokenizer, trainers
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    captions = list(captions)
    # an alphabet in code-point order, which is that of every run
    letters = sorted(ByteLevel.alphabet())
    letters += [f"{letter}</w>" for letter in letters]
    like = CLIPTokenizer(vocab={token: number for number, token in enumerate([*letters, START, END])}, merges=[])
    learner = Tokenizer(BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = like.backend_tokenizer.normalizer, like.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=letters[:256],
        special_tokens=letters[256:],  # else these get their ids, which break ties, in another order each time
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = list(dict.fromkeys([*letters, *("".join(pair) for pair in merges)]))
    vocab = {token: number for number, token in enumerate([*tokens, START, END])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    longest = max(len(ids) for ids in tokenizer([*captions, ""]).input_ids)
    tokenizer.model_max_length = min(LONGEST, max(16, -(-longest // 8) * 8))
    return tokenizer


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of `fit_tokenizer` from where it was saved: it is saved again to the same bytes.

    transformers' own `from_pretrained` keeps settings of the loading in the config.

    Raises:
        UsageError: it holds another tokenizer, or a damaged one.
    """
    try:
        model, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in TOKENIZER_FILES)
        merges = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in model["model"]["merges"]]
        tokenizer = CLIPTokenizer(vocab=model["model"]["vocab"], merges=merges)
        tokenizer.model_max_length = int(settings["model_max_length"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder} does not hold the tokenizer of a run ({type(error).__name__}: {error})") from error
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer, width: int = 128, layers: int = 2) -> CLIPTextModel:
    """An untrained CLIP text encoder for a tokenizer: [N, L] ids -> [N, L, width]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=max(count for count in range(1, max(1, width // 32) + 1) if width % count == 0),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
