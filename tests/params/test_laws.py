"""The laws can fail; and the edges: exact counts, hyperparameters, dtypes, integers, what is not finite, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxmerge import params
from jaxmerge.params._laws import assert_merge
from jaxmerge.params._layout import whole
from jaxmerge.params._stack import rounded
from jaxmerge.params.order import _devices as devices


def test_the_laws_can_fail():
    add_up = lambda x: x.sum(axis=0, keepdims=True)
    merge = lambda f: params.per_leaf(lambda x: None, lambda plan, x: f(x), models=1)
    auto = dict(axes=[AxisType.Auto])
    for law, tx, claims in (
        ("finite results", params.chain(params.scale(np.inf), params.sum_experts()), {}),
        ("one model", params.scale(1.0), {}),
        ("zero deltas", merge(lambda x: add_up(x) + 1), {}),
        ("identical experts", params.task_arithmetic(), dict(mean=True)),
        ("symmetry", merge(lambda x: x[:1]), dict(symmetric=True)),
        ("linearity", params.ties(0.5), dict(linear=True)),
        ("stays visible", merge(lambda x: jnp.nan_to_num(add_up(x))), {}),
        ("invariance to sharding", merge(lambda x: add_up(x) * (1 + _devices(x))), dict(axes=[AxisType.Explicit])),
        ("nothing moves", merge(lambda x: jnp.flip(add_up(x), axis=tuple(range(1, x.ndim)))), auto),
        ("layout stays", merge(lambda x: whole(add_up(x), (-1,) if x.ndim > 1 else ())), dict(moves=["all-gather"])),
    ):
        with pytest.raises(AssertionError, match=law):
            assert_merge(tx, **claims)


def _devices(x):
    """Not a function of the values: how many devices hold x."""
    sharding = jax.typeof(x).sharding
    return jnp.float32(0 if sharding.mesh.empty else sharding.mesh.size)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_bfloat16_ties_keep_the_exact_count(scope):
    """1000 entries of 5 distinct magnitudes: the threshold ties hundreds; the first by flat index stay, leaves by name."""
    values = np.random.default_rng(0).integers(1, 6, (2, 1000)) * np.random.default_rng(1).choice([-1, 1], (2, 1000))
    stacked = {"b": values[:, :600].astype(np.float32).reshape(2, 20, 30), "a": values[:, 600:].astype(np.float32)}
    stacked = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), stacked)
    tx = params.trim([0.3, 0.55], scope=scope)
    merged = tx.merge(tx.match(stacked), stacked)

    def expected(flat, d):
        order = np.argsort(-np.abs(flat), kind="stable")[: int(d * len(flat))]
        return np.where(np.isin(np.arange(len(flat)), order), flat, 0)

    for k, d in enumerate([0.3, 0.55]):
        a, b = np.asarray(stacked["a"])[k], np.asarray(stacked["b"])[k].ravel()
        want = expected(np.concatenate([a, b]), d) if scope == "model" else np.concatenate([expected(a, d), expected(b, d)])
        got = np.concatenate([np.asarray(merged["a"])[k], np.asarray(merged["b"])[k].ravel()])
        np.testing.assert_array_equal(got, want)


def test_constant_tensors_and_density_zero():
    stacked = {"w": jnp.ones((2, 10))}
    tx = params.trim([0.3, 0.0], scope="model")
    merged = tx.merge(tx.match(stacked), stacked)["w"]
    np.testing.assert_array_equal(merged, [[1] * 3 + [0] * 7, [0] * 10])


def test_hyperparameters_by_leaf_and_by_model():
    base = {"mlp": {"w": jnp.zeros(2)}, "norm": jnp.zeros(2)}
    models = [jax.tree.map(lambda x, v=v: x + v, base) for v in (1.0, 2.0)]
    tx = params.task_arithmetic(lambda name: [1.0, 0.0] if name.startswith("mlp/") else 0.5)
    merged = params.merge(tx, base, models)
    assert merged["mlp"]["w"].tolist() == [1, 1] and merged["norm"].tolist() == [1.5, 1.5]


def test_gradients_reach_the_weights():
    base, models = {"w": jnp.zeros(3)}, [{"w": jnp.ones(3)}, {"w": 2 * jnp.ones(3)}]
    loss = lambda w, t: params.merge(params.chain(params.weigh(w), params.sum_experts(), params.scale(t)), base, models)[
        "w"
    ].sum()
    by_weight, by_scale = jax.grad(loss, argnums=(0, 1))(jnp.array([1.0, 1.0]), jnp.array(2.0))
    assert by_weight.tolist() == [6, 12] and by_scale.item() == 9


def test_mixed_dtypes_integers_and_structure():
    base = {"w": jnp.ones(2, jnp.bfloat16), "v": jnp.ones(2), "step": jnp.int32(3)}
    models = [jax.tree.map(lambda x: x, base) for _ in range(2)]
    merged = params.merge(params.linear(), base, models)
    assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(lambda x: x.dtype, base)
    models[1] = models[1] | {"step": jnp.int32(4)}
    with pytest.raises(ValueError, match=r"integer leaves differ.*\['step'\].*integers=\"base\""):
        params.merge(params.linear(), base, models)
    assert params.merge(params.linear(), base, models, integers="base")["step"] == 3
    with pytest.raises(ValueError, match="inside jit"):
        jax.jit(lambda b: params.merge(params.linear(), b, [b]))(base)
    assert jax.eval_shape(lambda b: params.merge(params.ties(), b, [b], integers="base"), base)["w"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"(?s)model 0 has u, .*model 0 lacks v.*w: \(3,\) in model 0"):
        params.merge(params.linear(), base, [{"w": jnp.ones(3), "u": 1.0, "step": 3}])


def test_nonfinite_values_are_reported_and_stay_visible():
    model = {"a": jnp.array([1.0, np.nan, np.inf]), "b": jnp.ones(2), "i": jnp.int32(1)}
    assert params.nonfinite(model) == {"a": 2}
    base = {"a": jnp.zeros(3), "b": jnp.zeros(2), "i": jnp.int32(1)}
    for tx in (params.ties(0.5), params.linear()):
        merged = params.merge(tx, base, [model, model])
        assert np.isnan(merged["a"][1]) and np.isfinite(merged["b"]).all()


def arcee_divergence(base, model):
    return params.arcee_fusion().match({"w": jnp.stack([base, model])})[0]["w"]["divergence"]


def exact_divergence(base, model):
    def softmax(x):
        e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True) + 1e-8

    p, q = softmax(model), softmax(base)
    return (p * np.log(p / q) - (p - q)).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("alone", [False, True])
def test_arcee_fusion_keeps_the_digits_of_a_small_divergence(alone, monkeypatch):
    """A fine-tune's rows diverge by 2e-6, the sum of 1024 squares of changes of 0.002 p.

    A share is rounded by 4 ulp at most (exp 2, sum and quotient 1 each), so a change by sqrt(2) 2^-22 p, which is 1.7e-4 of
    it; the square by twice that, and the mean of 1024 by a thirty-second of it. Five deviations, 5.3e-5. Rows that moved far
    are logarithms, of which each term is rounded by 2^-22 p or less; numbers of any size, which exp cannot take.
    """
    monkeypatch.setattr(devices, "alone", lambda: alone)
    monkeypatch.setattr(devices, "LARGE", 0)
    rng = np.random.default_rng(0)
    base = 0.02 * rng.standard_normal((64, 1024)).astype(np.float32)
    model = base + 0.002 * rng.standard_normal((64, 1024)).astype(np.float32)
    near = 5 * 2 * 2**0.5 * 2.0**-22 / 0.002 / 32
    np.testing.assert_allclose(arcee_divergence(base, model), exact_divergence(base, model), rtol=near)
    far = model.copy()
    far[3], far[7, 5], far[11, :9] = rng.standard_normal(1024), 4.0, -40.0
    base[20], far[20] = base[20] + 1000, model[20] + 1000 + np.float32(2.0)  # softmax does not see what all have in common
    base[30], far[30] = base[30] - 500, model[30] - 700
    found, exact = arcee_divergence(base, far), exact_divergence(base, far)
    rounded = 2.0**-22 * (np.abs(far - base).max(axis=1, keepdims=True) + 1)  # of log p and of log base, at most
    assert (np.abs(found - exact) <= near * exact + rounded).all()
    others = np.delete(np.arange(64), [3, 7, 11, 20, 30])
    np.testing.assert_array_equal(np.asarray(found)[others], np.asarray(arcee_divergence(base, model))[others])
    far[40, 8] = np.nan
    assert np.flatnonzero(np.isnan(np.asarray(arcee_divergence(base, far)))).tolist() == [40]


@pytest.mark.parametrize("shape", [(6, 128), (5, 33)])
@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_arcee_fusion_from_a_sample(shape, alone, monkeypatch):
    """Quartiles of one group of 64 neighbours in three, or of one entry in three where 64 do not divide the leaf."""
    monkeypatch.setattr(devices, "alone", lambda: alone)
    monkeypatch.setattr(devices, "LARGE", 0)
    rng = np.random.default_rng(1)
    base, model = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    x, size = {"w": jnp.stack([base, model])}, base.size
    plan = lambda sample: params.arcee_fusion(sample=sample).match(x)[0]["w"]
    exact, some = plan(None), plan(-(-size // 3))
    importance = np.abs(model - base) * np.asarray(exact["divergence"])
    group = 64 if size % 64 == 0 else 1
    taken = np.sort(importance.reshape(-1, group)[::3].ravel())
    low, median, high = (taken[int(part * (taken.size - 1))] for part in (0.25, 0.5, 0.75))
    np.testing.assert_allclose(some["threshold"], median + 1.5 * (high - low), rtol=1e-6)
    for enough in (size, 10 * size):
        np.testing.assert_array_equal(plan(enough)["threshold"], exact["threshold"])
    with pytest.raises(ValueError, match="sample=0; quartiles need entries"):
        params.arcee_fusion(sample=0)


def test_nearswap_counts_small_changes_as_larger():
    """mergekit divides t by |change|, but by no less than 1e-6, and clips: of 4e-7 a t of 5e-7 takes half."""
    merged = params.merge(params.nearswap(5e-7), {"w": jnp.zeros(3)}, [{"w": jnp.array([4e-7, -2e-6, 1.0])}])["w"]
    np.testing.assert_allclose(merged, [2e-7, -5e-7, 5e-7], rtol=4 * 2.0**-23)


def test_karcher_is_where_the_logarithms_cancel():
    """Of directions far apart the normalised mean is not the mean on the sphere: ten steps are, to their tolerance."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5)) + 0.5
    w = np.array([0.6, 0.3, 0.1])
    u = x / np.linalg.norm(x, axis=1, keepdims=True)

    def pull(m):
        cos = u @ m / np.linalg.norm(m)
        off = u - cos[:, None] * m / np.linalg.norm(m)
        return np.linalg.norm(w @ (np.arccos(cos)[:, None] * off / np.linalg.norm(off, axis=1, keepdims=True)))

    merged = params.merge(params.karcher(w), None, [{"w": jnp.asarray(v, jnp.float32)} for v in x])["w"]
    assert pull(np.asarray(merged, np.float64)) < 1e-5 + 8 * 2.0**-23 < 1e-3 < pull(w @ u)
    np.testing.assert_allclose(np.linalg.norm(merged), w @ np.linalg.norm(x, axis=1), rtol=1e-6)


