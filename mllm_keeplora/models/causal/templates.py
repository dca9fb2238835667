"""Prompts that bases were trained with, where their processors bring none or another one: Jinja templates by style."""

# The published prompt of LLaVA-1.5 (conversation `vicuna_v1` of its code); its checkpoints' own template has no system
# line and no end mark after an answer.
VICUNA_V1 = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'][0]['text'] }}{% else %}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}"
    "{{ 'The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' }}{% endif %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ (' ' if loop.first else '') + ('USER: ' if message['role'] == 'user' else 'ASSISTANT: ') }}"
    "{% for part in message['content'] %}"
    "{{ '<' + part['type'] + '>\n' if part['type'] in ('image', 'video') else part['text'] }}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# PaliGemma: the question is a prefix that sees itself as a whole; what follows the first line break is the answer.
PALIGEMMA = (
    "{% for message in messages if message['role'] != 'system' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{{ bos_token if loop.first else '' }}"
    "{% for part in message['content'] if part['type'] != 'image' %}{{ part['text'] }}{% endfor %}"
    "{{ '\n' if message['role'] == 'user' else eos_token }}{% endfor %}"
)
# LLaVA-OneVision as llava-hf converted it, but for a space that its template puts behind `assistant` in finished turns
# and not where an answer is to begin: learnt with it, an answer would not follow what it is asked with.
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}"
    "{% if message['role'] != 'assistant' %}{{ ' ' }}"
    "{% for part in message['content'] if part['type'] != 'text' %}{{ '<' + part['type'] + '>' }}{% endfor %}"
    "{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# LLaVA-NeXT (v1.6) on Mistral; the converted checkpoints' own template writes a broken end mark after an answer.
LLAVA_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] %}"
    "{{ '<' + part['type'] + '>\n' if part['type'] in ('image', 'video') else part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + eos_token }}"
    "{% else %}{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% endif %}{% endfor %}"
)
STYLES = {"llava_mistral": LLAVA_MISTRAL, "vicuna_v1": VICUNA_V1, "paligemma": PALIGEMMA, "onevision": ONEVISION}
