"""The language model that the book keeps using: a GPT of 0.9 million parameters that knows Python's language reference.

It is trained by ``tools/train_tiny_lm.py`` and lies beside this file as float16. See its model card, book/tiny_lm.md.
Chapter: notebooks/foundations/tiny_language_model.ipynb.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from algokit._lazy import require
from algokit.nn.models import GPTConfig, check_floating, gpt_shapes
from algokit.nn.trees import Tree, check_like, map_paths, unflatten

jnp = require("jax", extra="neural").numpy

__all__ = ["TinyLM", "tiny_lm"]

FILE = Path(__file__).with_name("tiny_lm.npz")
CARD = Path(__file__).with_name("tiny_lm.json")  # shape, checksum and scores, written by the training script


class TinyLM(NamedTuple):
    """A pre-trained GPT of bytes.

    Attributes
    ----------
    params : nested dict of jax.Array
        Parameters, for :func:`algokit.nn.models.gpt`.
    config : GPTConfig
        Shape of the model.
    card : dict
        What is known of it: number of parameters, ``bits_per_byte`` on the validation text of
        :func:`algokit.nn.text.language_reference`, that of n-grams on the same text, and how it was trained.
    """

    params: Tree
    config: GPTConfig
    card: dict[str, Any]


def tiny_lm(*, dtype: Any = np.float32) -> TinyLM:
    """Load the book's pre-trained language model: bytes, 4 blocks of width 128, a context of 256.

    Parameters
    ----------
    dtype : dtype, default float32
        Floating-point type of the parameters. They are stored as float16.

    Returns
    -------
    TinyLM
        Parameters, shape, and card.

    Raises
    ------
    TypeError
        If ``dtype`` is not a floating-point type.
    OSError
        If the file of parameters is not the one that belongs to this version of the package.

    Notes
    -----
    Trained on Python's language reference (Python Software Foundation License). It writes the prose of that text, and
    knows nothing else: it is a specimen, not a tool.

    Examples
    --------
    >>> from algokit.nn.generation import generate
    >>> from algokit.nn.text import decode, encode
    >>> model = tiny_lm()
    >>> decode(generate(model.params, encode("The return sta"), model.config, n_tokens=6, temperature=0))
    'tement'
    """
    dtype = check_floating(dtype, "dtype")
    flat, config, card = _stored()
    params = map_paths(lambda _, x: jnp.asarray(x, dtype), unflatten(flat))
    return TinyLM(params, config, json.loads(card))


@lru_cache
def _stored() -> tuple[dict[str, np.ndarray], GPTConfig, str]:
    """Stored arrays, shape and card, after a look at the checksum."""
    text = CARD.read_text()
    card = json.loads(text)
    found = hashlib.sha256(FILE.read_bytes()).hexdigest()
    if found != card["sha256"]:
        raise OSError(f"{FILE.name} is damaged or of another version: its SHA-256 is {found}, not {card['sha256']}")
    config = GPTConfig(**card["config"])
    with np.load(FILE, allow_pickle=False) as stored:
        flat = {path: stored[path] for path in stored.files}
    check_like(unflatten(flat), gpt_shapes(config), FILE.name)
    return flat, config, text
