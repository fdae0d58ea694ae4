"""The hot paths: match, merge, step, pack. One folder each: `ref` is the spec in plain XLA, `mosaic_tpu` and `mosaic_gpu` are
kernels that give the same answer with fewer trips to memory, `arg_specs` are the shapes of real models.

At this level there is one batch axis B, and nothing is checked: the public functions do that. `_dispatch` chooses.

    match(a, b)            (B n k), (B m k)  ->  similarity (B n), index (B n)         no score reaches memory
    peaks(x)               (B n k)           ->  log(density · distance) (B n)         no distance reaches memory
    merge(ids, x, weight)  (B n), (B n d)    ->  y (B m d), mass (B m)                 and its transpose, unmerge
    step(metric, x, sizes) (B n k), (B n d)  ->  x (B n-r d), sizes (B n-r), ids (B n) a whole step of Token Merging
    pack(keep, x)          (B n), (B n d)    ->  x (B c d), positions (B c), count (B) the kept rows, to the left

An implementation module offers the functions of its `ref` with the same arguments, and `refusals(op, ...)`, every reason why
it cannot, and `faster(op, ..., kind=)`, whether it is worth it on a kind of device: `op` is the function's name, the rest its
arguments as shapes. Derivatives are taken once for all implementations, in the `__init__` of each folder.
"""
