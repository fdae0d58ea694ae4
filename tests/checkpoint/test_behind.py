"""What is merged goes to the disk from where a program put it: nothing is copied, whatever the place in the file."""

import contextlib
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

from jaxmerge import checkpoint, params
from jaxmerge.checkpoint import _behind, _direct, _programs
from jaxmerge.checkpoint._source import Extent
from jaxmerge.checkpoint._windows import Run, windows
from tests.checkpoint.conftest import save

SIZE = 1 << 14
"""Entries of the largest block here."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(_programs, "SIZES", (SIZE, 1 << 12))


@functools.partial(jax.jit, donate_argnums=0)
def put(room, at, entries):
    return lax.dynamic_update_slice(room, entries.astype(room.dtype), (at,)), jnp.sum(entries)


@pytest.mark.parametrize("page", [1, 512, 1 << 12])
@pytest.mark.parametrize("lead", [0, 3, 511])
@pytest.mark.parametrize("size", [0, 1, 100, 1 << 12, (1 << 14) + 5, 123_457])
def test_blocks_end_where_pages_do(size, page, lead):
    pieces = list(_programs.pieces(size, _programs.SIZES, page, lead))
    assert [start for start, _, _ in pieces] == [0, *(stop for _, stop, _ in pieces)][: len(pieces)]
    assert all(0 < stop - start <= fits for start, stop, fits in pieces)
    assert all((lead + stop) % page == 0 for _, stop, _ in pieces[:-1]) and (not pieces or pieces[-1][1] == size)
    assert len(pieces) <= len(list(_programs.pieces(size, _programs.SIZES))) + 2  # two more at most, of the smallest


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_is_what_was_written_into_it(tmp_path, monkeypatch, width, direct):
    """Blocks and bytes by turns, on and back, of every length and place."""
    if not direct:
        monkeypatch.setattr(_direct, "_open", lambda file, mode: (_direct.os.open(file, mode), False))
    rng, total, file = np.random.default_rng(0), 1 << 18, str(tmp_path / "f")
    expected = np.zeros(total, np.uint8)
    expected.tofile(file)
    sink, dtype, at, sums = _behind.WriteBehind(), np.dtype(f"uint{8 * width}"), 8, []
    addresses = set()
    for turn in range(60):
        made = int(rng.choice([1 << 12, SIZE])) * width
        size = min(int(rng.integers(1, made // width + 1)) * width, (total - at) // width * width)
        if turn % 3 == 2:
            data = rng.integers(0, 256, min(int(rng.integers(1, 70_000)), total - at), np.uint8)
            data = data[: data.size // width * width]
            sink.write(file, at, data)
            expected[at : at + data.size] = data
            at += data.size
        else:
            entries = rng.integers(0, 200, made // width, np.uint8)
            [found] = sink.fill(Extent(file, at, size), made, dtype, lambda room, i, entries=entries: put(room, i, entries))
            addresses.add((sink._room.array.unsafe_buffer_pointer() + sink._room.first) % _direct.HUGE)
            sums.append((found, entries))
            expected[at : at + size] = entries.astype(dtype).view(np.uint8)[:size]
            at += size
        if turn % 10 == 9 or at > total - 100:
            at = int(rng.integers(0, total // 2)) // width * width
    sink.close()
    np.testing.assert_array_equal(np.fromfile(file, np.uint8), expected)
    assert all(int(found) == int(np.sum(entries)) for found, entries in sums)
    assert addresses == {0}  # the memory that was given is the memory that is written
    if direct:
        assert not sink.buffered or not _direct._open(file, _direct.os.O_WRONLY)[1]


@pytest.mark.parametrize("other", ["gpu", "mesh"])
def test_programs_that_run_elsewhere_do_not_write_here(tmp_path, monkeypatch, other):
    """Rooms are the host's then, and take bytes: where JAX has an accelerator, or a mesh of several devices is in use."""
    if other == "gpu":
        monkeypatch.setattr(_behind, "_on_host", lambda: False)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    tree = {"w": np.arange(50_000, dtype=np.float32).astype(jnp.bfloat16), "n": np.arange(3)}
    for name, factor in (("a", 1), ("b", 3)):
        save(tmp_path / name, {"w": tree["w"] * factor, "n": tree["n"]})
    with jax.set_mesh(mesh) if other == "mesh" else contextlib.nullcontext():
        assert not _behind.WriteBehind().fills
        checkpoint.merge(params.linear(), None, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    merged = checkpoint.open(tmp_path / "out")
    np.testing.assert_array_equal(
        merged.read("w"), params.merge(params.linear(), None, [tree, {**tree, "w": tree["w"] * 3}])["w"]
    )
    np.testing.assert_array_equal(merged.read("n"), tree["n"])


def test_a_block_that_lies_as_its_page_does_passes_the_page_cache(tmp_path, monkeypatch):
    """What `pieces` cuts at pages is written as it is: only the ends of a leaf take the other way."""
    plain = []
    monkeypatch.setattr(_direct.Writer, "_plain", lambda self, data, offset: plain.append(data.size))
    monkeypatch.setattr(_direct, "_empty", lambda fd, data, offset: None)
    monkeypatch.setattr(_direct, "_open", lambda file, mode: (_direct.os.open(file, mode), True))
    (tmp_path / "f").touch()
    sink, offset, size = _behind.WriteBehind(), 1234, 5 * SIZE + 77
    for start, stop, fits in _programs.pieces(size, _programs.SIZES, _direct.PAGE // 2, offset // 2):
        where = Extent(str(tmp_path / "f"), offset + 2 * start, 2 * (stop - start))
        sink.fill(where, 2 * fits, np.dtype(np.uint16), lambda room, i, n=fits: put(room, i, np.zeros(n, np.uint8)))
    sink.close()
    assert [n for n in plain if n] == [_direct.PAGE - offset, (offset + 2 * size) % _direct.PAGE]


@pytest.mark.parametrize(
    "tx", [params.linear(), params.chain(params.elect_sign(), params.mean_agreeing())], ids=["linear", "consensus"]
)
def test_nothing_is_written_but_the_room(tx):
    """A merge is one loop that reads its windows and writes into the room that it was given."""
    steps, size, has_base = tx.match.steps, 1 << 12, True
    run = Run(np.zeros(2 * size, jnp.bfloat16), 5, size)
    room, settings = jnp.zeros(2 * size, jnp.uint16), [step.settings("w", (3, size)) for step in steps]
    seen = windows([run] * 4, 0, size, (size,))
    program = _programs.placer(steps, has_base, None, np.dtype(jnp.bfloat16), None)
    memory = program.lower(room, np.int32(3), settings, np.zeros(2, np.uint32), seen).compile().memory_analysis()
    assert memory.temp_size_in_bytes < size / 4 and memory.alias_size_in_bytes == room.nbytes


def test_nothing_is_noted_after_an_error_of_the_disk(tmp_path, monkeypatch):
    def full(fd, data, offset):
        raise OSError(28, "No space left on device")

    file = tmp_path / "f"
    np.zeros(SIZE, np.uint8).tofile(file)
    monkeypatch.setattr(_direct, "_empty", full)
    sink = _behind.WriteBehind()
    sink.fill(Extent(str(file), 0, 8192), 8192, np.dtype(np.uint8), lambda room, i: put(room, i, np.ones(8192, np.uint8)))
    noted, deadline = [], time.monotonic() + 20
    with pytest.raises(OSError, match="No space left"):
        while time.monotonic() < deadline:
            sink.mark(noted.append)
    with pytest.raises(OSError, match="No space left"):
        sink.close()
    assert not noted
