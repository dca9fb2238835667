"""The network of `tiny-clip`, its loss and the views of pictures that it is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from .processing import BOS, EOS, MEAN, PAD, POSITIONS, SIZE, STD

PATCH = 8
MOST_SCALE = math.log(100.0)


def build_model(tokens: Sequence[str]) -> CLIPModel:
    """Make a CLIP of about four million random weights."""
    marks = {"bos_token_id": tokens.index(BOS), "eos_token_id": tokens.index(EOS), "pad_token_id": tokens.index(PAD)}
    text = {
        "vocab_size": len(tokens),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "projection_dim": 128,
        **marks,
    }
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        "projection_dim": 128,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def similarities(
    model: CLIPModel, pixels: Tensor, words: Mapping[str, Tensor], generator: torch.Generator | None
) -> Tensor:
    """Compute logits of pictures (rows) and texts as the model does; a generator drops half of the patches."""
    vision = model.vision_model
    hidden = vision.embeddings(pixels)
    if generator is not None:
        scores = torch.rand(hidden.shape[0], hidden.shape[1] - 1, generator=generator)
        kept = scores.topk(scores.shape[1] // 2).indices[..., None].expand(-1, -1, hidden.shape[2])
        hidden = torch.cat([hidden[:, :1], hidden[:, 1:].gather(1, kept)], 1)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    images = model.visual_projection(vision.post_layernorm(hidden[:, 0]))
    texts = model.text_projection(model.text_model(**words).pooler_output)
    return model.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def symmetric_loss(logits: Tensor, texts: Sequence[str]) -> Tensor:
    """Compute CLIP's loss: cross-entropy from pictures to texts and back, halved.

    Args:
        logits: (b, b), one row a picture.
        texts: of the b pictures; where several are equal, all of them are right.
    """
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    numbers = torch.tensor([place[text] for text in texts])
    right = (numbers[:, None] == numbers).float()
    right = right / right.sum(1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def views(pixels: Tensor, turns: Tensor, dark: Tensor, generator: torch.Generator) -> Tensor:
    """Show pictures shifted, scaled, turned a little, some mirrored, in other light and on other paper.

    Args:
        pixels: (b, 64, 64, 4) uint8.
        turns: (b,) bool: may be mirrored.
        dark: (b,) bool: white ink, which is put on dark paper.
        generator: all randomness.

    Returns:
        (b, 3, 48, 48) float32, as the processor gives them.
    """
    count = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def chosen(share: float) -> Tensor:
        return (torch.rand(count, generator=generator) < share)[:, None, None, None]

    layers = pixels.permute(0, 3, 1, 2).float() / 255
    layers = torch.cat([layers[:, :3] * layers[:, 3:], layers[:, 3:]], 1)
    angle, zoom, squeeze = uniform(-0.2, 0.2), uniform(-0.25, 0.3).exp(), uniform(-0.1, 0.1).exp()
    mirror = torch.where(turns & chosen(0.5).flatten(), -1.0, 1.0)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack([cosine * squeeze * mirror, -sine / squeeze, sine * squeeze * mirror, cosine / squeeze], 1)
    grid = F.affine_grid(torch.cat([rows.view(count, 2, 2), uniform(-0.12, 0.12, 2, 1)], 2), (count, 4, SIZE, SIZE),
                         align_corners=False)  # fmt: skip
    seen = F.grid_sample(layers, grid, mode="bilinear", align_corners=False)
    paper = torch.where(chosen(0.75), 1.0, uniform(0, 1, 3, 1, 1))
    paper = torch.where(dark[:, None, None, None], 0.35 * uniform(0, 1, 1, 1, 1) * chosen(0.3), paper)
    image = seen[:, :3] + (1 - seen[:, 3:]) * paper
    image = torch.where(chosen(0.12), image.mean(1, keepdim=True), image)
    image = torch.where(chosen(0.06), 1 - image, image)
    image = (image - 0.5) * uniform(0.7, 1.2, 1, 1, 1) + 0.5 + uniform(-0.1, 0.1, 3, 1, 1)
    return (image.clamp(0, 1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
