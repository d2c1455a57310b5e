"""Prompts and captions as what a UNet attends to: tokens, and CLIP's embeddings of them.

This file is copied into published repositories: it imports torch and transformers.
"""

import torch
from transformers import CLIPTextModel, CLIPTokenizer


def cut_off(tokenizer: CLIPTokenizer, texts: list[str]) -> list[str]:
    """What of each text is beyond the tokenizer's L tokens, and not read; empty where nothing is."""
    length = tokenizer.model_max_length
    ids = tokenizer(list(texts), verbose=False).input_ids if len(texts) else []
    tokenize(tokenizer, [""])  # it is saved as it was last used: as for the UNet
    return [tokenizer.decode(one[length - 1 : -1]) if len(one) > length else "" for one in ids]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts as ids [N, L], padded and cut off to the tokenizer's L, and 1 where they are no padding [N, L]."""
    length = tokenizer.model_max_length
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def encode_texts(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str], device: torch.device
) -> torch.Tensor:
    """Texts as what a UNet attends to, [N, L, D]; the padding is masked where the text encoder learned so."""
    ids, mask = (each.to(device) for each in tokenize(tokenizer, texts))
    masked = getattr(text_encoder.config, "use_attention_mask", None)
    return text_encoder(ids, attention_mask=mask if masked else None)[0]
