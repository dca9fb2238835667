"""Load a base MLLM, name its parts, put its prompt. Knows no strategy and no training."""

from mllm_keeplora.models.base import Base, load_base
from mllm_keeplora.models.causal.prompt import IGNORED, ChatPrompt
from mllm_keeplora.models.causal.tower_cache import TowerCache, cache_tower
from mllm_keeplora.models.family import Parts

__all__ = ["IGNORED", "Base", "ChatPrompt", "Parts", "TowerCache", "cache_tower", "load_base"]
