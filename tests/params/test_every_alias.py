"""Every method, whole and sharded: the laws it claims, K = 1 to 8, on 1 to 8 devices, and what moves between chips.

One row per public function that returns a merge, a test holds the table complete. By default three models on eight Explicit
devices; the other numbers of models and devices, Auto axes, variants and a pod of 512 chips are slow tests.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from jaxmerge import params
from jaxmerge.params._laws import SHAPES, assert_merge, deltas, shardings
from jaxmerge.testing import collectives
from tests.hlo import compile_for, tpu_mesh


class Row(NamedTuple):
    """A method, the numbers of models it takes (the first by default, the others slowly), and what holds for it.

    Attributes:
      moves: collectives beside sums, under Explicit axes; under Auto axes the compiler chooses.
      on_a_pod: the same where vectors are not split.
    """

    make: Callable[[int], params.MergeTransform]
    laws: Mapping[str, Any] = MappingProxyType({})
    models: Collection[int] = (3, 1, 8)
    moves: Collection[str] = ()
    on_a_pod: Collection[str] | None = None
    variant: bool = False


def grams(models: int) -> list[dict[str, Any]]:
    """Gram matrices of the inputs of the one matrix that has enough rows."""
    draw = lambda k: np.random.default_rng(k).standard_normal((16, 40))
    return [{"b/kernel": np.cov(draw(k)).astype(np.float32)} for k in range(models)]


def fishers(models: int) -> list[dict[str, Any]]:
    return [{n: np.abs(v[k]) for n, v in deltas(np.random.default_rng(7), models).items()} for k in range(models)]


def chunks(models: int) -> dict[str, np.ndarray]:
    return {n: np.random.default_rng(0).standard_normal((models, 5)).astype(np.float32) for n in SHAPES}


def ramp(models: int) -> np.ndarray:
    """Weights that differ and add up to 1."""
    return np.arange(1.0, models + 1) / (models * (models + 1) / 2)


def masks(models: int) -> dict[str, np.ndarray]:
    return {n: (v > 0.2) * 1 for n, v in deltas(np.random.default_rng(5), models).items()}


MEAN, SYMMETRIC, LINEAR = dict(mean=True), dict(symmetric=True), dict(linear=True)
SUMS, DROPS = dict(exact=False), dict(visible=())  # DROPS: a NaN may be among what is zeroed
TWO, ONE = (2,), (1,)
SHARES = ("all-to-all",)  # of a matrix that is laid out along one axis every device keeps its share
RANKED = dict(moves=("all-gather", *SHARES), on_a_pod=SHARES)  # a vector is one row
WHOLE = ("all-gather", *SHARES)  # numbers per column, to be ranked; a matrix, to be factored exactly
p = params

ATOMS = {  # closed by a sum where they leave all models; variants where another row is little else
    "trim": Row(lambda k: p.chain(p.trim(0.4), p.sum_experts()), SYMMETRIC, variant=True),
    "trim_band": Row(lambda k: p.chain(p.trim_band(0.4, 0.1), p.sum_experts()), SYMMETRIC | DROPS, variant=True),
    "select_variance": Row(lambda k: p.chain(p.select_variance(0.4), p.sum_experts()), DROPS, variant=True),
    "random_mask": Row(lambda k: p.chain(p.random_mask(0.5, seed=1), p.sum_experts()), LINEAR | DROPS, variant=True),
    "rank_mask": Row(lambda k: p.chain(p.rank_mask(0.5, 0.2, seed=1), p.sum_experts()), DROPS, **RANKED, variant=True),
    "mask": Row(lambda k: p.chain(p.mask(masks(k)), p.sum_experts()), LINEAR | DROPS),
    "rescale": Row(
        lambda k: p.chain(p.rescale(p.trim(0.4, scope="tensor"), "l2"), p.sum_experts()), SYMMETRIC | SUMS, variant=True
    ),
    "weigh": Row(lambda k: p.chain(p.weigh(ramp(k)), p.sum_experts()), MEAN | LINEAR),
    "scale": Row(lambda k: p.chain(p.scale(0.5), p.sum_experts()), SYMMETRIC | LINEAR),
    # Rounding, 1e-7 of the largest singular value, turns singular vectors by itself over their gap, which is 0.03 to 0.1 at the
    # ranks here, and bases made orthogonal have singular values down to 0.14. knots takes vectors one by one: gaps of 0.013.
    "truncate": Row(
        lambda k: p.chain(p.truncate(0.5), p.sum_experts()), SYMMETRIC | SUMS | dict(rounding=1e-5), moves=SHARES, variant=True
    ),
    "truncate sketch": Row(
        lambda k: p.chain(p.truncate(0.2, oversample=4), p.sum_experts()), SYMMETRIC | SUMS | dict(rounding=1e-5), variant=True
    ),
    "elect_sign": Row(lambda k: p.chain(p.elect_sign(tie="majority"), p.sum_experts()), SYMMETRIC, variant=True),
    "sum_experts": Row(lambda k: p.sum_experts(), SYMMETRIC | LINEAR),
    "mean_agreeing": Row(lambda k: p.mean_agreeing(), SYMMETRIC | MEAN),
    "max_agreeing": Row(lambda k: p.max_agreeing(), MEAN),
    "elect_largest": Row(lambda k: p.elect_largest(), SYMMETRIC | MEAN),
    "interpolate": Row(lambda k: p.interpolate(0.3), LINEAR | MEAN, TWO),
    "spherical": Row(lambda k: p.spherical(0.3), MEAN | SUMS, TWO),
    "per_leaf": Row(
        lambda k: p.per_leaf(lambda x: None, lambda plan, x: x.max(0, keepdims=True), models=1), SYMMETRIC | MEAN | DROPS
    ),
    "per_layer": Row(
        lambda k: p.per_layer(p.ties(0.3, scope="tensor"), lambda n: "e/{}/stack" if n == "e/stack" else None), SYMMETRIC
    ),
    "partition": Row(
        lambda k: p.partition(
            {"a": p.ties(0.3, scope="tensor"), "b": p.ties(0.3), "rest": p.magmax()}, lambda n: n[0] if n[0] in "ab" else "rest"
        )
    ),
    "exclude": Row(lambda k: p.exclude(p.ties(0.3), "b/", rest=p.linear()), SYMMETRIC, variant=True),
    "keep_base": Row(lambda k: p.keep_base(), SYMMETRIC | LINEAR | DROPS),
    "chain": Row(lambda k: p.chain(p.elect_sign(), p.chain(p.scale(2.0), p.sum_experts())), SYMMETRIC),
}
ALIASES = {
    "linear": Row(lambda k: p.linear(), MEAN | SYMMETRIC | LINEAR),
    "task_arithmetic": Row(lambda k: p.task_arithmetic(0.5, scale=0.25), SYMMETRIC | LINEAR),
    "ties": Row(lambda k: p.ties(0.3), SYMMETRIC),
    "ties whole": Row(lambda k: p.ties(1.0), MEAN | SYMMETRIC, variant=True),
    "ties official": Row(lambda k: p.ties(0.3, extra=1, ties="all", tie="majority", reduce="sum"), SYMMETRIC, variant=True),
    "ties mergekit": Row(lambda k: p.ties(0.3, scope="tensor"), SYMMETRIC, variant=True),
    "ties mergellm": Row(
        lambda k: p.ties(0.3, scope="tensor", rounding="ceil", extra=1, ties="all", tie="majority"), SYMMETRIC, variant=True
    ),
    "ties rescale": Row(lambda k: p.ties(0.3, scope="tensor", rescale=True, reduce="max"), SYMMETRIC | SUMS, variant=True),
    "ties rows": Row(lambda k: p.ties(0.3, scope="row"), SYMMETRIC),
    "dare_linear": Row(lambda k: p.dare_linear(0.5, seed=3), LINEAR | DROPS),
    "dare_linear l1": Row(lambda k: p.dare_linear(0.5, seed=3, rescale="l1"), SUMS | DROPS, variant=True),
    "dare_ties": Row(lambda k: p.dare_ties(0.5, seed=3, reduce="mean"), DROPS, variant=True),
    "breadcrumbs": Row(lambda k: p.breadcrumbs(0.5, 0.1, scope="model", ties="all"), SYMMETRIC | DROPS, variant=True),
    "breadcrumbs_ties": Row(lambda k: p.breadcrumbs_ties(0.5, 0.1, reduce="mean"), SYMMETRIC | DROPS),
    "della": Row(lambda k: p.della(0.5, 0.2, seed=3), DROPS, **RANKED),
    "della_linear": Row(lambda k: p.della_linear(0.5, 0.2, seed=3, rescale="l1"), SUMS | DROPS, **RANKED, variant=True),
    "magmax": Row(lambda k: p.magmax(), MEAN),
    "slerp": Row(lambda k: p.slerp(0.5), MEAN | SYMMETRIC | SUMS, TWO),
    "nuslerp": Row(lambda k: p.nuslerp([0.7, 0.4]), MEAN | SUMS, TWO),
    "nuslerp rows": Row(lambda k: p.nuslerp(scope="row"), MEAN | SYMMETRIC | SUMS, TWO),
    "nuslerp columns": Row(lambda k: p.nuslerp(scope="column"), MEAN | SYMMETRIC | SUMS, TWO, variant=True),
    "multislerp": Row(lambda k: p.multislerp(), MEAN | SYMMETRIC | SUMS),
    "karcher": Row(lambda k: p.karcher(), MEAN | SYMMETRIC | SUMS),
    "model_stock": Row(lambda k: p.model_stock(), MEAN | SYMMETRIC | SUMS),
    # t moves K / (1 + (K - 1) c)^2 as much as the cosine c: up to 370 times where rows of eight models point apart
    "model_stock rows": Row(
        lambda k: p.model_stock(average="angle", scope="row"),
        MEAN | SYMMETRIC | SUMS | dict(rounding=2e-5),
        variant=True,
    ),
    # another order of the models rounds variances otherwise, and another of two equal ones is selected
    "sce": Row(lambda k: p.sce(0.3), MEAN | SUMS),
    "sce whole": Row(lambda k: p.sce(1.0), MEAN | SYMMETRIC | SUMS, variant=True),
    "sce mergekit": Row(lambda k: p.sce(0.3, mask="delta"), SUMS | DROPS, variant=True),
    "varm": Row(lambda k: p.varm(), MEAN | SYMMETRIC | SUMS),
    "ram": Row(lambda k: p.ram(), MEAN | SYMMETRIC),
    "ramplus_tl": Row(lambda k: p.ramplus_tl(), MEAN | SYMMETRIC),
    "nearswap": Row(lambda k: p.nearswap(0.3), {}, ONE),
    "passthrough": Row(lambda k: p.passthrough(0.5), LINEAR, ONE),
    "arcee_fusion": Row(lambda k: p.arcee_fusion(), MEAN | SUMS, TWO),
    "arcee_fusion sampled": Row(lambda k: p.arcee_fusion(sample=9), MEAN | SUMS, TWO, variant=True),
    "update_selective": Row(lambda k: p.update_selective(0.3), {}, ONE),
    "layer_swapping": Row(
        lambda k: p.layer_swapping(2, bottom=1, top=0, layer=lambda n: "ab".find(n[0]) if n[0] in "ab" else None),
        MEAN | LINEAR | DROPS,
        TWO,
    ),
    "select_layers": Row(lambda k: p.select_layers([[0.5] + [0.5 / (k - 1)] * (k - 1)], rest=1), LINEAR | DROPS, (3, 2, 8)),
    "evo_merging": Row(lambda k: p.evo_merging(ramp(k), np.linspace(1, -1, k))),
    "window_average": Row(lambda k: p.window_average("cosine"), MEAN | LINEAR),
    "consensus": Row(lambda k: p.consensus(), SYMMETRIC),
    # 32 eps of slack at the cut, exp and tanh of programs that differ
    "pcb": Row(lambda k: p.pcb(0.3), SYMMETRIC | SUMS | dict(visible=(np.nan,))),
    "pcb tensor": Row(lambda k: p.pcb(0.3, tail=0.0, scope="tensor"), SYMMETRIC | SUMS | dict(visible=(np.nan,)), variant=True),
    "widen": Row(lambda k: p.widen(), MEAN | SUMS, (3, 2, 8), moves=WHOLE),
    "tsvm": Row(lambda k: p.tsvm(), SYMMETRIC | SUMS | dict(rounding=1e-5), moves=SHARES),
    "tsvm svd": Row(lambda k: p.tsvm(method="svd"), SYMMETRIC | SUMS | dict(rounding=1e-5), moves=WHOLE, variant=True),
    "tsvm sketch": Row(lambda k: p.tsvm(density=0.1, oversample=4), SYMMETRIC | SUMS | dict(rounding=1e-5), variant=True),
    "r_tsvm": Row(lambda k: p.r_tsvm(), SYMMETRIC | SUMS | dict(rounding=1e-5), moves=SHARES),
    "iso_c": Row(lambda k: p.iso_c(), SYMMETRIC | SUMS | dict(rounding=1e-5), moves=SHARES),
    "iso_c svd": Row(lambda k: p.iso_c(method="svd"), SYMMETRIC | SUMS | dict(rounding=1e-5), moves=WHOLE, variant=True),
    "iso_cts": Row(lambda k: p.iso_cts(0.5), SYMMETRIC | SUMS | dict(rounding=1e-5), moves=SHARES),
    # Eight equal experts side by side have a norm of 25 for entries of 4, and factors are true to a few eps of the norm.
    "knots": Row(lambda k: p.knots(p.linear()), SYMMETRIC | LINEAR | SUMS | dict(mean=3e-6, rounding=1e-5), moves=SHARES),
    "knots svd": Row(
        lambda k: p.knots(p.linear(), method="svd"),
        MEAN | SYMMETRIC | LINEAR | SUMS | dict(rounding=1e-5),
        moves=WHOLE,
        variant=True,
    ),
    "knots ties": Row(lambda k: p.knots(p.ties(0.3, scope="tensor")), SUMS | dict(rounding=5e-5), moves=SHARES, variant=True),
    # eps times the condition of the sum of the Gram matrices, 39 here
    "wudi": Row(lambda k: p.wudi(), SYMMETRIC | SUMS | dict(rounding=5e-6), moves=SHARES),
    "twin_merging": Row(lambda k: p.twin_merging(ramp(k)), SUMS | dict(rounding=1e-5), moves=SHARES),
    "regmean": Row(lambda k: p.regmean(grams(k)), MEAN | LINEAR | SUMS, moves=SHARES),
    # what divides is a constant here: XLA multiplies by its reciprocal, unless it is split
    "fisher": Row(lambda k: p.fisher(fishers(k)), MEAN | LINEAR | SUMS),
    "adamerging": Row(lambda k: p.adamerging(ramp(k)), MEAN | LINEAR),
    "expert_merging": Row(lambda k: p.expert_merging(chunks(k)), LINEAR),
    "self_positioning": Row(lambda k: p.self_positioning(np.log(ramp(k))), MEAN | LINEAR),
}
ROWS = ATOMS | ALIASES


def rows(*, of: Callable[[Row], bool] = lambda row: True, slow: bool = False):
    marks = lambda row: [pytest.mark.slow] if slow or row.variant else []
    return [pytest.param(row, id=name, marks=marks(row)) for name, row in ROWS.items() if of(row)]


def test_the_table_is_complete():
    merges = {
        name
        for name, f in vars(params).items()
        if inspect.isfunction(f) and f.__annotations__.get("return") in (params.MergeTransform, "MergeTransform")
    }
    assert merges == {name.split()[0] for name in ROWS}


@pytest.mark.parametrize("row", rows())
def test_laws(row):
    models = row.models[0]
    assert_merge(row.make(models), models=models, moves=row.moves, axes=[AxisType.Explicit], **row.laws)


def _per_axis(spec, ndim):
    split = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]
    return split + [()] * (ndim - len(split))


LAYOUTS = {"rows": ("fsdp",), "columns": (None, "tensor"), "both": ("fsdp", "tensor"), "one axis": (("tensor", "fsdp"),)}
KEYED = ("fisher", "mask", "expert_merging")  # by names and shapes of their own


@pytest.mark.parametrize("row", rows(of=lambda row: not any(ROWS[name] is row for name in KEYED)))
def test_matrices_of_any_layout(row):
    """Tall, wide and stacked matrices, split along either axis or both, keep their layout; traced, which checks every type."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    layouts = {f"{shape}/{how}": (shape, spec) for shape in [(64, 48), (48, 64), (8, 24, 16)] for how, spec in LAYOUTS.items()}
    place = lambda spec: NamedSharding(mesh, P(None, *spec))
    models, tx = row.models[0], row.make(row.models[0])
    array = lambda shape, spec: jax.ShapeDtypeStruct((models, *shape), jnp.float32, sharding=place(spec))
    with jax.set_mesh(mesh):
        merged = jax.eval_shape(lambda x: tx.merge(tx.match(x), x), {n: array(*where) for n, where in layouts.items()})
    for name, leaf in merged.items():
        assert _per_axis(leaf.sharding.spec, leaf.ndim) == _per_axis(place(layouts[name][1]).spec, leaf.ndim), name


