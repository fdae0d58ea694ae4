"""Peers' official code, on recorded vectors, to the rounding of float32: by entry, or as far as a factorisation is stable."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmerge import params
from jaxmerge.params.atoms._random import _chances
from jaxmerge.params.spectral._spectral import shared_basis
from tests.rounding import EPS, assert_within, backward, entrywise

MANIFEST = json.loads((pathlib.Path(__file__).parents[1] / "golden/params/manifest.json").read_text())
OFFICIAL_TIES = dict(extra=1, ties="all", tie="majority")


def recorded(masks, density):
    """A masking atom that applies recorded masks, so that no peer's random generator has to be matched."""

    def settings(name, shape):
        return {"mask": np.stack([m[name] for m in masks]), "density": np.full(shape[0], density, np.float32)}

    return params._transform.atom(
        params._transform.Step(settings, lambda s, x: s, lambda plan, x: jnp.where(plan["mask"] != 0, x, 0))
    )


def dropped(masks, density, norm):
    return params.rescale(recorded(masks, density), norm)


CASES = {
    "mergekit_linear": lambda p, masks: params.linear(p["parameters"]["weight"]),
    "mergekit_task_arithmetic": lambda p, masks: params.task_arithmetic(p["parameters"]["weight"]),
    "mergekit_ties": lambda p, masks: params.ties(p["parameters"]["density"], scope="tensor"),
    "mergekit_ties_rescale": lambda p, masks: params.ties(
        p["parameters"]["density"], weight=p["parameters"]["weight"], scope="tensor", rescale=True
    ),
    "mergekit_dare_linear": lambda p, masks: params.chain(
        dropped(masks, 0.4, "l1"), params.weigh(p["parameters"]["weight"]), params.sum_experts()
    ),
    "mergekit_dare_ties": lambda p, masks: params.chain(
        dropped(masks, 0.5, "l1"), params.weigh(p["parameters"]["weight"]), params.elect_sign(), params.sum_experts()
    ),
    "mergekit_slerp": lambda p, masks: params.slerp(p["parameters"]["t"]),
    "mergellm_ties": lambda p, masks: params.ties(
        1 - p["param_value_mask_rate"], scope="tensor", rounding="ceil", **OFFICIAL_TIES
    ),
    "mergelm_dare": lambda p, masks: params.chain(
        dropped(masks, 1 - p["mask_rate"], "inv_p"), params.weigh(1.0, normalize=True), params.sum_experts()
    ),
    "fusion_bench_ties": lambda p, masks: params.ties(
        p["threshold"] / 100, reduce="sum", scale=p["scaling_factor"], **OFFICIAL_TIES
    ),
    "fusion_bench_ties_max": lambda p, masks: params.ties(
        p["threshold"] / 100, reduce="max", scale=p["scaling_factor"], **OFFICIAL_TIES
    ),
    "fusion_bench_dare_task_arithmetic": lambda p, masks: params.chain(
        dropped(masks, 1 - p["sparsity_ratio"], "inv_p"), params.sum_experts(), params.scale(p["scaling_factor"])
    ),
    "mergekit_nuslerp": lambda p, masks: params.nuslerp(p["parameters"]["weight"]),
    "mergekit_nuslerp_nobase": lambda p, masks: params.nuslerp(p["parameters"]["weight"], scope="row"),
    "mergekit_multislerp": lambda p, masks: params.multislerp(p["parameters"]["weight"]),
    "mergekit_karcher": lambda p, masks: params.karcher(),
    "mergekit_model_stock": lambda p, masks: params.model_stock(floor=1e-6),
    "mergekit_arcee_fusion": lambda p, masks: params.arcee_fusion(),
    "mergekit_nearswap": lambda p, masks: params.nearswap(p["parameters"]["t"]),
    "mergekit_sce": lambda p, masks: params.sce(p["parameters"]["select_topk"], mask="delta", floor=1e-6),
    "mergekit_sce_full": lambda p, masks: params.sce(p["parameters"]["select_topk"], mask="delta", floor=1e-6),
    "mergekit_ram": lambda p, masks: params.ram(threshold=p["parameters"]["epsilon"]),
    "mergekit_ramplus_tl": lambda p, masks: params.ramplus_tl(boost=p["parameters"]["r"], limit=p["parameters"]["alpha"]),
    "mergekit_breadcrumbs": lambda p, masks: params.breadcrumbs(
        p["parameters"]["density"], p["parameters"]["gamma"][0], weight=p["parameters"]["weight"]
    ),
    "mergekit_breadcrumbs_ties": lambda p, masks: params.breadcrumbs_ties(
        p["parameters"]["density"], p["parameters"]["gamma"][0], weight=p["parameters"]["weight"]
    ),
    "mergekit_della": lambda p, masks: params.chain(
        dropped(masks, 0.5, "l1"),
        params.weigh(p["parameters"]["weight"]),
        params.elect_sign(),
        params.mean_agreeing(p["parameters"]["weight"]),
    ),
    "mergekit_della_linear": lambda p, masks: params.chain(
        dropped(masks, 0.6, "l1"), params.weigh(p["parameters"]["weight"]), params.sum_experts()
    ),
    "mergellm_breadcrumbs": lambda p, masks: params.breadcrumbs(
        p["param_density"],
        1 - p["param_density"] - p["param_value_mask_rate"],
        scale=p["scaling_coefficient"],
        rounding="ceil",
        extra=1,
        ties="all",
    ),
    "fusechat_sce": lambda p, masks: params.sce(p["select_topk"]),
    "fusion_bench_model_stock": lambda p, masks: params.model_stock(average="angle"),
    "fusion_bench_magmax": lambda p, masks: params.magmax(scale=p["scaling_factor"]),
    "fusion_bench_slerp": lambda p, masks: params.slerp(p["t"], threshold=p["DOT_THRESHOLD"]),
}


