"""Segments, delete gates and the controller: laws, golden traces, meshes, faults."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge import words
from tests.hlo import collectives

KEY = jax.random.key(0)
STARTS = np.array([[1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 1, 0, 0, 0]], bool)
MASK = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]], bool)


# --- segments ---------------------------------------------------------------------------------------------------------


def test_segments_number_words_and_drop_padding():
    plan = words.segments(jnp.asarray(STARTS), 3, mask=jnp.asarray(MASK))
    assert plan.segment_ids.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3], [-1, 0, 0, 0, 1, 1, -1, -1]]
    assert plan.overflow.tolist() == [2, 0]
    assert plan.sizes.tolist() == [[2, 3, 1], [3, 2, 0]]


def test_segments_agree_with_the_splitter():
    text = "Hello, wörld! two  spaces"
    at = words.starts(text)
    plan = words.segments(jnp.asarray(at), int(at.sum()))
    assert plan.sizes.tolist() == [len(w) for w in words.split(text)]
    x = jax.random.normal(KEY, (len(at), 4))
    np.testing.assert_array_equal(jm.merge(plan, x, reduce="first"), x[at])


def test_a_byte_reads_the_word_before_its_own():
    plan = words.segments(jnp.asarray(STARTS[0]), 4)
    w, first = jax.random.normal(KEY, (4, 3)), jnp.arange(3.0)
    read = jm.unmerge(plan, words.shift(w, first))
    want = jnp.concatenate([first[None], w[:-1]])[plan.segment_ids]
    np.testing.assert_array_equal(read, want)
    jacobian = jax.jacobian(lambda w: jm.unmerge(plan, words.shift(w)).sum(-1))(w).sum(-1)  # (bytes, words)
    np.testing.assert_array_equal(jacobian != 0, plan.segment_ids[:, None] == jnp.arange(4)[None] + 1)


def test_shift_of_any_batch_rank():
    w = jax.random.normal(KEY, (2, 3, 4, 5))
    np.testing.assert_array_equal(words.shift(w)[:, :, 1:], w[:, :, :-1])
    np.testing.assert_array_equal(words.shift(w, jnp.ones(5))[:, :, 0], jnp.ones((2, 3, 5)))


def test_capacity_for():
    assert words.capacity_for([0]) == 128
    assert words.capacity_for([128, 5]) == 128
    assert words.capacity_for(np.array([129])) == 256
    assert words.capacity_for([60], multiple_of=8, at_most=50) == 50


# --- gate ---------------------------------------------------------------------------------------------------------------


def test_gate_and_deletions_equal_the_official(golden):
    z = golden("bytes/mrt5_a")
    mask = jnp.asarray(z["in/input_ids"] != 0)
    gate = words.delete_gate(jnp.asarray(z["soft/gate_logits"][..., 0]), mask=mask)
    # float32: |k| times a few ulp of a sigmoid
    np.testing.assert_allclose(gate, z["soft/gate"][..., 0], atol=30 * 4 * 2**-24)
    assert words.deletion_rate(gate, mask) * 100 == pytest.approx(z["soft/metric/percent_non_pad_deleted_tokens"], rel=1e-6)
    assert words.masked_mean(gate, mask) * 0.013 == pytest.approx(z["reg/gate_mean_loss"], rel=1e-6)


def test_packing_equals_the_official_edge_cases(golden):
    """The official code fills with position 0 and lets a row that deletes everything keep byte 0; ours keeps nothing there."""
    z = golden("bytes/mrt5_a")
    gate, n = jnp.asarray(z["edge/gate"][..., 0]), 9
    plan = jm.tokens.keep(words.kept(gate), n)
    positions = np.asarray(jm.merge(plan, jnp.broadcast_to(jnp.arange(n), gate.shape), reduce="first"))
    there, official = np.asarray(plan.sizes > 0), z["edge/mask"][..., 0] == 0
    assert there.sum(1).tolist() == [3, 0, 9, 2, 5] and official.sum(1).tolist() == [3, 1, 9, 2, 5]
    rows = [0, 2, 3, 4]
    np.testing.assert_array_equal(there[rows], official[rows])
    np.testing.assert_array_equal(positions[rows], z["edge/positions"][rows])
    assert int(plan.overflow.sum()) == 0


def test_padding_is_deleted_and_never_kept():
    gate = words.delete_gate(jnp.full((2, 8), 50.0), mask=jnp.asarray(MASK), scale=-10.0)
    np.testing.assert_array_equal(gate == -10, ~MASK)
    np.testing.assert_array_equal(words.kept(gate, mask=jnp.asarray(MASK), threshold=-1e9), MASK)
    assert words.deletion_rate(gate, jnp.asarray(MASK), threshold=-5.0) == 0
    assert words.masked_mean(gate, jnp.zeros((2, 8), bool)) == 0


def test_softmax1(golden):
    z = golden("bytes/mrt5_a")
    x = jnp.asarray(z["softmax1/x"])
    np.testing.assert_allclose(words.softmax1(x), z["softmax1/y"], atol=1e-6)
    with_nothing = jnp.concatenate([x, jnp.zeros((len(x), 1))], axis=1)
    np.testing.assert_allclose(words.softmax1(x), jax.nn.softmax(with_nothing)[:, :-1], atol=1e-6)
    far = jnp.array([[200.0, 0.0], [jm.attention.MASKED, jm.attention.MASKED], [-jnp.inf, -1.0]])
    y, grad = jax.value_and_grad(lambda x: words.softmax1(x)[:, 0].sum())(far)
    assert y == 1 and bool(jnp.isfinite(grad).all())


def test_regularisers_equal_the_official(golden):
    """All five of the official trainer, at alpha = 0.013; the entropies weigh 0.3 and 0.2, and count padding."""
    z = golden("bytes/mrt5_a")
    mask, alpha = jnp.asarray(z["in/input_ids"] != 0), 0.013
    gate, logits = (jnp.asarray(z[f"soft/{name}"][..., 0]) for name in ("gate", "gate_logits"))
    mean = alpha * words.masked_mean(gate, mask)
    entropies = jax.jit(words.gate_entropies)
    each, of_mean = entropies(gate)
    got = {
        "gate_mean_loss": mean,
        "logits_mean": alpha * words.masked_mean(logits, mask),
        "clamped_logits_mean": alpha * words.masked_mean(jnp.maximum(logits, -30.0), mask),
        "gate_var_loss": -alpha * words.masked_variance(gate, mask),
        "gate_mean_with_entropy_reg": mean + 0.3 * each - 0.2 * of_mean,
    }
    for name, value in got.items():
        np.testing.assert_allclose(value, z[f"reg/{name}"], rtol=2e-6)
    short = entropies(gate[:1, : int(mask[0].sum())])
    np.testing.assert_allclose(entropies(gate[:1], mask=mask[:1]), short, rtol=1e-6)
    sure = jax.jit(jax.grad(lambda g: sum(words.gate_entropies(g))))(jnp.array([[0.0, -30.0, -200.0]]))
    assert not jnp.isnan(sure).any()


def test_log_sigmoid_gate():
    z = jnp.array([[-200.0, -1.0, 0.0, 7.0]])
    gate = words.log_sigmoid_gate(z, mask=jnp.array([[True, True, True, False]]))
    np.testing.assert_allclose(gate, [[-200.0, -1.3132617, np.log(0.5), -30.0]], rtol=1e-6)
    np.testing.assert_array_equal(words.kept(words.log_sigmoid_gate(z), threshold=float(np.log(0.5))), z > 0)


def test_gumbel_noise_is_one_sided():
    """Its mean is Euler's constant, and its deviation pi / sqrt 6; the gate of it is the gate of noisy logits."""
    logits = jnp.zeros((200, 500))
    gate = words.delete_gate(logits, key=KEY)
    noise = -jnp.log(-30.0 / gate - 1)  # the logit again
    noise = -noise
    np.testing.assert_allclose(noise.mean(), 0.5772, atol=5 * 1.2825 / np.sqrt(logits.size))
    np.testing.assert_allclose(noise.std(), 1.2825, rtol=0.02)
    np.testing.assert_allclose(words.log_sigmoid_gate(logits, key=KEY), jax.nn.log_sigmoid(noise), atol=1e-4)
    assert not np.array_equal(gate, words.delete_gate(logits, key=jax.random.key(1)))


