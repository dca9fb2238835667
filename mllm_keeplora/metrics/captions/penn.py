"""The words of a caption as the COCO caption tools count them: Penn Treebank tokens, lower-cased, punctuation dropped.

Follows Stanford CoreNLP's PTBTokenizer 3.4.1 under the wrapper of pycocoevalcap, a Java program. Knows no metric.
"""

import re

# Spelled otherwise before anything is cut. The currencies and the guillemets are what the Java program makes of them.
_SPELLING = str.maketrans(
    {
        **dict.fromkeys("“”«»", '"'),
        **dict.fromkeys("‘’", "'"),
        **dict.fromkeys("–—", "--"),
        **{"…": "...", "€": "$", "£": "#", "¢": " cents", "½": "1/2", "¼": "1/4", "¾": "3/4"},
    }
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = re.compile(r"''|``|[\"'`.,?!:;]|\.{3}|-+")
# Words that keep their full stop. No., fig. and pp. do so before a number only.
_ABBREVIATIONS = (
    r"mr|mrs|ms|dr|st|jr|sr|inc|co|corp|ltd|bros|vs|etc|prof|gen|rev|hon|sen|sens|gov|capt|lt|col|sgt|maj|cmdr|adm|"
    r"rep|reps|pres|supt|treas|insp|attys|messrs|mme|mt|ft|ave|blvd|rd|bldg|dept|est|assn|univ|natl|mfg|pty|ph\.d|"
    r"al|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|ariz|calif|colo|conn|fla|"
    r"ga|ind|kan|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wis|wyo"
)
_SPLITS = (
    (re.compile(r"[\U00010000-\U0010ffff]"), " "),  # emoji are no tokens
    (re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b", re.I), r"\1\3\5\7 \2\4\6\8"),
    (re.compile(r"(?<!\w)('t)(is|was)\b", re.I), r"\1 \2"),
    (re.compile(r"(?<=\w)(n't|'(?:s|ll|re|ve|d|m))(?!\w)", re.I), r" \1"),
    (re.compile(r"(?<=:\d\d)([ap]m)\b", re.I), r" \1"),  # 10:30am, but 10am
)
_TOKEN = re.compile(
    rf"""
    https?://\S*[^\s.,;:!?'")\]] | www\.\S*[^\s.,;:!?'")\]] | [\w.+-]+@[\w-]+(?:\.[\w-]+)*  # addresses
    | [@\#][a-z_]\w*                                    # handles, hash tags
    | </?[a-z][^<>\s]*>                                 # markup
    | n't(?!\w) | '(?:s|ll|re|ve|d|m|t|em|cause|\d\ds?)(?!\w) | 'n'
    | [:;]-?[()](?!\w)                                  # smileys
    | (?:[a-z]\.)+(?!\w)                                # initials; p.m.
    | (?:{_ABBREVIATIONS})\.(?!\w) | (?:nos?|fig|pp)\.(?=\s*\d)
    | (?-i:[A-Z]+(?:&[A-Z]+)+)(?!\w)                    # AT&T, but a & b
    | (?:(?<!\S)-(?=\.?\d))?(?:\.(?=\d))?\w+(?:(?:[-./] | (?<=\d)[,:](?=\d) | (?<=[^\W\d])'(?=[^\W\d]))\w+)*
    | [!?]+ | \.{{3}} | -+ | \*+ | '' | `` | \S
    """,
    re.X | re.I,
)


def caption_words(text: str) -> list[str]:
    """Cut a caption into the words that caption metrics compare.

    Kept as the official tools do: a bracket is a word ("-lrb-"), so are a run of "!" or "?", "%", "$" and "&"; a single
    mark of punctuation, a quote and a dash are none. "don't" is two words, "t-shirt" and "black-and-white" are one.

    Departures: the Java program also joins what stands around a mark without a space ("dog!cat"), reads HTML entities,
    and knows more abbreviations and emoticons than the list here. It cuts these otherwise: words with a curly
    apostrophe, "y'all", feet and inches ("5'10\""), versions ("v1.0"), "C++", signed numbers ("+5"), and numbers
    in brackets.
    """
    text = text.translate(_SPELLING)
    for pattern, replacement in _SPLITS:
        text = pattern.sub(replacement, text)
    tokens = (token for token in _TOKEN.findall(text) if not _DROPPED.fullmatch(token))
    return ["".join(_BRACKETS.get(sign, sign) for sign in token).lower() for token in tokens]