# Matrices by their singular vectors, by statistics, by learned coefficients: (entry's parameters, vectors) -> transform, and
# whether matrices are factored.
FACTORED, POINTWISE = True, False
MORE = {
    "fusion_bench_tsvm": (lambda p, v: params.tsvm(scale=p["alpha"]), FACTORED),
    "fusion_bench_tsvm svd": (lambda p, v: params.tsvm(method="svd"), FACTORED),
    "fusion_bench_tsvm r_tsvm": (lambda p, v: params.r_tsvm(outlier=np.inf, nearly_zero=-1.0), FACTORED),
    "fusion_bench_iso_c": (lambda p, v: params.iso_c(scale=p["scaling_factor"]), FACTORED),
    "fusion_bench_iso_c svd": (lambda p, v: params.iso_c(method="svd"), FACTORED),
    "fusion_bench_iso_cts": (lambda p, v: iso_cts(p), FACTORED),
    "fusion_bench_iso_cts svd": (lambda p, v: iso_cts(p, method="svd"), FACTORED),
    "fusion_bench_wudi": (lambda p, v: params.wudi(optax.adam(p["lr"]), steps=p["iter_num"]), FACTORED),
    "fusion_bench_regmean": (
        lambda p, v: params.regmean([by_weight(v, k) for k in range(3)], shrink=p["reduce_non_diagonal_ratio"], axis=1),
        FACTORED,
    ),
    "fusion_bench_fisher": (lambda p, v: params.fisher([unpack(v[f"aux/fisher/expert_{k}"]) for k in range(3)]), POINTWISE),
    "widen": (
        lambda p, v: params.widen(
            ratio=p["above_average_value_ratio"],
            calibration=p["score_calibration_value"],
            rows=lambda name: "embed_tokens" in name,
        ),
        POINTWISE,
    ),
    "pcb": (lambda p, v: params.pcb(p["pcb_ratio"], scale=p["lambda"]), POINTWISE),
    "fusion_bench_adamerging_layerwise": (
        lambda p, v: params.adamerging(dict(zip(p["coefficient_columns"], v["aux/coefficients"].T, strict=True))),
        POINTWISE,
    ),
    "fusion_bench_adamerging_taskwise": (lambda p, v: params.adamerging(jnp.array(p["weights"])), POINTWISE),
    "expert_merging_apply": (
        lambda p, v: params.expert_merging({k.removeprefix("aux/raw/"): v[k] for k in v if k.startswith("aux/raw/")}),
        POINTWISE,
    ),
    "fusion_bench_emr": (lambda p, v: params.elect_largest(), POINTWISE),
    "twin_merging": (lambda p, v: twin_merging(p), FACTORED),
    "twin_merging svd": (lambda p, v: twin_merging(p, method="svd"), FACTORED),
}
BASE_IS_A_MODEL = ("mergekit_slerp", "mergekit_arcee_fusion", "widen")


def iso_cts(p, **kwargs):
    return params.iso_cts(p["common_space_fraction"], select=lambda name: name not in p["exclude_keys"], **kwargs)


def twin_merging(p, **kwargs):
    weight = jax.nn.softmax(jnp.array(p["router_logits"]))
    return params.twin_merging(weight, scale=p["scaling"], density=1 - p["mask_rate"], **kwargs)


def by_weight(vectors, k):
    found = {key: v for key, v in vectors.items() if key.startswith(f"aux/gram/expert_{k}/")}
    return {key.split("/")[-1] + ".weight": v for key, v in found.items()}


def unpack(v):
    return {t["name"]: v[t["offset"] :][: int(np.prod(t["shape"]))].reshape(t["shape"]) for t in MANIFEST["_layout"]}