@pytest.mark.slow
@pytest.mark.parametrize("row", rows())
def test_laws_under_auto_axes_on_any_number_of_devices(row):
    models = row.models[0]
    moves = (*WHOLE, "collective-permute") if row.moves else ()
    where = dict(axes=[AxisType.Auto], sharding=(1, 2, 4, 8), moves=moves, layout=not row.moves)
    assert_merge(row.make(models), models=models, **where, **row.laws)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows())
def test_auto_axes_where_the_layout_is_said(row):
    """Whole models over Auto axes on eight devices: nothing moves but what moves under Explicit axes; the same values."""
    tx, rng, layout = row.make(row.models[0]), np.random.default_rng(0), shardings(8, AxisType.Auto)
    layout = {n: NamedSharding(s.mesh, P(*s.spec[1:])) for n, s in layout.items()}
    models = [{n: v[k] for n, v in deltas(rng, row.models[0]).items()} for k in range(row.models[0])]
    run = lambda s: jax.jit(lambda base, models: params.merge(tx, base, models, shardings=s))
    base = jax.tree.map(np.zeros_like, models[0])
    args = jax.device_put(base, layout), [jax.device_put(m, layout) for m in models]
    program = run(layout).lower(*args).compile()
    assert {c.name for c in collectives(program)} <= {"all-reduce", *row.moves}
    expected, there = run(None)(base, models), program(*args)
    ahead = row is ROWS["expert_merging"]  # coefficients that are computed before the program round as such
    tolerance = row.laws.get("rounding", 1e-6) if ahead or not row.laws.get("exact", True) else 0.0
    for name, leaf in there.items():
        assert leaf.sharding.is_equivalent_to(layout[name], leaf.ndim)
        scale = max(1.0, float(abs(expected[name]).max()))
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=tolerance * scale)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(of=lambda row: len(row.models) > 1))
def test_one_model_and_eight(row):
    for models in row.models[1:]:
        assert_merge(row.make(models), models=models, sharding=False, **row.laws)


