"""Text as bytes: two corpora and a classification set, all from what Python itself installs. NumPy only.

The corpora are the texts of the running interpreter, so they differ a little from one Python version to the next;
measured numbers on them do, too.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from algokit.arrays import is_array, to_numpy
from algokit.checks import check_int

__all__ = ["Corpus", "TopicSet", "decode", "encode", "language_reference", "standard_library", "topic_paragraphs"]

# Modules whose source is one file, plain, and of some length in every Python since 3.11.
MODULES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "difflib", "doctest", "fractions", "functools", "gettext", "heapq", "imaplib", "mailbox", "optparse",
    "pdb", "pickle", "random", "shlex", "shutil", "smtplib", "socketserver", "statistics", "string",
    "subprocess", "tarfile", "textwrap", "zipapp",
)  # fmt: skip


class Corpus(NamedTuple):
    """A text, split.

    Attributes
    ----------
    train, validation : numpy.ndarray of uint8, shape (n,)
        Bytes: each is a token of a byte-level model.
    source, licence : str
        Where the text comes from, and on what terms.
    """

    train: np.ndarray
    validation: np.ndarray
    source: str
    licence: str


class TopicSet(NamedTuple):
    """Paragraphs of English with the topic each belongs to.

    Attributes
    ----------
    X_train, X_test : numpy.ndarray of uint8, shape (n, length)
        The first bytes of each paragraph, filled up with spaces.
    y_train, y_test : numpy.ndarray of int64, shape (n,)
        Index of the topic.
    topics : tuple of str
        Names of the topics.
    """

    X_train: np.ndarray
    X_test: np.ndarray
    y_train: np.ndarray
    y_test: np.ndarray
    topics: tuple[str, ...]


def encode(text: str) -> np.ndarray:
    """UTF-8 bytes of a text, as tokens.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    numpy.ndarray of uint8, shape (n,)
        Its bytes.

    Raises
    ------
    TypeError
        If ``text`` is not a string.

    Examples
    --------
    >>> encode("né")
    array([110, 195, 169], dtype=uint8)
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    return np.frombuffer(text.encode(), dtype=np.uint8)


def decode(tokens: Any) -> str:
    """The text that these bytes spell; what is not UTF-8 shows as U+FFFD.

    Parameters
    ----------
    tokens : array of integers in [0, 256), shape (n,)
        Bytes.

    Returns
    -------
    str
        The text.

    Raises
    ------
    TypeError, ValueError
        If ``tokens`` is not a vector of bytes.

    Examples
    --------
    >>> decode([110, 195, 169])
    'né'
    """
    x = to_numpy(tokens) if is_array(tokens) else np.asarray(tokens)
    if x.size and not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got dtype {x.dtype}")
    if x.ndim != 1:
        raise ValueError(f"tokens must have 1 dimension, got shape {x.shape}")
    if x.size and (x.min() < 0 or x.max() > 255):
        raise ValueError(f"tokens must lie in [0, 256), got {x[(x < 0) | (x > 255)][0]}")
    return bytes(x.astype(np.uint8)).decode(errors="replace")


def language_reference() -> Corpus:
    """Python's language reference: about 375,000 bytes of technical English, tables, grammar and examples.

    Topics repeat each other's sections, so a paragraph that has stood in an earlier topic (in alphabetical order) is
    left out. The last tenth of each topic's paragraphs is the validation text: no paragraph of it is in the training
    text.

    Returns
    -------
    Corpus
        About 340,000 and 35,000 bytes.

    Notes
    -----
    Source: ``pydoc_data.topics`` of the running interpreter (Python Software Foundation License).

    Examples
    --------
    >>> corpus = language_reference()
    >>> decode(corpus.train[:39])
    'The "assert" statement\\n****************'
    """
    train, validation = [], []
    for paragraphs in _unique_paragraphs().values():
        held_out = len(paragraphs) // 10
        train += paragraphs[: len(paragraphs) - held_out]
        validation += paragraphs[len(paragraphs) - held_out :]
    return Corpus(
        encode("\n\n".join(train) + "\n"),
        encode("\n\n".join(validation) + "\n"),
        "CPython, pydoc_data.topics",
        "Python Software Foundation License",
    )


