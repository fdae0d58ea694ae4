"""Adapters that stay factors: PEFT's combinations, compression without the dense update, learned coefficients."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxmerge import params
from tests.rounding import assert_within, backward, entrywise

MANIFEST = json.loads((pathlib.Path(__file__).parents[1] / "golden/params/manifest.json").read_text())
SPLIT = (P("data", None), P(None, "model"))


def load(golden):
    vectors, p = golden("params/lora_combine_a"), MANIFEST["lora_combine_a"]["params"]
    factors = lambda k, n: params.Factors(
        jnp.asarray(vectors[f"in/expert_{k}/{n}.lora_B"]), jnp.asarray(vectors[f"in/expert_{k}/{n}.lora_A"])
    )
    adapters = [{n: factors(k, n) for n in ("q", "up")} for k in range(3)]
    return vectors, adapters, [w * alpha / r for w, alpha, r in zip(p["weights"], p["alphas"], p["ranks"], strict=True)]


def test_lora_soups_equal_the_peer(golden):
    """PEFT's cat and svd; and its linear (with cross terms), ties and magnitude_prune, which merge factor by factor."""
    vectors, adapters, weight = load(golden)
    root = params.weigh(np.sqrt(weight))
    for how, tx in {
        "linear": params.chain(root, params.sum_experts()),
        "ties": params.chain(params.trim(0.5, scope="tensor"), params.elect_sign(), root, params.mean_agreeing()),
        "magnitude_prune": params.chain(params.trim(0.4, scope="tensor"), root, params.sum_experts()),
    }.items():
        for n, update in params.dense(params.merge(tx, None, adapters)).items():
            b, a = (sum(w**0.5 * np.abs(x[n][i]) for w, x in zip(weight, adapters, strict=True)) for i in range(2))
            assert_within(update, vectors[f"out/{how}/{n}.delta"], entrywise([b @ a], 20), how)
    soup = params.concatenate(adapters, weight)
    small = params.compress(soup, 3)
    bounds = backward(lambda soup: params.dense(params.compress(soup, 3)), soup)
    for n in soup:
        assert soup[n].a.shape[0] == 9 and small[n].a.shape[0] == small[n].b.shape[1] == 3  # factors are kept
        products = [w * np.abs(x[n].b) @ np.abs(x[n].a) for w, x in zip(weight, adapters, strict=True)]
        assert_within(params.dense(soup)[n], vectors[f"out/cat/{n}.delta"], entrywise(products, 9 + 2), n)  # 9 terms
        assert_within(params.dense(small)[n], vectors[f"out/svd/{n}.delta"], bounds[n], n)


def test_compressed_as_the_dense_update_would_be():
    """The best approximation, of every rank, by the singular values of the dense update; also of several at once."""
    rng = np.random.default_rng(0)
    b, a = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 20, 6), (2, 6, 15)))
    update = np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    values = np.linalg.svd(update, compute_uv=False)
    for rank in (1, 4, 6, 9):
        small = params.compress({"w": params.Factors(b, a)}, rank)["w"]
        assert small.b.shape == (2, 20, min(rank, 6))
        error = np.linalg.norm(np.asarray(params.dense(small)) - update, axis=(1, 2))
        np.testing.assert_allclose(error, np.sqrt((values[:, rank:] ** 2).sum(axis=1)), atol=2e-4)
    sizes = lambda name: 2 if name == "w" else 1
    both = params.compress({"w": jnp.asarray(update[0], jnp.float32), "v": params.Factors(b[1], a[1]), "b": jnp.ones(3)}, sizes)
    assert both["w"].b.shape == (20, 2) and both["v"].a.shape == (1, 15) and both["b"].shape == (3,)


def test_no_dense_update_is_formed():
    """Factors of a matrix of 10^10 entries, which no memory here would hold."""
    shapes = params.Factors(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((100_000, 8), (8, 100_000))))
    program = jax.jit(lambda f: params.compress({"w": f}, 2)).lower(shapes).as_text()
    assert "100000x100000" not in program


def test_factors_may_be_split(mesh):
    rng = np.random.default_rng(0)
    f = params.Factors(*(rng.standard_normal(s).astype(np.float32) for s in ((16, 4), (4, 8))))
    put = params.Factors(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(f, SPLIT, strict=True)))
    small = jax.jit(lambda f: params.compress(f, 2))
    np.testing.assert_allclose(params.dense(small(put)), params.dense(small(f)), atol=1e-5)


def test_learned_coefficients_by_layer(golden):
    """From equal coefficients to those that made the target, one for each leaf and adapter."""
    _, adapters, _ = load(golden)
    base = {n: jnp.zeros((f.b.shape[0], f.a.shape[1]), jnp.bfloat16) for n, f in adapters[0].items()} | {"b": jnp.ones(2)}
    wanted = {"q": jnp.array([0.7, -0.2, 0.4]), "up": jnp.array([0.1, 0.5, 0.9])}
    target = params.dense(params.concatenate(adapters, wanted.__getitem__))
    loss = lambda model, _: sum(jnp.mean((model[n].astype(jnp.float32) - target[n]) ** 2) for n in target)
    start = {n: jnp.full(3, 1 / 3) for n in wanted}
    found, losses = params.fit_adapters(
        loss, start, base=base, adapters=adapters, batches=[0.0] * 150, optimizer=optax.adam(0.05)
    )
    for n, w in wanted.items():
        np.testing.assert_allclose(found[n], w, atol=0.02)
    assert losses[-1] < 1e-3 * losses[0]
    adapted = params.adapt(base, params.concatenate(adapters, found.__getitem__))
    assert adapted["q"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(adapted["b"], base["b"])


def test_what_does_not_fit(unchecked):
    base, f = {"w": jnp.ones((2, 2))}, params.Factors(jnp.ones((2, 1)), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"(?s)no leaf v.*w: an update of shape \(2, 3\) for a leaf of shape \(2, 2\)"):
        params.adapt(base, {"w": f, "v": f})
    with pytest.raises(ValueError, match="rank of leaf 'w' must be 1 or more"):
        params.compress({"w": f}, 0)
    with pytest.raises(ValueError, match="no adapters"):
        params.concatenate([])
    with pytest.raises(ValueError, match="leaf 'w' has no coefficients"):
        params.fit_adapters(lambda m, b: 0.0, {}, base=base, adapters=[{"w": f}], batches=[0], optimizer=optax.sgd(1.0))
