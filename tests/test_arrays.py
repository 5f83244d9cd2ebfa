"""Namespace, conversion and kernel choice: every kind of array comes back as the kind that went in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from algokit.arrays import array_namespace, from_numpy, is_array, kind_of, pick_kernel, to_numpy

EXAMPLES: dict = {}


class Pair(NamedTuple):
    total: float
    doubled: np.ndarray


def _cpu(x: np.ndarray, factor: float = 2.0) -> np.ndarray:
    assert isinstance(x, np.ndarray)
    return factor * x


def test_round_trip_keeps_kind_values_and_dtype(xp_array):
    x = xp_array(np.arange(6.0).reshape(2, 3))
    host = to_numpy(x)
    assert isinstance(host, np.ndarray) and host.dtype == np.float64
    back = from_numpy(host, like=x)
    assert kind_of(back) == xp_array.kind
    np.testing.assert_array_equal(to_numpy(back), np.arange(6.0).reshape(2, 3))


def test_cpu_kernel_serves_every_kind_on_the_host(xp_array):
    if xp_array.kind == "cupy":
        pytest.skip("host arrays only")
    x = xp_array(np.array([1.0, 2.0]))
    y = pick_kernel(x, cpu=_cpu)(x, factor=3.0)
    assert kind_of(y) == xp_array.kind
    np.testing.assert_array_equal(to_numpy(y), [3.0, 6.0])


def test_tuples_and_named_tuples_of_results_are_handed_back(xp_array):
    if xp_array.kind == "cupy":
        pytest.skip("host arrays only")
    x = xp_array(np.array([1.0, 2.0]))
    result = pick_kernel(x, cpu=lambda a: Pair(float(a.sum()), 2 * a))(x)
    assert isinstance(result, Pair) and result.total == 3.0 and kind_of(result.doubled) == xp_array.kind
    plain = pick_kernel(x, cpu=lambda a: (float(a.sum()), 2 * a))(x)
    assert type(plain) is tuple and kind_of(plain[1]) == xp_array.kind


def test_device_array_without_gpu_kernel_is_refused():
    cupy = pytest.importorskip("cupy")
    with pytest.raises(TypeError, match="no GPU kernel"):
        pick_kernel(cupy.ones(3), cpu=_cpu)


@pytest.mark.gpu
def test_gpu_kernel_serves_cupy_and_torch_on_the_device():
    cupy = pytest.importorskip("cupy")
    x = cupy.arange(3.0)
    assert pick_kernel(x, cpu=_cpu, gpu=lambda a: a + 1)(x).get().tolist() == [1, 2, 3]
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        t = torch.arange(3.0, device="cuda")
        y = pick_kernel(t, cpu=_cpu, gpu=lambda a: a + 1)(t)
        assert kind_of(y) == "torch" and y.is_cuda and y.tolist() == [1, 2, 3]


def test_kinds_of_what_is_no_array():
    assert kind_of([1.0]) is None and not is_array("text") and is_array(np.float64(1))


def test_mixed_kinds_have_no_common_namespace():
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(TypeError):
        array_namespace(np.ones(2), strict.ones(2))