POD = {  # an FSDP and tensor-sharded transformer on 512 chips; layers stacked, and one matrix
    "head": ((1024, 32768), ("fsdp", "tensor")),
    "layers/attn": ((4, 1024, 1024), (None, "fsdp", "tensor")),
    "norm": ((1024,), ()),
}
SPECTRAL_POD = {"head": ((2048, 256), ("fsdp", "tensor")), "norm": ((1024,), ())}  # a larger eigenproblem compiles for minutes


def on_a_pod(merge, models, *data, pod=POD):
    """The collectives of merge(stacked, *data) by the real compiler; data: {leaf name: (shape, axes)}."""
    chips = tpu_mesh("v5p:8x8x8", (64, 8), ("fsdp", "tensor"))
    mesh = Mesh(chips.devices, chips.axis_names, axis_types=(AxisType.Explicit,) * 2)
    array = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    stacked = {name: array((models, *shape), (None, *spec)) for name, (shape, spec) in pod.items()}
    given = [{name: array(*where) for name, where in tree.items()} for tree in data]
    return collectives(compile_for(merge, stacked, *given))


def looks_at(row):
    return {need.statistic for need in params.needs(row.make(row.models[0]))}


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in rows(of=lambda row: "data" not in looks_at(row)) if r.id != "expert_merging"])
def test_on_a_pod(row):
    """On 512 chips nothing is gathered but where the mathematics needs it, and what is added up is small."""
    tx, spectral = row.make(row.models[0]), "spectral" in looks_at(row)
    moved = on_a_pod(lambda x: tx.merge(tx.match(x), x), row.models[0], pod=SPECTRAL_POD if spectral else POD)
    assert {c.name for c in moved} <= {"all-reduce", *(row.moves if row.on_a_pod is None else row.on_a_pod)}
    if not row.moves and not spectral:  # counts, norms, one number per row or column
        assert max((c.bytes for c in moved), default=0) <= 2**18


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask", "fisher", "expert_merging", "regmean"])
def test_on_a_pod_with_data(name):
    run = lambda tx, x: tx.merge(tx.match(x), x)
    if name == "mask":
        masks = {n: ((2, *shape), (None, *spec)) for n, (shape, spec) in POD.items()}
        moved = on_a_pod(lambda x, m: run(p.chain(p.mask(m), p.sum_experts()), x), 2, masks)
    elif name == "fisher":
        moved = on_a_pod(lambda x, *f: run(p.fisher(f), x), 2, POD, POD)
    elif name == "expert_merging":
        moved = on_a_pod(lambda x, c: run(p.expert_merging(c), x), 2, {n: ((2, 4), ()) for n in POD})
    else:
        grams = {"head": ((1024, 1024), ())}
        moved = on_a_pod(lambda x, *g: run(p.regmean(g), x), 2, grams, grams)
    assert {c.name for c in moved} <= {"all-reduce", *ROWS[name].moves}
