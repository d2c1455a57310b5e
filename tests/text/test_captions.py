"""Captions: the tokenizer fitted to them, the encoder that reads them, and that each stays with its image."""

import itertools
import json
import re

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextModel, CLIPTokenizer

from ddpm_hf.common.errors import DataError, UsageError
from ddpm_hf.data import ImageTransform
from ddpm_hf.data.dataset import ImageDataset, StreamingBatches, identity
from ddpm_hf.data.digits import DIGIT_CAPTIONS, DIGIT_NAMES
from ddpm_hf.data.flags import DataFlags
from ddpm_hf.data.images import augmentation_uniforms, choose_caption
from ddpm_hf.data.orders import keyed_permutation
from ddpm_hf.data.reading import load_rows, read_dataset
from ddpm_hf.data.rows import Rows
from ddpm_hf.portable.text_encoding_ddpm_hf import encode_texts
from ddpm_hf.text.captions import END, START, all_captions, fit_tokenizer, make_text_encoder
from ddpm_hf.training.flags import Flags
from ddpm_hf.training.plan import KeyedBatchSampler, StepPlan
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.pictures import encoded, image_rows, quiet, write_rows

CPU = torch.device("cpu")
DIGITS = sorted(caption.format(name) for caption in DIGIT_CAPTIONS for name in DIGIT_NAMES)
WORDS = sorted({word for caption in DIGITS for word in caption.split()})


@pytest.fixture(scope="module")
def tokenizer():
    """Fitted to the digits' captions."""
    return fit_tokenizer(DIGITS)


@pytest.fixture(scope="module")
def text_encoder(tokenizer):
    """A small encoder for it."""
    torch.manual_seed(0)
    return make_text_encoder(tokenizer, width=32, layers=1).eval()


# The tokenizer


def merges_of(tokenizer) -> list[tuple[str, str]]:
    """The pairs that it joins, in order."""
    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def test_the_vocabulary_is_laid_out_as_clips(tokenizer):
    """Else ids mean something else to code written for CLIP, such as pooling at the largest id."""
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    assert sorted(vocab.values()) == list(range(len(tokenizer)))
    letters = sorted(ByteLevel.alphabet())
    assert tokens[:256] == letters
    assert tokens[256:512] == [f"{letter}</w>" for letter in letters]
    assert tokens[-2:] == [START, END]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(vocab) - 2, len(vocab) - 1)
    pairs = merges_of(tokenizer)
    assert tokens[512:-2] == list(dict.fromkeys("".join(pair) for pair in pairs))
    for first, second in pairs:
        assert max(vocab[first], vocab[second]) < vocab[first + second]


def read_back(tokenizer, ids: list[int]) -> str:
    """What tokens spell, without the ends of words."""
    tokens = [token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids)]
    return ByteLevelDecoder().decode(tokens)


@settings(max_examples=200)
@given(text=st.text(max_size=40).filter(lambda text: "<|" not in text))  # which is how tokens are written
def test_any_text_has_tokens_and_comes_back(tokenizer, text):
    """Else a prompt with letters that no caption had becomes ends of text."""
    ids = tokenizer(text).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1])
    assert read_back(tokenizer, ids[1:-1]) == tokenizer.backend_tokenizer.normalizer.normalize_str(text).replace(
        " ", ""
    )


@pytest.mark.parametrize("text", ["Ein Straßenfest", "四つの数字", "naïve café — 7️⃣", "ΣΊΣΥΦΟΣ", "a\tb\n c"])
def test_case_and_spaces_do_not_matter(tokenizer, text):
    """Else a prompt in capitals, or with a line break, asks for another image."""
    assert tokenizer(f"  {text} \n").input_ids == tokenizer(text).input_ids
    assert tokenizer("A Handwritten  SEVEN").input_ids == tokenizer("a handwritten seven").input_ids


@pytest.mark.parametrize("word", WORDS)
def test_the_captions_words_are_one_token_each(tokenizer, word):
    """Else the merges are not of the captions, and a word's meaning is spread over letters."""
    assert len(tokenizer(word).input_ids) == 3
    assert len(tokenizer(f"the {word} and").input_ids) == len(tokenizer("the and").input_ids) + 1