def test_chain_is_associative_and_has_an_identity():
    stacked = {"w": jnp.array([[1.0, -2.0, 3.0], [2.0, 2.0, -1.0]])}
    a, b, c = params.trim(0.7), params.elect_sign(tie="majority"), params.mean_agreeing()
    run = lambda tx: tx.merge(tx.match(stacked), stacked)["w"].tolist()
    assert (
        run(params.chain(a, params.chain(b, c)))
        == run(params.chain(params.chain(a, b), c))
        == run(params.chain(params.chain(), a, b, c))
    )
    plain = params.MergeTransform(lambda s: jax.tree.map(lambda x: x.max(), s), lambda p, s: jax.tree.map(jnp.multiply, p, s))
    assert run(params.chain(plain, params.sum_experts())) == [[9.0, 0.0, 6.0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: params.trim(0.2, scope="column"), "scope must be one of"),
        (lambda: params.trim_band(0.2, 1.5), "gamma must be between 0 and 1"),
        (lambda: params.max_agreeing(tie="all"), "tie must be"),
        (lambda: params.nuslerp(scope="model"), "scope must be"),
        (lambda: params.model_stock(average="median"), "average must be"),
        (lambda: params.model_stock(scope="column"), "scope must be"),
        (lambda: params.sce(mask="both"), "mask must be"),
        (lambda: params.della(seed=0, reduce="max"), "reduce must be"),
        (lambda: params.della_linear(seed=0, rescale="l2"), "rescale must be"),
        (lambda: params.breadcrumbs_ties(reduce="max"), "reduce must be"),
        (lambda: params.trim(0.2, rounding="up"), "rounding must be"),
        (lambda: params.trim(0.2, ties="last"), "ties must be"),
        (lambda: params.trim(0.2, extra=-1), "extra must be 0 or more"),
        (lambda: params.trim(lambda name: 0.2), 'scope="tensor"'),
        (lambda: params.elect_sign(tie="-1"), "tie must be"),
        (lambda: params.elect_sign(scope="row"), "scope must be"),
        (lambda: params.rescale(params.trim(0.2), "l3"), "norm must be"),
        (lambda: params.rescale(params.ties(0.2), "l1"), "one masking atom"),
        (lambda: params.ties(reduce="min"), "reduce must be"),
        (lambda: params.dare_ties(seed=0, reduce="max"), "reduce must be"),
    ],
)
def test_wrong_arguments(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (params.trim(1.2), "density must be between 0 and 1"),
        (params.random_mask([0.5, 0.5, 0.5], seed=0), "one number or one per model; got shape"),
        (params.weigh([1.0, -1.0], normalize=True), "sum to 0"),
        (params.chain(params.sum_experts(), params.spherical(0.5)), "between two models, got 1"),
        (params.rescale(params.weigh(1.0), "inv_p"), "no density"),
        (params.weigh(1.0), "2 models are left"),
        (params.rank_mask(0.5, 0.6, seed=0), r"density \+- epsilon must lie between 0 and 1"),
        (params.nearswap(0.1), "takes one model beside the base, got 2"),
        (params.chain(params.sum_experts(), params.nuslerp()), "between two models, got 1"),
        (params.chain(params.sum_experts(), params.arcee_fusion()), "base first and one model"),
        (params.multislerp([1.0, -1.0]), "multislerp: the weights .* sum to 0"),
        (params.karcher([1.0, -1.0]), "karcher: the weights .* sum to 0"),
        (params.rescale(params.scale(1.0), "inv_p"), "no density"),
        (params.weigh(None), "weight must be one number, one per model, .* got None"),  # type: ignore[arg-type]
        (params.weigh("0.5"), "weight must be one number, one per model, .* got '0.5'"),  # type: ignore[arg-type]
        (params.trim(np.nan, scope="tensor"), "density must be one number, one per model, .* got nan"),
    ],
)
def test_wrong_values(tx, message):
    with pytest.raises(ValueError, match=message):
        params.merge(tx, {"w": jnp.zeros(2)}, [{"w": jnp.ones(2)}] * 2)


