"""The diagonal Fisher information against its definition, differentiated label by label and example by example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from jaxmerge import params
from tests.hlo import collectives

RNG = np.random.default_rng(0)
MODEL = {
    "w": jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32),
    "b": jnp.asarray(RNG.standard_normal(3), jnp.float32),
    "steps": jnp.int32(7),
}
X = jnp.asarray(RNG.standard_normal((8, 4)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, 8))


def logits(model, x):
    return jnp.tanh(x) @ model["w"] + model["b"]


@functools.cache
def program(f, labels, options):
    run = lambda m, x, y: params.fisher_information(f, m, x, y if labels is None else labels, **dict(options))
    return jax.jit(run)


def information(f, x, labels="expected", **options):
    named = labels if isinstance(labels, str) else None
    return program(f, named, tuple(options.items()))(MODEL, x, Y if named else labels)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
def gradients(model, x):
    """(examples, classes, *shape): d log p(y) / d weights, for every y."""
    weights = {n: model[n] for n in "wb"}
    return jax.jacobian(lambda w: jax.nn.log_softmax(logits(model | w, x)))(weights)


def close(got, expected, **options):
    assert sorted(got) == ["b", "w"]
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], **dict(rtol=1e-5, atol=1e-6) | options, err_msg=name)


def test_expected_and_given_labels_are_the_definition():
    g = jax.tree.map(np.asarray, gradients(MODEL, X))
    p = np.asarray(jax.nn.softmax(jax.vmap(logits, (None, 0))(MODEL, X)))
    true = {n: np.tensordot(p, g[n] ** 2, 2) for n in "wb"}
    found = information(logits, X)
    assert found.count == 8
    close(found.total, true)
    close(found.mean(), {n: v / 8 for n, v in true.items()})
    close(information(logits, X, Y).total, {n: (g[n][np.arange(8), Y] ** 2).sum(axis=0) for n in "wb"})
    root = {n: np.tensordot(np.sqrt(p), g[n], 2) ** 2 for n in "wb"}
    close(information(logits, X, "mixed").total, root, rtol=1e-4)
    assert not np.allclose(root["w"], true["w"], rtol=0.1)  # what peers compute is something else


def test_batches_add_up():
    whole = information(logits, X, Y)
    halves = [information(logits, X[i : i + 4], Y[i : i + 4]) for i in (0, 4)]
    both = jax.tree.map(jnp.add, *halves)
    assert both.count == 8
    close(both.total, whole.total)
    close(information(logits, X, Y, at_once=2).total, whole.total)
    close(information(logits, X, at_once=4).total, information(logits, X).total)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_statistics_are_saved_and_taken_up_again(tmp_path):
    """Half of the batch, to disk, the other half: Fisher and Gram as of the whole batch."""
    halves = (X[:4], Y[:4]), (X[4:], Y[4:])
    of = lambda x, y: {"fisher": information(logits, x, y), "gram": {"w": params.gram(x)}}
    first, second = (of(*half) for half in halves)
    ocp.save(tmp_path / "statistics", first)
    saved = ocp.load(tmp_path / "statistics", jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first))
    both, whole = jax.tree.map(jnp.add, saved, second), of(X, Y)
    close(both["fisher"].mean(), whole["fisher"].mean())
    np.testing.assert_allclose(both["gram"]["w"], whole["gram"]["w"], rtol=1e-5, atol=1e-6)


def test_draws_tend_to_what_is_expected():
    expected = information(logits, X).total
    draw = jax.jit(lambda m, x: params.fisher_information(logits, m, x, "sampled", key=jax.random.key(0), samples=4000))
    draws = draw(MODEL, X).total
    # 32000 squares, none above 4: their mean is off by less than 5 standard errors
    close(draws, expected, rtol=0, atol=8 * 5 * 4 / np.sqrt(32000))


def test_positions_are_independent_and_can_be_left_out():
    """A label at each of two positions: the sum of both; a constant position says nothing."""
    two = lambda model, x: jnp.stack([logits(model, x[0]), logits(model, x[1])])
    first = lambda model, x: jnp.where(jnp.array([[True], [False]]), two(model, x), 0)
    twice = lambda x: jnp.stack([x, x], axis=1)
    close(information(two, X.reshape(4, 2, 4)).total, information(logits, X).total)
    close(information(first, twice(X), twice(Y)).total, information(logits, X, Y).total)


def test_merges_with_its_own_names():
    """A model that is sure of a weight keeps it."""
    mean = information(logits, X).mean()
    models = [MODEL, MODEL | {"w": MODEL["w"] + 1, "b": MODEL["b"] - 1}]
    tx = params.fisher([mean, {n: 1e4 * x + 1 for n, x in mean.items()}], normalize=False)
    merged = params.merge(tx, None, models)
    close({n: merged[n] for n in "wb"}, models[1], rtol=0, atol=1e-3)


def test_examples_may_be_split_over_devices(mesh):
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data", *[None] * (x.ndim - 1))))
    model = jax.device_put(MODEL, NamedSharding(mesh, P()))
    run = jax.jit(lambda m, x, y: params.fisher_information(logits, m, x, y))
    assert set(collectives(run.lower(model, put(X), put(Y)).compile())) <= {"all-reduce"}
    close(run(model, put(X), put(Y)).total, run(MODEL, X, Y).total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(labels="empirical"), "labels must be"),
        (dict(labels="sampled"), "pass key"),
        (dict(at_once=3), "must divide the batch of 8"),
    ],
)
def test_wrong_arguments(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        params.fisher_information(logits, MODEL, X, **options)
