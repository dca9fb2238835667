"""Prompt styles and templates: published texts letter by letter, and token ids written out by hand."""

import copy

import pytest

from mllm_keeplora.data.schema import Turn
from mllm_keeplora.models import IGNORED, ChatPrompt
from tests.unit.models.causal.test_prompt import ONE, TWO, labelled, picture, record, talk, with_template

LLAMA_LIKE = """<unk> <s> </s> <pad> <image> NEWLINE ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial
▁intelligence ▁assistant. ▁The ▁assistant ▁gives ▁helpful, ▁detailed, ▁polite ▁answers ▁to ▁the ▁user's
▁questions. ▁USER: USER: ▁ASSISTANT: ▁red ▁left what ▁colour ▁? ▁where ▁"""


@pytest.fixture
def prompt(new_base):
    return new_base().prompt


def test_vicuna_v1_is_the_published_prompt_letter_by_letter(prompt):
    vicuna = ChatPrompt(copy.deepcopy(prompt.processor), "vicuna_v1")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert vicuna._render(TWO, 4) == (
        f"{system} USER: <image>\nwhat colour is the square ? ASSISTANT: red</s>"
        "USER: where is the square ? ASSISTANT: left</s>"
    )
    assert vicuna._render(ONE, 1) == f"{system} USER: <image>\nwhat colour is the square ? ASSISTANT:"
    own = talk(Turn("system", "Be brief."), Turn("user", "where ?"), Turn("assistant", "left"), images=0)
    assert vicuna._render(own, 3) == "Be brief. USER: where ? ASSISTANT: left</s>"
    assert vicuna.ends_answers(TWO)


def llama_like(processor):
    """The tiny processor with a tokenizer that marks spaces as Llama's does; ids are places in this list."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = LLAMA_LIKE.split()
    vocabulary = {word.replace("NEWLINE", "\n"): place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(words[place], normalized=False) for place in range(5)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    return type(processor)(
        processor.image_processor, fast, patch_size=processor.patch_size, chat_template=processor.chat_template,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
    )  # fmt: skip


def test_vicuna_v1_and_its_mask_token_by_token(prompt):
    vicuna = ChatPrompt(llama_like(prompt.processor), "vicuna_v1")
    two = record("what colour ?", "red", "where ?", "left")
    system = [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 12, 22, 23, 24, 25, 26, 27]
    first = [28, 37, 4, 4, 4, 4, 5, 33, 34, 35]  # "USER: ", four patches, line break, question
    second = [29, 36, 35]  # after "</s>" no space stands before "USER:"
    expected = [1, *system, *first, 30, 31, 2, *second, 30, 32, 2]
    batch = vicuna.training_batch([two], [[picture()]], None)
    assert batch["input_ids"].tolist() == [expected]
    assert batch["labels"].tolist() == [labelled(expected, 35, 36, 41, 42)]
    question = vicuna.question_batch([two], [[picture()]])["input_ids"].tolist()
    assert question == [[1, *system, *first, 30]]


def test_an_answer_that_the_tokenizer_joins_to_the_space_before_it_is_trained_whole(prompt):
    """A template may end an open turn in a space, which the tokenizer joins with the answer's first word."""
    spaced = ChatPrompt(llama_like(prompt.processor))
    spaced.processor.chat_template = (
        "{% for m in messages %}{{ 'USER:' if m.role == 'user' else 'ASSISTANT: ' }}"
        "{% for part in m.content %}{{ '<image>' if part.type == 'image' else ' ' + part.text if m.role == 'user' else "
        "part.text }}{% endfor %}{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
        "{{ 'ASSISTANT: ' if add_generation_prompt else '' }}"
    )
    batch = spaced.training_batch([record("where ?", "red", images=0)], [[]], None)
    assert batch["input_ids"][batch["labels"] != IGNORED].tolist() == [31, 2]


def test_llava_mistral_is_the_published_prompt_with_a_whole_end_mark(prompt):
    mistral = ChatPrompt(copy.deepcopy(prompt.processor), "llava_mistral")
    assert mistral._render(TWO, 4) == (
        "[INST] <image>\nwhat colour is the square ? [/INST] red</s>[INST] where is the square ? [/INST] left</s>"
    )
    assert mistral._render(ONE, 1) == "[INST] <image>\nwhat colour is the square ? [/INST]"


def test_a_template_that_tells_the_date_tells_the_same_one_every_day(prompt):
    dated = with_template(
        prompt, "{{ bos_token }}", "{{ bos_token + strftime_now('%Y-%m-%d') + strftime_now('%d %b %Y') }}"
    )
    assert dated._render(ONE, 1).startswith("<s>2024-07-2626 Jul 2024 user")
    assert ChatPrompt(dated.processor)._render(ONE, 1) == dated._render(ONE, 1)
