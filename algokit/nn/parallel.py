"""Data-parallel training: one step on several devices, each with its share of the batch.

Parameters and optimiser state lie on every device, the batch is cut along its first axis; from these placements
``jit`` derives the rest, which is one sum of the gradients over the devices. Page: book/cluster.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from algokit._lazy import require
from algokit.nn.trees import Tree

jax = require("jax", extra="neural")
optax = require("optax", extra="neural")

__all__ = ["data_parallel_step"]

Array = Any
Step = Callable[[Tree, Any, Any], tuple[Tree, Any, Array]]


def data_parallel_step(
    loss: Callable[[Tree, Any], Array], optimizer: Any, *, devices: Sequence[Any] | None = None
) -> Step:
    """An optimiser step whose batch is divided among devices: the step of one device, to rounding.

    Parameters
    ----------
    loss : callable
        ``loss(params, batch) -> scalar``, a mean over the examples of the batch.
    optimizer : optax.GradientTransformation
        The optimiser.
    devices : sequence of jax.Device, optional
        Where to compute. None: all of :func:`jax.devices`.

    Returns
    -------
    callable
        ``step(params, state, batch) -> (params, state, loss)``, compiled when first called. ``state`` comes from
        ``optimizer.init(params)``; ``batch`` is a pytree of arrays with one first axis, divisible by the number of
        devices. What comes back lies on all devices, ready for the next step. An array of random keys, one for each
        example, may be part of the batch.

    Raises
    ------
    TypeError
        If ``loss`` is not callable, ``optimizer`` is not one, or ``devices`` holds something else.
    ValueError
        If there are no devices; from ``step``, if the batch cannot be divided.

    Examples
    --------
    >>> def loss(params, batch):
    ...     return ((params["w"] - batch) ** 2).mean()
    >>> optimizer = optax.sgd(0.25)
    >>> params = {"w": np.zeros(())}
    >>> step = data_parallel_step(loss, optimizer, devices=jax.devices()[:1])
    >>> params, state, value = step(params, optimizer.init(params), np.full(8, 3.0))
    >>> params["w"].item(), value.item()
    (1.5, 9.0)
    """
    if not callable(loss):
        raise TypeError(f"loss must be callable, got {type(loss).__name__}")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be an optax GradientTransformation, got {type(optimizer).__name__}")
    mesh = _mesh(devices)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))

    def advance(params: Tree, state: Any, batch: Any) -> tuple[Tree, Any, Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    compiled = jax.jit(advance, in_shardings=(everywhere, everywhere, divided), out_shardings=everywhere)

    def step(params: Tree, state: Any, batch: Any) -> tuple[Tree, Any, Array]:
        shapes = [getattr(x, "shape", ()) for x in jax.tree.leaves(batch)]
        sizes = {shape[0] if shape else None for shape in shapes}
        if len(sizes) != 1 or None in sizes or sizes == {0}:
            raise ValueError(f"batch must hold arrays with one first axis, got shapes {shapes}")
        (size,) = sizes
        if size % mesh.size:
            raise ValueError(f"batch must be divisible by the {mesh.size} devices, got {size} examples")
        params, state = jax.device_put((params, state), everywhere)
        return compiled(params, state, jax.device_put(batch, divided))

    return step


def _mesh(devices: Any) -> Any:
    """The devices in a row, along an axis called batch."""
    if devices is None:
        devices = jax.devices()
    if not isinstance(devices, (list, tuple)) or not all(isinstance(d, jax.Device) for d in devices):
        raise TypeError(f"devices must be a list of jax.Device, got {type(devices).__name__} {devices!r:.60}")
    if not devices:
        raise ValueError("devices must hold at least one device")
    return jax.sharding.Mesh(np.array(devices), ("batch",))