def test_a_small_vocabulary_goes_to_the_frequent_words():
    """Else rare words take the place of those that nearly every caption has."""
    rare = ["".join(letters) for letters in itertools.product("qvwxyz", repeat=4)]
    few = fit_tokenizer([f"portrait {word}" for word in rare], vocabulary=560)
    assert len(few("portrait").input_ids) == 3
    assert max(len(few(word).input_ids) for word in rare) > 3


@pytest.mark.parametrize("count", [0, 1, 13, 14, 15, 22, 23, 61, 70, 75, 76, 200])
def test_the_longest_caption_fits(count):
    """Else captions are cut off that CLIP could read, or most of the UNet's attention goes to padding."""
    captions = [" ".join(["word"] * count), "word"]
    fitted = fit_tokenizer(captions)
    length, longest = fitted.model_max_length, len(fitted(captions[0]).input_ids)
    assert longest == max(2, count + 2)
    assert 16 <= length <= 77
    assert length >= min(77, longest)
    assert length == 16 or length - longest < 8


def test_stock_loads_the_tokenizer(tokenizer, tmp_path):
    """Else a published folder tokenizes prompts otherwise than training did."""
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.model_max_length == tokenizer.model_max_length
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    assert [getattr(loaded, name) for name in special] == [getattr(tokenizer, name) for name in special]
    texts = [*DIGITS, "", "Unseen, 四つ & naïve", "word " * 90]
    for options in ({}, {"padding": "max_length", "truncation": True}):
        assert loaded(texts, **options).input_ids == tokenizer(texts, **options).input_ids


# The encoder


def test_the_encoder_has_the_tokenizers_ids(tokenizer):
    """Else stock pools at a token that is not the end, or a prompt has more tokens than there are positions."""
    encoder = make_text_encoder(tokenizer, width=64, layers=1)
    config = encoder.config
    assert config.vocab_size == len(tokenizer)
    assert config.max_position_embeddings == tokenizer.model_max_length
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name)
    texts = ["seven", "a picture of the number two", ""]
    ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    found = encoder.eval()(ids)
    ends = [len(tokenizer(text).input_ids) - 1 for text in texts]
    assert torch.equal(found.pooler_output, found.last_hidden_state[range(3), ends])


@pytest.mark.parametrize(("width", "layers"), [(32, 1), (64, 2), (128, 2)])
def test_captions_become_what_a_unet_attends_to(tokenizer, width, layers):
    """Else the UNet's cross-attention meets another shape, or captions of a batch mix."""
    torch.manual_seed(0)
    encoder = make_text_encoder(tokenizer, width, layers).eval()
    captions = [*DIGITS[:3], ""]
    together = encode_texts(encoder, tokenizer, captions, CPU)
    assert together.shape == (4, tokenizer.model_max_length, width)
    alone = torch.cat([encode_texts(encoder, tokenizer, [caption], CPU) for caption in captions])
    torch.testing.assert_close(together, alone)
    assert len({one.numpy(force=True).tobytes() for one in alone}) == 4


def test_stock_loads_the_encoder(tokenizer, text_encoder, tmp_path):
    """Else a published folder reads prompts otherwise than training did."""
    text_encoder.save_pretrained(tmp_path)
    loaded = CLIPTextModel.from_pretrained(tmp_path).eval()
    for texts in (DIGITS[:5], ["", "unseen 四つ"]):
        ours, theirs = (encode_texts(encoder, tokenizer, texts, CPU) for encoder in (text_encoder, loaded))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prompt", ["a handwritten seven", "", "Unseen, 四つ & naïve", "word " * 90])
def test_captions_are_encoded_as_stock_encodes_prompts(tokenizer, text_encoder, prompt):
    """Else Stable Diffusion's pipeline would condition on something that was never trained on."""
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=32, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    scheduler = DDPMScheduler(steps_offset=1, clip_sample=False)
    stock = StableDiffusionPipeline(
        tiny_vae(), text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    theirs, null = stock.encode_prompt(prompt, CPU, 1, True)
    ours = [encode_texts(text_encoder, tokenizer, [text], CPU) for text in (prompt, "")]
    torch.testing.assert_close(ours, [theirs, null], rtol=0, atol=1e-4)


# One of several captions


@settings(max_examples=50)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=9, unique=True), st.integers(1, 5))
def test_captions_are_drawn_uniformly(captions, repeats):
    """Else some of an image's captions are hardly learnt, or the last one never."""
    count = repeats * len(captions)
    for kind in (list, tuple, np.array):
        drawn = [choose_caption(kind(captions), (place + 0.5) / count, "row") for place in range(count)]
        assert drawn == [str(caption) for caption in kind(captions) for _ in range(repeats)]
    assert choose_caption(captions, np.nextafter(1.0, 0.0), "row") == captions[-1]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.999])
