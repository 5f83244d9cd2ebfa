"""BitMoD: tables, rounding, search and machine against a plain version, closed forms, and the types of ml_dtypes."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algokit.arrays import kind_of, to_numpy
from algokit.compression import mixture_of_datatypes as module
from algokit.compression.mixture_of_datatypes import (
    ANT3,
    ANT4,
    BITMOD3,
    BITMOD4,
    DATATYPES,
    bit_serial_cost,
    bit_serial_matmul,
    bit_serial_terms,
    dequantize,
    effective_bits,
    pack_codes,
    pack_mixture,
    packed_matmul,
    quantize_int,
    quantize_mixture,
    quantize_mx,
    quantize_to_datatype,
    unpack_codes,
)

W = np.random.default_rng(0).standard_normal((3, 64))
Q = quantize_mixture(W, group=32, scale_bits=8)

EXAMPLES = {
    "quantize_to_datatype": dict(w=W[:, :8], datatype="fp3", scale=np.ones((3, 1))),
    "quantize_int": dict(w=W, bits=4, group=32, symmetric=True),
    "quantize_mx": dict(w=W, datatype="fp4", group=32),
    "quantize_mixture": dict(w=W, bits=3, group=32, datatypes=BITMOD3, scale_bits=8),
    "dequantize": dict(q=Q),
    "effective_bits": dict(q=Q),
    "bit_serial_terms": dict(level=6),
    "bit_serial_matmul": dict(q=Q, x=np.ones((2, 64))),
    "bit_serial_cost": dict(q=Q, lanes=4, pes=2),
    "pack_mixture": dict(q=Q),
    "packed_matmul": dict(p=pack_mixture(Q), x=np.ones((2, 64))),
    "pack_codes": dict(codes=np.array([[1, 2, 3]]), bits=3),
    "unpack_codes": dict(packed=np.array([[33, 3]], np.uint8), bits=4, size=3),
}


def nearest(w, levels):
    """Straight from the definition: step from the largest magnitude, nearest level, ties to the lower one."""
    step = np.clip(np.abs(w).max() / np.abs(levels).max(), 1e-5, 1e4)
    codes = np.array([min(range(len(levels)), key=lambda j: (abs(v / step - levels[j]), j)) for v in w])
    return codes, step


def plain_mixture(w, names, group):
    """The search, group by group in double precision: weights, format of each group, margin to the second best."""
    out, types, margins = np.empty(w.shape), [], []
    for k, g in product(range(w.shape[0]), range(w.shape[1] // group)):
        part, tried = w[k, g * group : (g + 1) * group], []
        for name in names:
            levels = np.array(DATATYPES[name])
            codes, step = nearest(part, levels)
            tried.append((np.mean((part - step * levels[codes]) ** 2), step * levels[codes]))
        errors = [e for e, _ in tried]
        best = int(np.argmin(errors))
        types.append(best)
        margins.append(np.partition(errors, 1)[1] - errors[best] if len(errors) > 1 else np.inf)
        out[k, g * group : (g + 1) * group] = tried[best][1]
    return out, np.reshape(types, (w.shape[0], -1)), np.reshape(margins, (w.shape[0], -1))


# --- formats ----------------------------------------------------------------------------------------------------------


def test_formats_fill_their_codes():
    for name, levels in DATATYPES.items():
        assert list(levels) == sorted(set(levels)) and 0.0 in levels
        bits = 3 if name in (*BITMOD3, "int3", "fp3") else 4
        assert len(levels) == (2**bits if "_e" in name else 2**bits - 1)
    for base, extra in (("fp3", BITMOD3), ("fp4", BITMOD4)):
        added = [set(DATATYPES[n]) - set(DATATYPES[base]) for n in extra]
        assert added == ([{3.0}, {-3.0}, {6.0}, {-6.0}] if base == "fp3" else [{10.0}, {-10.0}, {16.0}, {-16.0}])


def test_fp4_is_the_e2m1_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert sorted({2 * v for v in values}) == list(DATATYPES["fp4"])


def test_a_group_worked_by_hand():
    """max |w| = 6 at a step of 1 for EA+: 0.5 is a midpoint and goes down, 5 is one too (between 4 and 6)."""
    w = np.array([6.0, 0.5, 0.51, -0.5, 5.0, -6.0, 1.5, 3.01])
    codes, scale = quantize_to_datatype(w, "fp3_ea_pos")
    assert scale.tolist() == [1.0]
    assert np.array(DATATYPES["fp3_ea_pos"])[codes].tolist() == [6, 0, 1, -1, 4, -4, 1, 4]


@pytest.mark.parametrize("name", list(DATATYPES))
def test_rounding_is_to_the_nearest_level(name):
    rng = np.random.default_rng(1)
    for w in (rng.standard_normal(37), rng.integers(-40, 41, 37) / 8.0):
        codes, step = nearest(w, np.array(DATATYPES[name]))
        ours, scale = quantize_to_datatype(w, name)
        np.testing.assert_array_equal(ours, codes)
        assert scale[0] == step


def test_given_scales_are_used():
    codes, scale = quantize_to_datatype(np.array([[0.9, -7.0]]), "int3", scale=np.array([[0.5]]))
    assert scale.tolist() == [[0.5]] and np.array(DATATYPES["int3"])[codes].tolist() == [[2, -3]]


def test_integers_by_hand():
    w = np.array([[-3.0, 0.4, 1.6, 12.0]])
    np.testing.assert_allclose(quantize_int(w, 4, group=4, symmetric=False), [[-3, 0, 2, 12]])
    np.testing.assert_allclose(quantize_int(np.array([[-7.0, 2.5, 3.5, 0.2]]), 4, group=4), [[-7, 2, 4, 0]])


@given(st.integers(2, 8), st.booleans(), st.integers(0, 50))
def test_integer_error_is_at_most_half_a_step(bits, symmetric, seed):
    w = np.random.default_rng(seed).standard_normal((2, 32))
    out = quantize_int(w, bits, group=16, symmetric=symmetric)
    x = w.reshape(2, 2, 16)
    step = (
        np.abs(x).max(-1) / (2 ** (bits - 1) - 1) if symmetric else (x.max(-1) - x.min(-1)) / (2**bits - 1)
    )  # at the ends a zero point that was rounded costs another half step
    assert (np.abs(out - w).reshape(x.shape) <= (0.5 if symmetric else 1.0) * step[..., None] + 1e-12).all()


def test_mx_steps_are_the_given_power_of_two():
    rng = np.random.default_rng(2)
    w = rng.standard_normal((4, 64)) * 10.0 ** rng.integers(-3, 4, (4, 64))
    for name in ("fp4", "int4", "int3", "fp3"):
        levels = np.array(DATATYPES[name])
        out = quantize_mx(w, name)
        for k, g in product(range(4), range(2)):
            part = w[k, 32 * g : 32 * g + 32]
            step = 2.0 ** (np.frexp(np.abs(part).max())[1] - 1) * 2 / levels.max()
            best = np.abs(part[:, None] - step * levels).min(axis=1)
            np.testing.assert_allclose(np.abs(out[k, 32 * g : 32 * g + 32] - part), best, rtol=1e-9, atol=1e-12)
    edge = np.full((1, 32), np.nextafter(8.0, 0))  # its logarithm rounds to 3
    assert abs(quantize_mx(edge, "fp4")[0, 0] - 8.0) < 1e-9
    assert not quantize_mx(np.zeros((1, 32)), "fp4").any()


# --- the mixture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("bits", "names"),
    [(3, BITMOD3), (4, BITMOD4), (3, ANT3), (4, ANT4), (3, BITMOD3[:2]), (4, BITMOD4[2:]), (4, ("fp4",))],
)
def test_search_matches_the_plain_version(bits, names, dtype):
    w = np.random.default_rng(3).standard_t(4, (6, 96)).astype(dtype)
    q = quantize_mixture(w, bits=bits, group=24, datatypes=names)
    expected, types, margins = plain_mixture(w.astype(np.float64), names, 24)
    clear = (margins > 1e-6) | (margins == 0)  # nearly equal errors may be ordered either way in float32
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(q.types[clear], types[clear])
    off = np.abs(dequantize(q) - expected).reshape(6, 4, 24)[clear]
    assert (off > 1e-5).mean() < (
        0.01 if dtype == np.float32 else 1e-12
    )  # float32 may fall on the other side of a midpoint
    assert q.codes.dtype == np.uint8 and q.scales.dtype == dtype and q.bits == bits


weights = st.integers(0, 10_000).map(lambda s: np.random.default_rng(s).standard_t(3, (2, 32)))


@given(weights, st.sampled_from([3, 4]))
def test_the_mixture_is_never_worse_than_its_members(w, bits):
    names = BITMOD3 if bits == 3 else BITMOD4

    def error(names):
        off = dequantize(quantize_mixture(w, bits=bits, group=16, datatypes=names)) - w
        return (off**2).reshape(2, 2, 16).sum(-1)

    singles = np.stack([error((n,)) for n in names])
    np.testing.assert_allclose(error(names), singles.min(axis=0), rtol=1e-12)


@given(weights, st.sampled_from([3, 4]), st.integers(-6, 6))
def test_powers_of_two_pass_through_and_signs_swap_formats(w, bits, power):
    q = quantize_mixture(w, bits=bits, group=16)
    scaled = quantize_mixture(w * 2.0**power, bits=bits, group=16)
    np.testing.assert_array_equal(scaled.codes, q.codes)
    np.testing.assert_array_equal(scaled.types, q.types)
    np.testing.assert_allclose(scaled.scales, q.scales * 2.0**power)
    flipped = quantize_mixture(-w, bits=bits, group=16)
    same = np.abs(dequantize(q) - w).reshape(2, 2, 16) ** 2
    other = np.abs(dequantize(flipped) + w).reshape(2, 2, 16) ** 2
    np.testing.assert_allclose(other.sum(-1), same.sum(-1), rtol=1e-9)


@given(weights)
def test_quantising_twice_changes_nothing(w):
    q = quantize_mixture(w, bits=4, group=16)
    once = dequantize(q)
    codes = [
        quantize_to_datatype(once.reshape(2, 2, 16)[k, g], BITMOD4[q.types[k, g]], scale=q.scales[k, g : g + 1])[0]
        for k, g in product(range(2), range(2))
    ]
    np.testing.assert_array_equal(np.reshape(codes, (2, 32)), q.codes)


def test_ties_go_to_the_first_format_and_zeros_stay():
    q = quantize_mixture(np.zeros((2, 16)), group=8)
    assert not q.types.any() and not dequantize(q).any()
    np.testing.assert_allclose(q.scales, 1e-5)
    q = quantize_mixture(np.array([[4.0, 2.0, -1.0, 0.0]]), group=4)  # exact in both ER formats
    assert q.types.tolist() == [[0]]


def test_outlier_flattens_its_group_only():
    w = np.random.default_rng(4).standard_normal((1, 32))
    w[0, 3] = 1000.0
    out = dequantize(quantize_mixture(w, group=16))
    assert np.count_nonzero(out[0, :16]) == 1 and np.count_nonzero(out[0, 16:]) > 8
    assert out[0, 3] == pytest.approx(1000.0)


def test_large_errors_are_not_left_at_zero():
    """The official search starts from an error of 1,000 and leaves worse groups at zero; ours does not."""
    w = np.random.default_rng(5).standard_normal((1, 16)) * 1000
    out = dequantize(quantize_mixture(w, group=16))
    assert np.mean((out - w) ** 2) > 1000 and np.corrcoef(out[0], w[0])[0, 1] > 0.95


def test_float16_does_not_overflow():
    w = (np.random.default_rng(6).standard_normal((2, 64)) * 3000).astype(np.float16)  # squares exceed 65504
    q = quantize_mixture(w, bits=4, group=32)
    assert q.scales.dtype == np.float32
    np.testing.assert_array_equal(dequantize(q), dequantize(quantize_mixture(w.astype(np.float32), bits=4, group=32)))


def test_byte_scales_cost_little():
    w = np.random.default_rng(7).standard_normal((16, 512)) * np.geomspace(0.3, 3, 16)[:, None]
    plain = quantize_mixture(w, bits=4, group=64)
    byte = quantize_mixture(w, bits=4, group=64, scale_bits=8)
    np.testing.assert_array_equal(byte.scales, byte.row_scales * byte.scale_codes)
    assert byte.scale_codes.max() == 255 and byte.scale_codes.min() >= 1
    assert np.all(byte.row_scales.astype(np.float16) == byte.row_scales)
    np.testing.assert_allclose(byte.scales, plain.scales, rtol=0.5 / 60)
    errors = [np.mean((dequantize(q) - w) ** 2) for q in (plain, byte)]
    assert errors[1] < 1.01 * errors[0]
    halves = plain.scales.astype(np.float16).astype(np.float64)  # what effective_bits counts without scale_bits
    again = np.repeat(halves / plain.scales, 64, axis=1) * dequantize(plain)
    assert np.mean((again - w) ** 2) < 1.001 * errors[0]


def test_effective_bits():
    w = np.ones((2, 256))
    assert effective_bits(quantize_mixture(w, bits=4, group=128)) == 4 + 18 / 128
    assert effective_bits(quantize_mixture(w, bits=3, group=64, scale_bits=8)) == 3 + 10 / 64 + 16 / 256
    assert effective_bits(quantize_mixture(w, bits=4, group=128, datatypes=("fp4",))) == 4 + 16 / 128
    assert effective_bits(quantize_mixture(w, bits=4, group=128, datatypes=ANT4)) == 4 + 17 / 128


# --- the machine ------------------------------------------------------------------------------------------------------


@given(st.integers(-(2**20), 2**20))
def test_terms_add_up_and_are_few(level):
    terms = bit_serial_terms(level)
    assert sum((-1) ** s * 2**e for s, e in terms) == level
    assert [e for _, e in terms] == sorted({e for _, e in terms}, reverse=True)
    assert len(terms) <= -(-(abs(level).bit_length() + 1) // 2)


def test_no_signed_sum_is_shorter():
    powers = [s * 2**e for e in range(7) for s in (1, -1)]
    shortest = {0: 0}
    for count in (1, 2, 3, 4):
        for some in combinations(powers, count):
            shortest.setdefault(sum(some), count)
    for level in range(-64, 65):
        assert len(bit_serial_terms(level)) == shortest[level]


def test_every_level_needs_two_terms_at_most():
    assert max(len(bit_serial_terms(int(v))) for levels in DATATYPES.values() for v in levels) == 2
    assert bit_serial_terms(12) == ((0, 3), (0, 2)) and bit_serial_terms(-16) == ((1, 4),)


@pytest.mark.parametrize("scale_bits", [None, 8])
@pytest.mark.parametrize(("bits", "names"), [(3, None), (4, None), (4, ANT4), (3, ANT3)])
def test_machine_is_exact(bits, names, scale_bits):
    rng = np.random.default_rng(8)
    q = quantize_mixture(rng.standard_normal((5, 96)), bits=bits, group=24, datatypes=names, scale_bits=scale_bits)
    whole = rng.integers(-128, 128, (3, 96))
    half = rng.standard_normal((3, 96)).astype(np.float16)
    for x in (whole, half):
        expected = x.astype(np.float64) @ dequantize(q).T
        np.testing.assert_allclose(bit_serial_matmul(q, x), expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_array_equal(bit_serial_matmul(q, half.astype(np.float64)), bit_serial_matmul(q, half))
    with pytest.raises(ValueError, match="accumulator"):
        bit_serial_matmul(q, np.full((1, 96), 2**60))
    with pytest.raises(ValueError, match="x must be <= 65504"):
        bit_serial_matmul(q, np.full((1, 96), 1e6))


def test_cost_by_hand():
    q = quantize_mixture(np.random.default_rng(9).standard_normal((6, 256)), bits=4, group=128, scale_bits=8)
    cost = bit_serial_cost(q, lanes=4, pes=4)
    assert cost.cycles == 2 * 2 * 64  # two rounds of four outputs, two groups, 128 / 4 * 2 cycles each
    assert cost.bytes == pytest.approx(6 * 256 * (4 + 10 / 128 + 16 / 256) / 8)
    count = sum(len(bit_serial_terms(int(v))) for v in np.rint(dequantize(q) / np.repeat(q.scales, 128, 1)).ravel())
    assert cost.terms == count
    tiny = quantize_mixture(np.ones((1, 8)), bits=3, group=8, scale_bits=8)
    assert bit_serial_cost(tiny, lanes=4).cycles == 8  # rescaling, which eight weights cannot hide


# --- packing and packed products --------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 1000))
def test_packing_round_trips_and_is_the_documented_stream(bits, size, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, size))
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (3, -(-size * bits // 8))
    np.testing.assert_array_equal(unpack_codes(packed, bits, size), codes)
    stream = (codes[:, :, None] >> np.arange(bits) & 1).reshape(3, -1)
    np.testing.assert_array_equal(packed, np.packbits(stream, axis=1, bitorder="little"))
    from algokit.compression import _packing

    np.testing.assert_array_equal(_packing._pack_planes(codes, bits), packed)
    np.testing.assert_array_equal(_packing._unpack_planes(packed, bits, size), codes)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [8, 64, 128])
@pytest.mark.parametrize("n", [1, 5])
def test_packed_product_matches_the_dense_one(bits, group, n):
    rng = np.random.default_rng(10)
    q = quantize_mixture(rng.standard_normal((9, 256)).astype(np.float32), bits=bits, group=group)
    p = pack_mixture(q)
    assert p.packed.nbytes == 9 * 256 * bits // 8
    x = rng.standard_normal((n, 256)).astype(np.float32)
    expected = x.astype(np.float64) @ dequantize(q).astype(np.float64).T
    out = packed_matmul(p, x)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())


def test_messages():
    with pytest.raises(ValueError, match="group must divide the 64 inputs"):
        quantize_mixture(W, group=48)
    with pytest.raises(ValueError, match="datatypes must be one of"):
        quantize_mixture(W, group=32, datatypes=("fp5",))
    with pytest.raises(ValueError, match="datatypes must be formats of 3 bits"):
        quantize_mixture(W, group=32, datatypes=BITMOD4)
    with pytest.raises(TypeError, match="datatypes must be a sequence"):
        quantize_mixture(W, group=32, datatypes="fp3")
    with pytest.raises(ValueError, match="groups of a multiple of 8"):
        pack_mixture(quantize_mixture(W, group=4))
    with pytest.raises(ValueError, match="x must have 64 columns"):
        packed_matmul(pack_mixture(Q), np.ones((1, 32)))


# --- backends ---------------------------------------------------------------------------------------------------------


def test_every_backend_agrees(xp_array):
    w = np.random.default_rng(11).standard_normal((4, 64))
    x = xp_array(w)
    for call in (
        lambda a: quantize_to_datatype(a, "fp3_ea_neg")[0],
        lambda a: quantize_to_datatype(a, "fp4")[1],
        lambda a: quantize_int(a, 3, group=32),
        lambda a: quantize_int(a, 3, group=32, symmetric=False),
        lambda a: quantize_mx(a, "fp4"),
        lambda a: dequantize(quantize_mixture(a, bits=3, group=32)),
        lambda a: quantize_mixture(a, bits=4, group=16, scale_bits=8).scales,
        lambda a: quantize_mixture(a, bits=4, group=16, scale_bits=8).types,
        lambda a: bit_serial_matmul(Q, a),
        lambda a: packed_matmul(pack_mixture(quantize_mixture(a, bits=3, group=32)), a),
        lambda a: pack_codes(quantize_mixture(a, group=32).codes, 3),
        lambda a: unpack_codes(pack_codes(quantize_mixture(a, group=32).codes, 3), 3, 64),
    ):
        out, expected = call(x), call(w)
        assert kind_of(out) == xp_array.kind
        np.testing.assert_allclose(to_numpy(out), expected, rtol=1e-6, atol=1e-6)


def test_threads_agree(assert_threads_agree):
    assert_threads_agree(
        "import numpy as np\n"
        "from algokit.compression.mixture_of_datatypes import *\n"
        "w = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)\n"
        "for bits in (3, 4):\n"
        "    q = quantize_mixture(w, bits=bits, scale_bits=8)\n"
        "    print(q.codes.tobytes().hex(), q.types.tobytes().hex(), q.scales.tobytes().hex())\n"
        "    for y in (packed_matmul(pack_mixture(q), w[:2]), bit_serial_matmul(q, w[:2])):\n"
        "        print(y.tobytes().hex())\n"
    )


@pytest.mark.gpu
def test_gpu_agrees_with_the_host():
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(12)
    for dtype, bits, group in product((np.float32, np.float64), (3, 4), (32, 96, 128)):
        w = rng.standard_normal((40, 768 if group != 96 else 960)).astype(dtype)
        host, device = (
            quantize_mixture(w, bits=bits, group=group),
            quantize_mixture(cupy.asarray(w), bits=bits, group=group),
        )
        assert kind_of(device.codes) == "cupy"
        same = device.types.get() == host.types
        assert same.mean() > 0.999  # sums in another order may turn a near tie
        np.testing.assert_allclose(device.scales.get()[same], host.scales[same], rtol=1e-6)
        expected = dequantize(host).reshape(*same.shape, group)[same]
        np.testing.assert_allclose(dequantize(device).get().reshape(*same.shape, group)[same], expected, rtol=1e-6)
        x = rng.standard_normal((3, w.shape[1])).astype(np.float32)
        out = packed_matmul(pack_mixture(device), cupy.asarray(x))
        expected = x.astype(np.float64) @ dequantize(device).get().astype(np.float64).T
        np.testing.assert_allclose(out.get(), expected, atol=2e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(
            unpack_codes(pack_codes(device.codes, bits), bits, w.shape[1]).get(), device.codes.get()
        )


def test_fresh_module_has_tables_for_the_machine():
    signs, exponents = module._term_tables(BITMOD4)
    assert ((signs * 2**exponents).sum(-1) == module._tables(BITMOD4).levels).all()
