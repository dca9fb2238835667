"""Caption words; every vector was cut by the Java tokenizer of the COCO caption tools."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_keeplora.metrics.captions.penn import caption_words

JAVA = [
    ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
    ("Two dogs. One cat. Three birds.", "two dogs one cat three birds"),
    ("Two dogs.One cat.", "two dogs.one cat"),
    ("A man, a woman, and a child walk down the street.", "a man a woman and a child walk down the street"),
    ("It's a dog's bone, isn't it?", "it 's a dog 's bone is n't it"),
    ("I can't see; they won't and couldn't've known.", "i ca n't see they wo n't and could n't 've known"),
    ("The dogs' bowls aren't theirs.", "the dogs bowls are n't theirs"),
    ("'Tis the season, 'twas the night.", "'t is the season 't was the night"),
    ("He cannot go. I'm gonna wanna gotta lemme.", "he can not go i 'm gon na wan na got ta lem me"),
    ("A black-and-white photo of a 3-year-old boy.", "a black-and-white photo of a 3-year-old boy"),
    ("The well-known man -- a firefighter - stands up.", "the well-known man a firefighter stands up"),
    (
        "A man (left) and [a woman] {hold} <hands>.",
        "a man -lrb- left -rrb- and -lsb- a woman -rsb- -lcb- hold -rcb- <hands>",
    ),
    ("She said \"hello\" to him and ``bye'' too.", "she said hello to him and bye too"),
    ("She said “hello” and ‘bye’ to the dog’s owner.", "she said hello and bye to the dog 's owner"),
    ("Wait... what is that…", "wait what is that"),
    ("The U.S. flag and U.K. flags in Washington D.C.", "the u.s. flag and u.k. flags in washington d.c."),
    ("Mr. Smith lives on Elm St. in St. Louis.", "mr. smith lives on elm st. in st. louis"),
    ("It is 3:30 p.m. on a clock.", "it is 3:30 p.m. on a clock"),
    ("10:30am or 10am", "10:30 am or 10am"),
    ("A sign reads $5.00, 50% off or 1/2 price!!!", "a sign reads $ 5.00 50 % off or 1/2 price !!!"),
    ("The bus number is #12 & the train is No. 5.", "the bus number is # 12 & the train is no. 5"),
    ("he said no.", "he said no"),
    ("A 50/50 mix, 10,000 people, 3.5 miles, 20x30 cm.", "a 50/50 mix 10,000 people 3.5 miles 20x30 cm"),
    ("What?! Really?!", "what ?! really ?!"),
    ("Email bob@example.com or http://www.example.com/a?b=c.", "email bob@example.com or http://www.example.com/a?b=c"),
    ("café naïve Zürich 東京 Москва", "café naïve zürich 東京 москва"),
    ("emoji 🐶 dog", "emoji dog"),
    ("back\\slash | pipe * star + plus = equals", "back \\ slash | pipe * star + plus = equals"),
    ("He's 6'2\" tall.", "he 's 6 2 tall"),
    ("the '90s and 1990's style", "the '90s and 1990 's style"),
    ("a dog :) smiles ;-)", "a dog :-rrb- smiles ;--rrb-"),
    ("it's 5 o'clock for O'Brien", "it 's 5 o'clock for o'brien"),
    ("AT&T and a&b", "at&t and a & b"),
    ("#hashtag @user @ the beach", "#hashtag @user @ the beach"),
    ("100° outside, ½ cup, €20", "100 ° outside 1/2 cup $ 20"),
    ("a – b — c", "a b c"),
    ("dog;cat:bird,cow", "dog cat bird cow"),
    ("a <b>bold</b> word", "a <b> bold </b> word"),
    ("-5 degrees, .5 too", "-5 degrees .5 too"),
    ("the man--the dog", "the man the dog"),
    ("a   .   b\n,start\t", "a b start"),
    ("...", ""),
    ("'", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), JAVA)
def test_a_caption_is_cut_as_the_java_tokenizer_cuts_it(text, expected):
    assert " ".join(caption_words(text)) == expected


@given(st.text())
def test_words_of_any_text_are_lower_case_and_hold_no_space(text):
    for word in caption_words(text):
        assert word == word.lower()
        assert word.split() == [word]


@given(st.lists(st.sampled_from(["dog", "cat", "red", "t-shirt", "12", "3.5", "and"]), max_size=9))
def test_plain_words_stay_as_they_are(words):
    assert caption_words(" ".join(words)) == words