def compiled(f):
    """One program for the whole model, compiled in a hurry: it runs once."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


# The longest path of an entry: less the base, masked, times a weight, times a norm over another (2; 7 to add up 96 squares
# pairwise), added to two more, over their weights (3), scaled, added to the base: 18 roundings. PCB's exp and tanh count twice.
OPERATIONS = 20


def check(case, vectors, tx, factored=False):
    models = [unpack(vectors[k]) for k in sorted(vectors) if k.startswith("in/expert")]
    base = unpack(vectors["in/base"]) if "in/base" in vectors else None
    if case in BASE_IS_A_MODEL:
        base, models = None, [base, *models]
    run = compiled(lambda inputs: params.merge(tx, *inputs))
    merged, bounds = run((base, models)), backward(run, (base, models)) if factored else {}
    growth = 1 / 0.4 if "dare" in case or "della" in case else 1.0  # over their density
    for name, value in unpack(vectors["out"]).items():
        by_entry = entrywise([model[name] for model in (*models, *([base] if base else []))], OPERATIONS, growth)
        assert_within(merged[name], value, bounds[name] if factored and value.ndim == 2 else by_entry, name)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_peer(golden, case):
    vectors = golden(f"params/{case}_a")
    masks = [unpack(vectors[k]) for k in sorted(vectors) if k.startswith("aux/mask")]
    check(case, vectors, CASES[case](MANIFEST[f"{case}_a"]["params"], masks))


@pytest.mark.parametrize("case", MORE)
def test_equals_the_peer_with_statistics(golden, case):
    make, factored = MORE[case]
    case = case.split()[0]
    vectors = golden(f"params/{case}_a")
    check(case, vectors, make(MANIFEST[f"{case}_a"]["params"], vectors), factored)


@pytest.mark.parametrize("clamped", [True, False])
def test_adamerging_normalized(golden, clamped):
    """fusion_bench's normalized_merging_weights: a softmax over the models, of what its clamp_weights has left."""
    vectors, p = golden("params/fusion_bench_adamerging_layerwise_a"), MANIFEST["fusion_bench_adamerging_layerwise_a"]["params"]
    coefficients = np.clip(vectors["aux/coefficients"], 0, 1) if clamped else vectors["aux/coefficients"]
    tx = params.adamerging(dict(zip(p["coefficient_columns"], coefficients.T, strict=True)), squash="softmax")
    out = golden("params/fusion_bench_adamerging_normalized")["clamped" if clamped else "not clamped"]
    check("adamerging", vectors | {"out": out}, tx)


def test_varm_weighs_as_fusechat(golden):
    """By the weights that the official code of SCE computes of whole task vectors; for VaRM alone none is published."""
    vectors, weights = golden("params/fusechat_sce_a"), golden("params/fusechat_weights")
    base, models = unpack(vectors["in/base"]), [unpack(vectors[f"in/expert_{k}"]) for k in range(3)]
    mean = {n: base[n] + sum(w * (m[n] - base[n]) for w, m in zip(weights[n], models, strict=True)) for n in base}
    out = np.concatenate([mean[t["name"]].ravel() for t in MANIFEST["_layout"]])
    check("varm", vectors | {"out": out}, params.varm())


def test_emr_masks_and_factors(golden):
    vectors = golden("params/fusion_bench_emr_a")
    base = unpack(vectors["in/base"])
    masked = params.emr(params.task_vectors(base, [unpack(vectors[f"in/expert_{k}"]) for k in range(3)]))
    np.testing.assert_allclose(masked.factors, vectors["aux/rescalers"], rtol=OPERATIONS * EPS)  # sums of 576 terms, pairwise
    for k in range(3):
        for name, expected in unpack(vectors[f"aux/mask/expert_{k}"]).items():
            np.testing.assert_array_equal(masked.masks[name][k], expected != 0)


def test_tall_masks(golden):
    vectors = golden("params/fusion_bench_tall_mask_a")
    base = unpack(vectors["in/base"])
    stacked = params.task_vectors(base, [unpack(vectors[f"in/expert_{k}"]) for k in range(3)])
    merged = {name: 0.3 * x.sum(axis=0, keepdims=True) for name, x in stacked.items()}
    masks = params.tall_masks(stacked, merged, scale=MANIFEST["fusion_bench_tall_mask_a"]["params"]["tall_mask_lambda"])
    for k in range(3):
        for name, expected in unpack(vectors[f"out/mask/expert_{k}"]).items():
            np.testing.assert_array_equal(masks[name][k], expected != 0)


