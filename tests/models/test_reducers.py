"""Parts that carry weights: each equation written down again in numpy, every parameter learns, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmerge as jm
from models.reducers import arc_encoder, crosslmm, fcaformer, flexdit, subtokens, token_shuffle, tokenflex

B, D, HEADS = 2, 16, 2
GRID = (4, 4)


def tokens(n, seed=0):
    return np.random.default_rng(seed).standard_normal((B, n, D)).astype(np.float32)


def randomised(module, seed=7):
    """Every parameter drawn anew, so that what starts at 0 or 1 takes part."""
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        leaf[...] = jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
    return module


MODULES = {
    "tme": lambda r: fcaformer.TokenMergeEnhance(D, rngs=r),
    "fcaformer": lambda r: fcaformer.CrossTokenAttention(D, HEADS, GRID, 3, rngs=r),
    "tokenflex": lambda r: tokenflex.Projector(D, 24, hidden=20, rngs=r),
    "shuffle": lambda r: token_shuffle.TokenShuffle(D, 2, rngs=r),
    "unshuffle": lambda r: token_shuffle.TokenUnshuffle(D, 2, rngs=r),
    "flexdit": lambda r: flexdit.SparseDense(D, HEADS, GRID, (2, 2), depths=(1, 1, 1), mlp_ratio=2.0, rngs=r),
    "flexdit pooling": lambda r: flexdit.PoolingBlock(D, mlp_ratio=2.0, rngs=r),
    "crosslmm": lambda r: crosslmm.DualCrossAttention(D, HEADS, rngs=r),
    "arc": lambda r: arc_encoder.PooledBlock(arc_encoder.BlockConfig(D, 4, 2, 24), rngs=r),
    "subtokens": lambda r: subtokens.AttentionPool(D, rngs=r),
}
RUNS = jm.tokens.sequence_pool(16, 5)
CALLS = {
    "tme": lambda m, x: m(x, GRID),
    "fcaformer": lambda m, x: m(x, x[:, :3]),
    "tokenflex": lambda m, x: m(x, GRID, (3, 3)),
    "shuffle": lambda m, x: m(x, GRID),
    "unshuffle": lambda m, x: m(x[:, :4], GRID),
    "flexdit": lambda m, x: m(x, x[:, 0]),
    "flexdit pooling": lambda m, x: m(x, x[:, 0]),
    "crosslmm": lambda m, x: m(x[:, :7], x, num_visual=4),
    "arc": lambda m, x: m(x, jm.tokens.sequence_pool(16, 5, like=x)),
    "subtokens": lambda m, x: m(x, jm.tokens.sequence_pool(16, 5, like=x)),
}


# --- the equations


def lin(layer, x):
    y = x @ np.asarray(layer.kernel[...], np.float64)
    return y if layer.bias is None else y + np.asarray(layer.bias[...], np.float64)


def norm(x, layer=None, eps=1e-6):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return y if layer is None else y * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q, k, v, bias=0.0, heads=HEADS):
    """(b, t, d), (b, s, e), (b, s, e) -> (b, t, d); key heads are repeated."""
    split = lambda z, h: z.reshape(*z.shape[:2], h, -1).transpose(0, 2, 1, 3)
    q = split(q, heads)
    k, v = (np.repeat(split(z, z.shape[-1] // q.shape[-1]), heads * q.shape[-1] // z.shape[-1], axis=1) for z in (k, v))
    p = softmax(q @ k.transpose(0, 1, 3, 2) * q.shape[-1] ** -0.5 + bias)
    return (p @ v).transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)


silu = lambda x: x / (1 + np.exp(-x))
gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def token_merge_enhance(m, x, grid):
    (h, w), kernel = grid, np.asarray(m.conv.kernel[...], np.float64)[:, :, 0]
    image = np.pad(x.reshape(B, h, w, D), ((0, 0), (3, 6), (3, 6), (0, 0)))
    at = lambda i, j: (image[:, 4 * i : 4 * i + 7, 4 * j : 4 * j + 7] * kernel).sum((1, 2))
    return np.stack([at(i, j) for i in range(-(-h // 4)) for j in range(-(-w // 4))], axis=1)


def cross_token_attention(m, x, cross):
    table, place = np.asarray(m.bias[...]), [(i, j) for i in range(4) for j in range(4)]
    near = np.array([[table[:, abs(a - c) * 4 + abs(b - d)] for c, d in place] for a, b in place]).transpose(2, 0, 1)
    far = np.broadcast_to(np.asarray(m.cross_bias[...]), (1, HEADS, 16, cross.shape[1]))
    s = norm(cross * np.asarray(m.cross_scale[...]), m.cross_norm, 1e-5)
    own, other = lin(m.qkv, norm(x, m.norm, 1e-5)), lin(m.qkv, s)
    k, v = (np.concatenate([own[..., i : i + D], other[..., i : i + D]], 1) for i in (D, 2 * D))
    out = attend(own[..., :D], k, v, np.concatenate([near[None], far], -1))
    return x + np.asarray(m.gamma[...]) * lin(m.proj, out)


def projector(m, x):
    weights = np.asarray(jm.tokens.grid_pool(GRID, (3, 3)).matrix, np.float64)
    y = norm(weights / weights.sum(-1, keepdims=True) @ x, m.norm)
    return lin(m.down, silu(lin(m.gate, y)) * lin(m.up, y))


def fusion(m, x):
    for n, fc1, fc2 in zip(m.norms, m.fc1, m.fc2, strict=True):
        x = x + lin(fc2, gelu(lin(fc1, norm(x, n))))
    return x


def shuffle(m, x):
    y = lin(m.compress, x).reshape(B, 4, 4, D // 4)
    windows = [y[:, i : i + 2, j : j + 2].reshape(B, D) for i in (0, 2) for j in (0, 2)]
    return fusion(m.fusion, np.stack(windows, axis=1))


def unshuffle(m, x):
    y = fusion(m.fusion, x).reshape(B, 2, 2, 2, 2, D // 4)
    image = np.zeros((B, 4, 4, D // 4))
    for i, j, a, b in np.ndindex(2, 2, 2, 2):
        image[:, 2 * i + a, 2 * j + b] = y[:, i, j, a, b]
    return lin(m.expand, image.reshape(B, 16, D // 4))


def adaptive(m, mix, x, c, memory):
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(lin(m.modulation, silu(c))[:, None], 6, -1)
    x = x + gate1 * mix(norm(x) * (1 + scale1) + shift1, norm(memory) * (1 + scale1) + shift1)
    return x + gate2 * lin(m.fc2, gelu(lin(m.fc1, norm(x) * (1 + scale2) + shift2)))


def dit_block(m, x, c, memory):
    mix = lambda x, y: lin(m.proj, attend(lin(m.q, x), *np.split(lin(m.kv, y), 2, -1)))
    return adaptive(m.adaptive, mix, x, c, memory)


def pooling_block(m, x, c):
    """Uniform attention over all values, as the official code spells it."""
    mix = lambda x, _: lin(m.proj, np.full((16, 16), 1 / 16) @ lin(m.v, x))
    return adaptive(m.adaptive, mix, x, c, x)


def sparse_dense(m, x, c):
    dense = x
    x = dense.reshape(B, 2, 2, 2, 2, D).mean((2, 4)).reshape(B, 4, D)
    x = dit_block(m.merge[0], x, c, dense)
    x = dit_block(m.middle[0], x, c, x)
    up = x.reshape(B, 2, 2, D).repeat(2, 1).repeat(2, 2).reshape(B, 16, D)
    merged = lin(m.recover.from_sparse, up) + lin(m.recover.from_dense, dense)
    x = dit_block(m.recover.block, merged, c, x)
    return dit_block(m.after[0], x, c, x)


def dual_cross_attention(m, h, memory):
    one = lambda a, h: h + np.tanh(np.asarray(a.gamma[...])) * attend(lin(a.q, h), lin(a.k, memory), lin(a.v, memory))
    return np.concatenate([one(m.visual, h[:, :4]), one(m.text, h[:, 4:])], 1)


def pooled_block(m, x, causal=False):
    rms = lambda x, layer: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(layer.scale[...])
    ids = np.asarray(RUNS.segment_ids)
    y = np.stack([x[:, ids == s].mean(1) for s in range(5)], 1)

    def turn(z, heads):
        """As complex numbers, as the official code does it."""
        z = z.reshape(B, z.shape[1], heads, -1, 2)
        z = z[..., 0] + 1j * z[..., 1]
        z = z * np.exp(1j * np.arange(z.shape[1])[:, None, None] * 1e6 ** (-np.arange(z.shape[-1]) / z.shape[-1]))
        return np.stack([z.real, z.imag], -1).reshape(B, z.shape[1], -1)

    memory = rms(x, m.attention_norm)
    q, k = turn(lin(m.wq, rms(y, m.attention_norm)), 4), turn(lin(m.wk, memory), 2)
    seen = np.arange(16) <= np.array([np.flatnonzero(ids == s).max() for s in range(5)])[:, None]
    y = y + lin(m.wo, attend(q, k, lin(m.wv, memory), np.where(seen, 0, -np.inf) if causal else 0, heads=4))
    z = rms(y, m.ffn_norm)
    return y + lin(m.w2, silu(lin(m.w1, z)) * lin(m.w3, z))


def attention_pool(m, x):
    ids, score = np.asarray(RUNS.segment_ids), lin(m.score, x)[..., 0]
    pool = lambda here: np.einsum("bn,bnd->bd", softmax(score[:, here]), x[:, here])
    return np.stack([pool(np.flatnonzero(ids == s)) for s in range(5)], 1)


RULES = {
    "tme": lambda m, x: token_merge_enhance(m, x, GRID),
    "fcaformer": lambda m, x: cross_token_attention(m, x, x[:, :3]),
    "tokenflex": projector,
    "shuffle": shuffle,
    "unshuffle": lambda m, x: unshuffle(m, x[:, :4]),
    "flexdit": lambda m, x: sparse_dense(m, x, x[:, 0]),
    "flexdit pooling": lambda m, x: pooling_block(m, x, x[:, 0]),
    "crosslmm": lambda m, x: dual_cross_attention(m, x[:, :7], x),
    "arc": pooled_block,
    "subtokens": attention_pool,
}


@pytest.mark.parametrize("name", MODULES)
def test_equals_the_equations_and_every_parameter_learns(name):
    module, x = randomised(MODULES[name](nnx.Rngs(0))), tokens(16)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params):
        y = CALLS[name](nnx.merge(graph, params, rest), x)
        return (y**2).mean(), y

    evaluate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, y), grads = evaluate(params)
    np.testing.assert_allclose(y, RULES[name](module, x.astype(np.float64)), rtol=1e-4, atol=1e-4)
    for path, grad in nnx.to_flat_state(grads):
        grad = np.asarray(grad[...])
        assert np.isfinite(grad).all() and (grad != 0).any(), path

    # along the gradient, by a step at which the loss changes by a thousandth of itself and float32 by a ten-thousandth of that
    squared = sum(float((np.asarray(g[...], np.float64) ** 2).sum()) for _, g in nnx.to_flat_state(grads))
    h = 1e-3 * float((np.asarray(y, np.float64) ** 2).mean()) / squared
    ahead, behind = (evaluate(jax.tree.map(lambda p, g, h=h: p + h * g, params, grads))[0][0] for h in (h, -h))
    np.testing.assert_allclose((float(ahead) - float(behind)) / (2 * h), squared, rtol=1e-2)


def test_cross_tokens_of_sides_that_four_does_not_divide():
    module, x = randomised(fcaformer.TokenMergeEnhance(D, rngs=nnx.Rngs(0))), tokens(30)
    assert fcaformer.num_cross_tokens((5, 6)) == 4 and fcaformer.num_cross_tokens((14, 14)) == 16
    np.testing.assert_allclose(module(x, (5, 6)), token_merge_enhance(module, x, (5, 6)), rtol=1e-4, atol=1e-4)


def test_the_first_block_has_no_cross_tokens():
    module = fcaformer.CrossTokenAttention(D, HEADS, GRID, 0, gamma=0.0, rngs=nnx.Rngs(0))
    x = tokens(16)
    np.testing.assert_array_equal(module(x), x)  # layer scale 0
    assert not hasattr(module, "cross_scale")


def test_what_is_inserted_changes_nothing_at_first():
    x, r = tokens(16), nnx.Rngs(0)
    read, recover = crosslmm.DualCrossAttention(D, HEADS, rngs=r), flexdit.RecoveryBlock(D, HEADS, GRID, (2, 2), rngs=r)
    pool = subtokens.AttentionPool(D, rngs=r)

    @jax.jit
    def calls(x):
        plan = jm.tokens.sequence_pool(16, 5, like=x)
        return read(x, x, num_visual=9), recover(x[:, :4], x[:, 0], x), pool(x, plan), jm.merge(plan, x)

    inserted, recovered, pooled, means = calls(x)
    np.testing.assert_array_equal(inserted, x)
    np.testing.assert_allclose(recovered, x, rtol=1e-6)
    np.testing.assert_allclose(pooled, means, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sparse", [(3, 3), (2, 3)])
def test_upsampling_takes_the_nearest_place_rounded_down(sparse):
    plan = flexdit._upsampling((5, 7), sparse)
    small = np.arange(sparse[0] * sparse[1]).reshape(sparse)
    want = [[small[int(i * sparse[0] / 5), int(j * sparse[1] / 7)] for j in range(7)] for i in range(5)]
    np.testing.assert_array_equal(plan.segment_ids.reshape(5, 7), want)


def test_a_causal_encoder_sees_its_own_run_and_no_later_key():
    module, x = randomised(MODULES["arc"](nnx.Rngs(0))), tokens(16)
    plan = jm.tokens.sequence_pool(16, 5, like=x)
    call = jax.jit(lambda x: module(x, plan, causal=True))
    np.testing.assert_allclose(call(x), pooled_block(module, x.astype(np.float64), causal=True), rtol=1e-4, atol=1e-4)
    later = x.copy()
    later[:, 4:] += 1  # the first run is 4 long
    np.testing.assert_array_equal(call(later)[:, 0], call(x)[:, 0])


def test_masked_tokens_are_not_read():
    x, mask = tokens(16), jnp.asarray(np.arange(16) < np.array([[16], [12]]))
    other = np.where(mask[..., None], x, 5.0).astype(np.float32)
    read = randomised(MODULES["crosslmm"](nnx.Rngs(0)))
    call = jax.jit(lambda memory: read(x[:, :7], memory, num_visual=4, mask=mask))
    np.testing.assert_allclose(call(other), call(x), rtol=0, atol=1e-6)
    block = randomised(MODULES["arc"](nnx.Rngs(0)))
    plan = jm.Plan(jnp.where(mask, jm.tokens.sequence_pool(16, 4, like=x).segment_ids, -1), 4)
    call = jax.jit(lambda x: block(x, plan, mask=mask))
    np.testing.assert_allclose(call(other)[:, :3], call(x)[:, :3], rtol=0, atol=1e-6)


def test_large_scores_do_not_overflow():
    module, x = subtokens.AttentionPool(D, rngs=nnx.Rngs(0)), tokens(16)
    module.score.bias[...] = jnp.full((1,), 300.0)  # exp would be inf
    plan = jm.tokens.sequence_pool(16, 5, like=x)
    pooled, means = jax.jit(lambda x: (module(x, plan), jm.merge(plan, x)))(x)
    np.testing.assert_allclose(pooled, means, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MODULES["fcaformer"](nnx.Rngs(0))(tokens(16)), "built for 3 cross tokens, got 0"),
        (lambda: token_shuffle.TokenShuffle(18, 2, rngs=nnx.Rngs(0)), "multiple of window² = 4, got 18"),
        (lambda: MODULES["crosslmm"](nnx.Rngs(0))(tokens(4), tokens(4), num_visual=5), "between 0 and the 4 tokens, got 5"),
        (lambda: arc_encoder.BlockConfig(18, 2, 2, 8), "num_heads 2 must leave an even head size of d 18"),
        (lambda: arc_encoder.BlockConfig(16, 4, 3, 8), "num_kv_heads 3 must divide it"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
