"""What a causal base takes in passes, counted on its skeleton.

Activations are no formula for one architecture: the language model's skeleton runs on fake tensors, which have shapes
and no content, and what its graph saves is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.causal.parts import Parts
from mllm_keeplora.models.family import Sizes
from mllm_keeplora.models.running import removed_afterwards

if TYPE_CHECKING:
    import torch


def sizes_of(model: Any, parts: Parts, dtype: torch.dtype, tokens: int = 64) -> Sizes:
    """Run the language model's skeleton on shapes alone; it is no use afterwards.

    The weights are of `dtype`, and the sequence that is run has `tokens` tokens.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    decoder = model.get_submodule(parts.language_model)
    saved: dict[int, int] = {}
    inputs: dict[int, int] = {}
    kept: list[Any] = []  # held, so that no identity is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    def look(module: Any, args: tuple) -> None:
        kept.append(args[0])
        inputs[id(args[0])] = module.in_features

    # keys and values of every block for a token, by the config's own names, as all families share them
    text, width = model.config.get_text_config(), model.get_input_embeddings().embedding_dim
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    # the graph: storages that it saves beside the weights, and the distinct inputs of target layers
    handles = [model.get_submodule(name).register_forward_pre_hook(look) for name in parts.language_layers]
    with FakeTensorMode(allow_non_fake_inputs=True), removed_afterwards(handles):
        decoder.to_empty(device="cpu").requires_grad_(False)
        weights = {tensor.untyped_storage()._cdata for tensor in decoder.state_dict(keep_vars=True).values()}
        embedded = torch.zeros(1, tokens, width, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder(inputs_embeds=embedded, use_cache=False)
    return Sizes(
        saved=sum(saved.values()) / tokens,
        input_widths=(*inputs.values(), *(model.get_submodule(name).in_features for name in parts.projector_layers)),
        blocks=len({parts.depth(name) for name in parts.language_layers}),
        width=width,
        loss=model.get_output_embeddings().out_features * (dtype.itemsize + 2 * 4),  # logits, in float32, gradient
        cached=2 * text.num_hidden_layers * heads * head * dtype.itemsize,
    )
