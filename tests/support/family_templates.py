"""Chat templates in the published format of each family of image-text-to-text models.

A rendering of the first turns is a prefix of the rendering of them all, and so is a rendering that ends with a
generation prompt: where a published template breaks that, or ends no answer, or moves images, a comment says so.
"""

from __future__ import annotations

import json

VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
TEXT, TRIMMED = "part['text']", "part['text'] | trim"


def say(mark: str) -> str:
    """Jinja that prints a mark exactly, line ends included."""
    return "{{ " + json.dumps(mark) + " }}" if mark else ""


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
    """
    picture = "{% if part['type'] == 'image' %}" + say(image) + "{% endif %}"
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


def chatml(image: str, start: str = "", end: str = "<|im_end|>\n") -> str:
    roles = {role: (f"<|im_start|>{role}\n", end) for role in ("system", "user", "assistant")}
    return chat(**roles, prompt="<|im_start|>assistant\n", image=image, start=start)


def idefics(start: str) -> str:
    """No space after the colon of a turn that begins with a picture."""
    template = chat(
        **{role: (role.capitalize() + ":", "<end_of_utterance>\n") for role in ("system", "user", "assistant")},
        prompt="Assistant:",
        image="<image>",
        start=say(start),
    )
    space = "{% if message['content'][0]['type'] != 'image' %} {% endif %}"
    return template.replace("{% for part", space + "{% for part")


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    + say("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    + "{% endif %}"
)
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
AYA = "<|START_OF_TURN_TOKEN|>"

TEMPLATES = {
    # No end mark after an answer; images first.
    "llava": chat(("USER: ", " "), ("ASSISTANT: ", " "), "ASSISTANT:", "<image>\n", images_first=True),
    # As of v1.6-mistral; images first.
    "llava-next": chat(
        ("[INST] ", " [/INST]"), (" ", "</s> "), "", "<image>\n", ("<<SYS>>\n", "\n<</SYS>>\n\n"), images_first=True
    ),
    # Images first. The published one says "<|im_start|>assistant \n" in a finished turn, so it is no prefix.
    "llava-onevision": chat(
        ("<|im_start|>user ", "<|im_end|>"),
        ("<|im_start|>assistant", "<|im_end|>"),
        "<|im_start|>assistant\n",
        "<image>",
        ("<|im_start|>system ", "<|im_end|>"),
        before_text="\n",
        images_first=True,
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
    "qwen2-vl": chatml(QWEN_IMAGE, QWEN_SYSTEM),
    "qwen2.5-vl": chatml(QWEN_IMAGE, QWEN_SYSTEM),
    "qwen3-vl": chatml(QWEN_IMAGE),
    "internvl": chatml("<IMG_CONTEXT>\n"),
    "idefics3": idefics("<|begin_of_text|>"),
    "smolvlm": idefics("<|im_start|>"),
    # Published without a template; this is the documented prompt. The processor puts <bos> behind the last image and
    # a line end behind the whole text, also behind an answer; so a question must not end with one.
    "paligemma": chat(("", ""), ("\n", "<eos>"), "", "<image>", images_first=True),
    # The system's words open the first question.
    "gemma3": chat(
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        "<start_of_turn>model\n",
        "<start_of_image>",
        start="{{ bos_token }}",
        text=TRIMMED,
    )
    .replace("{% if message['role'] == 'system' %}", "{% if false %}")
    .replace(
        say("<start_of_turn>user\n"),
        say("<start_of_turn>user\n")
        + "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
        + "{{ messages[0]['content'][0]['text'] }}"
        + say("\n\n")
        + "{% endif %}",
    ),
    # A system turn stands before conversations without a picture only; texts are trimmed.
    "mllama": chat(
        (LLAMA3.format("user"), "<|eot_id|>"),
        (LLAMA3.format("assistant"), "<|eot_id|>"),
        LLAMA3.format("assistant"),
        "<|image|>",
        start="{{ bos_token }}{% if 'image' not in messages | map(attribute='content') | sum(start=[]) "
        "| map(attribute='type') %}"
        + say(LLAMA3.format("system") + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>")
        + "{% endif %}",
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
