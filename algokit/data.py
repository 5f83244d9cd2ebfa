"""Real data that chapters share. Everything is local: in this file, or in the data that scikit-learn ships.

Each loader's docstring names source and licence.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits, load_sample_image

from algokit.checks import RNGLike, check_float, check_int, check_one_of, check_rng

__all__ = ["Digits", "League", "american_league_1987", "digits", "documentation_topics", "image_patches"]


class League(NamedTuple):
    """Results of a round-robin league.

    Attributes
    ----------
    teams : list of str
        Names, length n.
    wins : numpy.ndarray, shape (n, n)
        ``wins[i, j]``: times team i beat team j.
    """

    teams: list[str]
    wins: np.ndarray


def american_league_1987() -> League:
    """The seven teams of baseball's American League East, season 1987: 13 games per pair.

    Returns
    -------
    League
        Teams and wins, shape (7, 7).

    Notes
    -----
    Source: A. Agresti, *Categorical Data Analysis* (Wiley, 1990), where the table is a standard example. The numbers
    are facts of the season and carry no licence.

    Examples
    --------
    >>> league = american_league_1987()
    >>> int((league.wins + league.wins.T).max())
    13
    """
    wins = np.array(
        [
            [0, 7, 9, 7, 7, 9, 11],
            [6, 0, 7, 5, 11, 9, 9],
            [4, 6, 0, 7, 7, 8, 12],
            [6, 8, 6, 0, 6, 7, 10],
            [6, 2, 6, 7, 0, 7, 12],
            [4, 4, 5, 6, 6, 0, 6],
            [2, 4, 1, 3, 1, 7, 0],
        ],
        dtype=np.float64,
    )
    return League(["Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore"], wins)


def image_patches(n: int, *, size: int = 32, image: str = "china", rng: RNGLike = None) -> np.ndarray:
    """Random square patches of a photograph, each flattened.

    Parameters
    ----------
    n : int
        Number of patches.
    size : int, default 32
        Side in pixels.
    image : {"china", "flower"}, default "china"
        Which photograph.
    rng : None, int or numpy.random.Generator
        Chooses the places.

    Returns
    -------
    numpy.ndarray, shape (n, 3 * size * size), float64
        Channel values divided by 255, in [0, 1].

    Raises
    ------
    ValueError
        If ``n`` or ``size`` is out of range, or the image is unknown.

    Notes
    -----
    Source: the sample images that ship with scikit-learn, both CC BY 2.0: *china.jpg* by "Cloudywithameatball",
    *flower.jpg* by "dany13".

    Examples
    --------
    >>> image_patches(5, rng=0).shape
    (5, 3072)
    """
    check_one_of(image, "image", ("china", "flower"))
    photo = load_sample_image(f"{image}.jpg")  # (height, width, 3), uint8
    height, width = photo.shape[:2]
    n = check_int(n, "n", low=1, high=10**6)
    size = check_int(size, "size", low=1, high=min(height, width))
    rng = check_rng(rng)
    top = rng.integers(0, height - size + 1, n)
    left = rng.integers(0, width - size + 1, n)
    patches = np.stack([photo[t : t + size, c : c + size].reshape(-1) for t, c in zip(top, left, strict=True)])
    return patches / 255.0


class Digits(NamedTuple):
    """Handwritten digits, split.

    Attributes
    ----------
    X_train, X_test : numpy.ndarray, shape (n, 64)
        Grey levels of 8 x 8 images, divided by 16: in [0, 1].
    y_train, y_test : numpy.ndarray, shape (n,)
        The digit, 0 to 9.
    """

    X_train: np.ndarray
    X_test: np.ndarray
    y_train: np.ndarray
    y_test: np.ndarray


def digits(*, test_fraction: float = 0.3, rng: RNGLike = 0) -> Digits:
    """Handwritten digits, shuffled and split into training and test sets.

    Parameters
    ----------
    test_fraction : float, default 0.3
        Share of the 1,797 images that is held out, in (0, 1).
    rng : None, int or numpy.random.Generator, default 0
        Order of the images, hence the split and the order of a stream.

    Returns
    -------
    Digits
        The split.

    Raises
    ------
    ValueError
        If ``test_fraction`` is out of range.

    Notes
    -----
    Source: the UCI ML *Optical Recognition of Handwritten Digits* test set (E. Alpaydin and C. Kaynak, 1998;
    CC BY 4.0), as shipped with scikit-learn.

    Examples
    --------
    >>> digits().X_train.shape
    (1258, 64)
    """
    test_fraction = check_float(test_fraction, "test_fraction", low=0, high=1, open_low=True, open_high=True)
    X, y = load_digits(return_X_y=True)
    order = check_rng(rng).permutation(len(y))
    X, y = X[order] / 16.0, y[order]
    n_test = max(1, round(test_fraction * len(y)))
    return Digits(X[:-n_test], X[-n_test:], y[:-n_test], y[-n_test:])


def documentation_topics() -> dict[str, list[list[str]]]:
    """Topics of Python's own language reference, as tokenised paragraphs: about 64,000 words of plain English.

    Returns
    -------
    dict of str to list of list of str
        For each topic, in alphabetical order, its paragraphs; a paragraph is a list of lower-cased words (runs of
        letters and underscores).

    Notes
    -----
    Source: ``pydoc_data.topics`` of the running interpreter (Python Software Foundation License). The text differs from
    one Python version to the next, so measured numbers on it do, too.

    Examples
    --------
    >>> topics = documentation_topics()
    >>> len(topics) > 50, topics["assert"][0][:3]
    (True, ['the', 'assert', 'statement'])
    """
    from pydoc_data.topics import topics

    word = re.compile(r"[a-z_]*[a-z][a-z_]*")
    return {
        name: [word.findall(paragraph.lower()) for paragraph in re.split(r"\n\s*\n", text)]
        for name, text in sorted(topics.items())
    }
