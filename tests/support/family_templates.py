"""Chat templates and tokenizers in the published format of each family of image-text-to-text models.

A rendering of the first turns is a prefix of the rendering of them all, and so is a rendering that ends with a
generation prompt: where a published template breaks that, or ends no answer, or moves images, a comment says so.
"""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
TEXT, TRIMMED = "part['text']", "part['text'] | trim"


def say(mark: str) -> str:
    """Jinja that prints a mark exactly, line ends included; what is Jinja already stays as it is."""
    return mark if mark.startswith("{") or not mark else "{{ " + json.dumps(mark) + " }}"


def chat(
    user: tuple[str, str],
    assistant: tuple[str, str],
    prompt: str,
    image: str,
    system: tuple[str, str] = ("", ""),
    start: str = "",
    text: str = TEXT,
    before_text: str = "",
    images_first: bool = False,
    video: str = "",
) -> str:
    """A template of what stands before and after each role's content.

    Args:
        user, assistant, system: the marks around a turn.
        prompt: what opens an answer.
        image: what stands for a picture.
        start: Jinja before all turns.
        text: the Jinja expression of a text part.
        before_text: a mark before each text part.
        images_first: pictures are moved to the front of their turn.
        video: what stands for a clip.
    """
    picture = "{% if part['type'] == 'image' %}" + say(image) + "{% endif %}"
    picture += "{% if part['type'] == 'video' %}" + say(video) + "{% endif %}" if video else ""
    words = "{% if part['type'] == 'text' %}" + say(before_text) + "{{ " + text + " }}{% endif %}"
    loop = "{% for part in message['content'] %}"
    orders = [picture, words] if images_first else [picture + words]
    content = "".join(loop + order + "{% endfor %}" for order in orders)
    turns = {"system": system, "user": user, "assistant": assistant}
    cases = [
        "{% if message['role'] == '" + role + "' %}" + say(first) + content + say(last) + "{% endif %}"
        for role, (first, last) in turns.items()
    ]
    ending = "{% if add_generation_prompt %}" + say(prompt) + "{% endif %}"
    return start + "{% for message in messages %}" + "".join(cases) + "{% endfor %}" + ending