def test_consensus_is_where_tall_masks_agree(golden):
    vectors, p = golden("params/fusion_bench_tall_mask_a"), MANIFEST["fusion_bench_tall_mask_a"]["params"]
    base, models = unpack(vectors["in/base"]), [unpack(vectors[f"in/expert_{k}"]) for k in range(3)]
    votes = sum(vectors[f"out/mask/expert_{k}"].astype(int) for k in range(3))
    for shared in (1, 2, 3):
        tx = params.consensus(scale=p["tall_mask_lambda"], shared=shared, factor=0.3)
        merged, agreed = compiled(lambda tx=tx: params.merge(tx, base, models))(), unpack(votes >= shared)
        for name in base:
            total = 0.3 * sum(m[name] - base[name] for m in models)
            bound = entrywise([base[name], *(m[name] for m in models)], OPERATIONS)
            assert_within(merged[name], base[name] + np.where(agreed[name], total, 0), bound, name)


@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
def test_knots_basis(golden, method):
    vectors = golden("params/fusion_bench_knots_a")
    x = jnp.stack([vectors[f"in/delta_{k}"] for k in range(3)])
    carry, v = shared_basis(x, method=method)
    bound = 2 * 8 * EPS * np.linalg.norm(x)  # 8 columns, on either side
    assert_within(jnp.linalg.norm(carry, axis=0), vectors["out/singular_values"], bound)
    for k in range(3):
        assert_within(carry @ v[k], vectors[f"out/US_V_{k}"], bound)
    merged = params.merge(params.knots(params.linear(), method=method), {"w": jnp.zeros((12, 8))}, [{"w": t} for t in x])["w"]
    assert_within(merged, vectors["out/mean_merged_delta"], bound)


@pytest.mark.parametrize("case", ["mergekit_della", "mergekit_della_linear"])
def test_probabilities_of_the_rank_mask(golden, case):
    """The generator is ours; the probability that each entry is kept is the peer's."""
    p, vectors = MANIFEST[f"{case}_a"]["params"]["parameters"], golden(f"params/{case}_a")
    base = unpack(vectors["in/base"])
    models = [unpack(vectors[f"in/expert_{k}"]) for k in range(3)]
    wanted = [unpack(vectors[f"aux/keep_prob/expert_{k}"]) for k in range(3)]
    (step,) = params.rank_mask(p["density"], p["epsilon"], seed=0).match.steps
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        x = np.stack([m[name] - base[name] for m in models])
        got = np.asarray(jnp.stack(_chances(step.settings(name, x.shape), jnp.asarray(x))), np.float64) / 2**32
        np.testing.assert_allclose(got, np.stack([w[name] for w in wanted]), atol=2e-7)


# What docstrings say of mergekit's arguments beyond the cases above: mergekit 0.1.5 on the models of `mergekit_nuslerp_a`.
ARGUMENTS = {
    "nuslerp flatten=False row_wise=False": lambda: params.nuslerp([0.6, 0.25], scope="row"),
    "nuslerp flatten=False row_wise=True": lambda: params.nuslerp([0.6, 0.25], scope="column"),
    "model_stock filter_wise": lambda: params.model_stock(floor=1e-6, scope="row"),
    "model_stock small": lambda: params.model_stock(floor=1e-6),
    "sce small": lambda: params.sce(1.0, mask="delta", floor=1e-6),
    "passthrough": lambda: params.passthrough(0.75),
    "sparsify l1": lambda: params.rescale(params.trim(0.4, scope="tensor"), "l1"),
    "sparsify l2": lambda: params.rescale(params.trim(0.4, scope="tensor"), "l2"),
    "sparsify linf": lambda: params.rescale(params.trim(0.4, scope="tensor"), "linf"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_equals_mergekits_other_arguments(golden, case):
    inputs, expected = golden("params/mergekit_nuslerp_a"), unpack(golden("params/mergekit_arguments")[case])
    base, *models = (unpack(inputs[f"in/{name}"]) for name in ("base", "expert_0", "expert_1"))
    if case.startswith(("passthrough", "sparsify")):
        models = models[:1]
    if case.startswith("sparsify"):  # a task vector in, a task vector out
        base, models = None, [{name: models[0][name] - base[name] for name in base}]
    if case == "passthrough":
        base = None
    if case.endswith("small"):  # so small that its floors are reached
        base, models = jax.tree.map(np.zeros_like, base), [jax.tree.map(lambda x: np.float32(1e-4) * x, m) for m in models]
    run = compiled(lambda inputs: params.merge(ARGUMENTS[case](), *inputs))
    merged, narrow = run((base, models)), "nuslerp" in case  # some columns of 4 entries are nearly opposite
    bounds = backward(run, (base, models)) if narrow else {}
    for name, value in expected.items():
        by_entry = entrywise([model[name] for model in (*models, *([base] if base else []))], OPERATIONS, 1 / 0.4)
        assert_within(merged[name], value, bounds[name] if narrow else by_entry, name)