def test_a_text_is_itself_and_a_missing_one_is_empty(uniform):
    """Else an image without a caption ends the run, or a caption is taken for a list of letters."""
    assert choose_caption("a cat", uniform, "row") == "a cat"
    assert choose_caption(None, uniform, "row") == ""
    assert choose_caption([None, None], uniform, "row") == ""


@pytest.mark.parametrize("value", [5, 0.5, True, b"a cat", {"text": "a cat"}, [3], ["a cat", 3], [["a cat"]]])
def test_what_is_no_caption_is_named(value):
    """Else a column of numbers is trained on as text, or ends in a traceback that names no row."""
    with pytest.raises(DataError, match=r"17 of photos.*captions are strings"):
        choose_caption(value, 0.999, "17 of photos")


def test_a_bad_caption_names_its_row():
    """Else the user has to search a dataset for the one cell that is wrong."""
    dataset = ImageDataset(caption_rows(8), ImageTransform(1, 1, 1), 0, cached=True)
    dataset.captions[5] = 3.5
    dataset.__getitems__([(0, 4)])
    with pytest.raises(DataError, match=r"5 of captioned.* 3\.5"):
        dataset.__getitems__([(0, 5)])
    with pytest.raises(DataError, match=r"captioned.* 3\.5"):
        all_captions(dataset.captions, "captioned")


def test_all_captions_are_those_that_training_draws():
    """Else the tokenizer is fitted to other texts than those it reads, or an embedding is missing."""
    dataset = ImageDataset(caption_rows(6, missing=(2,)), ImageTransform(1, 1, 1), 0, cached=True)
    drawn = {text for epoch in range(60) for text in dataset.__getitems__([(epoch, i) for i in range(6)])["captions"]}
    listed = all_captions(dataset.captions, "captioned")
    assert listed == sorted(drawn)
    assert listed == all_captions(dataset.captions[::-1], "captioned")


# Captions with their images


def caption_rows(count: int, broken: tuple[int, ...] = (), missing: tuple[int, ...] = ()) -> Rows:
    """Images whose one pixel is the row's number, and three captions that begin with it."""
    files = [b"junk" if n in broken else encoded(np.full((1, 1), n, dtype=np.uint8)) for n in range(count)]
    texts = [None if n in missing else [f"{n} {which}" for which in "abc"] for n in range(count)]
    rows = image_rows(files, text=texts).cast_column("image", datasets.Image(decode=False))
    return Rows(rows, "captioned", "image", caption_column="text")


def pairs(batch: dict) -> list[tuple[int, int]]:
    """(what the image shows, what its caption says)."""
    return list(zip(batch["images"].flatten().tolist(), [int(text.split()[0]) for text in batch["captions"]]))


def test_captions_are_a_function_of_seed_epoch_and_index():
    """Else a resumed run, or one of two ranks, reads other captions."""
    one = ImageDataset(caption_rows(12), ImageTransform(1, 1, 1), 7, cached=True)
    keys = [(epoch, index) for epoch in range(4) for index in range(12)]
    drawn = dict(zip(keys, one.__getitems__(keys)["captions"]))
    for order in (keys[::-1], keys[5:9], [keys[3]] * 2):
        assert one.__getitems__(order)["captions"] == [drawn[key] for key in order]
    assert one[(2, 3)]["captions"] == drawn[2, 3]
    by_epoch = {tuple(drawn[epoch, index][-1] for index in range(12)) for epoch in range(4)}
    assert len(by_epoch) == 4
    other = ImageDataset(caption_rows(12), ImageTransform(1, 1, 1), 8, cached=True)
    assert other.__getitems__(keys)["captions"] != list(drawn.values())


