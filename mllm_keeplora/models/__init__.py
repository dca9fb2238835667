"""Load a base MLLM, name its parts, put its prompt. Knows no strategy and no training."""

from mllm_keeplora.models.base import Base, load_base
from mllm_keeplora.models.parts import Parts
from mllm_keeplora.models.prompt import IGNORED, ChatPrompt

__all__ = ["IGNORED", "Base", "ChatPrompt", "Parts", "load_base"]
