"""H-Net's router, ratio loss and de-chunking: the official vectors, the loop, packed documents, meshes, faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge import words
from tests.hlo import collectives

KEY = jax.random.key(0)
route, segments = jax.jit(words.route), jax.jit(words.segments, static_argnums=1)


def routed(z, h, **kwargs):
    h = jnp.asarray(h)
    return route(h @ z["rt/q_proj_layer.weight"].T, h @ z["rt/k_proj_layer.weight"].T, **kwargs)


def test_routing_equals_the_official(golden):
    z = golden("bytes/hnet_a")
    mask = jnp.asarray(z["rt/mask"])
    routing = routed(z, z["rt/h"], mask=mask)
    np.testing.assert_allclose(routing.p, z["rt/boundary_prob"][..., 1], atol=1e-6)
    np.testing.assert_array_equal(routing.starts, z["rt/boundary_mask"])
    # The official confidence of padding is that of no boundary.
    decided = np.where(mask, routing.confidence, 0)
    np.testing.assert_allclose(decided, np.where(mask, z["rt/selected_probs"][..., 0], 0), atol=1e-6)


def test_ratio_loss_and_its_gradient_equal_the_official(golden):
    """The official loss averages over padding too: without a mask ours is that."""
    z = golden("bytes/hnet_a")
    loss = lambda h: words.ratio_loss(routed(z, h, mask=jnp.asarray(z["rt/mask"])), 3.0)
    value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(z["rt/h"]))
    np.testing.assert_allclose(value, z["rt/load_balancing_loss"], rtol=1e-6)
    np.testing.assert_allclose(grad, z["rt/lb_grad_h"], atol=1e-7)


def test_padding_does_not_change_the_ratio_loss():
    h, k = jax.random.normal(KEY, (2, 2, 12, 8))
    loss = jax.jit(lambda routing, mask=None: words.ratio_loss(routing, 4.0, mask=mask))
    short = loss(route(h, k))
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 5), (0, 0)), constant_values=3.0)
    mask = jnp.broadcast_to(jnp.arange(17) < 12, (2, 17))
    np.testing.assert_allclose(loss(route(pad(h), pad(k), mask=mask), mask), short, rtol=1e-6)


def test_chunks_and_dechunking_equal_the_official(golden):
    z = golden("bytes/hnet_a")
    mask = jnp.asarray(z["rt/mask"])
    routing = routed(z, z["rt/h"], mask=mask)
    plan = segments(routing.starts, 9, mask=mask)
    chunks = jm.merge(plan, jnp.asarray(z["rt/h"]), reduce="first")
    np.testing.assert_array_equal(plan.sizes > 0, z["ch/mask"])
    np.testing.assert_array_equal(chunks[z["ch/mask"]], z["ch/hidden"][z["ch/mask"]])
    out = jax.jit(words.dechunk)(plan, jnp.asarray(z["de/inner"]), routing.p)
    there = np.asarray(mask)[..., None]
    np.testing.assert_allclose(out, np.where(there, z["de/out_f32"], 0), atol=1e-5)
    assert np.abs(np.where(there, out - z["de/out_bf16"], 0)).max() > 1e-4  # what bfloat16 costs them


def test_packed_documents_equal_the_official(golden):
    z = golden("bytes/hnet_a")
    documents = jnp.asarray(np.repeat(np.arange(3), np.diff(z["pk/cu_seqlens"])))
    routing = routed(z, z["pk/h"], documents=documents)
    np.testing.assert_allclose(routing.p, z["pk/boundary_prob"][:, 1], atol=1e-6)
    np.testing.assert_array_equal(routing.starts, z["pk/boundary_mask"])
    plan = segments(routing.starts, 34)
    np.testing.assert_array_equal(jm.merge(plan, jnp.asarray(z["pk/h"]), reduce="first"), z["pk/chunk_hidden"])
    out = jax.jit(words.dechunk)(plan, jnp.asarray(z["pk/inner"]), routing.p, documents=documents)
    np.testing.assert_allclose(out, z["pk/dechunk_f32"], atol=1e-5)


def test_a_document_is_alone_in_its_row():
    """What stands in one document changes nothing in another, forwards and backwards."""
    q, k, c = jax.random.normal(KEY, (3, 11, 4))
    documents = jnp.array([0] * 4 + [7] * 7)

    def out(q, k, c):
        routing = route(q, k, documents=documents)
        plan = segments(routing.starts, 11)
        return words.dechunk(plan, c, routing.p, documents=documents)

    first = int(route(q, k, documents=documents).starts[:4].sum())
    alone = route(q[4:], k[4:])
    want = jax.jit(words.dechunk)(segments(alone.starts, 7), c[first:][:7], alone.p)
    np.testing.assert_allclose(jax.jit(out)(q, k, c)[4:], want, atol=1e-6)
    grads = jax.jit(jax.grad(lambda *a: out(*a)[4:].sum(), argnums=(0, 1, 2)))(q, k, c)
    for grad, upto in zip(grads, (4, 4, first), strict=True):
        assert not grad[:upto].any() and grad[upto:].any()


@pytest.mark.parametrize("m", [1, 2, 7, 33])
def test_the_scan_is_the_loop(m):
    """For lengths that are no power of two, with resets, and so are the gradients."""
    x, p = jax.random.normal(KEY, (2, m, 3)), jax.random.uniform(KEY, (2, m))
    resets = jax.random.bernoulli(KEY, 0.2, (2, m))

    def loop(x, p):
        def step(z, now):
            x, p, reset = now
            z = p[:, None] * x + (1 - p[:, None]) * jnp.where(reset[:, None], 0, z)
            return z, z

        return jnp.moveaxis(jax.lax.scan(step, jnp.zeros((2, 3)), [jnp.moveaxis(a, 1, 0) for a in (x, p, resets)])[1], 0, 1)

    scan = lambda x, p: words.moving_average(x, p, resets=resets)
    both = [jax.jit(jax.value_and_grad(lambda x, p, f=f: (f(x, p) ** 2).sum(), argnums=(0, 1)))(x, p) for f in (scan, loop)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *both)


def test_the_average_forgets_nothing_over_long_rows():
    """Float64 beside: 4,000 chunks, probabilities near 0 and near 1, in float32."""
    rng = np.random.default_rng(0)
    m = 4_001
    x, p = rng.standard_normal((m, 2)), np.clip(rng.beta(0.2, 0.2, m), 1e-4, 1 - 1e-4)
    z, want = np.zeros(2), []
    for x_j, p_j in zip(x, p, strict=True):
        z = p_j * x_j + (1 - p_j) * z
        want.append(z)
    got = jax.jit(words.moving_average)(jnp.asarray(x, jnp.float32), jnp.asarray(p, jnp.float32))
    np.testing.assert_allclose(got, np.stack(want), atol=1e-5)
    half = words.dechunk(jm.identity(3), jnp.ones((3, 2), jnp.bfloat16), jnp.ones(3))
    assert half.dtype == jnp.bfloat16


def test_straight_through_decides_forwards_and_learns_backwards():
    p = jnp.array([0.2, 0.9])
    value, pull = jax.vjp(lambda p: words.straight_through(p, jnp.round(p)), p)
    np.testing.assert_array_equal(value, [0, 1])
    np.testing.assert_array_equal(pull(jnp.array([3.0, 5.0]))[0], [3, 5])


def test_states_of_zero_have_finite_gradients():
    grad = jax.grad(lambda h: route(h, h).p.sum())(jnp.zeros((5, 4)))
    assert bool(jnp.isfinite(grad).all())


def test_on_a_mesh(mesh):
    """Routing and de-chunking are local to a row; the ratio is that of the whole batch."""
    q, k, c = jax.random.normal(KEY, (3, 8, 9, 4))
    mask = jnp.arange(9)[None] < jnp.arange(2, 10)[:, None]

    def local(q, k, c, mask):
        routing = words.route(q, k, mask=mask)
        return words.dechunk(words.segments(routing.starts, 6, mask=mask), c[:, :6], routing.p)

    loss = lambda q, k, c, mask: words.ratio_loss(words.route(q, k, mask=mask), 3.0, mask=mask)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (q, k, c, mask)]
        compiled = jax.jit(local).lower(*placed).compile()
        got, got_loss = compiled(*placed), jax.jit(loss)(*placed)
    assert collectives(compiled) == []
    np.testing.assert_allclose(got, jax.jit(local)(q, k, c, mask), atol=1e-6)
    np.testing.assert_allclose(got_loss, jax.jit(loss)(q, k, c, mask), rtol=1e-6)


def test_bad_arguments(unchecked):
    plan, p = jm.words.segments(jnp.ones((2, 5), bool), 4), jnp.ones((2, 5))
    with pytest.raises(ValueError, match=r"dechunk: .*chunks \(2, 4, 'd'\); got \(2, 5\) and \(2, 3, 1\)"):
        jm.words.dechunk(plan, jnp.ones((2, 3, 1)), p)
    h = jnp.zeros((2, 5, 4))
    with pytest.raises(ValueError, match=r"q and k must have one shape, got \(2, 5, 4\) and \(2, 5\)"):
        words.route(h, h[..., 0])
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\), one per byte; got \(5,\)"):
        words.route(h, h, mask=jnp.ones(5, bool))
    with pytest.raises(ValueError, match="ratio must be above 1 byte per chunk, got 1"):
        words.ratio_loss(words.route(h, h), 1)
    with pytest.raises(ValueError, match=r"p must have shape \(2, 5\), one per row of x; got \(5,\)"):
        words.moving_average(h, jnp.ones(5))
