"""The training loop against the closed form of its first steps, and its promises."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algokit.checks import AlgokitWarning
from algokit.nn.models import GPTConfig, gpt, init_gpt
from algokit.nn.training import (
    as_key,
    bits_per_token,
    cross_entropy,
    minibatches,
    next_token_loss,
    scan_steps,
    train,
    windows,
)

TINY = GPTConfig(vocab_size=11, context_length=8, d_model=8, n_layers=1, n_heads=2)
TEXT = np.random.default_rng(0).integers(0, 11, 50)


def square(params: Any, batch: Any) -> Any:
    return ((params["w"] - batch) ** 2).mean()


START = {"w": jnp.zeros(3)}
DATA = minibatches(np.full((8, 3), 2.0), batch_size=4)
SGD = optax.sgd(0.3)
EXAMPLES = {
    "as_key": dict(rng=0),
    "windows": dict(tokens=TEXT, batch_size=2, length=5),
    "minibatches": dict(data=np.ones((4, 2)), batch_size=2),
    "cross_entropy": dict(logits=np.zeros((2, 3)), targets=np.array([0, 2]), mask=np.array([1.0, 0.0])),
    "next_token_loss": dict(config=TINY),
    "bits_per_token": dict(params=init_gpt(TINY, rng=0), tokens=TEXT, config=TINY, batch_size=3),
    "scan_steps": dict(
        loss=square, params=START, state=SGD.init(START), batches=DATA, optimizer=SGD, key=as_key(0), steps=2
    ),
    "train": dict(loss=square, params=START, batches=DATA, optimizer=SGD, steps=2, rng=0, every=1, progress=False),
}
ACCEPTS = {"cross_entropy.logits": {"inf"}, "cross_entropy.mask": {"inf"}}


def test_steps_follow_the_closed_form() -> None:
    """Gradient 2 (w - 2) / 3 in each of three coordinates: w - 2 shrinks by 1 - 0.2 a step."""
    result = train(square, START, DATA, SGD, steps=10, rng=0, every=3)
    np.testing.assert_allclose(result.params["w"], 2 - 2 * 0.8**10, rtol=1e-6)
    np.testing.assert_allclose(result.loss, 4 * 0.64 ** np.arange(10), rtol=1e-5)
    assert (START["w"] == 0).all()


def test_the_chunks_see_different_batches_and_the_seed_fixes_them() -> None:
    batches = minibatches(np.arange(1000.0)[:, None] * np.ones(3), batch_size=2)
    slow = optax.sgd(0.0)
    losses = [train(square, START, batches, slow, steps=12, rng=rng, every=4).loss for rng in (0, 0, 1)]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert len(np.unique(losses[0])) == 12 and (losses[0] != losses[2]).all()


def test_scan_over_seeds_is_a_loop_over_seeds() -> None:
    batches = minibatches(np.arange(30.0)[:, None] * np.ones(3), batch_size=2)
    optimizer = optax.adam(0.1)

    def run(key: Any) -> Any:
        return scan_steps(square, START, optimizer.init(START), batches, optimizer, key, 5)[2]

    keys = jax.random.split(as_key(0), 3)
    np.testing.assert_allclose(jax.vmap(run)(keys), [run(k) for k in keys], rtol=1e-5)


def test_early_stop_returns_the_best() -> None:
    scores = iter([5.0, 3.0, 4.0, 3.5, 9.0, 9.0])
    seen = []

    def evaluate(params: Any) -> float:
        seen.append(np.asarray(params["w"]))
        return next(scores)

    result = train(square, START, DATA, SGD, steps=100, rng=0, evaluate=evaluate, every=2, patience=2)
    assert result.evaluations.tolist() == [5.0, 3.0, 4.0, 3.5] and result.evaluated_at.tolist() == [0, 2, 4, 6]
    np.testing.assert_array_equal(result.params["w"], seen[1])
    assert len(result.loss) == 6


def test_training_that_diverges_stops_with_a_warning() -> None:
    with pytest.warns(AlgokitWarning, match="not finite"):
        result = train(square, START, DATA, optax.sgd(1e20), steps=100, every=10)
    assert len(result.loss) < 100


def test_windows_are_windows_of_the_text() -> None:
    batch = np.asarray(windows(np.arange(40), batch_size=200, length=5)(as_key(0)))
    assert (np.diff(batch, axis=1) == 1).all() and batch.min() == 0 and batch.max() == 39


def test_minibatches_stay_aligned() -> None:
    x, y = minibatches((np.arange(20) * 2, np.arange(20)), batch_size=50)(as_key(1))
    np.testing.assert_array_equal(x, 2 * y)
    assert len(np.unique(y)) > 10
    with pytest.raises(ValueError, match="one length"):
        minibatches((np.ones(3), np.ones(4)), batch_size=2)


def test_cross_entropy_by_hand() -> None:
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    assert abs(float(cross_entropy(logits, np.array([0, 1]))) + np.log([0.5, 0.8]).mean()) < 1e-6
    assert abs(float(cross_entropy(logits, np.array([0, 1]), mask=np.array([0, 1]))) + np.log(0.8)) < 1e-6
    with pytest.raises(ValueError, match="targets"):
        cross_entropy(logits, np.array([0]))


def test_masked_loss_counts_the_answers_only() -> None:
    params = init_gpt(TINY, rng=0)
    tokens, mask = TEXT[:12].reshape(2, 6), np.zeros((2, 6), bool)
    mask[:, -1] = True
    logits = gpt(params, tokens[:, :-1], TINY)
    expected = cross_entropy(logits[:, -1], tokens[:, -1])
    np.testing.assert_allclose(next_token_loss(TINY)(params, (tokens, mask)), expected, rtol=1e-6)


@pytest.mark.parametrize("length", [2, 9, 23])
def test_bits_per_token_scores_each_token_once(length: int) -> None:
    """Against one forward per token, each with the context that the window gives it."""
    params, text = init_gpt(TINY, rng=1), TEXT[:length]
    context = min(8, length - 1)
    starts = [*range(0, length - 1 - context, 4), length - 1 - context]
    bits, scored = [], 0
    for start in starts:
        window = text[start : start + context + 1]
        logp = np.asarray(jax.nn.log_softmax(gpt(params, window[:-1], TINY)), dtype=np.float64)
        row = [-logp[i, window[i + 1]] / np.log(2) for i in range(context)]
        bits += row[scored - start :]
        scored = start + context
    assert len(bits) == length - 1
    assert abs(bits_per_token(params, text, TINY, batch_size=3) - np.mean(bits)) < 1e-5


def test_a_small_gpt_learns() -> None:
    text = np.tile([1, 2, 3, 4, 5], 40)
    loss = next_token_loss(TINY)
    result = train(
        loss, init_gpt(TINY, rng=0), windows(text, batch_size=8, length=9), optax.adam(1e-2), steps=150, rng=0
    )
    assert result.loss[-1] < 0.1 < 2 < result.loss[0]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(patience=2), ValueError, "patience"),
        (dict(loss=3), TypeError, "loss"),
        (dict(batches=3), TypeError, "batches"),
        (dict(optimizer=3), TypeError, "optimizer"),
        (dict(evaluate=3), TypeError, "evaluate"),
        (dict(steps=0), ValueError, "steps"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    good = dict(loss=square, params=START, batches=DATA, optimizer=SGD, steps=2)
    with pytest.raises(error, match=words):
        train(**{**good, **changes})
