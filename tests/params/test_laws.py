"""The laws, over every method; and the edges: K = 1 to 8, zeros, constants, ties in bfloat16, NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import params
from jaxmerge.params._laws import _deltas, assert_merge

K1238 = (1, 2, 3, 8)
METHODS = {
    "linear": (params.linear, K1238, dict(mean=True, linear=True)),
    "task_arithmetic": (lambda: params.task_arithmetic(0.5, scale=0.25), K1238, dict(linear=True)),
    "ties": (lambda: params.ties(0.3), K1238, {}),
    "ties_whole": (lambda: params.ties(1.0), (3,), dict(mean=True)),
    "ties_official": (lambda: params.ties(0.3, extra=1, ties="all", tie="majority", reduce="sum"), (3,), {}),
    "ties_mergekit": (lambda: params.ties(0.3, scope="tensor"), (3,), {}),
    "ties_mergellm": (
        lambda: params.ties(0.3, scope="tensor", rounding="ceil", extra=1, ties="all", tie="majority"),
        (2,),
        {},
    ),
    "ties_rescale": (lambda: params.ties(0.3, scope="tensor", rescale=True, reduce="max"), (3,), dict(exact=False)),
    "dare_linear": (lambda: params.dare_linear(0.5, seed=3), K1238, dict(linear=True)),
    "dare_linear_l1": (lambda: params.dare_linear(0.5, seed=3, rescale="l1"), (3,), dict(exact=False)),
    "dare_ties": (lambda: params.dare_ties(0.5, seed=3, reduce="mean"), K1238, {}),
    "slerp": (lambda: params.slerp(0.3), (2,), dict(exact=False, mean=True)),
    "breadcrumbs": (lambda: params.breadcrumbs_ties(0.5, 0.1, reduce="mean"), (1, 2), {}),
    "trim_rows": (lambda: params.ties(0.3, scope="row"), (1, 3), {}),
    "trim_band_model": (lambda: params.breadcrumbs(0.5, 0.1, scope="model", ties="all"), (2,), {}),
    "della": (lambda: params.della(0.5, 0.2, seed=3), (3,), {}),
    "della_linear_l1": (lambda: params.della_linear(0.5, 0.2, seed=3, rescale="l1"), (1,), dict(exact=False)),
    "magmax": (params.magmax, (1, 3), dict(mean=True)),
    "nuslerp": (lambda: params.nuslerp([0.7, 0.4]), (2,), dict(exact=False, mean=True)),
    "nuslerp_rows": (lambda: params.nuslerp(scope="row"), (2,), dict(exact=False, mean=True)),
    "nuslerp_columns": (lambda: params.nuslerp(scope="column"), (2,), dict(exact=False, mean=True)),
    "multislerp": (params.multislerp, (1, 2), dict(exact=False, mean=True)),
    "karcher": (params.karcher, (1, 3), dict(exact=False, mean=True)),
    "model_stock": (params.model_stock, (1, 3), dict(exact=False, mean=True)),
    "model_stock_rows": (lambda: params.model_stock(average="angle", scope="row"), (2,), dict(exact=False, mean=True)),
    "sce": (lambda: params.sce(0.3), (1, 3), dict(exact=False, mean=True)),
    "sce_mergekit": (lambda: params.sce(0.3, mask="delta"), (2,), dict(exact=False)),
    "varm": (params.varm, (1, 2), dict(exact=False, mean=True)),
    "ram": (params.ram, (3,), dict(mean=True)),
    "ramplus_tl": (params.ramplus_tl, (1, 3), {}),
    "nearswap": (lambda: params.nearswap(0.3), (1,), {}),
    "passthrough": (lambda: params.passthrough(0.5), (1,), dict(linear=True)),
    "arcee_fusion": (params.arcee_fusion, (2,), dict(exact=False, mean=True)),
    "interpolate": (lambda: params.interpolate(0.3), (2,), dict(linear=True, mean=True)),
}


# Peers' variants of one chain, which the recorded vectors check as well.
VARIANTS = {
    *("ties_whole", "ties_official", "ties_mergekit", "ties_mergellm", "ties_rescale", "sce_mergekit", "trim_band_model"),
    *("model_stock_rows", "nuslerp_columns", "iso_c_svd", "pcb_tensor", "knots_ties"),
    *("tsvm_svd", "truncate", "truncate_sketch", "iso_cts_svd", "knots_svd"),
}


def cases(methods):
    marks = lambda name: [pytest.mark.slow] if name in VARIANTS else []
    return [pytest.param(n, k, marks=marks(n), id=f"{n}-{k}") for n, (_, ks, _) in methods.items() for k in ks]


GRAMS = [{"b/kernel": np.cov(np.random.default_rng(k).standard_normal((16, 40))).astype(np.float32)} for k in range(3)]
FISHERS = [{n: np.abs(v[k]) for n, v in _deltas(np.random.default_rng(7), 3).items()} for k in range(3)]
CHUNKS = {n: np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32) for n in FISHERS[0]}
MATRICES = {  # spectral steps and solves: small and slow to compile
    # Rounding, 1e-7 of the largest singular value, turns singular vectors by itself over their gap. At the rank it is 0.03 to
    # 0.1 here, and bases that tsvm makes orthogonal have singular values down to 0.14. knots takes vectors one by one: 0.013.
    "tsvm": (params.tsvm, (1, 3), dict(rounding=1e-5)),
    "tsvm_svd": (lambda: params.tsvm(method="svd"), (3,), {}),
    "tsvm_sketch": (lambda: params.tsvm(density=0.2, oversample=4), (3,), dict(rounding=1e-5)),
    "r_tsvm": (params.r_tsvm, (3,), dict(rounding=1e-5)),
    "truncate": (lambda: params.chain(params.truncate(0.25), params.linear()), (3,), dict(rounding=1e-5)),
    "truncate_sketch": (lambda: params.chain(params.truncate(0.2, oversample=4), params.linear()), (2,), {}),
    "iso_c": (params.iso_c, (3,), {}),
    "iso_c_svd": (lambda: params.iso_c(method="svd"), (1, 2), {}),
    # the polar factors of two bases with singular values down to about 0.1
    "iso_cts": (lambda: params.iso_cts(0.5), (3,), dict(rounding=1e-5)),
    "iso_cts_svd": (lambda: params.iso_cts(0.5, method="svd"), (2,), dict(rounding=1e-5)),
    "knots_ties": (lambda: params.knots(params.ties(0.3, scope="tensor")), (3,), dict(rounding=5e-5)),
    # the largest singular value is eight times the largest entry
    "knots_linear": (lambda: params.knots(params.linear()), (1, 3), dict(linear=True, mean=True, rounding=1e-5)),
    "knots_svd": (lambda: params.knots(params.linear(), method="svd"), (2,), dict(linear=True, mean=True)),
    "wudi": (params.wudi, (1, 3), {}),
    "twin_merging": (lambda: params.twin_merging([0.2, 0.5, 0.3]), (3,), dict(rounding=1e-5)),
    "regmean": (lambda: params.regmean(GRAMS), (3,), dict(linear=True, mean=True)),
    "fisher": (lambda: params.fisher(FISHERS), (3,), dict(linear=True, mean=True)),
    "widen": (params.widen, (2, 3), dict(mean=True)),
    "pcb": (lambda: params.pcb(0.3), (1, 3), {}),
    "pcb_tensor": (lambda: params.pcb(0.3, tail=0.0, scope="tensor"), (2,), {}),
    "elect_largest": (params.elect_largest, (1, 2), dict(mean=True)),
    "consensus": (params.consensus, (1, 2), {}),
    "adamerging": (lambda: params.adamerging([0.2, 0.5, 0.3]), (3,), dict(linear=True, mean=True)),
    "expert_merging": (lambda: params.expert_merging(CHUNKS), (3,), dict(linear=True)),
    "self_positioning": (lambda: params.self_positioning([0.2, 0.5, 0.3]), (3,), dict(linear=True, mean=True)),
    "window_average": (lambda: params.window_average("cosine"), (1, 3), dict(linear=True, mean=True)),
    "update_selective": (lambda: params.update_selective(0.3), (1,), {}),
    "partition": (
        lambda: params.partition(
            {"a": params.ties(0.3, scope="tensor"), "b": params.linear(), "c": params.magmax()}, lambda name: name[0]
        ),
        (3,),
        {},
    ),
}
INEXACT = dict(exact=False)


@pytest.mark.parametrize(("name", "models"), cases(MATRICES))
def test_laws_of_statistics(name, models):
    make, _, laws = MATRICES[name]
    assert_merge(make(), models=models, sharding=models == 3, **(INEXACT | laws))


@pytest.mark.parametrize(("name", "models"), cases(METHODS))
def test_laws(name, models):
    make, _, laws = METHODS[name]
    assert_merge(make(), models=models, sharding=models == 3, **laws)


def test_the_laws_can_fail():
    position = lambda x: jnp.argmax(jnp.abs(x.reshape(x.shape[0], -1)), axis=1)
    for law, tx, claims in (
        ("finite", params.chain(params.scale(np.inf), params.sum_experts()), {}),
        ("one model", params.scale(1.0), {}),
        ("zero", params.per_leaf(lambda x: None, lambda p, x: x[:1] + 1, models=1), {}),
        ("identical", params.task_arithmetic(), dict(mean=True)),
        ("linearity", params.ties(0.5), dict(linear=True)),
        ("sharding", params.per_leaf(position, lambda p, x: x[:1] * (1 + _devices(x)), models=1), {}),
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
