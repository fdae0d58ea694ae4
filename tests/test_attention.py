"""The key bias: what a plan means to attention, in both of its forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge.attention import MASKED, append_bias, key_bias, packed_attention, proportional_attention, segment_mask
from tests.hlo import collectives

B, T, S, H, D = 8, 5, 6, 2, 8


def qkv(dtype=jnp.float32, groups=H):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, H, D), (B, S, groups, D), (B, S, groups, D)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def explicit_softmax(q, k, v, bias, scale):
    """The equation in numpy, float64, one head per query head."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) * scale + np.asarray(bias, np.float64)[:, None, None, :]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


def bias_of_every_kind():
    sizes = jnp.array([[1, 3, 0, 7, 1, 2]] * B)
    here = jnp.broadcast_to(jnp.arange(6), (B, 6))
    return key_bias(sizes, gate=-here.astype(jnp.float32), mask=here != 4)


def test_key_bias_adds_log_size_gate_and_mask():
    bias = bias_of_every_kind()[0]
    np.testing.assert_allclose(bias[jnp.array([0, 1, 3, 5])], [0, np.log(3) - 1, np.log(7) - 3, np.log(2) - 5], rtol=1e-6)
    assert bias[2] < -1e38 and bias[4] < -1e38 and bias.dtype == jnp.float32


@pytest.mark.parametrize("groups", [H, 1], ids=["heads", "shared heads"])
def test_bias_argument_equals_the_equation(groups):
    q, k, v = qkv(groups=groups)
    bias = bias_of_every_kind()
    np.testing.assert_allclose(
        proportional_attention(q, k, v, bias), explicit_softmax(q, k, v, bias, D**-0.5), rtol=1e-5, atol=1e-6
    )


# Rounding of the bias column: float32 carries 24 bits of it. bfloat16 carries 8 + 8 in two columns, so |bias| <= 8 is off by
# at most 8 * 2^-16 = 1.2e-4 in the logit. The outputs are of order one and are rounded to the dtype itself (2^-8 in bfloat16).
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2 * 2**-7)])
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_appended_columns_equal_the_bias_argument(dtype, tolerance, scale):
    q, k, v = qkv(dtype)
    bias, factor = bias_of_every_kind(), D**-0.5 if scale is None else scale
    wide = append_bias(q, k, v, bias, scale=scale, multiple_of=16)
    assert all(a.shape[-1] == 16 and a.dtype == dtype for a in wide)
    out = jax.nn.dot_product_attention(*wide, scale=factor)
    assert jnp.all(out[..., D:] == 0)
    np.testing.assert_allclose(
        out[..., :D].astype(jnp.float32), explicit_softmax(q, k, v, bias, factor), rtol=tolerance, atol=tolerance
    )


def test_two_bfloat16_columns_carry_sixteen_bits():
    bias = jnp.log(jnp.arange(1.0, 7.0))[None] * jnp.ones((B, 1))
    q, k, v = qkv(jnp.bfloat16)
    wide = append_bias(q, k, v, bias)[1][0, :, 0, D:].astype(jnp.float32)
    assert wide.shape == (S, 2)
    np.testing.assert_allclose(wide.sum(-1) * D**-0.5, bias[0], rtol=2**-15)
    one_column = bias[0].astype(jnp.bfloat16).astype(jnp.float32)
    assert jnp.abs(one_column - bias[0]).max() > 2**-10  # which is why there are two


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_masked_keys_get_no_weight_and_a_row_without_keys_no_nan(dtype):
    q, k, v = qkv(dtype)
    none = key_bias(mask=jnp.zeros((B, S), bool))
    some = key_bias(mask=jnp.broadcast_to(jnp.arange(S) < 2, (B, S)))
    loud = v.at[:, 2:].set(100)
    for form in (
        lambda v, b: proportional_attention(q, k, v, b),
        lambda v, b: jax.nn.dot_product_attention(*append_bias(q, k, v, b), scale=D**-0.5)[..., :D],
    ):
        assert jnp.isfinite(form(v, none)).all()
        assert jnp.abs(form(loud, some)).max() < 10
        grad = jax.grad(lambda b, form=form: form(v, b).astype(jnp.float32).sum())(none)
        assert jnp.isfinite(grad).all()


def test_merged_tokens_attend_as_their_copies_do():
    plan = jm.Plan(jnp.array([0, 1, 0, 2, 1, 0]), 4)  # the last slot is empty
    x = jm.merge(plan, jax.random.normal(jax.random.key(3), (S, H, D)))
    copies = jm.unmerge(plan, x)
    short = proportional_attention(x, x, x, key_bias(plan))
    np.testing.assert_allclose(
        jm.unmerge(plan, short), proportional_attention(copies, copies, copies, None), rtol=1e-5, atol=1e-6
    )


