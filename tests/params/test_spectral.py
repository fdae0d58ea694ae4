"""Singular vectors without bringing a matrix together: how far the sketch is from the best, what travels, and R-TSVM, TSV-C."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxmerge import params
from jaxmerge.params.spectral._polar import factors
from jaxmerge.params.spectral._sketch import gaussian, independent, sketched
from tests.hlo import collectives, compile_for, tpu_mesh

EPS = float(np.finfo(np.float32).eps)
sketch = jax.jit(sketched, static_argnums=(1, 2, 3))


def with_spectrum(s, m, n, seed=0):
    """A float64 matrix with these singular values, and its right singular vectors."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((size, len(s))))[0] for size in (m, n))
    return (u * s) @ v.T, v.T


SPECTRA = {
    "geometric": np.geomspace(1, 1e-4, 48),
    "step": np.where(np.arange(48) < 8, 1.0, 1e-3),
    "flat": np.linspace(1, 0.9, 48),
    "power": 1 / np.arange(1.0, 49),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("iterations", [0, 2])
def test_the_sketch_is_within_its_bound(spectrum, iterations):
    """Halko, Martinsson and Tropp 2011, theorems 9.1 to 9.4, for the very random matrix that is drawn."""
    rank, oversample, s = 8, 6, SPECTRA[spectrum]
    x, v = with_spectrum(s, 64, 48)
    g = v @ np.asarray(gaussian(48, rank + oversample), np.float64)
    tail = np.linalg.norm(g[rank:] @ np.linalg.pinv(g[:rank]), 2)
    best = s[rank]
    projected = best * (1 + tail**2) ** (1 / (4 * iterations + 2))
    found_u, found_s, found_v = sketch(jnp.asarray(x, jnp.float32)[None], rank, oversample, iterations)
    u, w = (np.asarray(f[0], np.float64) for f in (found_u, found_v))
    rounding = 64 * EPS  # of products with 64 terms, on a matrix of norm 1
    assert np.linalg.norm(x - u @ (u.T @ x), 2) <= projected + rounding
    truncated = (u[:, :rank] * np.asarray(found_s[0, :rank], np.float64)) @ w[:rank]
    assert best - rounding <= np.linalg.norm(x - truncated, 2) <= projected + best + rounding
    np.testing.assert_allclose(u.T @ u, np.eye(rank + oversample), atol=rounding)


def test_more_iterations_are_nearer_to_the_best():
    x, _ = with_spectrum(SPECTRA["power"], 64, 48)
    outside = []
    for iterations in (0, 2):
        u = np.asarray(sketch(jnp.asarray(x, jnp.float32)[None], 8, 6, iterations)[0][0], np.float64)
        outside.append(np.linalg.norm(x - u @ (u.T @ x), 2))
    assert SPECTRA["power"][14] < outside[1] < outside[0]  # 14 vectors cannot do better


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("ratio", [10.0, 1e3, 1e5])
def test_factors_are_as_good_as_a_direct_factorisation(shape, ratio):
    """Backward stable: errors are multiples of eps on the largest singular value, however small the others."""
    s = np.geomspace(1, 1 / ratio, 24)
    x, _ = with_spectrum(s, *shape)
    u, found, v = (np.asarray(f[0], np.float64) for f in jax.jit(factors)(jnp.asarray(x, jnp.float32)[None]))
    rounding = 2 * 24 * EPS
    np.testing.assert_allclose(found, s, atol=rounding)
    np.testing.assert_allclose((u * found) @ v, x, atol=rounding)
    np.testing.assert_allclose(u.T @ u, np.eye(24), atol=rounding)
    np.testing.assert_allclose(v @ v.T, np.eye(24), atol=rounding)


def test_the_random_matrix_is_normal():
    g = np.asarray(gaussian(400, 100))
    assert abs(g.mean()) < 4 / 200 and abs(g.var() - 1) < 4 * 2**0.5 / 200  # four standard deviations of 40,000 numbers
    assert np.abs(np.corrcoef(g.T) - np.eye(100)).max() < 6 / 20  # six of 400
    assert len(np.unique(g)) > 39_800  # of 2^23 values: some 95 twice


def test_independent_columns_of_any_matrix():
    x, _ = with_spectrum(np.geomspace(1, 1e-3, 8), 32, 8)
    y = np.asarray(independent(jnp.asarray(x, jnp.float32)[None])[0], np.float64)
    assert np.linalg.cond(y) < 3  # a shift of 1e-6 of the sum of squares, singular values from 1 to 1e-3
    assert not np.asarray(independent(jnp.zeros((1, 32, 8)))).any()


# --- what travels ----------------------------------------------------------------------------------------------------

SPLITS = {"rows": P(None, "data"), "columns": P(None, None, "model"), "both": P(None, "data", "model")}
SKETCHES = {
    "truncate": lambda: params.truncate(0.25, oversample=4),
    "tsvm": lambda: params.tsvm(oversample=4),
    "r_tsvm": lambda: params.r_tsvm(oversample=4),
    "twin_merging": lambda: params.twin_merging([0.2, 0.5, 0.3], density=0.25, oversample=4),
}
GRAMS = [{"w": np.eye(64, dtype=np.float32)}] * 3
ALL_VECTORS = {
    "iso_c": params.iso_c,
    "iso_cts": lambda: params.iso_cts(0.5, oversample=4),
    "knots": lambda: params.knots(params.ties(0.3, scope="tensor")),
    "wudi": params.wudi,
    "regmean": lambda: params.regmean(GRAMS),
    "tsvm": lambda: params.tsvm(oversample=64),
}
DEFAULT = {("tsvm", "both"), ("iso_c", "both"), ("regmean", "both")}  # one of each kind; the others are slow


def moved(tx, split, mesh, shape=(64, 32), models=3):
    x = {"w": jax.ShapeDtypeStruct((models, *shape), jnp.float32, sharding=NamedSharding(mesh, split))}
    compiled = compile_for(lambda x: tx.merge(tx.match(x), x), x)
    (out,) = jax.tree.leaves(compiled.output_shardings)
    assert out.is_equivalent_to(NamedSharding(mesh, split), 3), f"laid out as {out.spec}, not {split}"
    return set(collectives(compiled))


def cases(methods):
    some = [(name, split) for name in methods for split in SPLITS]
    return [pytest.param(*c, marks=[] if c in DEFAULT else [pytest.mark.slow], id="-".join(c)) for c in some]


@pytest.mark.parametrize(("name", "split"), cases(SKETCHES))
def test_a_sketch_adds_up_and_moves_nothing(mesh, name, split):
    """However the matrix is split, under Auto and Explicit axes: sums of products alone."""
    assert moved(SKETCHES[name](), SPLITS[split], mesh) == {"all-reduce"}


@pytest.mark.parametrize(("name", "split"), cases(ALL_VECTORS))
def test_all_vectors_lay_a_matrix_out_along_one_axis(name, split):
    """Every device keeps its share, under Explicit axes; nothing is gathered."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    assert moved(ALL_VECTORS[name](), SPLITS[split], mesh) <= {"all-reduce", "all-to-all"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iso_c", "wudi", "tsvm"])
def test_all_vectors_of_a_matrix_split_along_its_longer_axis(mesh, name):
    assert moved(ALL_VECTORS[name](), SPLITS["rows"], mesh) == {"all-reduce"}


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("iso_c", {"all-reduce", "all-to-all"}),
        pytest.param("tsvm", {"all-reduce"}, marks=pytest.mark.slow),
        pytest.param("truncate", {"all-reduce"}, marks=pytest.mark.slow),
    ],
)
def test_on_a_pod_no_matrix_is_gathered(name, expected):
    mesh = tpu_mesh("v5p:8x8x8", (64, 8), ("data", "model"))
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * 2)
    tx = (ALL_VECTORS if name == "iso_c" else SKETCHES)[name]()
    assert moved(tx, SPLITS["both"], mesh, shape=(1024, 512), models=8) == expected


# --- R-TSVM, TSV-C ---------------------------------------------------------------------------------------------------


def tasks():
    rng = np.random.default_rng(3)
    return rng.standard_t(3, (3, 24, 20)).astype(np.float32)


def merged(tx, x):
    x = {"w": jnp.asarray(x)}
    return np.asarray(jax.jit(lambda x: tx.merge(tx.match(x), x))(x)["w"][0])


def test_tasks_that_differ_by_signs_and_order_weigh_the_same():
    """Both add up the same directions, six of each task, known to eps over the gap behind them; the polar factor of all of them
    together magnifies that by 1 over the least singular value. A weight off by 1 % moves large entries by 20 times that.
    """
    x = tasks()[0]
    rng = np.random.default_rng(0)
    same = np.stack([sign * x[rng.permutation(24)][:, rng.permutation(20)] for sign in (1, -1, 1)])
    u, s, v = np.linalg.svd(same.astype(np.float64))
    least = [np.linalg.svd(np.concatenate(side), compute_uv=False)[-1] for side in (u[:, :, :6].mT, v[:, :6])]
    noise = EPS * s[0, 0] / (s[0, 5] - s[0, 6]) * (1 / least[0] + 1 / least[1]) * s[0, 0]
    assert noise < 0.01 * np.abs(x).max() / 20
    np.testing.assert_allclose(merged(params.r_tsvm(nearly_zero=-1.0), same), merged(params.tsvm(), same), rtol=0, atol=noise)


def test_what_tasks_share_counts_once():
    """The polar factor of [U U] is [U U] / sqrt 2. Both U agree to eps over the gap, which Newton-Schulz lifts 12e3 times."""
    x = tasks()[0]
    u, s, v = np.linalg.svd(x.astype(np.float64))
    expected = 2 * (u[:, :10] * s[:10]) @ v[:10]
    noise = 12 * 1e3 * EPS * s[0] / (s[:10] - s[1:11]).min()
    assert noise**2 < 0.1  # rounding that became a direction would count in full
    np.testing.assert_allclose(merged(params.tsvm(), np.stack([x, 3 * x])), expected, atol=noise**2 * s[0])
    np.testing.assert_allclose(merged(params.tsvm(method="svd"), np.stack([x, 3 * x])), expected, atol=1e-4 * s[0])


def test_outliers_weigh_more_and_sparse_tasks_have_a_lower_rank():
    """The first direction is turned by what 40 products of up to 20 round, over the distance of 1 to the second."""
    x = np.zeros((2, 40, 40), np.float32)
    x[0, :20, :20] = np.diag(np.arange(20.0, 0.0, -1.0))  # 20 entries, outliers all: weight 2, rank 1
    x[1, 20:, 20:] = np.random.default_rng(0).choice([-1.0, 1.0], (20, 20))  # a quarter of the entries, no outlier: weight 0
    out = merged(params.r_tsvm(), x)
    expected = np.zeros((40, 40))
    expected[0, 0] = 2 * 20.0
    np.testing.assert_allclose(out, expected, atol=2 * 20.0 * np.sqrt(40) * EPS * 20 / (20 - 19))


def test_tsv_compress_keeps_the_leading_vectors():
    x = tasks()
    own = params.tsv_compress({"w": jnp.asarray(x), "b": jnp.asarray(x[:, 0])}, density=0.25)
    assert own["w"].b.shape == (3, 24, 5) and own["w"].a.shape == (3, 5, 20)
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    best = np.einsum("kmr,kr,krn->kmn", u[:, :, :5], s[:, :5], v[:, :5])
    gap = (s[:, 4] - s[:, 5]).min() / s.max()
    np.testing.assert_allclose(params.dense(own)["w"], best, atol=10 * EPS / gap * s.max())
    np.testing.assert_array_equal(own["b"], x[:, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: params.truncate(0.5, method="qr"), 'truncate: method must be "randomized" or "svd"'),
        (lambda: params.tsvm(oversample=-1), "tsvm: oversample and iterations must be 0 or more, got -1"),
        (lambda: params.iso_cts(iterations=-2), "iso_cts: .* got 16 and -2"),
        (lambda: params.knots(params.linear(), method="qr"), "knots: method must be"),
        (lambda: params.polar(jnp.eye(2), "qr"), "polar: method must be"),
    ],
)
def test_wrong_arguments(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [params.wudi, lambda **axis: params.knots(params.ties(0.5, scope="tensor"), **axis)])
def test_flax_kernels_are_pytorchs_weights_transposed(make):
    x = jax.random.normal(jax.random.key(3), (3, 6, 4))
    run = lambda tx, x: tx.merge(tx.match({"w": x}), {"w": x})["w"]
    np.testing.assert_array_equal(run(make(axis=0), jnp.swapaxes(x, 1, 2)), jnp.swapaxes(run(make(axis=1), x), 1, 2))
    assert not np.allclose(run(make(axis=0), x), run(make(axis=1), x), atol=1e-2)
    with pytest.raises(ValueError, match="axis must be 0 or 1"):
        make(axis=2)
