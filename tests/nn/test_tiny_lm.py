"""The shipped model: its file, its score, and the baseline it has to beat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from algokit.nn import tiny_lm as module
from algokit.nn.models import gpt_shapes
from algokit.nn.ngram import fit_ngram
from algokit.nn.text import language_reference
from algokit.nn.tiny_lm import tiny_lm
from algokit.nn.training import bits_per_token
from algokit.nn.trees import flatten

EXAMPLES = {"tiny_lm": dict(dtype=np.float32)}


def test_size_and_card() -> None:
    model = tiny_lm()
    count = sum(x.size for x in flatten(model.params).values())
    assert 500_000 <= count == model.card["parameters"] <= 1_000_000
    assert module.FILE.stat().st_size <= 2_000_000
    assert set(flatten(model.params)) == set(gpt_shapes(model.config))


def test_the_page_says_what_the_card_says() -> None:
    page = (Path(__file__).parents[2] / "book" / "tiny_lm.md").read_text()
    card = tiny_lm().card
    assert f"**{card['bits_per_byte']:.3f} bits per byte**" in page
    for key in ("training_bits_per_byte", "five_gram_bits_per_byte", "best_n_gram_bits_per_byte"):
        assert f"{card[key]:.3f}" in page, key
    for key in ("parameters", "training_bytes", "validation_bytes", "steps"):
        assert f"{card[key]:,}" in page, key


def test_it_has_the_stated_score_and_beats_n_grams() -> None:
    """On this Python's text: exact where it is the text of the training, close where it is another version's."""
    model, corpus = tiny_lm(), language_reference()
    bits = bits_per_token(model.params, corpus.validation, model.config)
    baselines = {n: fit_ngram(corpus.train, order=n).bits_per_token(corpus.validation) for n in range(3, 9)}
    assert bits < baselines[5] and bits < min(baselines.values())
    same = f"{sys.version_info.major}.{sys.version_info.minor}" == model.card["python"]
    assert abs(bits - model.card["bits_per_byte"]) < (0.005 if same else 0.3)
    assert abs(baselines[5] - model.card["five_gram_bits_per_byte"]) < (0.005 if same else 0.3)


def test_loading_is_quick_and_needs_no_pickle() -> None:
    clock = "t = time.process_time(); m.tiny_lm(); print(time.process_time() - t)"
    program = f"import jax, algokit.nn.tiny_lm as m, time; {clock}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 3  # a third of a second on a quiet machine; this only catches what is absurd
    with np.load(module.FILE, allow_pickle=False) as stored:
        assert {stored[name].dtype for name in stored.files} == {np.dtype(np.float16)}


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = bytearray(module.FILE.read_bytes())
    broken[1000] ^= 1
    (tmp_path / "tiny_lm.npz").write_bytes(broken)
    monkeypatch.setattr(module, "FILE", tmp_path / "tiny_lm.npz")
    module._stored.cache_clear()
    with pytest.raises(OSError, match="SHA-256"):
        tiny_lm()
    module._stored.cache_clear()


def test_dtype_and_independence() -> None:
    with jax.enable_x64(True):
        model = tiny_lm(dtype=np.float64)
        assert model.params["norm"].dtype == np.float64
    model.card["parameters"] = 0
    assert tiny_lm().card == json.loads(module.CARD.read_text())
    with pytest.raises(TypeError, match="dtype"):
        tiny_lm(dtype=np.int32)
