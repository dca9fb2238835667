"""The network of `tiny-llava` and the two forward passes that its training needs."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm_keeplora.mini.general_scenes import CHANNELS
from mllm_keeplora.mini.vocabulary import BOS, EOS, IMAGE, PAD, vocabulary

from .processing import MEAN, PATCH, STD

NUM_IMAGE_TOKENS = 64
WEIGHTS = (1.5, 1.0, 1.5, 0.6, 0.6, 0.6, 0.5, 0.5)  # of the dense channels in the loss, in the order of CHANNELS


def build_model() -> LlavaForConditionalGeneration:
    """A LLaVA of about 5.5 million random weights."""
    tokens = vocabulary()
    ids = {"bos_token_id": tokens.index(BOS), "eos_token_id": tokens.index(EOS), "pad_token_id": tokens.index(PAD)}
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokens.index(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.generation_config.update(**ids)
    return model


def to_pixel_values(pixels: np.ndarray) -> Tensor:
    """(b, 64, 64, 3) uint8 to (b, 3, 64, 64) float32, as the processor does it."""
    values = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class DenseHeads(nn.Module):
    """Linear readers of the tower's patch tokens: the class targets of each cell and its 2 x 2 mean colours."""

    def __init__(self, hidden: int = 192):
        super().__init__()
        self.sizes = list(CHANNELS.values())
        self.norm = nn.LayerNorm(hidden)
        self.classes = nn.Linear(hidden, sum(self.sizes))
        self.colors = nn.Linear(hidden, 12)

    def forward(self, patches: Tensor, cells: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Loss over all channels, and the share of right classes per channel (foreground cells for the first three)."""
        x = self.norm(patches)
        groups = self.classes(x).float().split(self.sizes, dim=-1)
        targets = cells.flatten(2).transpose(1, 2)
        front = targets[..., 0] > 0
        loss, shares = torch.zeros(()), []
        for channel, (logits, weight) in enumerate(zip(groups, WEIGHTS, strict=True)):
            target = targets[..., channel]
            cost = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            right = logits.argmax(-1) == target
            if channel < 3:
                emphasis = 0.3 + 0.7 * front
                loss = loss + weight * (cost * emphasis).sum() / emphasis.sum()
                shares.append(right[front].float().mean())
            else:
                loss = loss + weight * cost.mean()
                shares.append(right.float().mean())
        small = F.avg_pool2d(pixel_values, PATCH // 2)
        small = F.pixel_unshuffle(small, 2).flatten(2).transpose(1, 2)
        loss = loss + 0.5 * F.mse_loss(self.colors(x).float(), small)
        return loss, torch.stack(shares)


def patch_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """(b, 64, 192) tower output that the projector reads."""
    outputs = model.model.vision_tower(pixel_values, output_hidden_states=True)
    return outputs.hidden_states[model.config.vision_feature_layer][:, 1:]


def language_states(model, patches: Tensor | None, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Language model states of rows `ids`, whose image tokens (if any) follow the first token.

    Args:
        model: the LLaVA.
        patches: (b, 64, 192) tower output, or None for text-only rows.
        ids: (b, t) token ids.
        positions: (b, t) position ids.
        mask: (b, t, t) bool, True where a query (second axis) may read a key (third axis).
    """
    embeddings = model.get_input_embeddings()(ids)
    if patches is not None:
        seen = model.model.multi_modal_projector(patches).to(embeddings.dtype)
        embeddings = torch.cat([embeddings[:, :1], seen, embeddings[:, 1 + NUM_IMAGE_TOKENS :]], dim=1)
    return model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state
