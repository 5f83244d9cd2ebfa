"""Race of one online-PCA step against the SVD that GaLore takes at each refresh, and of whole training steps.

    make bench PART=training SLUG=online_subspace_descent

All run on one thread of BLAS. A refresh is compared with one step: GaLore takes one in 200 steps, so a ratio below 200
means that its time per step is smaller on average; what it cannot avoid is the pause. The answers compared are
subspaces of a gradient with a clear leading part.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from algokit.nn.models import init_mlp, mlp
from algokit.races import Contestant, Race, race, write_results
from algokit.training.online_subspace_descent import online_subspace_adamw, pca_loss, subspace_overlap

RANK = 32
WIDTH = 1024


@lru_cache
def gradient(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A gradient of order n in single precision, leading part 20 times the noise, and its subspace."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(n, RANK)))[0] for _ in range(2))
    G = 20 * U @ V.T + rng.normal(size=(n, n)) / np.sqrt(n)
    P = scipy.linalg.svd(G)[0][:, :RANK]
    return G.astype(np.float32), np.ascontiguousarray(P, dtype=np.float32)


def ours(data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """One gradient step on the PCA loss, projected gradient included."""
    G, P = data
    return P - 0.1 * pca_loss(P, G).grad


def svd(data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """LAPACK's divide and conquer."""
    return scipy.linalg.svd(data[0], full_matrices=False)[0][:, :RANK]


def randomised(data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Randomised SVD with scikit-learn's defaults."""
    return randomized_svd(data[0], RANK, random_state=0)[0]


def same_subspace(a: np.ndarray, b: np.ndarray) -> bool:
    """Overlap above 0.999."""
    return subspace_overlap(a.astype(float), b.astype(float)) > 0.999


def training_step(optimizer: Any) -> Any:
    """``run(data)``: 10 compiled steps of a wide network from the same start; its parameters afterwards."""

    def loss(params: Any, x: Any) -> Any:
        return ((mlp(params, x) - x) ** 2).mean()

    @jax.jit
    def steps(params: Any, state: Any, x: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, x)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, state), length=10)[1]

    params = init_mlp([WIDTH, WIDTH, WIDTH], rng=0)
    state = optimizer.init(params)
    state = state._replace(count=state.count + 1) if hasattr(state, "P") else state  # past the first step's SVD
    return lambda x: np.asarray(steps(params, state, x))


def main() -> list[Race]:
    """Refreshes of two sizes, and ten training steps."""
    races = [
        race(
            f"one refresh, order {n:,}, rank {RANK}",
            data=lambda n=n: gradient(n),  # type: ignore[misc]
            ours=Contestant("algokit pca_loss", ours),
            peers=[
                Contestant("SciPy svd", svd, "scipy"),
                Contestant("scikit-learn randomized_svd", randomised, "scikit-learn"),
            ],
            agree=same_subspace,
            agreement="same subspace, overlap above 0.999",
            runs=runs,
            note="One step of ours against one refresh of GaLore's; a refresh serves 200 steps, a step serves one.",
        )
        for n, runs in ((512, 7), (1024, 3))
    ]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, WIDTH)), jnp.float32)
    adam = optax.adamw(1e-4, weight_decay=0.0)
    low = dict(rank=RANK, lr=1e-4, start="random")
    races.append(
        race(
            f"ten training steps, two matrices of order {WIDTH:,}, batch 256, rank {RANK}",
            data=lambda: x,
            ours=Contestant("online PCA", training_step(online_subspace_adamw(**low))),  # type: ignore[arg-type]
            peers=[
                Contestant("optax adamw, full state", training_step(adam), "optax"),
                Contestant(
                    "the same subspace, fixed",
                    training_step(online_subspace_adamw(update="fixed", **low)),  # type: ignore[arg-type]
                ),
            ],
            agree=lambda a, b: abs(a[0] - b[0]) <= 1e-5 * abs(a[0]),
            agreement="same loss at the start, to 1e-5",
            runs=5,
            note="The fixed subspace does less work: its ratio below 1 is the price of learning the subspace.",
        )
    )
    return races


if __name__ == "__main__":
    with threadpool_limits(1):
        results = main()
    write_results("training", "online_subspace_descent", results, folder=Path(__file__).parents[1] / "results")
