"""Peers' official code, on recorded vectors: rtol 2e-5, atol 2e-6, as the vectors state."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import params

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
    "fusion_bench_slerp": lambda p, masks: params.slerp(p["t"], threshold=p["DOT_THRESHOLD"]),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_peer(golden, case):
    entry, vectors = MANIFEST[f"{case}_a"], golden(f"params/{case}_a")

    def model(key):
        v = vectors[key]
        return {t["name"]: v[t["offset"] :][: int(np.prod(t["shape"]))].reshape(t["shape"]) for t in MANIFEST["_layout"]}

    models = [model(k) for k in sorted(vectors) if k.startswith("in/expert")]
    masks = [model(k) for k in sorted(vectors) if k.startswith("aux/mask")]
    base = model("in/base") if "in/base" in vectors else None
    if "slerp" in case and base is not None:  # mergekit counts its first model as the base
        base, models = None, [base, *models]
    merged, expected = params.merge(CASES[case](entry["params"], masks), base, models), model("out")
    error = 0.0
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
        error = max(error, float(np.abs(merged[name] - value).max()))
    print(f"{case}: {error:.1e}")