def test_segment_mask_is_block_diagonal():
    plan = jm.Plan(jnp.array([0, 0, 1, -1, 5]), 2)
    want = np.array([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(segment_mask(plan), want)
    np.testing.assert_array_equal(segment_mask(plan, causal=True), np.tril(want))


def test_no_collective_on_a_mesh(mesh):
    q, k, v = qkv()
    place = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
    forms = (
        lambda q, k, v, s: proportional_attention(q, k, v, key_bias(s)),
        lambda q, k, v, s: jax.nn.dot_product_attention(*append_bias(q, k, v, key_bias(s)), scale=D**-0.5)[..., :D],
    )
    sizes = jnp.array([[1, 3, 0, 7, 1, 2]] * B)
    with jax.set_mesh(mesh):
        args = [place(a) for a in (q, k, v, sizes)]
        for form in forms:
            compiled = jax.jit(form).lower(*args).compile()
            assert collectives(compiled) == []
            np.testing.assert_allclose(compiled(*args), forms[0](q, k, v, sizes), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (key_bias, "at least one"),
        (lambda: key_bias(jnp.ones((2, 3)), mask=jnp.ones((2, 4), bool)), r"one shape.*\(2, 3\).*\(2, 4\)"),
        (lambda: append_bias(*qkv(), jnp.zeros((B, T))), r"bias \(\*batch, s\); got.*\(8, 5\)"),
        (lambda: append_bias(*qkv(), jnp.zeros((B, S)), multiple_of=0), "1 or more, got 0"),
        (lambda: proportional_attention(*(a[None] for a in qkv()), None), r"jax.vmap over more axes.*got \(1, 8, 5"),
        (lambda: proportional_attention(*qkv(), jnp.zeros((B, S + 1))), rf"bias \(b, s\).*and \({B}, {S + 1}\)"),
    ],
)
def test_bad_input(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()


def test_masked_is_finite_in_bfloat16():
    assert jnp.isfinite(jnp.bfloat16(MASKED))


@pytest.mark.parametrize(
    "t, s, causal",
    [(5, 5, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((5, 5, False), (4, 7, False), (6, 6, False)))],
)
def test_odd_lengths_made_even_change_nothing(monkeypatch, t, s, causal):
    """cuDNN has gradients for even lengths alone. Here XLA stands in for it, and refuses odd ones under differentiation."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 3, 8)), jnp.float32) for n in (t, s, s))
    bias = jm.attention.key_bias(jnp.asarray(rng.integers(1, 5, (2, s))))
    seen = []

    def flash(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        seen.append((q.shape[1], k.shape[1]))
        return plain(q, k, v, **options)

    plain = jax.nn.dot_product_attention
    loss = lambda which: lambda *a: (jm.attention.proportional_attention(*a, is_causal=causal, implementation=which) ** 2).sum()
    for some in (bias, None):
        wanted = jax.value_and_grad(loss("xla"), argnums=(0, 1, 2))(q, k, v, some)
        with monkeypatch.context() as m:
            m.setattr(jax.nn, "dot_product_attention", flash)
            value = loss("cudnn")(q, k, v, some)
            found = jax.value_and_grad(loss("cudnn"), argnums=(0, 1, 2))(q, k, v, some)
        assert seen[0] == (t, s) and seen[-1] == (t + t % 2, s + s % 2)
        chex.assert_trees_all_close((found, value), (wanted, wanted[0]), rtol=1e-5, atol=1e-5)


def test_packed_attention_is_attention_of_its_three_parts():
    rng, length = np.random.default_rng(0), 5
    packed = jnp.asarray(rng.standard_normal((B, S, 3, H, D)), jnp.float32)
    offset = jnp.asarray(rng.standard_normal((3, H, D)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((B, length)), jnp.float32)
    q, k, v = (packed[:, :length, i] + offset[None, None, i] for i in range(3))
    found = packed_attention(packed, bias, offset=offset, length=length)
    np.testing.assert_array_equal(found, proportional_attention(q, k, v, bias))
    # what is added to every key adds the same to all scores of a query, which a softmax does not see
    shifted = packed_attention(packed, bias, offset=offset.at[1].add(3.0), length=length)
    np.testing.assert_allclose(found, shifted, rtol=1e-4, atol=1e-5)
    again, keys = packed_attention(packed, bias, offset=offset, length=length, mean_keys=True)
    np.testing.assert_array_equal(again, found)
    np.testing.assert_allclose(keys, k.mean(axis=-2), rtol=0, atol=2.0**-22 * np.abs(k).max())


@pytest.mark.parametrize(
    "packed, options, expected",
    [
        ((B, S, 2, H, D), {}, "3, heads, features"),
        ((B, S, 3, H, D), {"length": S + 1}, f"length {S + 1}"),
        ((B, S, 3, H, D), {"offset": (3, H, D + 1)}, "offset must have the shape"),
        ((B, S, 3, H, D), {"bias": (B, S - 1)}, "a bias of shape"),
    ],
)
def test_packed_attention_refuses_what_does_not_fit(packed, options, expected):
    options = {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in options.items()}
    with pytest.raises(ValueError, match=expected):
        packed_attention(jnp.zeros(packed), options.pop("bias", None), **options)


def test_a_mask_is_refused_by_the_kernel():
    q, k, v = qkv(jnp.bfloat16)
    with pytest.raises(ValueError, match="takes no mask"):
        proportional_attention(q, k, v, None, is_causal=True, implementation="mosaic_gpu")


def test_attention_refuses_what_does_not_fit(unchecked):
    q, k, v = qkv()
    for some in ((q, k, v[:, 1:]), (q, k[:, :, :1], v), (q[:1], k, v), (q[..., :4], k, v), (q[:, :, :1], k, v)):
        with pytest.raises(ValueError, match="proportional_attention: expected q"):
            proportional_attention(*some, None)
