"""Run recipes with mergekit: started by mergekit_parity in mergekit's own Python, which needs neither JAX nor this package.

python mergekit_run.py JOBS: a JSON list of {recipe, out, masks, seed}. What torch.bernoulli draws for each tensor and model is
written to `masks` (npz), so that a comparison can use the same masks.
"""
# pyright: reportMissingImports=false

import json
import sys
import traceback


def main(jobs: list[dict]) -> None:
    import numpy as np
    import torch
    import transformers
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods import generalized_task_arithmetic as arithmetic
    from mergekit.options import MergeOptions

    drawn: dict[str, np.ndarray] = {}
    at = [""]
    bernoulli, merge_group = torch.bernoulli, arithmetic.GeneralizedTaskArithmeticMerge.merge_group

    def recorded(p, *args, **kwargs):
        mask = bernoulli(p, *args, **kwargs)
        number = sum(name.startswith(at[0] + "#") for name in drawn)
        drawn[f"{at[0]}#{number}"] = mask.numpy().astype(np.uint8)
        return mask

    def named(self, group, /, **parameters):
        at[0] = group.metadata.name
        return merge_group(self, group, **parameters)

    torch.bernoulli = recorded
    arithmetic.GeneralizedTaskArithmeticMerge.merge_group = named
    transformers.logging.set_verbosity_error()
    for job in jobs:
        drawn.clear()
        with open(job["recipe"], encoding="utf-8") as file:
            text = file.read()
        try:
            config = MergeConfiguration.model_validate(yaml.safe_load(text))
            options = MergeOptions(random_seed=job["seed"], quiet=True, copy_tokenizer=True)
            run_merge(config, job["out"], options=options, config_source=text)
        except Exception:
            traceback.print_exc()
            print(f"mergekit could not run {job['recipe']}", file=sys.stderr)
            continue
        np.savez(job["masks"], **drawn)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.path.pop(0)  # this folder has a kernels.py of its own, which transformers would take for a package of that name
    with open(sys.argv[1], encoding="utf-8") as listed:
        main(json.load(listed))
