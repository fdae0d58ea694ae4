"""BLT's patches and hashes: the official vectors, packed documents, the calibrator, Python's integers, meshes, faults."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxmerge as jm
from jaxmerge import words
from jaxmerge.words._hash import PRIMES
from tests.hlo import collectives

ROWS = 500002


def lengths(starts, to):
    """Patch lengths, right-padded with zeros, as the official code returns them."""
    out = np.zeros((len(starts), to), int)
    for row, at in zip(out, starts, strict=True):
        each = np.diff(np.r_[np.flatnonzero(at), len(at)])
        row[: len(each)] = each
    return out


MODES = {
    "thr": dict(threshold=words.BLT_THRESHOLD),
    "mono": dict(rise=0.4),  # the vectors do not say; theirs lies between 0.339 and 0.430
    "add": dict(threshold=words.BLT_THRESHOLD, rise=0.25),
    "topk": dict(budget=12),
}


@pytest.mark.parametrize("mode", MODES)
def test_entropy_patches_equal_the_official(golden, mode):
    z = golden("bytes/blt_a")
    h = jnp.asarray(z["in/entropies"])
    got = words.entropy_starts(h, **MODES[mode])
    want = z[f"{mode}/next0/lengths"]
    np.testing.assert_array_equal(lengths(got, want.shape[1]), want)
    # "next1" also says whether the byte that is not there yet will begin a patch.
    one_more = words.entropy_starts(jnp.pad(h, ((0, 0), (0, 1))), **MODES[mode])
    want = z[f"{mode}/next1/lengths"]
    np.testing.assert_array_equal(lengths(one_more, want.shape[1]), want)


def test_other_patches_equal_the_official(golden):
    z = golden("bytes/blt_a")
    tokens, n = jnp.pad(jnp.asarray(z["in/tokens"]), ((0, 0), (0, 1))), 49
    space = words.space_starts(tokens, offset=4, bos=True)
    np.testing.assert_array_equal(lengths(space, 15), z["space/lengths_next1"])
    head = jnp.broadcast_to(jnp.arange(n) == 0, (3, n))
    np.testing.assert_array_equal(lengths(words.limit_patches(head, 6), 9), z["Patcher/static/lengths"])
    np.testing.assert_array_equal(lengths(words.limit_patches(head, 1), 49), z["Patcher/byte/lengths"])


def test_a_longest_patch_equals_the_official(golden):
    z = golden("bytes/blt_a")
    h = jnp.pad(jnp.asarray(z["in/entropies"]), ((0, 0), (0, 1)))
    starts = words.limit_patches(words.entropy_starts(h, **ENTROPY_PATCHER), 6)
    np.testing.assert_array_equal(lengths(starts, z["Patcher/entropy/lengths"].shape[1]), z["Patcher/entropy/lengths"])


ENTROPY_PATCHER = dict(threshold=words.BLT_THRESHOLD)


def test_patch_ids_equal_the_official(golden):
    z = golden("bytes/blt_a")
    starts = words.entropy_starts(jnp.asarray(z["in/entropies"]), threshold=words.BLT_THRESHOLD)
    plan = words.segments(starts, 48)
    np.testing.assert_array_equal(plan.segment_ids, z["patch_ids_from_lengths"])
    # The decoder's byte t reads the patch before that of byte t + 1.
    ahead = np.maximum(np.asarray(plan.segment_ids)[:, 1:] - 1, 0)
    np.testing.assert_array_equal(ahead, z["decoder_patch_ids_from_lengths"][:, :-1])


def test_entropy_equals_the_official(golden):
    z = golden("bytes/blt_a")
    np.testing.assert_allclose(words.byte_entropy(jnp.asarray(z["entropy/logits"])), z["entropy/value"], atol=1e-5)
    assert words.byte_entropy(jnp.array([[0.0, -jnp.inf]])) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bos", [True, False])
def test_documents_do_not_bleed(mode, bos):
    """Packed, each document has the patches that it has alone; a budget is the row's."""
    h = jax.random.exponential(jax.random.key(1), (30,))
    documents = jnp.array([4] * 11 + [2] * 19)
    how = dict(MODES[mode], bos=bos)
    got = words.entropy_starts(h, documents=documents, **how)
    if mode == "topk":
        assert got.sum() == 12 and got[0] and got[11] and (not bos or (got[1] and got[12]))
        return
    alone = [words.entropy_starts(part, **how) for part in (h[:11], h[11:])]
    np.testing.assert_array_equal(got, jnp.concatenate(alone))


def test_padding_begins_no_patch():
    h = jax.random.exponential(jax.random.key(1), (2, 20))
    mask = jnp.arange(20)[None] < jnp.array([[20], [13]])
    for how in MODES.values():
        starts = words.entropy_starts(h, mask=mask, **how)
        assert not (starts & ~mask).any()
        np.testing.assert_array_equal(starts[1, :13] if "budget" not in how else starts.sum(1),
                                      words.entropy_starts(h[1, :13], **how) if "budget" not in how else [12, 12])  # fmt: skip
    assert not (words.space_starts(jnp.zeros((2, 20), jnp.int32), mask=mask) & ~mask).any()


def test_limit_keeps_every_start():
    starts = jax.random.bernoulli(jax.random.key(2), 0.1, (5, 200)).at[:, 0].set(True)
    got = words.limit_patches(starts, 7)
    assert (got | ~starts).all()
    assert max(int(np.diff(np.r_[np.flatnonzero(row), 200]).max()) for row in got) == 7
    long = lengths(starts, 200)
    assert int(got.sum()) == int(np.ceil(long / 7).sum())


