"""Coefficients that are searched for: CMA-ES over whatever a merge takes, by whatever gives a model a score."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.errors import JAXTypeError
from jaxtyping import Float, PyTree

from jaxmerge.params._stack import merge
from jaxmerge.params._transform import Hyperparameter, Match, MergeTransform, chain
from jaxmerge.params.atoms._consensus import sum_experts
from jaxmerge.params.atoms._scale import weigh
from jaxmerge.params.atoms._trim import Scope, trim


class Evolution(NamedTuple):
    """A search, as far as it went. Pickle it to go on another day (`resume`).

    Attributes:
      best: the coefficients of the highest score.
      score: that score.
      mean: the centre of the distribution that is searched; where scores are noisy, the better answer.
      scores: (generations, population), each candidate's, in the order of evaluation.
      search: the state of CMA-ES.
      seed: what its candidates are drawn by, with the number of the generation.
    """

    best: PyTree
    score: float
    mean: PyTree
    scores: Float[np.ndarray, "generations population"]
    search: Any
    seed: int


def evolve(
    score: Callable[[PyTree], Any],
    transform: Callable[[PyTree], MergeTransform],
    start: PyTree,
    *,
    base: PyTree | None,
    models: list[PyTree],
    generations: int,
    seed: int = 0,
    sigma: float = 1 / 6,
    population: int | None = None,
    bounds: tuple[PyTree | float, PyTree | float] | None = None,
    jit: bool = True,
    callback: Callable[[Evolution], Any] | None = None,
    resume: Evolution | None = None,
) -> Evolution:
    """Search the coefficients of a merge for the merged model of the highest score, without gradients (CMA-ES).

    Args:
      score: merged model -> number, higher is better; any Python function: an evaluation, a server's answer. -inf is the worst.
      transform: coefficients -> transform, such as `evo_merging`.
      start: coefficients to start from, a pytree; its candidates have the same structure, float32 arrays.
      base, models: see `merge`; integer leaves are the base's.
      generations: how many; each scores a whole population.
      seed: of the candidates: one seed, one course.
      sigma: the standard deviation at the start, of every coefficient.
      population: candidates in a generation; None is 4 + int(3 log n) for n coefficients.
      bounds: the lowest and the highest value, numbers or pytrees like `start`; candidates are drawn inside.
      jit: compile the merge once, with coefficients that are traced. False builds each candidate from concrete numbers, which
        densities must be (`trim` counts entries on the host), and compiles its atoms each time (those of `evo_merging` once).
      callback: called with what there is after each generation.
      resume: an earlier search to go on with; its course, not `start`, `seed`, `sigma`, `population` and `bounds`, is followed.

    Returns:
      The best coefficients, their score, and the whole course.

    Law:
      k generations, and then m more (`resume`), are k + m generations.

    Raises:
      ValueError: no coefficients or generations; fewer than 4 candidates; a score that is NaN; bounds that leave `start`
        outside; with `jit`, a transform that needs concrete coefficients.
      ModuleNotFoundError: the package cmaes is missing: `pip install "jaxmerge[evolve]"`.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
      >>> score = lambda model: -jnp.sum((model["w"] - jnp.array([0.25, 0.75])) ** 2)
      >>> found = jm.params.evolve(
      ...     score, jm.params.task_arithmetic, jnp.full(2, 0.5), base=base, models=models, generations=30
      ... )
      >>> [round(v, 2) for v in found.best.tolist()], found.scores.shape
      ([0.25, 0.75], (30, 6))

    Source: mergekit-evolve (CMA-ES, sigma 1/6); Evo-Merging (arXiv:2509.12951), where the score is an API's.
    """
    if generations < 1:
        raise ValueError(f"evolve: generations must be 1 or more, got {generations}.")
    if population is not None and population < 4:
        raise ValueError(f"evolve: a population must have 4 candidates or more, to learn from; got {population}.")
    shapes = [np.shape(x) for x in jax.tree.leaves(start)]
    cuts = np.cumsum([int(np.prod(s)) for s in shapes])
    if not len(cuts) or cuts[-1] == 0:
        raise ValueError("evolve: there are no coefficients in start; pass at least one number.")

    def unflat(x):
        pieces = np.split(np.asarray(x, np.float32)[: cuts[-1]], cuts[:-1])
        return jax.tree.unflatten(jax.tree.structure(start), [p.reshape(s) for p, s in zip(pieces, shapes, strict=True)])

    build = lambda c, base, models: merge(transform(c), base, models, integers="base")
    build = jax.jit(build) if jit else build
    search = _search(start, sigma, population, bounds) if resume is None else resume.search
    found = Evolution(start, -np.inf, unflat(search.mean), np.zeros((0, search.population_size)), search, seed)
    found = found if resume is None else resume
    for _ in range(generations):
        search = copy.deepcopy(search)  # what was returned before stays as it was
        search.reseed_rng(int(np.random.SeedSequence([found.seed, len(found.scores)]).generate_state(1)[0]))
        candidates = [search.ask() for _ in range(search.population_size)]
        scores = np.array([_scored(score, build, unflat(x), base, models) for x in candidates])
        search.tell([(x, -s) for x, s in zip(candidates, scores, strict=True)])
        top = int(np.argmax(scores))
        better = scores[top] > found.score or not len(found.scores)
        found = Evolution(
            unflat(candidates[top]) if better else found.best,
            float(scores[top]) if better else found.score,
            unflat(search.mean),
            np.concatenate([found.scores, scores[None]]),
            search,
            found.seed,
        )
        if callback is not None:
            callback(found)
    return found


def _scored(score: Callable, build: Callable, coefficients: PyTree, base: PyTree | None, models: list[PyTree]) -> float:
    try:
        merged = build(coefficients, base, models)
    except JAXTypeError as error:
        raise ValueError("evolve: this transform needs concrete coefficients (densities are); pass jit=False.") from error
    value = float(score(merged))
    if np.isnan(value):
        raise ValueError(f"evolve: the score of {coefficients} is NaN; return -inf for a model that is of no use.")
    return value


def _search(start: PyTree, sigma: float, population: int | None, bounds: Any) -> Any:
    try:
        from cmaes import CMA
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('evolve needs the package cmaes: pip install "jaxmerge[evolve]".') from error
    flat = lambda tree: np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
    mean = flat(start)
    limits = None
    if bounds is not None:
        spread = lambda b: jax.tree.map(lambda x, v: np.broadcast_to(v, np.shape(x)), start, b)
        like = lambda b: spread(b if jax.tree.structure(b) == jax.tree.structure(start) else jax.tree.map(lambda x: b, start))
        limits = np.stack([flat(like(b)) for b in bounds], axis=1)
        if not ((limits[:, 0] < limits[:, 1]) & (limits[:, 0] <= mean) & (mean <= limits[:, 1])).all():
            raise ValueError(f"evolve: every coefficient must start between its bounds; got {start} and {bounds}.")
    if len(mean) == 1:  # CMA-ES is defined from two coefficients on: one that nobody reads joins
        mean = np.append(mean, 0.0)
        limits = None if limits is None else np.append(limits, [[-np.inf, np.inf]], axis=0)
    return CMA(mean, sigma, bounds=limits, population_size=population)


def evo_merging(density: Hyperparameter, weight: Hyperparameter, *, scope: Scope = "tensor") -> MergeTransform:
    """Denoise each model as much as it needs, then add it or take it away: a density and a signed weight for each.

    Args:
      density: the share of its largest changes that each model keeps; concrete. A function of the leaf's name may treat the two
        factors of a low-rank update (".../a", ".../b") differently.
      weight: one signed number per model; below 0 a model is subtracted. May be traced.
      scope: see `trim`.

    Law:
      A density of 0 or a weight of 0 leaves a model out.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, 3.0])}, {"w": jnp.array([2.0, 1.0])}]
      >>> jm.params.merge(jm.params.evo_merging([0.5, 1.0], [1.0, -0.5]), base, models)["w"].tolist()
      [-1.0, 2.5]

    Source: Evo-Merging (arXiv:2509.12951): sparsity-based denoising and sign-aware scaling, searched for by `evolve`.
    """
    own, shared = _evo_merging(density, weight, scope), _any_evo_merging(scope)
    steps = zip(own.match.steps, shared.match.steps, strict=True)  # type: ignore[attr-defined]
    return chain(own._replace(match=Match(tuple(f._replace(settings=s.settings) for s, f in steps))))


def _evo_merging(density: Hyperparameter, weight: Hyperparameter, scope: Scope) -> MergeTransform:
    return chain(trim(density, scope=scope), weigh(weight), sum_experts())


@functools.cache
def _any_evo_merging(scope: Scope) -> MergeTransform:
    """The functions of all candidates, who differ in their settings alone: they are compiled once."""
    return _evo_merging(1.0, 1.0, scope)
