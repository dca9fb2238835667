"""Every word of the miniature generators, and nothing else: the tokenizer of the bundled base has one token for each.

The base model's embedding rows follow this list, so it may not change without a new base.
"""

from __future__ import annotations

import string

PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<unk>", "<image>", "user:", "assistant:"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT)
CHARACTERS = "".join(c for c in string.printable if not c.isspace() and not c.isupper())
_LIST = """
    above act ahead and another answer are area arrow atom background bar bars belly below big bigger black block
    blue body bottom brain bright brown building candle car cells chart checked chest circle circuit city color
    companies company core cover cross dark day days describe desert diagonal did different direction directly
    disc do does dotted down drawing drawn drive driver east electrons end everywhere farmland figure flat force
    forest gain given go goes gray green has have heavy hexagon highest horizontal how image in is it kind lamp
    land lane large largest leaf left lesion lesions letter light line lines lit longer longest lowest main many
    map market middle moon most move moves negative night no none north nothing number numbers object objects of
    on only or orange part pedestrian phrase picture pie pink plain plant point points positive price profit
    purple quarter question red repeat right ring road roof root rough run rural shape shapes share shares
    shortest should shown side single slow small so south square stain star stop striped tanks texture than the
    there tissue top topic traffic triangle up urban using vertical water way west what where which white with
    word yellow yes
"""
WORDS = tuple(_LIST.split())


def vocabulary() -> list[str]:
    """List all tokens in the order of their ids: special tokens, words, characters, continuation characters."""
    return [*SPECIAL_TOKENS, *WORDS, *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
