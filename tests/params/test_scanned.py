"""Scanned layers come out as the layers of an unstacked model would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import params

LAYERS, KEY = 3, jax.random.key(0)
stacked_name = lambda name: name.replace("layers/", "layers/{}/") if name.startswith("layers/") else None


def models(count):
    """The same models with layers stacked and apart, some entries equal."""
    draw = lambda k, shape: jnp.round(4 * jax.random.normal(jax.random.fold_in(KEY, k), shape)) / 4
    stacked = [
        {"layers": {"kernel": draw(k, (LAYERS, 6, 4)), "scale": draw(k + 50, (LAYERS, 4))}, "head": draw(k + 99, (4, 5))}
        for k in range(count)
    ]
    apart = [
        {"layers": [jax.tree.map(lambda x, i=i: x[i], m["layers"]) for i in range(LAYERS)], "head": m["head"]} for m in stacked
    ]
    return stacked, apart


@pytest.mark.parametrize(
    ("tx", "rounding"),
    [
        (params.ties(0.3, scope="tensor"), 0),
        (params.dare_linear(0.5, seed=1, rescale="l1"), 1e-6),
        (params.task_arithmetic(params.gradient([0.0, 1.0], LAYERS)), 0),
        (params.tsvm(), 1e-5),
        (params.chain(params.random_mask(0.5, seed=2), params.mean_agreeing()), 0),
    ],
    ids=["ties", "dare", "gradient", "tsvm", "mask"],
)
def test_as_the_unstacked_model(tx, rounding):
    (base, *rest), (base_apart, *rest_apart) = models(4)
    merged = params.merge(params.per_layer(tx, stacked_name), base, rest)
    expected = params.merge(tx, base_apart, rest_apart)
    np.testing.assert_allclose(merged["head"], expected["head"], rtol=0, atol=rounding)
    for name in ("kernel", "scale"):
        together = jnp.stack([layer[name] for layer in expected["layers"]])
        np.testing.assert_allclose(merged["layers"][name], together, rtol=0, atol=rounding * 4)


def test_a_threshold_for_each_layer_differs_from_one_for_all():
    (base, *rest), _ = models(3)
    tx = params.ties(0.3, scope="tensor")
    whole, each = (params.merge(t, base, rest)["layers"]["kernel"] for t in (tx, params.per_layer(tx, stacked_name)))
    assert not np.array_equal(whole, each)


@pytest.mark.parametrize(
    ("tx", "layers", "message"),
    [
        (params.ties(0.3), stacked_name, "statistic of the whole model"),
        (params.linear(), lambda name: "layers" if name.startswith("layers") else None, "needs an axis of layers and a name"),
        (params.tsvm(select=lambda name: "/1/" in name), stacked_name, "in different ways"),
    ],
)
def test_wrong_layers(tx, layers, message):
    (base, *rest), _ = models(2)
    with pytest.raises(ValueError, match=message):
        params.merge(params.per_layer(tx, layers), base, rest)
