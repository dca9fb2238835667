"""What METEOR 1.5 knows of English words: where a text is cut, stems, synonyms, paraphrases.

The lists are data files of pycocoevalcap, beside the Java program that is not run here; the stemmer is nltk's. Both are
imported at first use.
"""

from __future__ import annotations

import gzip
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

Paraphrases = Mapping[str, Sequence[str]]

_NOUNS = "s: ses:s xes:x zes:z ches:ch shes:sh men:man ies:y"
_VERBS = "s: ies:y es:e es: ed:e ed: ing:e ing:"
_ADJECTIVES = "er: est: er:e est:e"
_ENDINGS = [pair.split(":") for pair in f"{_NOUNS} {_VERBS} {_ADJECTIVES}".split()]  # WordNet's, in its order
_LETTER = "A-Za-zÀ-ÖØ-öø-žЀ-ӿ"
_SPACING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"([^0-9{_LETTER}\s.'`,\-])", r" \1 "),
        (rf"([0-9{_LETTER}.])-([0-9{_LETTER}])", r"\1 \2"),  # "t-shirt" is two words here
        (rf"([^{_LETTER}])'([^{_LETTER}])", r"\1 ' \2"),
        (rf"([^0-9{_LETTER}])'([{_LETTER}])", r"\1 ' \2"),  # "'s", a word by now, is a quote and an s
        (rf"([{_LETTER}])'([^{_LETTER}])", r"\1 ' \2"),
        (rf"([{_LETTER}])'([{_LETTER}])", r"\1 '\2"),
        (r"([0-9])'(s)", r"\1 '\2"),
    )
]
_KEEP_DOT = {"v.", "vs.", "rev."}


def cut(text: str) -> list[str]:
    """Cut a tokenized text as `-norm` does: hyphens part words, quotes stand alone, abbreviations lose their dots."""
    text = f" {text} "
    for pattern, replacement in _SPACING:
        text = pattern.sub(replacement, text)
    words = text.split()
    for place, (word, following) in enumerate(zip(words, [*words[1:], ""], strict=False)):
        if len(word) > 1 and word.endswith("."):
            if "." in word[:-1] and re.search(f"[{_LETTER}]", word):
                words[place] = word.replace(".", "")
            elif word not in _KEEP_DOT and not re.match("[a-z]", following):
                words[place] = f"{word[:-1]} ."
    return " ".join(words).split()


def is_function_word(word: str) -> bool:
    return word in _lists()[0]


def same_stem(word: str, other: str) -> bool:
    return _stem(word) == _stem(other)


def same_meaning(word: str, other: str) -> bool:
    """Tell whether the words share a synonym set of WordNet."""
    return not _meanings(word).isdisjoint(_meanings(other))


def paraphrases(phrases: set[str]) -> Paraphrases:
    """Return phrase -> paraphrases among those given, twice if listed twice. Reads five million pairs: some seconds."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    with gzip.open(_folder() / "data" / "paraphrase-en.gz", "rt", encoding="utf-8") as lines:
        for _, phrase, other in zip(lines, lines, lines, strict=True):
            if phrase[:-1] in phrases and other[:-1] in phrases:
                found[phrase[:-1]].append(other[:-1])
    return dict(found)


@cache
def _stem(word: str) -> str:
    from nltk.stem.snowball import SnowballStemmer

    return SnowballStemmer("english").stem(word)


@cache
def _meanings(word: str) -> frozenset[str]:
    """Synonym sets of a word and of its base form: by the list of exceptions, or else by the first ending that fits."""
    _, sets, bases = _lists()
    own = sets.get(word, frozenset())
    if word in bases:
        return own.union(*(sets.get(base, frozenset()) for base in bases[word]))
    if word.endswith("ss") or len(word) <= 2:
        return own
    forms = (word.removesuffix(ending) + other for ending, other in _ENDINGS if word.endswith(ending))
    return own | sets.get(next((form for form in forms if form in sets), ""), frozenset())


@cache
def _lists() -> tuple[frozenset[str], dict[str, frozenset[str]], dict[str, list[str]]]:
    """Function words; word -> its synonym sets; inflected word -> its base forms."""
    with zipfile.ZipFile(_folder() / "meteor-1.5.jar") as archive:
        functions, sets, exceptions = (
            archive.read(name).decode("utf-8").splitlines()
            for name in ("function/english.words", "synonym/english.synsets", "synonym/english.exceptions")
        )
    bases: defaultdict[str, list[str]] = defaultdict(list)
    for base, forms in zip(exceptions[::2], exceptions[1::2], strict=True):
        for form in forms.split():
            bases[form].append(base)
    synsets = {word: frozenset(names.split()) for word, names in zip(sets[::2], sets[1::2], strict=True)}
    return frozenset(functions), synsets, dict(bases)


def _folder() -> Path:
    from pycocoevalcap.bleu import bleu

    return Path(bleu.__file__).parents[1] / "meteor"