def test_every_caption_comes_as_often_and_whatever_the_flip():
    """Else a caption is tied to the mirrored image, or rarely seen."""
    count = 3000
    dataset = ImageDataset(caption_rows(1), ImageTransform(1, 1, 1), 0, cached=True)
    letters = [text[-1] for text in dataset.__getitems__([(epoch, 0) for epoch in range(count)])["captions"]]
    shown = np.array([letters.count(letter) for letter in "abc"])
    assert np.abs(shown - count / 3).max() < 4 * np.sqrt(count * (1 / 3) * (2 / 3))
    flips = np.array([augmentation_uniforms(0, epoch, 0)[2] < 0.5 for epoch in range(count)])
    for letter in "abc":
        mine = flips[np.array(letters) == letter]
        assert abs(mine.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(mine))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_captions_are_the_same_however_they_are_loaded(cached, workers):
    """Else --cache_dataset or --dataloader_num_workers would change what is learnt."""
    dataset = ImageDataset(caption_rows(14, missing=(3,)), ImageTransform(1, 1, 1), 5, cached)
    plan = StepPlan(14, 4, 1, 1)
    sampler = KeyedBatchSampler(plan, lambda epoch: keyed_permutation(5, epoch, 14), 0, 1)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=identity, num_workers=workers)
    reference = ImageDataset(caption_rows(14, missing=(3,)), ImageTransform(1, 1, 1), 5, cached=True)
    for batch, keys in itertools.islice(zip(loader, sampler), 6):
        want = reference.__getitems__(keys)
        assert batch["captions"] == want["captions"]
        assert torch.equal(batch["images"], want["images"])
        for shown, text in zip(batch["images"].flatten().tolist(), batch["captions"]):
            assert text == "" if shown == 3 else text.startswith(f"{shown} ")


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("broken", [(4,), (0, 4, 5), (10,), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)])
def test_captions_stay_with_images_where_broken_ones_are_left_out(cached, broken):
    """Else one broken file shifts every caption after it to another image."""
    rows = caption_rows(11, broken)
    dataset = ImageDataset(rows, ImageTransform(1, 1, 1), 0, cached, skip_broken=True)
    for epoch in range(3):
        found = pairs(dataset.__getitems__([(epoch, index) for index in range(len(dataset))]))
        assert {shown for shown, _ in found} == set(range(11)) - set(broken)
        assert all(shown == told for shown, told in found)


@pytest.mark.parametrize("broken", [(), (4, 7)])
def test_a_streams_captions_stay_with_their_images(broken):
    """Else the shuffle buffer of a stream parts captions from images, or a resumed one reads others."""
    rows = caption_rows(12, broken)
    rows.dataset = rows.dataset.to_iterable_dataset()

    def batches(count, **options):
        stream = StreamingBatches(
            rows, ImageTransform(1, 1, 1), 3, 4, shuffle_buffer=5, skip_broken=bool(broken), **options
        )
        return list(itertools.islice(iter(stream), count))

    found = batches(9)
    assert all(shown == told for batch in found for shown, told in pairs(batch))
    assert {text[-1] for batch in found for text in batch["captions"]} == set("abc")
    assert [batch["captions"] for batch in batches(5, skip_batches=4)] == [batch["captions"] for batch in found[4:]]


def test_a_streams_bad_caption_is_named():
    """Else a stream of numbers for captions is a traceback."""
    files = [encoded(np.zeros((1, 1), dtype=np.uint8))] * 4
    rows = image_rows(files, text=[1, 2, 3, 4]).cast_column("image", datasets.Image(decode=False))
    stream = Rows(rows.to_iterable_dataset(), "numbers", "image", caption_column="text")
    with pytest.raises(DataError, match=r"of numbers is [1-4]; captions are strings"):
        next(iter(StreamingBatches(stream, ImageTransform(1, 1, 1), 0, 2)))


# Columns and samples