@pytest.mark.parametrize("by", ["threshold", "rise"])
@pytest.mark.parametrize("longest", [None, 9])
def test_calibration_meets_the_size(by, longest):
    h = jax.random.exponential(jax.random.key(3), (4, 500))
    documents = jnp.broadcast_to(jnp.arange(500) // 100, (4, 500))
    mask = jnp.arange(500)[None] < jnp.array([[500], [500], [480], [300]])
    given = dict(documents=documents, mask=mask)
    theta = words.patch_threshold(h, 5.0, by=by, longest=longest, **given)
    starts = words.entropy_starts(h, **{by: theta}, **given)
    starts = starts if longest is None else words.limit_patches(starts, longest) & mask
    # One patch more or less is the nearest that can be had.
    assert abs(int(starts.sum()) - int(mask.sum()) / 5) <= 1
    both = words.patch_threshold(h, 12.0, rise=0.1)
    assert abs(int(words.entropy_starts(h, threshold=both, rise=0.1).sum()) - 2000 / 12) <= 1


@pytest.mark.parametrize("size, function", [(3, 0), (4, 0), (5, 0), (5, 1), (5, 2), (6, 0), (7, 0), (8, 0)])
def test_hashes_equal_the_official(golden, size, function):
    z = golden("bytes/blt_a")
    got = words.ngram_hash(jnp.asarray(z["in/tokens"]), size, ROWS, function=function)
    np.testing.assert_array_equal(got, z[f"hash/g{size}_f{function}"])


def by_python(ids, size, rows, function):
    padded = [0] * (size - 1) + [int(i) for i in ids]
    sums = [sum(PRIMES[function] ** i * x for i, x in enumerate(padded[j : j + size])) for j in range(len(ids))]
    wrapped = [(s + 2**63) % 2**64 - 2**63 for s in sums]
    return [w % rows for w in wrapped]


def test_hashes_are_pythons():
    """Any int32, any table, and the sum does wrap around."""
    rng = np.random.default_rng(0)
    ids = rng.integers(-(2**31), 2**31, 100).astype(np.int32)
    for size, rows, function in ((1, 2, 0), (3, 1, 1), (8, 2**31 - 1, 6), (12, 2**20, 10), (5, 999983, 4)):
        got = jax.jit(lambda ids, c=(size, rows, function): words.ngram_hash(ids, *c[:2], function=c[2]))(jnp.asarray(ids))
        assert got.tolist() == by_python(ids, size, rows, function)


def test_hashes_of_documents():
    ids, documents = jnp.arange(5, 25), jnp.array([0] * 8 + [1] * 12)
    got = jax.jit(lambda *a: words.ngram_hash(a[0], 6, ROWS, documents=a[1]))(ids, documents)
    alone = jax.jit(lambda ids: words.ngram_hash(ids, 6, ROWS))
    np.testing.assert_array_equal(got, jnp.concatenate([alone(ids[:8]), alone(ids[8:])]))
    assert words.ngram_hash(jnp.arange(2), 8, ROWS).shape == (2,)


def test_the_golden_primes_are_ours():
    case = pathlib.Path(__file__).parents[1] / "golden/bytes/blt_a.json"
    assert tuple(json.loads(case.read_text())["primes"]) == PRIMES


def test_on_a_mesh(mesh):
    h, ids = jax.random.exponential(jax.random.key(1), (8, 20)), jax.random.randint(jax.random.key(2), (8, 20), 0, 260)

    def local(h, ids):
        starts = [words.entropy_starts(h, **how) for how in MODES.values()] + [words.space_starts(ids)]
        pooled = jm.merge(words.segments(starts[0], 9), h)
        return [words.limit_patches(s, 5) for s in starts], words.ngram_hash(ids, 3, ROWS), pooled

    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (h, ids)]
        compiled = jax.jit(local).lower(*placed).compile()
        got = compiled(*placed)
    assert collectives(compiled) == []
    jax.tree.map(np.testing.assert_array_equal, got, jax.jit(local)(h, ids))


def test_bad_arguments(unchecked):
    h = jnp.ones((2, 9))
    with pytest.raises(ValueError, match="give a threshold, a rise, both, or a budget"):
        words.entropy_starts(h)
    with pytest.raises(ValueError, match="a budget stands alone"):
        words.entropy_starts(h, budget=3, threshold=1.0)
    with pytest.raises(ValueError, match="longest must be 1 or more, got 0"):
        words.limit_patches(h > 0, 0)
    with pytest.raises(ValueError, match=r"patches of this sample are 1 to 4.5 bytes long, not 9"):
        words.patch_threshold(jnp.arange(18.0).reshape(2, 9), 9.0)
    with pytest.raises(ValueError, match='by must be "threshold" or "rise"'):
        words.patch_threshold(h, 2.0, by="size")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="leave it out"):
        words.patch_threshold(h, 2.0, by="rise", rise=1.0)
    for arguments, message in (((0, 5), "size"), ((3, 2**31), "rows"), ((3, 0), "rows")):
        with pytest.raises(ValueError, match=f"{message} must"):
            words.ngram_hash(jnp.arange(4), *arguments)
    with pytest.raises(ValueError, match="function must lie between 0 and 10"):
        words.ngram_hash(jnp.arange(4), 3, 5, function=11)
