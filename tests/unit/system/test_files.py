"""Text that a model may answer comes back from files as it was."""

from __future__ import annotations

import pytest

from mllm_keeplora.eval.harness import Answer, Journal
from mllm_keeplora.system import files


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_json_lines_keep_a_line_separator_inside_a_text(mark, tmp_path):
    files.write_json_lines(tmp_path / "a.jsonl", [{"prediction": f"a{mark}b"}])
    assert files.read_json_lines(tmp_path / "a.jsonl") == [{"prediction": f"a{mark}b"}]


def test_a_journal_keeps_a_line_separator_inside_an_answer(tmp_path):
    Journal(tmp_path / "a.part", "[1]").add(0, {0: Answer("a\u2028b", False)})
    assert Journal(tmp_path / "a.part", "[1]").by_index() == {0: Answer("a\u2028b", False)}
