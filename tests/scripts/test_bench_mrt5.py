"""The bench of MrT5 runs without its peer and counts what the compiler counts. No time is asserted."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import mrt5 as family, published, t5
from scripts.bench import mrt5

TINY = t5.T5Config(d_model=64, d_kv=16, d_ff=256, num_heads=2, num_layers=4, num_decoder_layers=1, dropout=0.0)


@pytest.mark.parametrize("step", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forward", "step"])
def test_our_side_alone(tmp_path, monkeypatch, step):
    monkeypatch.setitem(t5.VARIANTS, "tiny", TINY)
    mrt5.main(out=tmp_path, size="tiny", batch=2, inputs=64, targets=8, rounds=1, step=step)
    figures = json.loads((tmp_path / f"mrt5_{'step' if step else 'forward'}.json").read_text())
    assert 32 <= figures["capacity"] <= 48 and 0.5 < figures["promise"] < 1
    assert list(figures["rounds"]) == ["jaxmerge"] and list(figures["rounds"]["jaxmerge"]) == ["byt5", "soft", "hard"]
    with pytest.raises(ValueError, match="give --mrt5 and --python together"):
        mrt5.main(out=tmp_path, python=tmp_path)


def test_products_are_counted_as_the_compiler_counts_them():
    config = family.MrT5Config(TINY)
    graph, params = nnx.split(published.blank(family.MrT5, config))

    def f(p, ids, labels):
        m = nnx.merge(graph, p)
        return m.decode(labels, m.encode(ids)).logits

    ids, labels = jnp.zeros((2, 256), jnp.int32), jnp.zeros((2, 16), jnp.int32)
    counted = jax.jit(f).lower(params, ids, labels).compile().cost_analysis()["flops"]
    products = mrt5.operations(config, 2, 256, 256, 16)
    assert products < counted < 1.25 * products  # softmax, norms and biases are the rest