def test_random_deletion_holds_its_rate_in_every_row():
    draw = jax.jit(words.random_gate, static_argnames="spread")
    full = jnp.ones((1000, 100), bool)
    mask = full.at[:4].set(jnp.arange(100)[None] < jnp.array([[100], [50], [11], [0]]))
    gone = draw(KEY, mask, 0.4, spread=0.0) < 0
    assert (gone & mask)[:5].sum(1).tolist() == [40, 20, 4, 0, 40] and (gone | mask).all()
    np.testing.assert_allclose(gone[4:].mean(axis=0), 0.4, atol=5 * 0.5 / np.sqrt(1000))
    rates = (draw(KEY, full, 0.5, spread=0.05) < 0).mean(axis=1)
    np.testing.assert_allclose([rates.mean(), rates.std()], [0.5, 0.05], atol=0.007)
    assert not draw(KEY, full, 0.0, spread=0.0).any() and (draw(KEY, full, 1.0, spread=0.0) == -30).all()


def test_fixed_deletion_is_right_in_every_row():
    """The official pattern of this sentence alone, also in a batch, where the official code pools all rows."""
    lines = ["the quick brown fox jumps", "a bb, ccc"]
    want = ["KK.KKK...KKK...KK..KKK...", "KKK.KKK.."]
    ids = np.zeros((2, 25), np.int32)
    for row, line in zip(ids, lines, strict=True):
        row[: len(line)] = words.to_ids(line)
    fixed = lambda rate: jax.jit(lambda ids: words.fixed_gate(ids, ids != 0, rate))(ids)
    gate = fixed(0.5)
    for row, line, pattern in zip(gate, lines, want, strict=True):
        assert "".join("K" if g == 0 else "." for g in row[: len(line)]) == pattern
        assert (row[len(line) :] == -30).all()
    for rate in (0.0, 1.0):
        assert ((fixed(rate) == 0) == ((ids != 0) & (rate == 0))).all()


