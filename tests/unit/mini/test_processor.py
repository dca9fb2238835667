"""The bundled base's tokenizer, processor and configuration: every known word one token, prompts, offline loading."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mllm_keeplora
from mllm_keeplora.mini import ad, fin, general, med, rs, sci
from mllm_keeplora.mini.vocabulary import SPECIAL_TOKENS, vocabulary

FOLDER = Path(mllm_keeplora.__file__).parent / "assets" / "tiny_llava"


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


def talk(*texts):
    """Messages of alternating user and assistant turns; the first holds an image."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": [{"type": "text", "text": t}]} for i, t in enumerate(texts)]
    messages[0]["content"].insert(0, {"type": "image"})
    return messages


def ids_of(processor, text):
    return processor(images=[Image.new("RGB", (64, 64))], text=[text])["input_ids"][0]


def test_tokens_are_the_vocabulary_in_order(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == vocabulary()
    assert set(SPECIAL_TOKENS) <= set(tokenizer.all_special_tokens)


@pytest.mark.parametrize("module", [general, rs, med, ad, sci, fin], ids=lambda m: m.__name__.split(".")[-1])
def test_every_word_of_every_generator_is_one_token(processor, module):
    samples = [module.sample(np.random.default_rng((8, i))) for i in range(60)]
    texts = {text for s in samples for text in [*s.facts, *(t for _, q, a in s.qas for t in (q, a))]}
    assert len(texts) > 10
    for text in texts:
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.split()), text
        assert processor.tokenizer.decode(ids) == text


def test_unknown_words_are_spelled_not_lost(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer("Zebra-42 (x_y)")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "zebra - 42 ( x_y )"


def test_tokenizer_adds_no_special_token_of_its_own(processor):
    assert processor.tokenizer("red circle")["input_ids"] == processor.tokenizer.convert_tokens_to_ids(
        ["red", "circle"]
    )


def test_prompt_reads_as_documented(processor):
    messages = talk("what color is it ?", "red", "where ?")
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<s> <image> user: what color is it ? assistant: red </s> user: where ? assistant:"
    ids = ids_of(processor, text)
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert ids.count(processor.image_token_id) == 64


def test_plain_strings_and_part_lists_give_the_same_text(processor):
    parts = [{"role": "user", "content": [{"type": "text", "text": "where ?"}]}]
    plain = [{"role": "user", "content": "where ?"}]
    assert processor.apply_chat_template(parts) == processor.apply_chat_template(plain) == "<s> user: where ?"


def test_prompt_tokens_are_a_strict_prefix_of_the_answered_conversation(processor):
    texts = ["What is in the top left quarter?", "Large bright", "where ?", "zebra-42", "why ?", "7"]
    for turns in (1, 3, 5):
        prompt = processor.apply_chat_template(talk(*texts[:turns]), add_generation_prompt=True)
        whole = processor.apply_chat_template(talk(*texts[: turns + 1]))
        prompt_ids, whole_ids = ids_of(processor, prompt), ids_of(processor, whole)
        assert len(prompt_ids) < len(whole_ids) and whole_ids[: len(prompt_ids)] == prompt_ids
        assert whole_ids[-1] == processor.tokenizer.eos_token_id


def test_pictures_of_any_size_become_64_pixels_and_true_size_is_untouched(processor):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    values = np.asarray(processor.image_processor([Image.fromarray(pixels)], return_tensors="np")["pixel_values"][0])
    assert np.abs(values.transpose(1, 2, 0) - (pixels / 255 - 0.5) / 0.3).max() < 1e-4
    other = processor.image_processor([Image.new("L", (90, 50))], return_tensors="np")["pixel_values"]
    assert np.asarray(other[0]).shape == (3, 64, 64)


def test_bundled_weights_are_small_bfloat16_and_a_llava():
    from transformers import LlavaConfig

    config = LlavaConfig.from_pretrained(FOLDER, local_files_only=True)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "default")
    assert config.text_config.vocab_size == len(vocabulary())
    assert (FOLDER / "model.safetensors").stat().st_size <= 16 * 2**20
    assert (FOLDER / "README.md").is_file() and not list(FOLDER.glob("*.bin"))