def test_wrong_models(unchecked):
    with pytest.raises(ValueError, match="no models"):
        params.merge(params.linear(), None, [])
    with pytest.raises(ValueError, match="integers must be"):
        params.merge(params.linear(), None, [{"w": jnp.ones(2)}], integers="mean")
    with pytest.raises(TypeError, match=r"complex leaves.*\['w'\]"):
        params.merge(params.linear(), None, [{"w": jnp.ones(2, jnp.complex64)}])
    with pytest.raises(ValueError, match=r"occur twice: \['a/b'\]"):
        params.merge(params.linear(), None, [{"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}])
    with pytest.raises(TypeError, match="models must be a list"):
        params.merge(params.linear(), None, {"w": jnp.ones(2)})  # type: ignore[arg-type]


def test_what_is_no_merge(unchecked):
    models: list = [{"w": jnp.ones(2)}]
    for call in (
        lambda: params.merge(params.ties, None, models),  # type: ignore[arg-type]
        lambda: params.chain(params.ties(), params.ties),  # type: ignore[arg-type]
        lambda: params.needs(params.ties),  # type: ignore[arg-type]
        lambda: params.rescale(params.ties, "l1"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"expected a merge, .*ties.*; call it first"):
            call()
    for seed in (1.5, None):
        with pytest.raises(TypeError, match="seed must be an integer"):
            params.random_mask(0.5, seed=seed)  # type: ignore[arg-type]
    own = params.per_leaf(lambda x: None, lambda plan, x: x, models=1)
    assert [need.statistic for need in params.needs(own)] == ["unknown"]


@pytest.mark.parametrize("tx", [params.ties(0.5), params.pcb(), params.ties(tie="majority")], ids=["ties", "pcb", "majority"])
def test_without_a_leaf_to_merge(tx):
    """Statistics of a whole model that has no floating-point leaf; and models that come one by one."""
    base = {"step": np.arange(3)}
    assert params.merge(tx, {}, [{}]) == {}
    np.testing.assert_array_equal(params.merge(tx, base, (dict(base) for _ in range(2)))["step"], base["step"])


def test_rounding_is_xlas():
    """To bfloat16, written out for the CPU: of every upper half the lower halves about the middle and at the ends, NaN too."""
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    x = np.concatenate([halves | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)
    round_, cast = (jax.jit(f)(x) for f in (lambda x: rounded(x, jnp.bfloat16), lambda x: x.astype(jnp.bfloat16)))
    np.testing.assert_array_equal(np.asarray(round_).view(np.uint16), np.asarray(cast).view(np.uint16))
    slope = jax.grad(lambda x: rounded(3 * x, jnp.bfloat16).astype(jnp.float32).sum())(jnp.ones(2))
    np.testing.assert_array_equal(slope, [3, 3])
