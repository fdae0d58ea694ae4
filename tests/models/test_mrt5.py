"""MrT5: equal to the official code, soft and hard; the laws of deletion; the same on eight devices as on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxmerge as jm
from models import load, mrt5, sharding, t5
from tests.models.test_t5 import ATOL, FORMS, check_gradients, state_dict

BASE = t5.T5Config(32, 12, 48, 2, num_layers=4, num_decoder_layers=2, softmax1=True, dropout=0.0)
CONFIG = mrt5.MrT5Config(BASE, gate_layer=2)
NAME = functools.partial(mrt5.torch_name, gate_layer=2)


@pytest.fixture(scope="module")
def case(golden):
    z = golden("bytes/mrt5_a")
    model = mrt5.MrT5(CONFIG, rngs=nnx.Rngs(0))
    load.load(model, state_dict(z), NAME, ignore=t5.ALIASES)
    return model, z, jnp.asarray(z["in/input_ids"]), jnp.asarray(z["in/labels"])


@pytest.fixture(scope="module", params=FORMS, ids=FORMS)
def form(request, golden):
    """The model of `case` in every form that must not change a number."""
    z = golden("bytes/mrt5_a")
    model = mrt5.MrT5(CONFIG, **FORMS[request.param], rngs=nnx.Rngs(0))
    load.load(model, state_dict(z), NAME, ignore=t5.ALIASES)
    return model, z, jnp.asarray(z["in/input_ids"]), jnp.asarray(z["in/labels"])


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("capacity", "threshold", "keep_gate"))
def forward(graph, params, ids, labels, **kwargs):
    model = nnx.merge(graph, params)
    encoded = model.encode(ids, **kwargs)
    return encoded, model.decode(t5.shift_right(labels), encoded)


def run(model, ids, labels, **kwargs):
    return forward(*nnx.split(model), ids, labels, **kwargs)


def test_soft_deletion_and_gradients(form):
    model, z, ids, labels = form
    graph, params = nnx.split(model)

    def f(p):
        m = nnx.merge(graph, p)
        total, metrics = mrt5.loss(m, ids, labels, 0.013, score_weight=0.5)
        encoded = m.encode(ids)
        decoded = m.decode(t5.shift_right(labels), encoded)
        return total, (metrics, encoded, decoded, m.score_penalty(encoded, decoded))

    (total, (metrics, encoded, decoded, penalty)), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(params)
    there = z["in/input_ids"] != 0
    for i, h in enumerate(encoded.hidden):
        np.testing.assert_allclose(np.asarray(h)[there], z[f"soft/encoder_hidden_states/{i}"][there], atol=ATOL)
    for i, h in enumerate(decoded.hidden):
        np.testing.assert_allclose(h, z[f"soft/decoder_hidden_states/{i}"], atol=ATOL)
    np.testing.assert_allclose(encoded.gate_logits, z["soft/gate_logits"][..., 0], atol=ATOL)
    np.testing.assert_allclose(encoded.gate, z["soft/gate"][..., 0], atol=ATOL)
    for name in ("soft", "soft_eval"):  # the official code computes both alike when dropout is 0
        np.testing.assert_allclose(decoded.logits, z[f"{name}/logits"], atol=ATOL)
        np.testing.assert_allclose(metrics["ce"], z[f"{name}/ce"], atol=ATOL)
    np.testing.assert_allclose(penalty, z["soft/scores_loss"], atol=1e-6)
    np.testing.assert_allclose(total, z["soft/total_loss"], atol=ATOL)
    np.testing.assert_allclose(metrics["rate"] * 100, z["soft/metric/percent_non_pad_deleted_tokens"], rtol=1e-6)
    np.testing.assert_allclose(0.013 * metrics["gate"], z["soft/metric/delete_gate_loss"], atol=ATOL)
    np.testing.assert_allclose(encoded.gate.mean(), z["soft/metric/delete_gate_average"], atol=ATOL)
    gone = (np.asarray(encoded.gate) <= model.threshold).mean() * 100  # padding counted as deleted
    np.testing.assert_allclose(gone, z["soft/metric/percent_deleted_tokens"], rtol=1e-6)
    check_gradients(load.export(nnx.merge(graph, grads), NAME), z, "soft/grad")


@pytest.mark.parametrize("name, threshold", [("hard", None), ("hard_thr", -6.0)])
def test_hard_deletion(form, name, threshold):
    """`keep_gate=False` is the official rule; ours keeps the gate of what stays, as training saw it."""
    model, z, ids, labels = form
    capacity = z[f"{name}/positions"].shape[1]  # theirs: the longest row of this batch; ours: any static number
    encoded, decoded = run(model, ids, labels, capacity=capacity, threshold=threshold, keep_gate=False)
    there = z[f"{name}/delete_gate_mask"][..., 0] == 0
    np.testing.assert_array_equal(encoded.plan.sizes > 0, there)
    np.testing.assert_allclose(encoded.gate, z[f"{name}/gate"][..., 0], atol=ATOL)
    positions = np.array([np.flatnonzero(row >= 0).tolist() + [0] * capacity for row in encoded.plan.segment_ids], object)
    for row, want in zip(positions, z[f"{name}/positions"], strict=True):
        assert row[: len(want)] == want.tolist()
    assert encoded.plan.overflow.tolist() == [0, 0, 0]
    assert z[f"{name}/encoder_attention_mask"][there].all()  # they keep no padding either
    for i in (3, 4):
        np.testing.assert_allclose(
            np.asarray(encoded.hidden[i])[there], z[f"{name}/encoder_hidden_states/{i}"][there], atol=ATOL
        )
    np.testing.assert_allclose(np.asarray(encoded.states)[there], z[f"{name}/encoder_last_hidden_state"][there], atol=ATOL)
    np.testing.assert_allclose(decoded.logits, z[f"{name}/logits"], atol=ATOL)
    np.testing.assert_allclose(t5.cross_entropy(decoded.logits, labels), z[f"{name}/ce"], atol=ATOL)


def test_attention_weights(case):
    """What queries give to keys in the gate's block and in the first cross-attention: the gate is in both."""
    model, z, ids, labels = case
    graph, params = nnx.split(model)

    def weights(attention, x, memory, key_bias, position_bias=0.0):
        scores = jnp.einsum("bthd,bshd->bhts", attention.heads(attention.q(x)), attention.keys_values(memory)[0])
        return jm.words.softmax1(scores + position_bias + key_bias[:, None, None, :])

    @jax.jit
    def both(params):
        m = nnx.merge(graph, params)
        encoded, read = m.encode(ids), t5.shift_right(labels)
        at = lambda stack, n: stack.position_bias(jnp.arange(n)[None])
        gated, first = m.t5.encoder.blocks[2], m.t5.decoder.blocks[0]
        h = gated.attention_norm(encoded.hidden[2])
        inside = weights(gated.attention, h, h, encoded.key_bias, at(m.t5.encoder, ids.shape[1]))
        x = m.t5.embed(read)
        h = first.attention_norm(x)
        x = x + first.attention(h, first.attention.keys_values(h), position_bias=at(m.t5.decoder, read.shape[1]))[0]
        return inside, weights(first.cross, first.cross_norm(x), encoded.states, encoded.key_bias)

    inside, across = both(params)
    there = np.broadcast_to((z["in/input_ids"] != 0)[:, None, :], inside.shape[:3])  # padding may ask what it likes
    np.testing.assert_allclose(np.asarray(inside)[there], z["soft/encoder_attn_weights_gate_block"][there], atol=1e-5)
    np.testing.assert_allclose(across, z["soft/cross_attn_weights_0"], atol=1e-5)


