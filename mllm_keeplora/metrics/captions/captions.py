"""The caption mean of UCIT (VizWiz captions and Flickr30k): seven scores of a whole set, averaged.

Source: `eval_caption.py` of HiDe-LLaVA (arXiv 2503.12941), which runs the COCO caption tools (pycocoevalcap) with Java.
"""

from collections.abc import Sequence
from typing import Any

from mllm_keeplora.metrics.captions.meteor import meteor
from mllm_keeplora.metrics.captions.penn import caption_words

PARTS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


def grade_captions(
    predictions: Sequence[str], answers: Sequence[str | Sequence[str]]
) -> tuple[tuple[float, ...], float, dict[str, float]]:
    """Grade a set of captions, each against its references: equal-weight mean of BLEU-1..4, METEOR, ROUGE-L and CIDEr.

    CIDEr weighs a phrase by how few images have it in a reference, so it depends on the set, is 0 for a set of one,
    and may exceed 1: the mean may exceed 100.

    No Java is used. BLEU, ROUGE-L and CIDEr are pycocoevalcap's own code. METEOR is 1.5 with its synonyms and
    paraphrases written anew; it equalled the Java program on 1,320 captions, item by item and as a set. The tokenizer
    imitates Stanford's: `penn` names the departures, and only they can part the result from the official one.

    Args:
        predictions: one per image.
        answers: references of each image, in the same order.

    Returns:
        Of each image the mean of its seven scores, 1 = 100 percent (their mean is not the mean of the set: BLEU and
        METEOR add up counts); the caption mean in percent; the seven scores in percent.

    Raises:
        ValueError: an image without a reference, no reference with a word, or the libraries are not installed.
    """
    bleu, rouge, cider = _libraries()
    texts = [_tokenized(text) for text in predictions]
    known = [[_tokenized(text) for text in ([each] if isinstance(each, str) else each)] for each in answers]
    if not all(known):
        raise ValueError(f"caption_mean needs a reference for every image, got none for item {known.index([])}")
    if not any(text for several in known for text in several):
        raise ValueError("caption_mean needs references with words, got none")
    predicted, references = dict(enumerate([text] for text in texts)), dict(enumerate(known))
    whole, single = bleu.compute_score(references, predicted, verbose=0)
    for total, items in (
        meteor(texts, known),
        rouge.compute_score(references, predicted),
        cider.compute_score(references, predicted),
    ):
        whole, single = [*whole, total], [*single, items]
    percents = [100.0 * float(score) for score in whole]
    items = tuple(float(sum(scores)) / len(PARTS) for scores in zip(*single, strict=True))
    return items, sum(percents) / len(percents), dict(zip(PARTS, percents, strict=True))


def score_caption(prediction: str, answer: str | Sequence[str], question: str = "", image: str = "") -> float:
    """Grade one caption as a set of one: CIDEr is 0, so at most 6/7, and slow, as METEOR reads its paraphrases anew."""
    return grade_captions([prediction], [answer])[1] / 100.0


def _tokenized(text: str) -> str:
    return " ".join(caption_words(text))


def _libraries() -> tuple[Any, Any, Any]:
    """Return scorers for BLEU, ROUGE-L and CIDEr; importing these starts no Java and reads no file."""
    try:
        import nltk  # noqa: F401  METEOR's stemmer
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError as error:
        raise ValueError(
            f"caption_mean needs {error.name}: install the extra with pip install 'mllm-keeplora[captions]'"
        ) from error
    return Bleu(4), Rouge(), Cider()
