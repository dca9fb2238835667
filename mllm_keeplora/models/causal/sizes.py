"""What a causal base takes in passes, counted on its skeleton.

Activations are no formula for one architecture: the language model's skeleton runs on fake tensors, which have shapes
and no content, and what its graph saves is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.causal.parts import Parts
from mllm_keeplora.models.family import Sizes
from mllm_keeplora.models.graph import counted_graph

if TYPE_CHECKING:
    import torch


def sizes_of(model: Any, parts: Parts, dtype: torch.dtype, tokens: int = 64) -> Sizes:
    """Run the language model's skeleton on shapes alone; it is no use afterwards.

    The weights are of `dtype`, and the sequence that is run has `tokens` tokens.
    """
    import torch

    decoder = model.get_submodule(parts.language_model)

    # keys and values of every block for a token, by the config's own names, as all families share them
    text, width = model.config.get_text_config(), model.get_input_embeddings().embedding_dim
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def run() -> None:
        embedded = torch.zeros(1, tokens, width, dtype=dtype, requires_grad=True)
        decoder(inputs_embeds=embedded, use_cache=False)

    saved, inputs = counted_graph(decoder, [model.get_submodule(name) for name in parts.language_layers], run)
    return Sizes(
        saved=saved / tokens,
        input_widths=(*inputs, *(model.get_submodule(name).in_features for name in parts.projector_layers)),
        blocks=len({parts.depth(name) for name in parts.language_layers}),
        width=width,
        loss=model.get_output_embeddings().out_features * (dtype.itemsize + 2 * 4),  # logits, in float32, gradient
        cached=2 * text.num_hidden_layers * heads * head * dtype.itemsize,
    )