def _unique_paragraphs() -> dict[str, list[str]]:
    """Paragraphs of each topic, in alphabetical order of the topics, without those that an earlier topic has."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    unique: dict[str, list[str]] = {}
    for name, text in sorted(topics.items()):
        unique[name] = []
        for paragraph in re.split(r"\n[ \t]*\n\s*?(?=\S|[ \t]+\S)", text):
            paragraph = paragraph.strip("\n")
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                unique[name].append(paragraph)
    return unique


def standard_library(*, max_bytes: int = 1_000_000) -> Corpus:
    """Python source code of the standard library: a second domain, for fine-tuning.

    Parameters
    ----------
    max_bytes : int, default 1,000,000
        Length of the text, before it is split.

    Returns
    -------
    Corpus
        The last tenth of each file (in lines) is the validation text.

    Raises
    ------
    ValueError
        If ``max_bytes`` is not positive.
    FileNotFoundError
        If the interpreter was installed without its source code.

    Notes
    -----
    Source: modules of the running interpreter (Python Software Foundation License), in alphabetical order.

    Examples
    --------
    >>> decode(standard_library(max_bytes=1000).train[:34])
    '# Author: Steven J. Bethard <steve'
    """
    max_bytes = check_int(max_bytes, "max_bytes", low=1)
    folder = Path(sysconfig.get_paths()["stdlib"])
    train, validation, left = [], [], max_bytes
    for name in MODULES:
        path = folder / f"{name}.py"
        if not path.exists():
            raise FileNotFoundError(f"this interpreter has no source of the standard library: {path} is missing")
        text = path.read_bytes()[:left].decode(errors="ignore")
        left -= len(text.encode())
        lines = text.splitlines(keepends=True)
        held_out = len(lines) // 10
        train += lines[: len(lines) - held_out]
        validation += lines[len(lines) - held_out :]
        if left <= 0:
            break
    return Corpus(
        encode("".join(train)),
        encode("".join(validation)),
        "CPython, standard library",
        "Python Software Foundation License",
    )


def topic_paragraphs(*, length: int = 96) -> TopicSet:
    """A small classification set of real text: which of six topics of the language reference is a paragraph from?

    Parameters
    ----------
    length : int, default 96
        Bytes kept of each paragraph, from its start; shorter paragraphs are filled up with spaces.

    Returns
    -------
    TopicSet
        Paragraphs of at least 40 bytes. One in five, by a hash of its text, is for testing.

    Raises
    ------
    ValueError
        If ``length`` is not positive.

    Notes
    -----
    Source: as for :func:`language_reference`. The topics are: compound statements, the debugger, string formatting,
    methods of strings, the data model's types, and sequence types.

    Examples
    --------
    >>> topic_paragraphs().topics
    ('compound', 'debugger', 'formatstrings', 'string-methods', 'types', 'typesseq')
    """
    length = check_int(length, "length", low=1, high=10_000)
    topics = ("compound", "debugger", "formatstrings", "string-methods", "types", "typesseq")
    paragraphs = _unique_paragraphs()
    rows: dict[bool, list[np.ndarray]] = {False: [], True: []}
    labels: dict[bool, list[int]] = {False: [], True: []}
    for label, topic in enumerate(topics):
        for paragraph in paragraphs[topic]:
            text = " ".join(paragraph.split()).encode()
            if len(text) >= 40:
                held_out = hashlib.sha256(text).digest()[0] < 51  # 51 of 256
                rows[held_out].append(np.frombuffer(text[:length].ljust(length), dtype=np.uint8))
                labels[held_out].append(label)
    return TopicSet(
        np.stack(rows[False]), np.stack(rows[True]), np.array(labels[False]), np.array(labels[True]), topics
    )
