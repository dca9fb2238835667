"""Public docstrings begin with a sentence that a newcomer reads in one breath."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for room in ("mllm_keeplora", "eval") for path in sorted((ROOT / room).rglob("*.py"))]
MOST_WORDS = 20
# What a first sentence began with where it had neither subject nor verb.
NO_VERB = re.compile(r"^(Of|Where|In|With|For|As|At|Whose|Which|That|Also|Not|To be)\b")


def public_docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and docstring of every public function, class and method that has one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            if text:
                yield node.name, text


def first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.:;])\s", paragraph)[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_first_sentences_are_short_and_begin_with_a_subject_or_a_verb(path):
    for name, text in public_docstrings(ast.parse(path.read_text(encoding="utf-8"))):
        sentence = first_sentence(text)
        assert len(sentence.split()) <= MOST_WORDS, f"{name}: {sentence}"
        assert not NO_VERB.match(sentence), f"{name}: {sentence}"


def test_there_is_something_to_read():
    assert len(FILES) > 100
    assert sum(len(list(public_docstrings(ast.parse(path.read_text(encoding="utf-8"))))) for path in FILES) > 500