def test_a_missing_caption_column_is_named_with_those_that_exist(tmp_path):
    """Else a typo in --caption_column ends in a traceback, or leaves the user to guess."""
    files = [encoded(np.zeros((1, 1), dtype=np.uint8))] * 2
    folder = write_rows(tmp_path / "data", files, "img", caption=["a", "b"])
    with pytest.raises(DataError, match=rf"'text' in {re.escape(str(folder))}; it has img, caption .--caption_column"):
        read_dataset(directory=str(folder), caption_column="text")
    rows = read_dataset(directory=str(folder), caption_column="caption")
    assert ImageDataset(rows, ImageTransform(1, 1, 1), 0).captions == ["a", "b"]
    with pytest.raises(DataError, match=r"'caption'.*image, label, text.*--caption_column"):
        load_rows(DataFlags(), 0, caption_column="caption")


def test_the_digits_captions_name_their_digit():
    """Else the demo learns to draw another digit than the prompt says."""
    rows, held_out = load_rows(DataFlags(max_train_samples=300), 0, caption_column="text")
    for part, count in ((rows, 300), (held_out, 1000)):
        assert len(part.dataset) == count
        for label, captions in zip(part.dataset["label"], part.dataset["text"]):
            assert len(set(captions)) == len(DIGIT_CAPTIONS)
            for caption in captions:
                assert [name for name in DIGIT_NAMES if name in caption.split()] == [DIGIT_NAMES[label]]
    everything = load_rows(DataFlags(), 0)[0].dataset["image"]
    drawn = [one["bytes"] for one in rows.dataset["image"]]
    assert set(drawn) <= {one["bytes"] for one in everything}
    assert not set(drawn) & {one["bytes"] for one in held_out.dataset["image"]}


def numbers(rows: Rows) -> list[int]:
    """What the rows' captions say."""
    return [int(captions[0].split()[0]) for captions in rows.dataset["text"]]


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("most", [1, 7, 29])
def test_some_samples_are_a_part_of_the_training_images(share, most, tmp_path):
    """Else --max_train_samples trains on held-out images, on one twice, or on others after resuming."""
    folder = tmp_path / "data"
    with quiet():
        caption_rows(40).dataset.save_to_disk(str(folder))
    flags = DataFlags(train_data_dir=str(folder), validation_split=share)
    limited = DataFlags(train_data_dir=str(folder), validation_split=share, max_train_samples=most)
    parts = set()
    for seed in range(4):
        train, held_out = load_rows(flags, seed, caption_column="text")
        some, still_held_out = load_rows(limited, seed, caption_column="text")
        drawn = numbers(some)
        assert len(drawn) == len(set(drawn)) == most
        assert set(drawn) <= set(numbers(train))
        if share:
            assert numbers(still_held_out) == numbers(held_out)
            assert not set(drawn) & set(numbers(held_out))
        assert numbers(load_rows(limited, seed, caption_column="text")[0]) == drawn
        batch = ImageDataset(some, ImageTransform(1, 1, 1), seed).__getitems__([(0, i) for i in range(most)])
        assert all(shown == told for shown, told in pairs(batch))
        parts.add(tuple(drawn))
    assert len(parts) > 1


def test_more_samples_than_there_are_is_all_of_them(tmp_path):
    """Else a generous --max_train_samples repeats or loses images."""
    with quiet():
        caption_rows(9).dataset.save_to_disk(str(tmp_path / "data"))
    for most in (9, 100):
        flags = DataFlags(train_data_dir=str(tmp_path / "data"), max_train_samples=most)
        assert numbers(load_rows(flags, 0, caption_column="text")[0]) == list(range(9))


@pytest.mark.parametrize("most", [0, -3])
def test_no_samples_is_refused(most):
    """Else a run starts that has nothing to train on."""
    with pytest.raises(UsageError, match=f"--max_train_samples {most}: must be 1 or more"):
        Flags([DataFlags(max_train_samples=most)]).check()
    with pytest.raises(DataError, match="stream"):
        Flags([DataFlags(dataset_name="photos", streaming=True, max_train_samples=4)]).check()


def test_the_same_captions_give_the_same_tokenizer():
    """Else a resumed run, or another rank, reads other words than the text encoder has learnt."""
    generator = np.random.default_rng(0)
    captions = ["".join(chr(97 + letter) for letter in generator.integers(0, 6, 5)) for _ in range(100)]
    vocabularies = [fit_tokenizer(generator.permutation(captions).tolist(), 600).get_vocab() for _ in range(4)]
    assert all(one == vocabularies[0] for one in vocabularies)