# --- controller ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, gains",
    [
        ("pi", dict(k_p=0.5, k_i=1e-5, target=0.5)),
        ("pi_readme", dict(k_p=0.5, k_i=5e-5, target=0.4)),
        ("pi_fast", dict(k_p=1.3, k_i=0.002, target=0.6)),
    ],
)
def test_controller_traces(golden, name, gains):
    z = golden("bytes/mrt5_a")
    controller = words.pi_controller(**gains)

    def step(state, rate):
        state = controller.update(state, rate)
        return state, jnp.stack([state.alpha, state.p, state.i])

    _, trace = jax.lax.scan(step, controller.init(), jnp.asarray(z["pi/ratios"], jnp.float32))
    want = z[f"{name}/trace"]
    # 400 additions in float32 against float64: each rounds by half an ulp of the largest value.
    np.testing.assert_allclose(trace, want, atol=400 * 2**-24 * np.abs(want).max())
    assert (want[:, 0] == 0).any() or name == "pi_fast" or want[:, 0].min() > 0


def test_controller_order_differs_from_the_official_on_purpose(golden):
    """Theirs updates inside the loss, after using alpha: call n uses the alpha of call n - 1, in evaluation as well.

    Ours returns it from `update`, once per step, to the same effect on the loss. On resuming, theirs begins again at 0; ours is
    a pytree in the checkpoint.
    """
    rows = golden("bytes/mrt5_a")["order/loss_ce_gateloss_alpha_after"]
    rate, gate_mean = 36 / 76, -0.17828820645809174 / 0.013
    controller = words.pi_controller(target=0.9, k_p=0.5, k_i=1e-2)
    state = controller.init()
    for loss, ce, gate_loss, alpha_after in rows:
        np.testing.assert_allclose(float(state.alpha) * gate_mean, gate_loss, atol=1e-5)
        np.testing.assert_allclose(ce + gate_loss, loss, atol=1e-5)
        state = controller.update(state, jnp.float32(rate))
        np.testing.assert_allclose(state.alpha, alpha_after, atol=1e-6)


def test_a_lower_floor_lets_the_controller_hold_deletion_back():
    controller = words.pi_controller(target=0.2, lowest=-0.1)
    state = controller.update(controller.init(), jnp.float32(0.9))
    assert -0.1 < state.alpha < 0
    for _ in range(40):
        state = controller.update(state, jnp.float32(1.0))
    assert state.alpha == jnp.float32(-0.1)


def test_controller_stays_above_zero_and_is_pure():
    controller = words.pi_controller(target=0.2)
    state = controller.init(0.1)
    assert state.alpha == state.i == jnp.float32(0.1)
    after = controller.update(controller.init(), jnp.float32(0.9))
    assert after.alpha == 0 and after.i < 0
    assert jax.grad(lambda r: controller.update(state, r).alpha)(0.5) == 0  # steering is not learned