# --- laws -----------------------------------------------------------------------------------------------------------------


def far_gate(model, gap):
    """The model with its gate pushed away from the threshold: bytes either stay outright or leave outright."""
    graph, params = nnx.split(model)
    params = jax.tree.map(lambda x: x, params)
    far = nnx.merge(graph, params)
    far.gate.out.kernel[...] = far.gate.out.kernel[...] * gap
    far.gate.out.bias[...] = far.gate.out.bias[...] * gap
    return far


def test_a_soft_gate_of_minus_infinity_is_hard_deletion(case):
    model, _, ids, labels = case
    sharp = far_gate(model, 50.0)
    sharp.gate_scale, sharp.threshold = -1e9, -5e8
    (soft, decoded_soft), (hard, decoded_hard) = run(sharp, ids, labels), run(sharp, ids, labels, capacity=28)
    assert 0.3 < float((soft.gate[:2] < -5e8).mean()) < 0.7
    np.testing.assert_allclose(decoded_soft.logits, decoded_hard.logits, atol=ATOL)
    stay = hard.plan.kept
    unpacked = np.stack([np.asarray(h)[np.clip(s, 0, 27)] for h, s in zip(hard.states, hard.plan.segment_ids, strict=True)])
    np.testing.assert_allclose(unpacked[stay], np.asarray(soft.states)[stay], atol=ATOL)