def chatml(image: str, start: str = "", video: str = "") -> str:
    roles = {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant")}
    return chat(**roles, prompt="<|im_start|>assistant\n", image=image, start=start, video=video)


def idefics(start: str) -> str:
    """No space after the colon of a turn that begins with a picture."""
    space = "{% if message['content'][0]['type'] != 'image' %} {% endif %}"
    roles = {
        role: (say(f"{role.capitalize()}:") + space, "<end_of_utterance>\n") for role in ("system", "user", "assistant")
    }
    return chat(**roles, prompt="Assistant:", image="<image>", start=say(start))


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
QWEN_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    + say("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    + "{% endif %}"
)
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3_SYSTEM = (
    "{% if 'image' not in messages | map(attribute='content') | sum(start=[]) | map(attribute='type') %}"
    + say(LLAMA3.format("system") + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>")
    + "{% endif %}"
)
GEMMA_USER = "{% if loop.first or loop.previtem['role'] != 'system' %}" + say("<start_of_turn>user\n") + "{% endif %}"
AYA = "<|START_OF_TURN_TOKEN|>"

TEMPLATES = {
    # No end mark after an answer; images first.
    "llava": chat(
        ("USER: ", ""), ("ASSISTANT: ", ""), "ASSISTANT:", "<image>\n", text="part['text'] + ' '", images_first=True
    ),
    # As of v1.6-mistral; images first.
    "llava-next": chat(
        ("[INST] ", " [/INST]"), (" ", "</s> "), "", "<image>\n", ("<<SYS>>\n", "\n<</SYS>>\n\n"), images_first=True
    ),
    # Images first. The published one has a space behind "assistant" in finished turns: its prompt is no prefix of them.
    "llava-onevision": chat(
        ("<|im_start|>user ", "<|im_end|>"),
        ("<|im_start|>assistant", "<|im_end|>"),
        "<|im_start|>assistant\n",
        "<image>",
        ("<|im_start|>system ", "<|im_end|>"),
        before_text="\n",
        images_first=True,
        video="<video>",
    ),
    **dict.fromkeys(
        ("llava-next-video", "video-llava"),
        chat(("USER: ", " "), ("ASSISTANT: ", "</s>"), "ASSISTANT:", "<image>\n", video="<video>\n"),
    ),
    "llava-phi3": chat(
        ("<|user|>\n", "<|end|>\n"),
        ("<|assistant|>\n", "<|end|>\n"),
        "<|assistant|>\n",
        "<image>\n",
        ("<|system|>\n", "<|end|>\n"),
    ),
    # No end mark after an answer but the marks of the next turn.
    "vipllava": chat(
        ("###Human: ", ""),
        ("###Assistant: ", ""),
        "###Assistant:",
        "<image>\n",
        start="{% if messages[0]['role'] != 'system' %}" + say(VICUNA) + "{% endif %}",
    ),
    "qwen2-vl": chatml(QWEN_IMAGE, QWEN_SYSTEM, QWEN_VIDEO),
    "qwen2.5-vl": chatml(QWEN_IMAGE, QWEN_SYSTEM, QWEN_VIDEO),
    "qwen3-vl": chatml(QWEN_IMAGE, video=QWEN_VIDEO),
    "internvl": chatml("<IMG_CONTEXT>\n", video="<video>\n"),
    "idefics3": idefics("<|begin_of_text|>"),
    "smolvlm": idefics("<|im_start|>"),
    # Published without a template; this is the documented prompt. The processor puts <bos> behind the last image and
    # a line end behind the whole text, also behind an answer; so a question must not end with one.
    "paligemma": chat(("", ""), ("\n", "<eos>"), "", "<image>", images_first=True),
    # The system's words open the first question; texts are trimmed.
    "gemma3": chat(
        (GEMMA_USER, "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        "<start_of_turn>model\n",
        "<start_of_image>",
        ("<start_of_turn>user\n", "\n\n"),
        "{{ bos_token }}",
        TRIMMED,
    ),
    # A system turn stands before conversations without a picture only; texts are trimmed.
    "mllama": chat(
        (LLAMA3.format("user"), "<|eot_id|>"),
        (LLAMA3.format("assistant"), "<|eot_id|>"),
        LLAMA3.format("assistant"),
        "<|image|>",
        start="{{ bos_token }}" + LLAMA3_SYSTEM,
        text=TRIMMED,
    ),
    # Without the published default system turn, which holds today's date.
    "mistral3": chat(
        ("[INST]", "[/INST]"),
        ("", "</s>"),
        "",
        "[IMG]",
        ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "{{ bos_token }}",
    ),
    # Images first.
    "aya-vision": chat(
        (AYA + "<|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        (AYA + "<|CHATBOT_TOKEN|><|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        AYA + "<|CHATBOT_TOKEN|><|START_RESPONSE|>",
        "<image>",
        (AYA + "<|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        "{{ bos_token }}",
        images_first=True,
    ),
}

CORPUS = "what colour is the square? it is red green blue white on the left or right. yes no a man in the picture " * 3
CHATML = "<|endoftext|> <|im_start|> <|im_end|>"
VISION_MARKS = "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
GRID_MARKS = "<fake_token_around_image> <global-img> <end_of_utterance> <image> " + " ".join(
    f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)
)
LLAMA2 = {"marks": "<unk> <s> </s> <pad> <image>", "bos": "<s>", "eos": "</s>", "pad": "<pad>", "add_bos": True}
QWEN = {"marks": f"{CHATML} {VISION_MARKS}", "bos": None, "eos": "<|im_end|>", "pad": "<|endoftext|>"}
INTERN = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
GEMMA = {"marks": "<pad> <eos> <bos> <unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
GEMMA3 = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TOKENIZERS: dict[str, dict] = {
    "llava": LLAMA2,
    "llava-next": LLAMA2,
    "vipllava": LLAMA2,
    "llava-phi3": {
        **LLAMA2,
        "marks": f"{LLAMA2['marks']} <|endoftext|> {' '.join(PHI3)}",
        "eos": "<|endoftext|>",
        "rstrip": PHI3,
    },
    "llava-next-video": {**LLAMA2, "marks": f"{LLAMA2['marks']} <video>"},
    "video-llava": {**LLAMA2, "marks": f"{LLAMA2['marks']} <video>"},
    "llava-onevision": {**QWEN, "marks": f"{CHATML} <image> <video>"},
    "qwen2-vl": QWEN,
    "qwen2.5-vl": QWEN,
    "qwen3-vl": QWEN,
    "internvl": {**QWEN, "marks": f"{CHATML} {' '.join(INTERN.values())}", "names": INTERN},
    "idefics3": {
        "marks": f"<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> {GRID_MARKS}",
        "bos": "<|begin_of_text|>",
        "eos": "<|end_of_text|>",
        "pad": "<|reserved_special_token_0|>",
        "add_bos": True,
    },
    "smolvlm": {
        "marks": f"{CHATML} {GRID_MARKS} <video>",
        "bos": "<|im_start|>",
        "eos": "<end_of_utterance>",
        "pad": "<|im_end|>",
    },
    "paligemma": {**GEMMA, "marks": f"{GEMMA['marks']} <image>"},
    "gemma3": {
        **GEMMA,
        "marks": f"{GEMMA['marks']} <start_of_turn> <end_of_turn> {' '.join(GEMMA3.values())}",
        "names": GEMMA3,
        "add_bos": True,
    },
    "mllama": {
        "marks": "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> "
        "<|python_tag|> <|finetune_right_pad_id|> <|image|>",
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "pad": "<|finetune_right_pad_id|>",
        "add_bos": True,
    },
    "mistral3": {
        **LLAMA2,
        "marks": "<unk> <s> </s> [INST] [/INST] [IMG] <pad> [IMG_BREAK] [IMG_END] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
    },
    "aya-vision": {
        "marks": "<PAD> <UNK> <BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> "
        "<|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|> <image> <|START_OF_IMG|> "
        "<|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> TILE_GLOBAL " + " ".join(f"TILE_{n}" for n in range(1, 13)),
        "bos": "<BOS_TOKEN>",
        "eos": "<|END_OF_TURN_TOKEN|>",
        "pad": "<PAD>",
        "add_bos": True,
    },
}


@cache
def byte_pairs() -> str:
    """A byte-level tokenizer without special tokens, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer.to_str()


def tokenizer_of(
    marks: str,
    bos: str | None,
    eos: str,
    pad: str,
    add_bos: bool = False,
    names: dict[str, str] | None = None,
    rstrip: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """The shared tokenizer with a family's special tokens.

    Args:
        marks: special tokens in the order of their ids, which follow all others.
        bos, eos, pad: which of them begin a text, end it, fill it up.
        add_bos: the tokenizer itself puts `bos` before a text.
        names: attributes of the tokenizer that give special tokens.
        rstrip: special tokens that swallow white space behind them.
    """
    tokenizer = Tokenizer.from_str(byte_pairs())
    tokenizer.add_special_tokens([AddedToken(m, normalized=False, rstrip=m in rstrip) for m in marks.split()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        add_bos_token=add_bos,
        extra_special_tokens=names or {},
    )