# --- everywhere -----------------------------------------------------------------------------------------------------------


def test_pure_functions_on_a_mesh(mesh):
    """Plans are computed without a collective; means over the batch are global."""
    n = 8
    starts = jax.random.bernoulli(KEY, 0.3, (8, n))
    logits = jax.random.normal(KEY, (8, n))
    x = jax.random.normal(KEY, (8, n, 4))
    put = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
    mask = jnp.arange(n)[None] < jnp.arange(1, 9)[:, None]

    def local(starts, logits, x, mask):
        plan = words.segments(starts, 6, mask=mask)
        gate = words.delete_gate(logits, mask=mask)
        packed = jm.merge(jm.tokens.keep(words.kept(gate, mask=mask), 6), x, reduce="first")
        controls = words.random_gate(KEY, mask, 0.5), words.fixed_gate(jnp.where(starts, 35, 70), mask, 0.5)
        read = jm.unmerge(plan, words.shift(jm.merge(plan, x), jnp.ones(4)))
        return plan.segment_ids, read, packed, words.softmax1(logits), controls

    def means(logits, mask):
        gate = words.delete_gate(logits, mask=mask)
        return words.masked_mean(gate, mask), words.deletion_rate(gate, mask)

    arguments = (starts, logits, x, mask)
    with jax.set_mesh(mesh):
        placed = tuple(put(a) for a in arguments)
        compiled = jax.jit(local).lower(*placed).compile()
        got, got_means = jax.jit(local)(*placed), jax.jit(means)(placed[1], placed[3])
    assert collectives(compiled) == []
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, jax.jit(local)(*arguments))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got_means, means(logits, mask))


def test_bfloat16_logits_give_float32_gates():
    logits = jax.random.normal(KEY, (2, 8)).astype(jnp.bfloat16)
    assert words.delete_gate(logits).dtype == words.softmax1(logits).dtype == jnp.float32


def test_bad_arguments(unchecked):
    with pytest.raises(ValueError, match=r"delete_gate: mask must have the shape of logits, \(2, 8\), got \(2, 4\)"):
        jm.words.delete_gate(jnp.zeros((2, 8)), mask=jnp.ones((2, 4), bool))
    starts = jnp.asarray(STARTS)
    with pytest.raises(TypeError, match="starts and mask must be boolean, got int32; compare scores"):
        words.segments(starts.astype(jnp.int32), 3)
    with pytest.raises(ValueError, match=r"mask must have the shape of starts, \(2, 8\), got \(2, 4\)"):
        words.segments(starts, 3, mask=starts[:, :4])
    with pytest.raises(ValueError, match="num_segments must be 0 or more"):
        words.segments(starts, -1)
    with pytest.raises(ValueError, match=r"first must be one vector of shape \(4,\), got \(3,\)"):
        words.shift(jnp.zeros((2, 4)), jnp.zeros(3))
    with pytest.raises(ValueError, match="scale must be negative"):
        words.delete_gate(jnp.zeros(3), scale=30.0)
    with pytest.raises(ValueError, match="rate must lie between 0 and 1, got 50"):
        words.random_gate(KEY, starts, 50)
    with pytest.raises(ValueError, match="scale must be negative"):
        words.fixed_gate(starts.astype(jnp.int32), starts, 0.5, scale=1.0)
    with pytest.raises(ValueError, match="target must lie between 0 and 1, got 50"):
        words.pi_controller(target=50)
    with pytest.raises(ValueError, match="lowest must be 0 or less, got 1"):
        words.pi_controller(target=0.5, lowest=1.0)
    with pytest.raises(ValueError, match="multiple_of must be 1 or more"):
        words.capacity_for([1], multiple_of=0)
    with pytest.raises(ValueError, match="counts must be one or more numbers"):
        words.capacity_for([])


def test_the_table_names_everything():
    """`help(jm.words)` lists whatever is offered, and the vectors that it names are there."""
    table = words.__doc__ or ""
    offered = {n for n, v in vars(words).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}
    missing = {name for name in offered - {"Corrupted", "DynamicTokens", "Packed"} if not re.search(rf"\b{name}\b", table)}
    assert not missing, f"no row for {missing}"
    golden = pathlib.Path(__file__).parents[1] / "golden"
    for name in ("hat_splitter", "span", "blt", "hnet", "mrt5", "exact_byte_probs"):
        assert re.search(rf"\b{name}\b", table) and list(golden.glob(f"*/{name}_a.npz"))
