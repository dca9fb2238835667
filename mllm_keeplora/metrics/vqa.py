"""VQA accuracy over ten human answers, after the answer processor of the TextVQA evaluation on EvalAI.

Source: `m4c_evaluator.py` of Pythia/MMF, which LLaVA, CoIN (arXiv 2403.08350) and MLLM-CL use unchanged.
"""

import re
from collections.abc import Sequence

NUM_ANSWERS = 10
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
# A comma, a question mark and "'s" are gone by the time these are looked at.
PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
MAX_DOTS = 32  # the original hands `re.UNICODE`, which is 32, to `sub` as the number of dots to remove
_DOT = re.compile(r"\.(?!\d)")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""


# Each contraction that lacks one apostrophe, and its spelling. "shes", "well" or "Im" are not among them.
CONTRACTIONS = {
    word[: apostrophe.start()] + word[apostrophe.end() :]: word
    for word in _CONTRACTIONS.split()
    for apostrophe in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the wrong way round in the original


def score_soft(prediction: str, answer: str | Sequence[str], question: str = "", image: str = "") -> float:
    """Grade by agreement with ten people: the mean, over leaving out each of them, of min(agreeing others / 3, 1).

    Both sides are normalised first, so an answer of articles only equals an empty prediction.

    Raises:
        ValueError: there are not ten answers; fewer would lower the score without a word.
    """
    given = [answer] if isinstance(answer, str) else answer
    if len(given) != NUM_ANSWERS:
        raise ValueError(
            f"VQA accuracy needs the {NUM_ANSWERS} human answers of a question, got {len(given)}: {answer!r}"
        )
    same = [normalise(each) == normalise(prediction) for each in given]
    return sum(min(1.0, (sum(same) - left_out) / 3) for left_out in same) / NUM_ANSWERS


def normalise(text: str) -> str:
    """Bring an answer to the form in which the official evaluation compares it.

    In this order: lower case; commas and question marks gone, "'s" set apart; a punctuation mark becomes nothing if it
    touches a space anywhere in the text, otherwise a space; dots gone unless a digit follows (32 of them at most);
    number words up to ten become digits, "none" becomes 0; articles gone; missing apostrophes put in.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    for mark in PUNCTUATION:
        bare = bare.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    words = [NUMBERS.get(word, word) for word in _DOT.sub("", bare, count=MAX_DOTS).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
