"""The exact-match rule of UCIT (ImageNet-R, ArxivQA, IconQA, CLEVR-Math).

Source: the eval scripts of HiDe-LLaVA (arXiv 2503.12941), used unchanged by MCITlib and KeepLoRA.
"""


def score_exact_upper(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade by equality after upper-casing both sides; punctuation counts and "Unanswerable" has no rule."""
    return float(prediction.upper() == answer.upper())
