"""Names of columns and tags that a LLaMA-Factory `dataset_info.json` gives to the records beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_TAGS = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class Layout:
    """Names that a LLaMA-Factory `dataset_info.json` gives to columns and tags; the defaults are its own."""

    formatting: str = ""  # sharegpt or alpaca; empty: told by the keys
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    told: str = ""  # where they come from, for whoever cannot make sense of a record


BY_KEYS = Layout()


def canonical(row: dict, layout: Layout) -> dict:
    """The row under the standard names, where a `dataset_info.json` gives it others."""
    if not layout.formatting:
        return row
    if layout.formatting == "alpaca":
        standard = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
    else:
        standard = {"messages": "conversations"}
    standard |= {"system": "system", "images": "images", "videos": "videos", "audios": "audios"}
    named = {standard.get(key, key): row[column] for key, column in layout.columns.items() if column in row}
    rest = {key: value for key, value in row.items() if key not in layout.columns.values()}
    found = {**rest, **named}
    if layout.formatting == "sharegpt" and isinstance(found.get("conversations"), list):
        found["conversations"] = [_retagged(turn, layout.tags) for turn in found["conversations"]]
    return found


def _retagged(turn: Any, tags: Mapping[str, str]) -> Any:
    if not isinstance(turn, dict):
        return turn
    role = turn.get(tags.get("role_tag", "from"))
    names = {tags.get(f"{part}_tag", name): name for part, name in DEFAULT_TAGS.items()}
    return {
        "from": names.get(role, role) if isinstance(role, str) else role,
        "value": turn.get(tags.get("content_tag", "value")),
    }