def test_a_threshold_below_everything_deletes_nothing(case):
    model, _, ids, labels = case
    soft, hard = run(model, ids, labels), run(model, ids, labels, capacity=28, threshold=-1e9)
    np.testing.assert_array_equal(hard[0].plan.sizes.sum(1), (np.asarray(ids) != 0).sum(1))  # padding still leaves
    np.testing.assert_allclose(soft[1].logits, hard[1].logits, atol=ATOL)
    graph, params = nnx.split(model)
    open_gate = nnx.merge(graph, jax.tree.map(lambda x: x, params))
    open_gate.gate.out.kernel[...], open_gate.gate.out.bias[...] = jnp.zeros((32, 1)), jnp.full(1, 100.0)
    zero = run(open_gate, ids, labels)
    ungated = run(model, ids, labels, capacity=28, threshold=-1e9, keep_gate=False)
    np.testing.assert_allclose(zero[1].logits, ungated[1].logits, atol=ATOL)


def test_more_room_than_needed_changes_nothing_and_less_is_counted(case):
    model, _, ids, labels = case
    exact, roomy, tight = (run(model, ids, labels, capacity=m) for m in (17, 28, 10))
    np.testing.assert_allclose(exact[1].logits, roomy[1].logits, atol=ATOL)
    assert exact[0].plan.overflow.tolist() == roomy[0].plan.overflow.tolist() == [0, 0, 0]
    assert tight[0].plan.overflow.tolist() == [7, 0, 4]
    np.testing.assert_allclose(tight[1].logits[1], exact[1].logits[1], atol=ATOL)  # the row that fits


def test_a_row_that_loses_everything_reads_nothing(case):
    """The official code raises if that is the whole batch, and keeps byte 0 of a single row."""
    model, _, ids, labels = case
    encoded, decoded = run(model, ids, labels, capacity=17, threshold=0.0)
    assert int(encoded.plan.sizes.sum()) == 0 and bool(jnp.isfinite(decoded.logits).all())
    np.testing.assert_allclose(decoded.logits[0, 0], decoded.logits[1, 0], atol=1e-6)  # no input, one first guess
    loss = lambda p: forward.__wrapped__(nnx.split(model)[0], p, ids, labels, capacity=17, threshold=0.0)[1].logits.sum()
    grads = jax.jit(jax.grad(loss))(nnx.split(model)[1])
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_padding_does_not_matter(case):
    model, _, ids, labels = case
    wide = jnp.pad(ids, ((0, 0), (0, 5)))
    for kwargs in ({}, dict(capacity=17)):
        np.testing.assert_allclose(
            run(model, ids, labels, **kwargs)[1].logits, run(model, wide, labels, **kwargs)[1].logits, atol=ATOL
        )


def test_config_is_checked():
    with pytest.raises(ValueError, match="gate_layer must name an encoder block, 0 to 3; got 4"):
        mrt5.MrT5Config(BASE, gate_layer=4)


# --- eight devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, scan",
    [
        pytest.param(AxisType.Auto, True, id="auto-scanned", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, False, id="explicit-list"),
        pytest.param(AxisType.Auto, False, id="auto-list", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, True, id="explicit-scanned", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(case, kind, scan):
    """Auto axes: heads and feed-forward split over `tensor`. Explicit axes: parameters are split at rest and whole in use."""
    _, z, ids, labels = case
    model = mrt5.MrT5(CONFIG, scan=scan, remat="dots", rngs=nnx.Rngs(0))
    load.load(model, state_dict(z), NAME, ignore=t5.ALIASES)
    ids, labels = (jnp.concatenate([x, x[:, ::-1], x])[:8] for x in (ids, labels))
    graph, params = nnx.split(model)
    whole = lambda p: jax.tree.map(lambda x: jax.reshard(x, P()), p) if kind == AxisType.Explicit else p
    capacity = 20 if scan else None

    def loss(p, ids, labels, place):
        return mrt5.loss(nnx.merge(graph, place(p)), ids, labels, 0.01, capacity=capacity, score_weight=0.5)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=3)
    want = step(params, ids, labels, lambda p: p)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    where = sharding.shardings(params, mesh, sharding.T5_RULE)
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        got = step(jax.device_put(params, where), put(ids), put(labels), whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), got, want)


def test_rules_are_checked_and_place_moves(case):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    model = mrt5.MrT5(CONFIG, scan=True, rngs=nnx.Rngs(0))
    sharding.place(model, mesh, sharding.T5_RULE)
    blocks = model.t5.encoder.blocks.each
    assert blocks.ffn.wo.kernel[...].sharding.spec == P(None, "tensor", None)
    assert blocks.attention.q.kernel[...].sharding.spec == P(None, None, "tensor")
    assert model.gate.out.kernel[...].sharding.is_fully_replicated
    params = nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match=r"the rule names \['pipe'\]; the mesh has \('data', 'tensor'\)"):
        sharding.shardings(params, mesh, lambda path: P("pipe"))
    with pytest.raises(ValueError, match="has too few axes for the rule's"):
        sharding.specs(params, lambda path: P(None, None, None))
