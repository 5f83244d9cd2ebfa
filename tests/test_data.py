"""Shared data have the shape, range and provenance that their docstrings state."""

from __future__ import annotations

import re

import numpy as np

from algokit import data

EXAMPLES = {"image_patches": dict(n=3, size=4, image="china", rng=0), "digits": dict(test_fraction=0.3, rng=0)}
ACCEPTS = {"image_patches.rng": {"none"}, "digits.rng": {"none"}}


def test_league_has_thirteen_games_a_pair_but_for_one_rained_off():
    league = data.american_league_1987()
    games = league.wins + league.wins.T
    off_diagonal = games[~np.eye(7, dtype=bool)]
    assert len(league.teams) == 7 and (np.diag(games) == 0).all()
    assert set(off_diagonal) <= {12.0, 13.0}


def test_patches_are_cut_from_the_photograph():
    patches = data.image_patches(4, size=8, rng=3)
    assert patches.shape == (4, 192) and patches.min() >= 0 and patches.max() <= 1
    np.testing.assert_array_equal(patches, data.image_patches(4, size=8, rng=3))
    assert not np.array_equal(patches, data.image_patches(4, size=8, rng=4))


def test_digits_are_split_without_overlap_or_loss():
    split = data.digits(test_fraction=0.25, rng=1)
    assert len(split.X_train) + len(split.X_test) == 1797 and len(split.X_test) == 449
    everything = np.vstack([split.X_train, split.X_test])
    assert len(np.unique(everything, axis=0)) == 1797
    assert np.bincount(np.r_[split.y_train, split.y_test]).sum() == 1797


def test_topics_are_words_of_the_reference():
    topics = data.documentation_topics()
    words = [w for paragraphs in topics.values() for p in paragraphs for w in p]
    assert list(topics) == sorted(topics) and 30_000 < len(words) < 300_000
    assert all(w == w.lower() and not any(c.isdigit() for c in w) for w in set(words))


def test_docstrings_name_source_and_licence():
    for loader in (data.american_league_1987, data.image_patches, data.digits, data.documentation_topics):
        assert "Source:" in loader.__doc__ and re.search("CC BY|no licence|License", loader.__doc__)
