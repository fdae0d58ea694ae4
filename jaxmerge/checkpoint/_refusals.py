"""What a merge refuses once the numbers are read: values that are not finite, integers that have no mean."""

from collections.abc import Sequence

from jaxmerge.checkpoint._plan import CheckpointPlan, MergeError


def strange(bad: dict[str, list[int]], headers: CheckpointPlan) -> MergeError:
    """The refusal of values that are not finite."""
    lines = [
        f"  {n}: {count} in {c.name}"
        for n, counts in sorted(bad.items())
        for c, count in zip([c for c in headers.inputs if n in c.leaves], counts, strict=True)
        if count
    ]
    return MergeError(
        "values that are not finite (NaN or inf); nothing was written:\n"
        + "\n".join(lines)
        + '\nrepair the checkpoint, or pass nonfinite="allow" (--nonfinite allow; in a recipe, nonfinite: allow).'
    )


def differing(names: Sequence[str]) -> MergeError:
    """The refusal of integers that differ."""
    return MergeError(
        f"leaves that are not floating point differ between the checkpoints and have no mean: {sorted(names)}; "
        'pass integers="base" (--integers base; in a recipe, integers: base) to take the base\'s.'
    )
