"""Negative token merging: the official vectors, both readings of the index, the rule, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxmerge.tokens import negative_merge
from tests.conftest import GOLDEN
from tests.hlo import collectives

CASES = {c["name"]: c["params"] for c in json.loads((GOLDEN / "tokens/negtome_a.json").read_text())["cases"]}


@pytest.fixture(scope="module")
def negtome(golden):
    return golden("tokens/negtome_a")


def read(negtome, name):
    h, p = negtome[f"{name}/h"], CASES[name]
    mask = negtome[f"{name}/mask"].reshape(len(h), h.shape[1], h.shape[1]) > 0 if p["masked"] else None
    return h, mask, dict(alpha=p["alpha"], threshold=p["threshold"])


def rule(h, reference, mask, *, alpha, threshold, match):
    """One row at a time, in float64."""
    unit = lambda a: a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
    h, reference = np.asarray(h, np.float64), np.asarray(reference, np.float64)
    s = unit(h) @ unit(reference).T
    s = s if mask is None else np.where(mask, s, -np.inf)
    axis = 1 if match == "reference" else 0
    moves = s.max(axis) > threshold
    return np.where(moves[:, None], h + alpha * (h - reference[s.argmax(axis)]), h)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_official_code(negtome, name):
    h, mask, p = read(negtome, name)
    got = jax.jit(lambda h: negative_merge(h, h[:1], mask=mask, match="tokens", **p))(h)
    np.testing.assert_allclose(got, negtome[f"{name}/out"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("match", ["reference", "tokens"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_rule(negtome, name, match):
    h, mask, p = read(negtome, name)
    got = jax.jit(lambda h: negative_merge(h, h[:1], mask=mask, match=match, **p))(h)
    want = [rule(row, h[0], None if mask is None else mask[i], match=match, **p) for i, row in enumerate(h)]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_the_two_readings_differ_and_agree_on_the_reference_itself(negtome):
    h, _, p = read(negtome, "c0")
    paper, official = (negative_merge(h, h[:1], match=m, **p) for m in ("reference", "tokens"))
    assert (np.abs(paper - official).max(axis=(1, 2)) > 1e-3).tolist() == [False, True, True]
    np.testing.assert_allclose(paper[0], h[0], rtol=0, atol=1e-6)  # the reference matches itself, and stays


@pytest.mark.parametrize("match", ["reference", "tokens"])
def test_laws(negtome, match):
    h, _, p = read(negtome, "c0")

    @jax.jit
    def calls(h):
        still = (negative_merge(h, h[:1], alpha=0.0, threshold=-2.0, match=match), negative_merge(h, h[:1], threshold=1.1))
        rows = jax.vmap(lambda row: negative_merge(row, h[0], match=match, **p))(h)
        return still, rows, negative_merge(h, h[:1], match=match, **p)

    still, rows, whole = calls(h)
    for out in still:
        np.testing.assert_array_equal(out, h)
    np.testing.assert_allclose(rows, whole, rtol=0, atol=1e-6)
    assert negative_merge(jnp.asarray(h, jnp.bfloat16), h[:1], match=match).dtype == jnp.bfloat16


def test_tokens_without_a_direction_stay():
    h = np.repeat(np.float32([[1], [0], [np.nan]]), 4, axis=1)
    reference = np.full((2, 4), 2, np.float32)
    out = jax.jit(lambda h: negative_merge(h, reference, alpha=1.0))(h)
    np.testing.assert_array_equal(out, [[0] * 4, [0] * 4, [np.nan] * 4])  # only the first has a match, and is pushed off it
    none = jax.jit(lambda h: negative_merge(h, reference, threshold=-2.0, mask=np.zeros((3, 2), bool)))(h)
    np.testing.assert_array_equal(none, h)


def test_gradients_are_those_of_the_moves(negtome):
    h, _, p = read(negtome, "c0")
    x, reference = jnp.asarray(h[1]), jnp.asarray(h[0])
    dx, dr = jax.grad(lambda x, r: negative_merge(x, r, **p).sum(), argnums=(0, 1))(x, reference)
    moved = np.any(np.asarray(negative_merge(x, reference, **p)) != h[1], axis=-1)
    np.testing.assert_allclose(dx, np.where(moved[:, None], 1.9, 1.0) * np.ones_like(h[1]), rtol=1e-6)
    np.testing.assert_allclose(dr.sum(), -0.9 * moved.sum() * h.shape[-1], rtol=1e-5)


@pytest.mark.parametrize("match", ["reference", "tokens"])
def test_every_device_moves_its_own(mesh, match):
    x = np.random.default_rng(0).standard_normal((8, 16, 8)).astype(np.float32)
    layout = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        args = jax.device_put(x, layout), jax.device_put(x[:1], NamedSharding(mesh, P()))
        compiled = jax.jit(lambda x, r: negative_merge(x, r, threshold=0.3, match=match)).lower(*args).compile()
        out = compiled(*args)
    assert collectives(compiled) == []
    assert out.sharding.is_equivalent_to(layout, 3)
    np.testing.assert_allclose(out, negative_merge(x, x[:1], threshold=0.3, match=match), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda h: negative_merge(h, h[0]), r"as many axes and the same d, got \(3, 24, 8\) and \(24, 8\)"),
        (lambda h: negative_merge(h, h[..., :4]), "same d"),
        (lambda h: negative_merge(h, h[:, :5], match="tokens"), "so n = m; got 24 and 5"),
        (lambda h: negative_merge(h, h, match="official"), '"reference" or "tokens", got \'official\''),
    ],
)
def test_bad_input(call, message, negtome, unchecked):
    with pytest.raises(ValueError, match=message):
        call(negtome["c0/h"])
