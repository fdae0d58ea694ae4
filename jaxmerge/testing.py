"""The laws, as assertions: for our tests, and for planners and merges of your own.

assert_plan(plan)              every law of the algebra, on this plan
assert_planner(planner, x)     the planner under jit, vmap, scan, eval_shape and bfloat16, then the laws
assert_merge(tx)               every law of merging models, sharded and whole
collectives(compiled)          what a compiled program moves between devices
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmerge._collectives import Collective as Collective, collectives as collectives
from jaxmerge._plan import Plan, SoftPlan, compose, from_parents, identity, merge, unmerge
from jaxmerge.params._laws import assert_merge as assert_merge

EPS = float(jnp.finfo(jnp.float32).eps)


def assert_plan(plan: Plan | SoftPlan, *, features: int = 3, seed: int = 0, ordered: bool = False) -> None:
    """Check every law of the algebra on one plan, against its dense matrix in float64.

    Adjoint, mass, left inverse, identity, composition (sum and size-weighted mean), linearity, max and first by definition, and
    the gradients that the laws imply. Bounds are derived: n + 2 roundings of float32 on the sum of magnitudes.

    Args:
      plan: any batch shape; concrete values.
      features: size of the trailing axis to try.
      seed: of the random values.
      ordered: also demand that segments are numbered by their first position.

    Raises:
      AssertionError: names the law, the largest error and its bound.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> jm.testing.assert_plan(jm.Plan(jnp.array([[0, 1, 0, -1], [2, 2, 7, 1]]), 3))
    """
    rng = np.random.default_rng(seed)
    matrix = np.asarray(plan.matrix, np.float64)
    *batch, m, n = matrix.shape
    assert (plan.num_segments, plan.num_positions) == (m, n), "shape: num_segments, num_positions against the matrix"
    x = rng.standard_normal((*batch, n, features)).astype(np.float32)
    y = rng.standard_normal((*batch, m, features)).astype(np.float32)
    w = rng.uniform(0.5, 2.0, (*batch, n)).astype(np.float32)

    def close(law: str, got, want, magnitude, roundings: int = n + 2):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        bound = EPS * roundings * np.maximum(np.asarray(magnitude, np.float64), np.abs(want)) + 1e-30
        worst = np.max(np.abs(got - want) - bound, initial=-np.inf)
        assert got.shape == want.shape and worst <= 0, (
            f"{law}: shape {got.shape} for {want.shape}, off by {np.max(np.abs(got - want), initial=0):.3g}, "
            f"which is {worst:.3g} beyond the bound of float32"
        )

    up = lambda a, v: np.einsum("...mn,...nf->...mf", a, np.asarray(v, np.float64))
    down = lambda a, v: np.einsum("...mn,...mf->...nf", a, np.asarray(v, np.float64))

    pairs = Plan(jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32) // 2, (*batch, m)), (m + 1) // 2)
    half = np.asarray(pairs.matrix, np.float64)
    got = jax.tree.map(np.asarray, _apply_every_way(plan, pairs, x, y, w))

    # A x, Aᵀ y, and that they are adjoint
    close("merge(sum) = A x", got["sum"], up(matrix, x), up(abs(matrix), abs(x)))
    close("unmerge = Aᵀ y", got["unmerge"], down(matrix, y), down(abs(matrix), abs(y)), m + 2)
    inner = lambda a, b: np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64))
    size_of_terms = inner(up(abs(matrix), abs(x)), abs(y))
    close("adjoint <merge x, y> = <x, unmerge y>", inner(got["sum"], y), inner(x, got["unmerge"]), size_of_terms, n + m)
    close("the gradient of merge is unmerge", got["grad sum"], down(matrix, y), down(abs(matrix), abs(y)), m + 2)
    close("the gradient of unmerge is merge", got["grad unmerge"], up(matrix, x), up(abs(matrix), abs(x)))

    # mass, mean, fill
    close("sizes = A 1", got["sizes"], matrix.sum(-1), abs(matrix).sum(-1))
    weighted, ones = matrix * w[..., None, :], np.ones((*batch, n, 1))
    mass = up(weighted, ones)
    safe = np.where(mass == 0, 1, mass)
    mean = np.where(mass == 0, 0, up(weighted, x) / safe)
    spread = (up(abs(weighted), abs(x)) + abs(mean) * up(abs(weighted), ones)) / abs(safe)
    close("merge(mean) = sum w x / sum w", got["mean"], mean, spread, 2 * n + 6)
    kept = np.asarray(plan.kept)
    assert np.all(got["fill"][~kept] == 7), "fill: positions in no segment take the fill value"

    # identity and composition
    np.testing.assert_array_equal(got["identity"], x, err_msg="merge(identity, x) = x")
    for side in (got["after identity"], got["before identity"]):
        if isinstance(plan, Plan):
            canonical = lambda ids: np.clip(ids, -1, m)
            same = canonical(np.asarray(plan.segment_ids))
            np.testing.assert_array_equal(canonical(side), same, err_msg="compose with the identity changes nothing")
        else:
            close("compose with the identity changes nothing", side, matrix, abs(matrix))
    twice, magnitude = up(half @ matrix, x), up(half @ abs(matrix), abs(x))
    close("merge∘merge = merge(compose)", got["sum sum"], twice, magnitude, n + m + 4)
    close("sizes of a composition", got["composed"], (half @ matrix).sum(-1), (half @ abs(matrix)).sum(-1), n + m)
    if isinstance(plan, SoftPlan):
        return

    size = np.maximum(half @ matrix @ np.ones((n, 1)), 1)
    close("nested means, weighted by sizes", got["nested mean"], twice / size, magnitude / size, 2 * (n + m))

    # what only a hard plan promises
    filled, ids = got["sizes"] > 0, np.asarray(plan.segment_ids)
    round_trip = np.where(filled[..., None], got["round trip"], y)
    close("left inverse: merge(unmerge(y)) = y", round_trip, y, abs(y))
    members = np.where(matrix[..., None] > 0, x[..., None, :, :], -np.inf)
    largest = np.where(filled[..., None], members.max(-2, initial=-np.inf), 0)
    np.testing.assert_array_equal(got["max"], largest, err_msg="merge(max): elementwise maximum")
    at = np.argmax(matrix > 0, -1) if n else np.zeros((*batch, m), int)
    first = np.where(filled[..., None], np.take_along_axis(x, at[..., None], -2), 0) if n else np.zeros_like(y)
    np.testing.assert_array_equal(got["first"], first, err_msg="merge(first): the lowest position")
    assert np.array_equal(got["overflow"], (ids >= m).sum(-1)), "overflow counts ids at or above num_segments"
    assert np.array_equal(got["sizes"].sum(-1), kept.sum(-1)), "mass: sizes add up to the kept positions"
    if ordered:
        lowest = np.where(filled, at, n)
        assert np.all(np.diff(lowest, axis=-1) >= 0), f"order: segments must be numbered by their first position, got {ids}"


@jax.jit
def _apply_every_way(plan, pairs, x, y, w):
    """All that the laws speak of, in one program."""
    n, m, batch = plan.num_positions, plan.num_segments, x.shape[:-2]
    total, both = merge(plan, x, reduce="sum"), compose(pairs, plan)
    name = lambda p: p.segment_ids if isinstance(p, Plan) else p.weights
    out = {
        "sum": total,
        "unmerge": unmerge(plan, y),
        "grad sum": jax.grad(lambda x: jnp.sum(merge(plan, x, reduce="sum") * y))(x),
        "grad unmerge": jax.grad(lambda y: jnp.sum(unmerge(plan, y) * x))(y),
        "sizes": plan.sizes,
        "mean": merge(plan, x, weight=w),
        "fill": unmerge(plan, y, fill=7.0),
        "identity": merge(identity(n, batch), x),
        "after identity": name(compose(plan, identity(n, batch))),
        "before identity": name(compose(identity(m, batch), plan)),
        "sum sum": merge(pairs, total, reduce="sum"),
        "composed": both.sizes,
        "overflow": plan.overflow,
    }
    if isinstance(plan, Plan):
        out |= {
            "nested mean": merge(pairs, merge(plan, x), weight=plan.sizes),
            "round trip": merge(plan, unmerge(plan, y)),
            "max": merge(plan, x, reduce="max"),
            "first": merge(plan, x, reduce="first"),
        }
    return out


def assert_planner(
    planner: Callable[..., Plan | SoftPlan],
    x: Float[Array, "b n d"],
    *,
    ordered: bool = False,
    low_precision: bool = True,
) -> None:
    """Check that a planner is a pure function with static shapes, and that its plans obey the laws.

    The batched call, `jit`, `vmap`, `scan` over the batch and `eval_shape` must agree exactly; a bfloat16 input must give a
    plan of the same shape.

    Args:
      planner: from (b, n, d) to a plan of batch shape (b,), and from (n, d) to one without.
      x: concrete input, b at least 2.
      ordered: see `assert_plan`.
      low_precision: also try bfloat16.

    Raises:
      AssertionError: names what disagreed.

    Example:
      >>> import jax, jaxmerge as jm
      >>> score = lambda x: jm.tokens.keep_top_k(x.sum(-1), 4)
      >>> jm.testing.assert_planner(score, jax.random.normal(jax.random.key(0), (2, 8, 3)), ordered=True)
    """
    leaf = lambda p: p.segment_ids if isinstance(p, Plan) else p.weights
    plan = planner(x)
    shape = jax.eval_shape(planner, x)
    assert leaf(shape).shape == leaf(plan).shape, f"eval_shape: {leaf(shape).shape}, the plan has {leaf(plan).shape}"
    tolerance = 0 if isinstance(plan, Plan) else 16 * EPS * x.shape[1]
    ways = {
        "jit": planner,
        "vmap": jax.vmap(planner),
        "scan": lambda x: jax.lax.scan(lambda c, row: (c, planner(row)), 0, x)[1],
    }
    others = jax.jit(lambda x: [f(x) for f in ways.values()])(x)  # compiled together, once
    for how, other in zip(ways, others, strict=True):
        assert other.num_segments == plan.num_segments, f"{how}: num_segments {other.num_segments}, eager {plan.num_segments}"
        message = f"{how} disagrees with the eager call"
        np.testing.assert_allclose(leaf(other), leaf(plan), rtol=tolerance, atol=tolerance, err_msg=message)
    assert_plan(plan, ordered=ordered)
    if low_precision:
        low = planner(x.astype(jnp.bfloat16))
        assert leaf(low).shape == leaf(plan).shape, "bfloat16 input changes the plan's shape"
        assert_plan(low, ordered=ordered)


def random_plan(key: Array, batch: tuple[int, ...], n: int, m: int) -> Plan:
    """A plan with everything in it: merges, drops, overflow and empty slots.

    Example:
      >>> import jax, jaxmerge as jm
      >>> jm.testing.random_plan(jax.random.key(0), (2,), 8, 4).segment_ids.shape
      (2, 8)
    """
    return Plan(jax.random.randint(key, (*batch, n), -1, m + 1), m)


def random_forest(key: Array, batch: tuple[int, ...], n: int, roots: int) -> Plan:
    """A plan from random parents, each below its child, with `roots` roots: merges in chains, nothing dropped.

    Example:
      >>> import jax, jaxmerge as jm
      >>> jm.testing.random_forest(jax.random.key(0), (), 8, 3).sizes.sum().item()
      8
    """
    here = jnp.broadcast_to(jnp.arange(n), (*batch, n))
    parents = jnp.floor(jax.random.uniform(key, (*batch, n)) * here).astype(jnp.int32)
    return from_parents(jnp.where(here < roots, here, parents), roots)
