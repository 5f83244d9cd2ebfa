"""Race of Swivel's training against the same algorithm in NumPy and in PyTorch, at equal loss after every epoch.

    make bench PART=matrices SLUG=swivel

All three start from the same vectors, visit the same shards in the same order and take the same Adagrad steps. The
PyTorch version is what one would write there: products, whole-array losses, autograd, and ``torch.optim.Adagrad``
for each block of rows and of columns. On small shards the peers, too, run on one thread: with more they are slower.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.special import expit
from threadpoolctl import threadpool_limits

from algokit.matrices.swivel import Swivel, shard_indices
from algokit.races import Contestant, Limit, Race, matmul_rate, race, write_results

AGREEMENT = "loss of every epoch equal to 1e-3, relative"


class Problem(NamedTuple):
    """Counts and settings."""

    X: sp.csr_array
    d: int
    n_shards: int
    n_epochs: int
    rate: float


def problem(n: int, pairs: int, d: int, n_shards: int, n_epochs: int) -> Problem:
    """Pairs of items whose frequencies follow Zipf's law."""
    rng = np.random.default_rng(0)
    z = 1 / np.arange(1, n + 1)
    i, j = rng.choice(n, (2, pairs), p=z / z.sum())
    X = sp.csr_array(sp.coo_array((np.ones(pairs), (i, j)), shape=(n, n)))
    return Problem(X + X.T + sp.eye_array(n, format="csr"), d, n_shards, n_epochs, 0.1)


def start(p: Problem) -> tuple[np.random.Generator, np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Generator after drawing the vectors (n, d), and the shards."""
    rng, n = np.random.default_rng(0), p.X.shape[0]
    W, C = (rng.normal(0, p.d**-0.5, (n, p.d)).astype(np.float32) for _ in range(2))
    shards = shard_indices(n, p.n_shards)
    return rng, W, C, [(r, c) for r in shards for c in shards]


def ours(p: Problem) -> np.ndarray:
    """algokit."""
    size = -(-p.X.shape[0] // p.n_shards)
    return Swivel(p.d, n_epochs=p.n_epochs, learning_rate=p.rate, shard_size=size, rng=0).fit(p.X).loss_history_


def log_sums(p: Problem) -> tuple[np.ndarray, float]:
    """Logarithms of the sums, which are those of rows and of columns, and of the total."""
    return np.log(p.X.sum(axis=1)).astype(np.float32), float(np.log(p.X.sum()))


def threads(p: Problem) -> int:
    """Threads that serve the peers best."""
    return 1 if p.d < 50 else len(os.sched_getaffinity(0))


def numpy_reference(p: Problem) -> np.ndarray:
    """Plain NumPy, in single precision, one dense shard at a time."""
    with threadpool_limits(threads(p)):
        return numpy_epochs(p)


def numpy_epochs(p: Problem) -> np.ndarray:
    """The epochs of :func:`numpy_reference`."""
    rng, W, C, places = start(p)
    A, B = np.full_like(W, 0.1), np.full_like(C, 0.1)
    logs, total = log_sums(p)
    history = []
    for _ in range(p.n_epochs):
        loss = 0.0
        for k in rng.permutation(len(places)):
            r, c = places[k]
            x = p.X[r][:, c].toarray().astype(np.float32)
            Wa, Cb = W[r], C[c]
            E = Wa @ Cb.T - (np.log(np.where(x > 0, x, 1)) + np.float32(total) - logs[r][:, None] - logs[c])
            f = np.float32(0.1) + np.float32(0.25) * np.sqrt(x)
            loss += np.where(x > 0, np.float32(0.5) * f * E * E, np.logaddexp(0, E)).sum(dtype=np.float64)
            G = np.where(x > 0, f * E, expit(E)) * np.float32(x.size**-0.5)
            for V, S, index, g in ((W, A, r, G @ Cb), (C, B, c, G.T @ Wa)):
                S[index] += g * g
                V[index] -= np.float32(p.rate) * g / np.sqrt(S[index])
        history.append(loss)
    return np.array(history)


def pytorch(p: Problem) -> np.ndarray:
    """PyTorch with autograd and its own Adagrad, one optimiser per block of rows and of columns."""
    torch.set_num_threads(threads(p))
    rng, W, C, places = start(p)
    logs, total = log_sums(p)
    blocks = shard_indices(p.X.shape[0], p.n_shards)
    vectors = [[torch.tensor(V[b], requires_grad=True) for b in blocks] for V in (W, C)]
    steps = [
        [torch.optim.Adagrad([v], lr=p.rate, initial_accumulator_value=0.1, eps=0.0) for v in side] for side in vectors
    ]
    history = []
    for _ in range(p.n_epochs):
        loss_sum = 0.0
        for k in rng.permutation(len(places)):
            a, b = divmod(int(k), p.n_shards)
            r, c = places[k]
            x = torch.from_numpy(p.X[r][:, c].toarray().astype(np.float32))
            seen = x > 0
            target = torch.log(torch.where(seen, x, 1.0)) + total - torch.from_numpy(logs[r])[:, None]
            E = vectors[0][a] @ vectors[1][b].T - (target - torch.from_numpy(logs[c]))
            cost = torch.where(seen, 0.5 * (0.1 + 0.25 * torch.sqrt(x)) * E * E, torch.nn.functional.softplus(E))
            loss = cost.sum()
            for optimiser in (steps[0][a], steps[1][b]):
                optimiser.zero_grad()
            (loss * x.numel() ** -0.5).backward()
            for optimiser in (steps[0][a], steps[1][b]):
                optimiser.step()
            loss_sum += float(loss.detach())
        history.append(loss_sum)
    return np.array(history)


def agree(a: np.ndarray, b: np.ndarray) -> bool:
    """Loss of every epoch equal to 1e-3, relative."""
    return bool(np.allclose(a, b, rtol=1e-3))


def main() -> list[Race]:
    """The chapter's size, and one full shard of common size."""
    sizes: list[tuple[str, Any]] = [
        ("600 items, d = 8, 2 x 2 shards, 20 epochs", problem(600, 200_000, 8, 2, 20)),
        ("3,000 items, d = 100, one shard, 2 epochs", problem(3000, 1_000_000, 100, 1, 2)),
    ]
    rate = matmul_rate()
    races = []
    for name, data in sizes:
        flops = 6.0 * data.X.shape[0] ** 2 * data.d * data.n_epochs

        def limit(seconds: float, flops: float = flops) -> Limit:
            return Limit("flops", flops / seconds / 1e9 / rate, "measured float32 matrix product")

        races.append(
            race(
                name,
                data=lambda data=data: data,
                ours=Contestant("algokit Swivel", ours),
                peers=[Contestant("NumPy, plain", numpy_reference, "numpy"), Contestant("PyTorch", pytorch, "torch")],
                agree=agree,
                agreement=AGREEMENT,
                runs=3 if data.d > 50 else 7,
                limit=limit,
                note="Counting the three matrix products only; at d = 8 the logarithms and exponentials of the cells "
                "take longer than the products."
                if data.d < 50
                else "",
            )
        )
    return races


if __name__ == "__main__":
    write_results("matrices", "swivel", main(), folder=Path(__file__).parents[1] / "results")
