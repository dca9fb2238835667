"""Where the stored caption numbers come from: ask the Java tools of pycocoevalcap again and show what differs.

Needs Java and the extra `captions`; no test runs it: `python -m tests.unit.metrics.captions.record_captions`.
"""

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from tests.unit.metrics.captions import test_captions, test_meteor, test_penn


def tokenized(several):
    """Cut every text of a list of lists."""
    return PTBTokenizer().tokenize(
        {place: [{"caption": text} for text in texts] for place, texts in enumerate(several)}
    )


def show(name, stored, found):
    print("same" if stored == found else f"stored {stored}\nfound  {found}", name)


def main():
    found = tokenized([text] for text, _ in test_penn.JAVA)
    for place, (text, stored) in enumerate(test_penn.JAVA):
        show(repr(text), stored, found.get(place, [""])[0])  # the tool forgets empty lines at the end

    whole, items = Meteor().compute_score(
        {place: references for place, (_, references, _) in enumerate(test_meteor.PAIRS)},
        {place: [prediction] for place, (prediction, _, _) in enumerate(test_meteor.PAIRS)},
    )
    show("METEOR of pairs", [score for _, _, score in test_meteor.PAIRS], items)
    show("METEOR of the set", test_meteor.SET, whole)

    predictions = tokenized([prediction] for prediction, _, _ in test_captions.GOLDEN)
    references = tokenized(references for _, references, _ in test_captions.GOLDEN)
    totals, singles = Bleu(4).compute_score(references, predictions, verbose=0)
    for metric in (Meteor(), Rouge(), Cider()):
        total, single = metric.compute_score(references, predictions)
        totals, singles = [*totals, total], [*singles, single]
    for (name, stored), total in zip(test_captions.PARTS.items(), totals, strict=True):
        show(name, stored, 100 * float(total))
    items = [float(sum(scores)) / 7 for scores in zip(*singles, strict=True)]
    show("caption scores", [score for _, _, score in test_captions.GOLDEN], items)
    show("caption mean", test_captions.PERCENT, sum(100 * float(total) for total in totals) / 7)


if __name__ == "__main__":
    main()
