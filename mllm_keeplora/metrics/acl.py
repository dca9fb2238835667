"""The official MLLM-ACL scoring rules that need neither a judge model nor a server, quirks included.

Source: `eval_ocr.py` and `eval_sat.py` of MLLM-CL (arXiv 2506.05453). Two abilities of four cannot be graded offline.
"""

from collections.abc import Sequence

UNGRADED = {
    "mathvista": (
        "mathvista cannot be graded offline: the official script lets a GPT model extract the answer from what was "
        "predicted; what is handed to it instead is <domain>.submit.jsonl, beside the predictions file"
    ),
    "gui": (
        "gui cannot be graded offline: the answers lie on a public challenge server; what is submitted there instead "
        "is <domain>.submit.jsonl, beside the predictions file (as the server's table, in upper case)"
    ),
}


def score_ocrbench(prediction: str, answer: str | Sequence[str], question: str = "", image: str = "") -> float:
    """Grade by containment of any of the answers, case and line breaks ignored (a line break leaves no space).

    Handwritten mathematics is compared with case and without spaces. The official script knows that category from the
    field `answer_type`; here the question tells, which asks for LaTeX in that category only. An empty answer passes.
    """
    answers = [answer] if isinstance(answer, str) else answer
    form = _latex if "LaTeX" in question else _plain
    return float(any(form(each) in form(prediction) for each in answers))


def score_count(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade a CV-Bench count by containment, once case, spaces, line breaks and dots are gone ("1" in "10" too)."""
    return float(_bare(answer) in _bare(prediction))


def _plain(text: str) -> str:
    return text.lower().strip().replace("\n", "")


def _latex(text: str) -> str:
    return text.strip().replace(" ", "").replace("\n", "")


def _bare(text: str) -> str:
    return _latex(text.lower()).replace(".", "")
