"""METEOR 1.5 for English without Java: the official program's number, from the word lists that lie beside it.

Source: Denkowski and Lavie (WMT 2014), and the program as pycocoevalcap starts it (`-l en -norm`), quirks included.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mllm_keeplora.metrics.captions import meteor_lists as english

EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # what a matched word is worth, by kind of match
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
BEAM = 40
LONGEST_PHRASE = 7  # words, in the paraphrase table


class Match(NamedTuple):
    """Take words of the reference (from `start`) for words of the prediction (from `at`)."""

    start: int
    length: int
    at: int
    at_length: int
    kind: int

    def gain(self) -> int:
        """Count the words covered on both sides; halves are rounded down, so one word for another one gives 0."""
        return self.length + self.at_length if self.kind == EXACT else self.length // 2 + self.at_length // 2


class Alignment(NamedTuple):
    """Keep the matches chosen so far, left to right along the reference."""

    covered: int = 0
    chunks: int = 0  # closed ones
    distance: int = 0
    end: int = -1  # where in the prediction the open chunk goes on; -1: none is open
    after: int = 0  # first word of the reference behind the last match
    predicted_used: int = 0  # a bit per word
    reference_used: int = 0
    matches: tuple[Match, ...] = ()

    def rank(self) -> tuple[int, int, int]:
        return -self.covered, self.chunks, self.distance

    def clashes(self, match: Match) -> bool:
        used = self.predicted_used & _bits(match.at, match.at_length)
        return bool(used | self.reference_used & _bits(match.start, match.length))

    def plus(self, match: Match, distance: int) -> Alignment:
        return Alignment(
            self.covered + match.gain(),
            self.chunks + (self.end not in (-1, match.at)),
            distance,
            match.at + match.at_length,
            match.start + match.length,
            self.predicted_used | _bits(match.at, match.at_length),
            self.reference_used | _bits(match.start, match.length),
            (*self.matches, match),
        )

    def closed(self, distance: int) -> Alignment:
        return self._replace(chunks=self.chunks + (self.end != -1), end=-1, distance=distance)


class Counts(NamedTuple):
    """Count what a score is computed from; a set sums over its items. Weights count a content word most."""

    predicted_gain: float
    reference_gain: float
    predicted_weight: float
    reference_weight: float
    predicted_matches: int
    reference_matches: int
    chunks: int  # 0 where all words of both sides match in one

    def score(self) -> float:
        """Average precision and recall, harmonically and in favour of recall, less a penalty for scattered matches."""
        if not self.predicted_gain or not self.reference_gain:
            return 0.0
        precision = self.predicted_gain / self.predicted_weight
        recall = self.reference_gain / self.reference_weight
        mean = 1.0 / ((1.0 - ALPHA) / precision + ALPHA / recall)
        scatter = self.chunks / ((self.predicted_matches + self.reference_matches) / 2)
        return mean * (1.0 - GAMMA * scatter**BETA)


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Score tokenized captions, each against its best reference.

    Args:
        predictions: one per item, words with a space between them (as `penn.caption_words` cuts them).
        references: one or more per item, of the same kind.

    Returns:
        The score of the set in [0, 1], from the summed counts and so not the mean; the score of each item.
    """
    texts = [english.cut(text) for text in predictions]
    known = [[english.cut(text) for text in several] for several in references]
    phrases = {
        phrase
        for words in [*texts, *(words for several in known for words in several)]
        for _, phrase in _phrases(words)
    }
    table = english.paraphrases(phrases)
    best = [
        max((_counts(words, reference, table) for reference in several), key=Counts.score)
        for words, several in zip(texts, known, strict=True)
    ]
    return Counts(*map(sum, zip(*best, strict=True))).score(), [counts.score() for counts in best]


def _counts(predicted: Sequence[str], reference: Sequence[str], table: english.Paraphrases) -> Counts:
    weights = {word: 1.0 - DELTA if english.is_function_word(word) else DELTA for word in [*predicted, *reference]}
    found = align(reference, _candidates(predicted, reference, table))
    gained = [0.0, 0.0]
    for start, length, at, at_length, kind in found.matches:
        gained[0] += WEIGHTS[kind] * sum(weights[word] for word in predicted[at : at + at_length])
        gained[1] += WEIGHTS[kind] * sum(weights[word] for word in reference[start : start + length])
    matched = sum(match.at_length for match in found.matches), sum(match.length for match in found.matches)
    is_whole = found.chunks == 1 and matched == (len(predicted), len(reference))
    return Counts(
        *gained,
        sum(weights[word] for word in predicted),
        sum(weights[word] for word in reference),
        *matched,
        0 if is_whole else found.chunks,
    )


