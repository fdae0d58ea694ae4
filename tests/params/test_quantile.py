"""The exact k-th magnitude against a sort, in memory and streamed; counts beyond the counter; random bits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxmerge import params
from jaxmerge.params.atoms._random import hashed, threefry
from jaxmerge.params.order import _blocks as blocks, _devices as devices, _quantile as q, _rows as rows, _search as search
from jaxmerge.params.order._rows import outranks, rank_in_row
from jaxmerge.params.order._sums import LINE, sums
from jaxmerge.params.order._words import quotient


def _values(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 40, 25)).astype(np.float32)
    x[0] = x[0].astype(jnp.bfloat16).astype(np.float32)
    x[1] = np.round(x[1])
    x[2, :5] *= np.float32(1e-41)  # subnormal
    x[2, 5, :3] = [np.inf, -np.inf, -0.0]
    return x


@pytest.mark.parametrize("seed", range(3))
def test_kth_largest_equals_sorting(seed):
    x = _values(seed)
    kth = jax.jit(lambda x, k: q.kth_largest([q.magnitude_bits(x[:, :11]), q.magnitude_bits(x[:, 11:])], tuple(k)))
    order = -np.sort(-np.abs(x).reshape(3, -1).view(np.uint32).astype(np.int64), axis=1)
    for k in (1, 2, 17, 500, 999, 1000):
        np.testing.assert_array_equal(kth(x, q.to_words([k] * 3)), order[:, k - 1])


@pytest.mark.parametrize(
    "tx",
    [
        params.trim([0.1, 0.3, 0.0], scope="model"),
        params.trim_band([0.1, 0.3, 0.0], 0.2, scope="model"),
        params.pcb(0.3, tail=0.01),
    ],
    ids=["trim", "trim_band", "pcb"],
)
def test_streamed_thresholds_equal_those_in_memory(tx):
    """Three rounds of histograms and 31 of bisection find the same threshold and the same share of the ties."""
    x = _values(7)
    x[2, 5, :3] = 7  # PCB adds models up
    leaves = {"a": x[:, :11], "b": x[:, 11:]}
    step = tx.match.steps[0]
    settings = {n: step.settings(n, v.shape) for n, v in leaves.items()}
    survey = step.survey
    query, notes = survey.start(settings)
    read = jax.jit(survey.read)
    for _ in range(survey.rounds):
        blocks = {n: [v[:, :4], v[:, 4:]] for n, v in leaves.items()}  # additive over blocks
        counts = {n: sum(np.asarray(read(query, b)).astype(np.uint64) for b in bs) for n, bs in blocks.items()}
        query, notes = survey.step(query, notes, counts)
    streamed, settled = survey.finish(notes, settings), survey.settle(settings, leaves)
    for n in leaves:
        for key, value in settled[n].items():
            if key in ("cut", "top"):  # of exp and tanh, which two programs may round differently
                np.testing.assert_allclose(streamed[n][key], value, rtol=1e-6)
            else:
                np.testing.assert_array_equal(streamed[n][key], value)


def test_shares_of_counts():
    counts = [0, 1, 10, 999, 2**31 + 7, 2**33 + 5, 2**40]
    fractions = [2**32 - 1, 2**31, 429496730, 2**32 - 1, 3, 2**32 - 5, 123456789]
    got = q.share(tuple(jnp.asarray(q.to_words(counts))), jnp.asarray(np.array(fractions, np.uint32)))
    assert q.from_words(got).tolist() == [c * f >> 32 for c, f in zip(counts, fractions, strict=True)]


def test_counts_beyond_the_counter():
    mask = np.random.default_rng(0).random((2, 6, 5, 4, 7)) < 0.6
    for word in (32, 12, 11):  # 840 elements, counters of 12 and 11 bits: rows must be summed in two parts
        np.testing.assert_array_equal(q.from_words(q.count(jnp.asarray(mask), word)), mask.sum((1, 2, 3, 4)))
    for word in (9, 8):
        np.testing.assert_array_equal(q.from_words(q.count(jnp.asarray(mask), word)), mask.sum((1, 2, 3, 4)))


def test_words():
    pairs = [(2**32 - 1, 1), (2**33 + 5, 2**32 - 1), (2**40, 2**32), (7, 7)]
    a, b = (tuple(jnp.asarray(q.to_words(v))) for v in zip(*pairs, strict=True))
    assert q.from_words(q.add(a, b)).tolist() == [x + y for x, y in pairs]
    assert q.from_words(q.subtract(a, b)).tolist() == [x - y for x, y in pairs]
    assert q.at_least(a, b).tolist() == [True] * 4 and q.at_least(b, a).tolist() == [False, False, False, True]
    assert q.from_words(q.smaller(a, b)).tolist() == [y for _, y in pairs]


def test_quotients():
    a = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    for b in (1, 2, 3, 1259, 1259536, 2**31 - 1, 2**31, 2**32 - 1):
        edges = np.array([0, b - 1, b, (2**32 - 1) // b * b, (2**32 - 1) // b * b - 1, 2**32 - 1], np.uint64).astype(np.uint32)
        both = np.concatenate([a, edges])
        np.testing.assert_array_equal(quotient(jnp.asarray(both), jnp.uint32(b)), both // np.uint32(b))


def test_coordinates_order_beyond_32_bits():
    rows, columns, row, column = q.coordinates((1 << 20, 3, 1 << 20))
    assert (rows, columns) == (1 << 20, 3 << 20) and row.shape == (1 << 20, 1, 1) and column.shape == (1, 3, 1 << 20)
    assert int(column[0, 2, 5]) == 2 * (1 << 20) + 5
    assert q.coordinates(())[:2] == (1, 1)


def test_first_over_rows_and_columns(monkeypatch):
    """The cut of a leaf with more elements than one word can index, on a small leaf that is split the same way."""
    chosen = np.random.default_rng(0).random((2, 12, 10)) < 0.5
    whole = q.coordinates
    split = lambda shape, origin=q.ORIGIN: (
        12,
        10,
        jnp.arange(12, dtype=jnp.uint32)[:, None],
        jnp.arange(10, dtype=jnp.uint32)[None],
    )
    for coordinates in (whole, split):
        monkeypatch.setattr(q, "coordinates", coordinates)
        for quota in (0, 1, 23, 1000):
            cut, kept = q.first(jnp.asarray(chosen), tuple(jnp.asarray(q.to_words([quota] * 2))))
            got = np.stack([q.before(cut[:, k], jnp.asarray(v)) & v for k, v in enumerate(chosen)])
            want = chosen & (np.cumsum(chosen.reshape(2, -1), axis=1).reshape(chosen.shape) <= quota)
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(q.from_words(kept), np.minimum(quota, chosen.sum((1, 2))))


def test_a_leaf_that_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="more elements than can be counted"):
        q.count(jnp.ones((1, 200, 200, 200), bool), 8)


def test_threefry_is_threefry():
    counter = np.random.default_rng(0).integers(0, 2**32, 8, dtype=np.uint32)
    key = np.array([123, 2**31 + 5], np.uint32)
    expected = threefry_2x32(jnp.asarray(key), jnp.asarray(counter))  # pairs (i, i + 4)
    ours = threefry((jnp.asarray(key[0]), jnp.asarray(key[1])), (jnp.asarray(counter[:4]), jnp.asarray(counter[4:])))
    np.testing.assert_array_equal(jnp.concatenate(ours), expected)


def test_hashed_words_are_random():
    """Bits are fair, bytes uniform; words at a lag, and under keys that differ in one bit, are uncorrelated bit by bit."""
    n, key = 1 << 18, jnp.asarray([7, 9], jnp.uint32)
    draw = jax.jit(lambda a, b: hashed(jnp.arange(n, dtype=jnp.uint32), (a, b)))
    word = np.asarray(draw(*key))
    assert len(np.unique(word)) == n  # a permutation
    bits = lambda w: np.unpackbits(w.view(np.uint8).reshape(n, 4), axis=1).astype(np.float64) * 2 - 1
    one, bound = bits(word), 6 / np.sqrt(n)  # of up to 6 * 1024 correlations of n fair signs each
    assert np.abs(one.mean(axis=0)).max() < bound
    for byte in word.view(np.uint8).reshape(n, 4).T:  # chi-square of 255 degrees: its mean and six deviations
        assert np.square(np.bincount(byte, minlength=256) - n / 256).sum() / (n / 256) < 255 + 6 * np.sqrt(2 * 255)
    others = [bits(np.roll(word, lag)) for lag in (1, 2, 64, 4096)]
    others += [bits(np.asarray(draw(*(key ^ flip)))) for flip in np.array([[1, 0], [0, 1]], np.uint32)]
    for other in others:
        assert np.abs(one.T @ other).max() / n < bound


def test_random_masks():
    stacked = {"a": jnp.ones((2, 100, 100)), "b": jnp.ones((2, 100, 100))}
    mask = lambda seed: (tx := params.random_mask([0.3, 0.7], seed=seed)).merge(tx.match(stacked), stacked)
    one, other = mask(1), mask(2)
    for v in one.values():  # 10000 draws: five standard deviations
        np.testing.assert_allclose(v.mean((1, 2)), [0.3, 0.7], atol=5 * np.sqrt(0.21 / 1e4))
    assert (one["a"] != one["b"]).any() and (one["a"] != other["a"]).any()
    assert abs(np.corrcoef(np.asarray(one["a"]).reshape(2, -1))[0, 1]) < 0.05
    np.testing.assert_array_equal(one["a"], mask(1)["a"])


@pytest.fixture
def one_device(monkeypatch):
    """The forms that one CPU device gets, here among the eight of the tests."""
    monkeypatch.setattr(devices, "alone", lambda: True)
    monkeypatch.setattr(devices, "LARGE", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.slow
def test_forms_for_one_device_find_the_same(one_device):
    """Subnormals, infinities, NaN, ties; several leaves and one; with and without a first guess; two statistics at once."""
    x = _values(0)
    x[2, 5, 3] = np.nan
    order = -np.sort(-np.abs(x).reshape(3, -1).view(np.uint32).astype(np.int64), axis=1)
    leaves = [jnp.asarray(x[:, :11]), jnp.asarray(x[:, 11:])]

    @jax.jit
    def both(leaves, k):
        k = tuple(k)
        blind = search.kth_largest(leaves, (k[0], jnp.maximum(k[1], 1)), q.magnitude_bits, bits=31)[0]
        t = q.kth_largest(leaves, k, q.magnitude_bits)
        return t, blind, [q.sides(leaf, t, q.magnitude_bits) for leaf in leaves]

    place = jax.jit(lambda x, k: q.place(x, tuple(k), q.magnitude_bits))
    for k in (1, 2, 17, 500, 999, 1000):
        t, blind, sides = both(leaves, q.to_words([k] * 3))
        for found in (t, blind):
            np.testing.assert_array_equal(found, order[:, k - 1])
        above, tied = (sum(q.from_words(s[i]) for s in sides) for i in range(2))
        np.testing.assert_array_equal(above, (order > order[:, k - 1 : k]).sum(axis=1))
        np.testing.assert_array_equal(tied, (order == order[:, k - 1 : k]).sum(axis=1))
    for ks in ((1, 1000), (17, 500), (999, 2), (0, 400)):
        want = [order[:, k - 1] if k else np.full(3, q.INF) for k in ks]
        t, above, tied = place(jnp.asarray(x), q.to_words(np.repeat(ks, 3)))
        np.testing.assert_array_equal(t, np.concatenate(want))
        np.testing.assert_array_equal(q.from_words(above), np.concatenate([(order > t[:, None]).sum(axis=1) for t in want]))
        np.testing.assert_array_equal(q.from_words(tied), np.concatenate([(order == t[:, None]).sum(axis=1) for t in want]))
    assert np.asarray(both(leaves, q.to_words([0] * 3))[0]).tolist() == [int(q.INF)] * 3


@pytest.mark.parametrize("draw", ["normal", "laplace", "cauchy", "coarse", "lumps", "two values", "rows of their own scale"])
def test_search_collects_what_is_left(one_device, draw):
    """Enough entries that the last of a bracket are collected run by run, of distributions that lead astray."""
    rng, shape = np.random.default_rng(0), (2, 300, 256)
    x = {
        "normal": rng.standard_normal,
        "laplace": lambda s: rng.laplace(size=s),
        "cauchy": rng.standard_cauchy,
        "coarse": lambda s: np.round(rng.standard_normal(s), 1),
        "lumps": lambda s: rng.choice(rng.standard_normal(40), s) * (1 + 1e-6 * rng.standard_normal(s)),
        "two values": lambda s: rng.choice([1.0, 1.0000001], s),
        "rows of their own scale": lambda s: rng.standard_normal(s) * 10.0 ** np.arange(-20, 10, 0.1)[:, None],
    }[draw](shape).astype(np.float32)
    order = -np.sort(-np.abs(x).reshape(2, -1).view(np.uint32).astype(np.int64), axis=1)
    place = jax.jit(lambda x, k: q.place(x, tuple(k), q.magnitude_bits))
    for ks in ((768, 70000), (38400, 38401), (1, 76800)):
        t, above, tied = place(jnp.asarray(x), q.to_words(np.repeat(ks, 2)))
        want = np.concatenate([order[:, k - 1] for k in ks])
        np.testing.assert_array_equal(t, want)
        both = np.tile(order, (2, 1))
        np.testing.assert_array_equal(q.from_words(above), (both > want[:, None]).sum(axis=1))
        np.testing.assert_array_equal(q.from_words(tied), (both == want[:, None]).sum(axis=1))


def test_first_for_one_device(one_device):
    chosen = np.random.default_rng(0).random((2, 12, 10)) < [[[0.5]], [[0.02]]]
    first = jax.jit(lambda quota: q.first(jnp.asarray(chosen), tuple(quota)))
    for quota in (0, 1, 2, 23, 50, 1000):
        cut, kept = first(q.to_words([quota] * 2))
        got = np.stack([q.before(cut[:, k], jnp.asarray(v)) & v for k, v in enumerate(chosen)])
        want = chosen & (np.cumsum(chosen.reshape(2, -1), axis=1).reshape(chosen.shape) <= quota)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(q.from_words(kept), np.minimum(quota, chosen.sum((1, 2))))


@pytest.mark.parametrize(
    "make",
    [
        lambda: params.ties(0.3, tie="majority"),
        pytest.param(lambda: params.breadcrumbs(0.5, 0.1), marks=pytest.mark.slow),
        lambda: params.sce(0.3, mask="delta"),
        pytest.param(lambda: params.pcb(0.3), marks=pytest.mark.slow),
        lambda: params.della(0.5, 0.2, seed=1, rescale="l1"),
        params.model_stock,
        lambda: params.dare_linear(0.5, seed=1),
    ],
    ids=["ties", "breadcrumbs", "sce", "pcb", "della", "model_stock", "dare"],
)
def test_merges_on_one_device_are_those_on_many(make, monkeypatch):
    x = _values(3)
    x[2, 5, :3] = 7
    base, models = {"w": jnp.zeros((40, 25))}, [{"w": v} for v in x]
    merge = lambda: params.merge(make(), base, models)
    many = merge()
    monkeypatch.setattr(devices, "alone", lambda: True)
    monkeypatch.setattr(devices, "LARGE", 0)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    one = merge()  # atoms made anew, so compiled anew
    for name, value in many.items():  # sums in another order
        np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes"), [((1, 3 << 18), (1,)), ((1, 3, 1 << 18), (1, 2)), ((1, 1 << 18, 3), (1,)), ((1, 5, 7), (1, 2))]
)
def test_sums_are_of_short_chains(one_device, shape, axes):
    """However long a vector is: of so many additions in a row, each rounds by half a unit in the last place at most."""
    value = np.float32(0.1)
    found = jax.jit(lambda x: sums([x, 2 * x], axes))(np.full(shape, value))
    for times, one in zip((1, 2), found, strict=True):
        n = math.prod(shape[axis] for axis in axes)
        assert one.shape == tuple(1 if axis in axes else size for axis, size in enumerate(shape))
        np.testing.assert_allclose(one, times * n * float(value), rtol=(LINE + math.log2(n)) * 2.0**-24)


@pytest.mark.parametrize(
    "make",
    [
        lambda: params.ties(0.5, scope="tensor"),
        lambda: params.dare_ties(0.5, seed=0),
        lambda: params.della(0.5, seed=0),
        lambda: params.chain(params.rescale(params.random_mask(0.5, seed=0), "l1"), params.sum_experts()),
    ],
)
@pytest.mark.parametrize("spec", [P("fsdp", None), P(None, "fsdp")])
def test_one_device_may_be_an_explicit_mesh(one_device, make, spec):
    """Arrays that are split over an axis of length 1 are merged as those that are not."""
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    base, *trees = [{"w": v} for v in np.random.default_rng(0).standard_normal((4, 256, 512)).astype(np.float32)]
    laid = lambda tree: jax.device_put(tree, NamedSharding(mesh, spec))
    merge = lambda base, trees: jax.jit(lambda base, trees: params.merge(make(), base, trees))(base, trees)["w"]
    found = merge(laid(base), list(map(laid, trees)))
    assert found.sharding.spec == spec
    np.testing.assert_allclose(found, merge(base, trees), rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("short", [13, 0])
def test_ranks_for_one_device(one_device, monkeypatch, short):
    """Ties; a few entries that agree in their upper bits alone; rows of nothing but such, in order and not."""
    monkeypatch.setattr(rows, "SHORT", short)
    near = 1 + np.random.default_rng(0).integers(0, [[[400]], [[16]], [[9]]], (3, 40, 25)).astype(np.float32) * np.float32(
        2**-23
    )
    near[2].sort(axis=-1)
    bits = np.abs(np.concatenate([_values(0), np.round(_values(1)), near])).view(np.uint32)
    for some in (bits, bits[..., :1]):
        want = np.argsort(np.argsort(some, axis=-1, kind="stable"), axis=-1)
        np.testing.assert_array_equal(jax.jit(rank_in_row)(jnp.asarray(some)), want)


def test_counts_for_one_device(one_device):
    masks = np.random.default_rng(0).random((3, 2, 12, 10)) < [[[[0.5]], [[0.02]]]]
    found = jax.jit(q.counts)(*map(jnp.asarray, masks))
    np.testing.assert_array_equal([q.from_words(c) for c in found], masks.sum((2, 3)))


def test_rank_mask_has_just_its_probabilities():
    """Every rival of every entry of a short row, drawn once: the share of those that rank lower is the rank over n - 1."""
    row = jnp.array([[3.0, -1.0, 2.0, 1.0, -3.0, 0.0, 2.0]])
    n = row.shape[-1]
    rank = np.asarray(rank_in_row(q.magnitude_bits(row)))[0]
    lower = 0
    for draw in range(n - 1):
        rival = jnp.uint32(draw) + (draw >= jnp.arange(n)).astype(jnp.uint32)[None]
        lower += np.asarray(outranks(row, rival))[0].astype(int)
    np.testing.assert_array_equal(lower, rank)
    for rival, higher in ((n, True), (n + 1, False)):
        assert (outranks(row, jnp.full((1, n), rival, jnp.uint32)) == higher).all()


def test_rank_mask_keeps_as_often_as_it_says():
    """The draws themselves: 20000 rows of 5, so that five standard deviations are 0.018."""
    x = {"w": jnp.broadcast_to(jnp.array([2.0, -1.0, 5.0, 1.0, 0.5]), (1, 20000, 5))}
    tx = params.rank_mask(0.5, 0.4, seed=3)
    kept = np.asarray(tx.merge(tx.match(x), x)["w"] != 0)[0].mean(axis=0)
    np.testing.assert_allclose(kept, 0.1 + 0.8 * np.array([3, 1, 4, 2, 0]) / 4, atol=0.018)
