"""T5 v1.1 and ByT5, equal to the published implementation: states, logits, loss, every gradient, greedy text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmerge import words
from models import load, t5
from models.fold import Scanned

CONFIG = t5.T5Config(d_model=32, d_kv=12, d_ff=48, num_heads=2, num_layers=3, num_decoder_layers=2, dropout=0.0)
ATOL = 1e-4  # the golden vectors' own figure for float32
FORMS = {
    "list": {},
    "scanned": dict(scan=True, remat="full"),
    "blocks": dict(scan=True, remat="dots", block_size=5),
}


@pytest.fixture(scope="module")
def case(golden):
    z = golden("bytes/byt5_a")
    model = t5.T5(CONFIG, rngs=nnx.Rngs(0))
    load.load(model, state_dict(z), t5.torch_name, ignore=t5.ALIASES)
    return model, z


@pytest.fixture(scope="module", params=FORMS, ids=FORMS)
def form(request, golden):
    """The model of `case` in every form that must not change a number."""
    z = golden("bytes/byt5_a")
    model = t5.T5(CONFIG, **FORMS[request.param], rngs=nnx.Rngs(0))
    load.load(model, state_dict(z), t5.torch_name, ignore=t5.ALIASES)
    return model, z


def state_dict(z):
    return {k.removeprefix("sd/"): z[k] for k in z if k.startswith("sd/")}


def run(model, ids, mask, labels):
    encoded = model.encode(ids, mask)
    decoded = model.decode(t5.shift_right(labels), encoded.states, encoded.key_bias)
    return t5.cross_entropy(decoded.logits, labels), (encoded, decoded)


def test_states_logits_loss_and_gradients(form):
    model, z = form
    ids, mask, labels = (jnp.asarray(z[f"in/{k}"]) for k in ("input_ids", "attention_mask", "labels"))
    graph, params = nnx.split(model)
    f = lambda p: run(nnx.merge(graph, p), ids, mask > 0, labels)
    (loss, (encoded, decoded)), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(params)

    there = np.asarray(mask) > 0  # what padding computes is nobody's business
    for i, h in enumerate(encoded.hidden):
        np.testing.assert_allclose(np.asarray(h)[there], z[f"out/encoder_hidden_states/{i}"][there], atol=ATOL)
    for i, h in enumerate(decoded.hidden):
        np.testing.assert_allclose(h, z[f"out/decoder_hidden_states/{i}"], atol=ATOL)
    np.testing.assert_allclose(decoded.logits, z["out/logits"], atol=ATOL)
    np.testing.assert_allclose(loss, z["out/loss"], atol=ATOL)
    np.testing.assert_array_equal(t5.shift_right(labels), z["out/decoder_input_ids"])
    check_gradients(load.export(nnx.merge(graph, grads), t5.torch_name), z, "grad")


def check_gradients(got, z, prefix):
    for key in z:
        if key.startswith(f"{prefix}/"):
            np.testing.assert_allclose(got[key.removeprefix(f"{prefix}/")], z[key], atol=ATOL, err_msg=key)
        if key.startswith("grad_rowsum/"):
            np.testing.assert_allclose(got[key.removeprefix("grad_rowsum/")].sum(1), z[key], atol=ATOL, err_msg=key)
    norms = [np.linalg.norm(got[name]) for name in sorted(got)]
    np.testing.assert_allclose(norms, z[f"{prefix}_l2_all"], rtol=1e-4, atol=ATOL)


def test_position_bias_and_buckets(case):
    model, z = case
    np.testing.assert_allclose(model.encoder.position_bias(jnp.arange(24)[None]), z["out/encoder_position_bias"], atol=1e-7)
    bias, causal = model.decoder.position_bias(jnp.arange(10)[None]), np.tril(np.ones((10, 10), bool))
    np.testing.assert_allclose(bias[0, :, causal], z["out/decoder_position_bias"][0][:, causal].T, atol=1e-7)
    assert (np.asarray(bias)[0][:, ~causal] < -1e38).all()
    distance = jnp.arange(-300, 301)
    for causal, key in ((False, "out/bucket_bidirectional_row0_300"), (True, "out/bucket_causal_300")):
        got = t5.relative_buckets(distance, num_buckets=32, max_distance=128, causal=causal)
        np.testing.assert_array_equal(got, z[key])


def test_export_is_the_inverse_of_load(form):
    model, z = form
    out = load.export(model, t5.torch_name)
    for name, value in state_dict(z).items():
        if name not in t5.ALIASES:
            np.testing.assert_array_equal(out.pop(name), value)
    assert not out


def test_a_checkpoint_that_does_not_fit_is_refused_whole(case):
    _, z = case
    tensors = state_dict(z)
    tensors["surprise"] = tensors.pop("lm_head.weight")
    tensors["shared.weight"] = tensors["shared.weight"][:100]
    model = t5.T5(CONFIG, rngs=nnx.Rngs(0))
    before = np.asarray(model.embedding[...])
    with pytest.raises(ValueError, match=r"(?s)missing.*lm_head.*unknown.*surprise.*shape of shared\.weight: \(100, 32\)"):
        load.load(model, tensors, t5.torch_name, ignore=t5.ALIASES)
    np.testing.assert_array_equal(model.embedding[...], before)


@pytest.mark.parametrize(
    "size, millions",
    [
        ("small", 300),
        *(
            pytest.param(*size, marks=pytest.mark.slow)
            for size in (("base", 582), ("large", 1230), ("xl", 3740), ("xxl", 12900))
        ),
    ],
)
def test_variants_have_the_published_size(size, millions):
    model = nnx.eval_shape(lambda: t5.T5(t5.VARIANTS[size], rngs=nnx.Rngs(0)))
    count = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == pytest.approx(millions * 1e6, rel=0.01)


BF16 = 2.0**-8
"""The relative rounding of one bfloat16 number."""


def test_bfloat16_computes_low_and_adds_high(form):
    """Logits differ from float32's by less than 3 · 2^-8 · sqrt(roundings on the way) of their spread.

    Every branch rounds its normed input, its weights and its result, some eight roundings deep (q, k, v, weights, o; likewise
    in the feed-forward), each of relative size 2^-8 at most and independent of the others; a stack adds its branches in
    float32. With 2 branches per encoder block and 3 per decoder block, n = 8 · (2 · 3 + 3 · 2) = 96 roundings add up to
    sqrt(96) · 2^-8 = 0.038 of the spread: the root mean square must stay below, the largest of 7680 below four times it.
    """
    model, z = form
    low = t5.T5(CONFIG, dtype=jnp.bfloat16, scan=isinstance(model.encoder.blocks, Scanned), rngs=nnx.Rngs(0))
    load.load(low, state_dict(z), t5.torch_name, ignore=t5.ALIASES)
    ids, mask, labels = (jnp.asarray(z[f"in/{k}"]) for k in ("input_ids", "attention_mask", "labels"))
    loss, (encoded, decoded) = jax.jit(lambda: run(low, ids, mask > 0, labels))()
    assert all(h.dtype == jnp.float32 for h in (*encoded.hidden[:-1], *decoded.hidden[:-1])), "the residual stream"
    assert decoded.logits.dtype == loss.dtype == jnp.float32 and encoded.states.dtype == jnp.bfloat16
    error = np.asarray(decoded.logits) - z["out/logits"]
    bound = BF16 * 96**0.5 * z["out/logits"].std()
    assert BF16 * z["out/logits"].std() / 10 < np.sqrt((error**2).mean()) < bound and abs(error).max() < 4 * bound
    assert abs(float(loss) - float(z["out/loss"])) < bound  # cross-entropy moves less than the logits do


def test_sixteen_thousand_bytes_need_no_bias_of_all_pairs():
    """Forward and gradients: what the program holds beside its parameters is a few blocks of scores and the activations."""
    n, block, c = 16384, 128, t5.T5Config(16, 4, 32, num_heads=2, num_layers=2, num_decoder_layers=1, softmax1=True)
    scores, activation = c.num_heads * block * n * 4, n * c.d_model * 4

    def temporary(**how):
        model = nnx.eval_shape(lambda: t5.T5(c, scan=True, **how, rngs=nnx.Rngs(0)))
        graph, params = nnx.split(model)

        def loss(p, ids, labels):
            m = nnx.merge(graph, p)
            encoded = m.encode(ids)
            return t5.cross_entropy(m.decode(t5.shift_right(labels), encoded.states, encoded.key_bias).logits, labels)

        ids, labels = jax.ShapeDtypeStruct((1, n), jnp.int32), jax.ShapeDtypeStruct((1, 64), jnp.int32)
        return jax.jit(jax.grad(loss)).lower(params, ids, labels).compile().memory_analysis().temp_size_in_bytes

    bound = 8 * scores + 64 * activation  # scores, weights, their gradients, excess; what two blocks keep for the way back
    assert bound < 210e6 and temporary(block_size=block) < bound
    assert temporary() > c.num_heads * n * n * 4 > 10 * bound  # all at once


def test_a_policy_of_remat_is_named():
    with pytest.raises(ValueError, match=r"remat must be .*dots_saveable.*; got 'some'"):
        jax.eval_shape(lambda: t5.T5(CONFIG, remat="some", rngs=nnx.Rngs(0)).encode(jnp.zeros((1, 4), int)).states)
    with pytest.raises(ValueError, match="block_size must be 1 or more"):
        t5.query_block(0, 10, 100)
    assert t5.query_block("auto", 100, 10**4) == 100 and t5.query_block("auto", 16384, 6 * 16384**2) == 512


def test_dropout_needs_rngs_and_keeps_the_mean():
    x = jnp.ones((64, 64))
    np.testing.assert_array_equal(t5.dropout(x, 0.5, None), x)
    y = t5.dropout(x, 0.25, nnx.Rngs(dropout=0))
    assert set(np.unique(y).round(4)) == {np.float32(0), np.float32(1.3333)} and abs(float(y.mean()) - 1) < 0.05
    model = t5.T5(t5.T5Config(16, 4, 32, 2, 1, 1, dropout=0.5), rngs=nnx.Rngs(0))
    ids = jnp.asarray(words.to_ids("Hello"))[None]
    states = [model.encode(ids, rngs=nnx.Rngs(dropout=seed)).states for seed in (0, 0, 1)]
    np.testing.assert_array_equal(states[0], states[1])
    assert not np.array_equal(states[0], states[2])


def test_unknown_path():
    with pytest.raises(ValueError, match="is no parameter of T5"):
        t5.torch_name("encoder.gate.kernel")
