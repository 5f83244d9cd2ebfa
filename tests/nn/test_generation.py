"""Generation with the cache against generation without it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algokit.nn.generation import generate
from algokit.nn.models import GPTConfig, gpt, init_gpt
from algokit.nn.trees import map_paths

TINY = GPTConfig(vocab_size=11, context_length=12, d_model=8, n_layers=2, n_heads=2)
PARAMS = map_paths(lambda _, x: 20 * x if x.ndim == 2 else x, init_gpt(TINY, rng=0))  # far from uniform
PROMPT = np.array([[1, 2, 3], [4, 5, 6]])
EXAMPLES = {
    "generate": dict(params=PARAMS, prompt=PROMPT, config=TINY, n_tokens=2, temperature=1.0, logits_fn=None, rng=0)
}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_greedy_is_the_argmax_without_a_cache(positions: str) -> None:
    config = GPTConfig(vocab_size=11, context_length=12, d_model=8, n_layers=2, n_heads=2, positions=positions)
    params = map_paths(lambda _, x: 20 * x if x.ndim == 2 else x, init_gpt(config, rng=0))
    text, forward = np.pad(PROMPT, ((0, 0), (0, 9))), jax.jit(gpt, static_argnames="config")
    for t in range(3, 12):  # what stands after t is not seen at t - 1
        text[:, t] = np.asarray(forward(params, text, config))[:, t - 1].argmax(-1)
    new = np.asarray(generate(params, PROMPT, config, n_tokens=9, temperature=0))
    np.testing.assert_array_equal(new, text[:, 3:])
    assert len(np.unique(new)) > 1


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_samples_have_the_model_s_distribution(temperature: float) -> None:
    many = np.repeat(PROMPT[:1], 4000, axis=0)
    tokens = np.asarray(generate(PARAMS, many, TINY, n_tokens=2, temperature=temperature, rng=0))
    expected = jax.nn.softmax(gpt(PARAMS, PROMPT[0], TINY)[-1] / temperature)
    np.testing.assert_allclose(np.bincount(tokens[:, 0], minlength=11) / 4000, expected, atol=5 * 0.5 / 4000**0.5)
    first = int(np.bincount(tokens[:, 0]).argmax())
    rows = tokens[tokens[:, 0] == first]  # the second token, given the first
    second = jax.nn.softmax(gpt(PARAMS, np.array([*PROMPT[0], first]), TINY)[-1] / temperature)
    np.testing.assert_allclose(np.bincount(rows[:, 1], minlength=11) / len(rows), second, atol=2.5 / len(rows) ** 0.5)


def forbid_three(logits: Any) -> Any:
    return logits.at[:, 3].set(-jnp.inf)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_logits_fn_forbids(temperature: float) -> None:
    many = np.repeat(PROMPT, 200, axis=0)
    free = generate(PARAMS, many, TINY, n_tokens=9, temperature=2.0, rng=0)
    tokens = generate(PARAMS, many, TINY, n_tokens=9, temperature=temperature, logits_fn=forbid_three, rng=0)
    assert (np.asarray(free) == 3).any() and not (np.asarray(tokens) == 3).any()


def test_a_single_prompt_gives_a_single_answer() -> None:
    one = generate(PARAMS, PROMPT[1], TINY, n_tokens=2, temperature=0)
    assert one.shape == (2,)
    np.testing.assert_array_equal(one, generate(PARAMS, PROMPT, TINY, n_tokens=2, temperature=0)[1])


def test_seeds() -> None:
    a, b, c = (np.asarray(generate(PARAMS, PROMPT, TINY, n_tokens=9, temperature=3.0, rng=r)) for r in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="n_tokens must be at most 9"):
        generate(PARAMS, PROMPT, TINY, n_tokens=10)
    with pytest.raises(ValueError, match="temperature"):
        generate(PARAMS, PROMPT, TINY, n_tokens=1, temperature=-1)
    with pytest.raises(TypeError, match="logits_fn"):
        generate(PARAMS, PROMPT, TINY, n_tokens=1, logits_fn=3)  # type: ignore[arg-type]
