"""Train the language model that ships with the book, and write it: algokit/nn/tiny_lm.npz and tiny_lm.json.

    python -m tools.train_tiny_lm [--steps 4000]

It took 20 minutes on two cores that other work shared; on a GPU give it more steps. The text is that of the running
Python, and sums round differently on other machines, so another run gives a model of the same quality, not the same
bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from algokit.nn.models import GPTConfig, gpt, init_gpt
from algokit.nn.ngram import fit_ngram
from algokit.nn.text import language_reference
from algokit.nn.tiny_lm import CARD, FILE
from algokit.nn.training import bits_per_token, cross_entropy, train, windows
from algokit.nn.trees import flatten, map_paths

CONFIG = GPTConfig(context_length=256, d_model=128, n_layers=4, n_heads=4, d_ff=384, activation="swiglu")
BATCH_SIZE = 8
DROPOUT = 0.2


def dropout(key: Any) -> Any:
    """A tap that drops channels of what enters the layers: the same ones at every position of a sequence."""
    calls = iter(range(1000))

    def tap(path: str, x: Any) -> Any:
        if not path.endswith(("query", "up", "output", "down", "head")):
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(key, next(calls)), 1 - DROPOUT, (x.shape[0], 1, x.shape[2]))
        return jnp.where(keep, x / (1 - DROPOUT), 0)

    return tap


def loss(params: Any, batch: Any) -> Any:
    """Cross-entropy under dropout."""
    tokens, key = batch
    return cross_entropy(gpt(params, tokens[:, :-1], CONFIG, tap=dropout(key)), tokens[:, 1:])


def optimizer(steps: int) -> Any:
    """Muon for the matrices of the blocks, AdamW for the rest; warm-up, then a cosine to a twentieth of the peak."""

    def schedule(peak: float) -> Any:
        return optax.warmup_cosine_decay_schedule(0, peak, min(100, steps // 10), steps, peak / 20)

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim == 2, params)

    def labels(params: Any) -> Any:
        return map_paths(lambda path, x: "muon" if path.startswith("blocks") and x.ndim == 2 else "adamw", params)

    rules = {
        "muon": optax.contrib.muon(schedule(0.02), weight_decay=0.1),
        "adamw": optax.adamw(schedule(3e-3), b2=0.98, weight_decay=0.1, mask=decays),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(rules, labels))


def main() -> int:
    """Train, score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    steps = parser.parse_args().steps
    corpus = language_reference()
    sample = windows(corpus.train, batch_size=BATCH_SIZE, length=CONFIG.context_length + 1)
    start = time.perf_counter()

    def evaluate(params: Any) -> float:
        bits = bits_per_token(params, corpus.validation, CONFIG)
        print(f"{time.perf_counter() - start:6.0f} s   validation {bits:.4f} bits per byte", flush=True)
        return bits

    result = train(
        loss,
        init_gpt(CONFIG, rng=0),
        jax.tree_util.Partial(lambda sample, key: (sample(key), jax.random.fold_in(key, 1)), sample),
        optimizer(steps),
        steps=steps,
        rng=0,
        evaluate=evaluate,
        every=max(1, steps // 10),
        progress=True,
    )
    flat = {path: np.asarray(x, dtype=np.float16) for path, x in flatten(result.params).items()}
    np.savez_compressed(FILE, **flat)  # type: ignore[arg-type]
    stored = map_paths(lambda _, x: jnp.asarray(np.asarray(x, np.float16), jnp.float32), result.params)
    grams = {n: fit_ngram(corpus.train, order=n).bits_per_token(corpus.validation) for n in range(3, 9)}
    best = min(grams, key=grams.__getitem__)
    card = {
        "parameters": sum(x.size for x in flat.values()),
        "bits_per_byte": round(bits_per_token(stored, corpus.validation, CONFIG), 4),
        "training_bits_per_byte": round(bits_per_token(stored, corpus.train, CONFIG), 4),
        "five_gram_bits_per_byte": round(grams[5], 4),
        "best_n_gram": best,
        "best_n_gram_bits_per_byte": round(grams[best], 4),
        "steps": steps,
        "tokens_seen": steps * BATCH_SIZE * CONFIG.context_length,
        "training_bytes": len(corpus.train),
        "validation_bytes": len(corpus.validation),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "device": jax.devices()[0].device_kind,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "licence": "MIT (the model); text: " + corpus.licence,
        "source": corpus.source,
        "config": asdict(CONFIG),
        "sha256": hashlib.sha256(FILE.read_bytes()).hexdigest(),
    }
    CARD.write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps({k: v for k, v in card.items() if "bits" in k}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
