"""Bytes, corpora, and the classification set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algokit.nn.text import decode, encode, language_reference, standard_library, topic_paragraphs

EXAMPLES = {
    "encode": dict(text="abc"),
    "decode": dict(tokens=np.array([97, 98])),
    "standard_library": dict(max_bytes=1000),
    "topic_paragraphs": dict(length=20),
}
ACCEPTS = {"encode.text": {"string", "word", "empty"}, "decode.tokens": {"empty", "zero"}}


@given(st.text())
def test_decode_inverts_encode(text: str) -> None:
    assert decode(encode(text)) == text


def test_what_is_not_text_is_shown_as_such() -> None:
    assert decode([255, 97]) == "\ufffda"
    with pytest.raises(ValueError, match="256"):
        decode([256])


def test_language_reference_splits_without_overlap() -> None:
    corpus = language_reference()
    train, validation = decode(corpus.train), decode(corpus.validation)
    assert len(corpus.train) > 250_000 and 0.05 < len(corpus.validation) / len(corpus.train) < 0.15
    held_out = [" ".join(p.split()) for p in validation.split("\n\n") if p.strip()]
    learnt = {" ".join(p.split()) for p in train.split("\n\n")}
    assert len(held_out) > 100 and not learnt.intersection(held_out)
    assert len(learnt) == len([p for p in train.split("\n\n") if p.strip()])  # no paragraph twice


def test_standard_library_is_python() -> None:
    corpus = standard_library(max_bytes=60_000)
    assert len(corpus.train) + len(corpus.validation) == 60_000
    assert decode(standard_library(max_bytes=10_000).train).count("def ") > 3
    assert len(standard_library().train) > 500_000


def test_topics_are_split_without_overlap_and_learnable() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import ComplementNB
    from sklearn.pipeline import make_pipeline

    data = topic_paragraphs()
    assert not {bytes(x) for x in data.X_train}.intersection(bytes(x) for x in data.X_test if x[-1] != 32)
    assert set(data.y_train) == set(data.y_test) == set(range(6))
    words = make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 4)), ComplementNB())
    words.fit([decode(x) for x in data.X_train], data.y_train)
    score = words.score([decode(x) for x in data.X_test], data.y_test)
    assert np.bincount(data.y_test).max() / len(data.y_test) + 0.2 < score < 0.99  # neither hopeless nor trivial
