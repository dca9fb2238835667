"""The tokenizer and processor of `tiny-llava`: one token per known word, unknown words spelled in characters."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_clip import CLIPImageProcessor

from mllm_keeplora.mini.draw import SIZE
from mllm_keeplora.mini.vocabulary import ASSISTANT, BOS, EOS, IMAGE, PAD, UNK, USER, vocabulary

PATCH = 8
MEAN, STD = [0.5, 0.5, 0.5], [0.3, 0.3, 0.3]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set ns = namespace(images='', text=message['content']) -%}"
    "{%- else -%}"
    "{%- set ns = namespace(images='', text='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set ns.images = ns.images + ' " + IMAGE + "' -%}"
    "{%- elif part['type'] == 'text' -%}"
    "{%- set ns.text = ns.text + (' ' if ns.text else '') + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{ ' " + ASSISTANT + " ' + ns.text | trim + ' ' + eos_token }}"
    "{%- elif message['role'] == 'user' -%}{{ ns.images + ' " + USER + " ' + ns.text | trim }}"
    "{%- else -%}{{ ns.images + ' ' + ns.text | trim }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' " + ASSISTANT + "' }}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower case, split at white space and punctuation, then whole words or single characters; adds no BOS itself."""
    tokens = vocabulary()
    core = Tokenizer(
        models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token=UNK, max_input_chars_per_word=200)
    )
    core.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
        model_max_length=1024,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    assert len(tokenizer) == len(tokens)
    return tokenizer


def build_processor() -> LlavaProcessor:
    """The processor that ships: 64 x 64 images, 64 image tokens, the chat template."""
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(
        do_resize=True, size=size, resample=3, do_center_crop=False, crop_size=size, image_mean=MEAN, image_std=STD
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