def align(reference: Sequence[str], candidates: Sequence[Sequence[Match]]) -> Alignment:
    """Choose matches that do not overlap: most words covered, then fewest chunks, then least distance, by beam search.

    A match that overlaps no other is taken without a search. The distance of a match is added to the alternatives
    that come after it, not to itself: so does the program.
    """
    fixed = _without_rival(candidates)
    used = Alignment()
    for match in fixed.values():
        used = used.plus(match, 0)
    paths = [Alignment(predicted_used=used.predicted_used, reference_used=used.reference_used)]
    for position in range(len(reference)):
        paths = sorted(paths, key=Alignment.rank)[:BEAM]
        paths = [step for path in paths for step in _steps(path, position, candidates[position], fixed.get(position))]
    paths = sorted(paths, key=Alignment.rank)[:BEAM]
    return min((path.closed(path.distance) for path in paths), key=Alignment.rank)


def _steps(path: Alignment, position: int, matches: Iterable[Match], fixed: Match | None) -> Iterator[Alignment]:
    if path.reference_used >> position & 1:
        yield path if position < path.after else path.plus(fixed, path.distance + abs(fixed.start - fixed.at))
        return
    distance = path.distance
    for match in matches:
        if not path.clashes(match):
            yield path.plus(match, distance)
            distance += abs(match.start - match.at)
    yield path.closed(distance)


def _without_rival(candidates: Sequence[Sequence[Match]]) -> dict[int, Match]:
    every = [match for matches in candidates for match in matches]
    predicted = Counter(word for match in every for word in range(match.at, match.at + match.at_length))
    reference = Counter(word for match in every for word in range(match.start, match.start + match.length))
    return {
        match.start: match
        for match in (matches[0] for matches in candidates if len(matches) == 1)
        if all(reference[word] == 1 for word in range(match.start, match.start + match.length))
        and all(predicted[word] == 1 for word in range(match.at, match.at + match.at_length))
    }


def _candidates(predicted: Sequence[str], reference: Sequence[str], table: english.Paraphrases) -> list[list[Match]]:
    """Every possible match by the word of the reference it starts at. Equal texts need exact matches only."""
    found: list[list[Match]] = [[] for _ in reference]
    for start, wanted in enumerate(reference):
        found[start] += [Match(start, 1, at, 1, EXACT) for at, word in enumerate(predicted) if word == wanted]
    if predicted == reference:
        return found
    for kind, same in ((STEM, english.same_stem), (SYNONYM, english.same_meaning)):
        for start, wanted in enumerate(reference):
            others = [at for at, word in enumerate(predicted) if word != wanted and same(word, wanted)]
            found[start] += [Match(start, 1, at, 1, kind) for at in others]
    places = [_places(words) for words in (predicted, reference)]
    for start, phrase in _phrases(reference):
        for other in table.get(phrase, ()):
            sizes = phrase.count(" ") + 1, other.count(" ") + 1
            found[start] += [Match(start, sizes[0], at, sizes[1], PARAPHRASE) for at in places[0].get(other, ())]
    for at, phrase in _phrases(predicted):
        for other in table.get(phrase, ()):
            sizes = other.count(" ") + 1, phrase.count(" ") + 1
            for start in places[1].get(other, ()):
                found[start].append(Match(start, sizes[0], at, sizes[1], PARAPHRASE))
    return found


def _phrases(words: Sequence[str]) -> Iterator[tuple[int, str]]:
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST_PHRASE, len(words)) + 1):
            yield start, " ".join(words[start:end])


def _places(words: Sequence[str]) -> dict[str, list[int]]:
    places: defaultdict[str, list[int]] = defaultdict(list)
    for start, phrase in _phrases(words):
        places[phrase].append(start)
    return places


def _bits(start: int, length: int) -> int:
    return ((1 << length) - 1) << start
