"""What is read past the page cache is computed with where it lies: the same entries, and nothing is moved or written for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import params
from jaxmerge.checkpoint import _direct, _programs
from jaxmerge.checkpoint._windows import LINE, Run, windows
from jaxmerge.params.order import _devices
from jaxmerge.params.order._host import Streamed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn", "float64"])
def test_a_window_shows_the_entries_wherever_they_begin(dtype):
    width, size, shape = jnp.dtype(dtype).itemsize, 24, (4, 6)
    memory = np.arange(_direct.PAGE).astype(np.uint8).view(dtype)
    traced = []
    look = jax.jit(lambda window: [traced.append(dtype), window.bits()][1])
    for lead in (0, 1, LINE // width - 1, LINE // width, 100, memory.size - size - LINE // width):
        [window] = windows([Run(memory, lead, size)], 0, size, shape)
        assert window.memory.base is not None and window.memory.size == size + LINE // width  # a view
        expected = memory[lead : lead + size].view(f"uint{8 * width}").reshape(shape)
        if width < 8:  # JAX has no 64 bits here
            np.testing.assert_array_equal(look(window), expected)
    assert traced == [dtype] * (width < 8)  # one program, wherever they begin


def test_a_part_that_is_too_short_is_filled_up_with_zeros():
    memory = np.arange(256, dtype=np.float32)
    [window] = windows([Run(memory, 3, 100)], 90, 100, (16,))
    np.testing.assert_array_equal(window.open(), [*range(93, 103), *[0] * 6])
    part = Run(memory, 3, 100).part(10, 20)
    assert part.entries.tolist() == list(range(13, 23)) and part.nbytes == 40


@pytest.mark.parametrize("has_base", [True, False])
def test_programs_read_a_window_in_their_loops(has_base):
    """No loop before theirs: all that is written beside the result is a few words."""
    steps, size = params.linear().match.steps, 1 << 12
    run = Run(np.zeros(2 * size, jnp.bfloat16), 5, size)
    program = _programs.merger(steps, has_base, None, np.dtype(jnp.bfloat16))
    seen = windows([run] * (3 + has_base), 0, size, (size,))
    compiled = program.lower([step.settings("w", (3, size)) for step in steps], np.zeros(2, np.uint32), seen).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size / 4
    assert "dynamic-slice" not in compiled.as_text().split("ENTRY")[1]


@pytest.mark.parametrize(
    "tx", [params.rescale(params.random_mask(0.5, seed=0), "l1"), params.spherical(0.3)], ids=["dare", "slerp"]
)
def test_sums_over_a_block_are_added_up_where_it_is_read(monkeypatch, tx):
    """Neither differences nor what a mask leaves is written, which take four bytes an entry: the mask's bits at most."""
    monkeypatch.setattr(_devices, "alone", lambda: True)
    (step,), size, models = tx.match.steps, 1 << 18, 3 if tx.match.steps[0].lazy else 2
    asked, settings = [], step.settings("w", (models, 2, size // 2))
    total = lambda f, mine, combine: [asked.append((f, mine)), np.ones(2 * models)][1]
    step.resolve(settings, Streamed(models, (2, size // 2), lambda: iter(()), total=total))
    (f, mine), run = asked[0], Run(np.zeros(2 * size, jnp.bfloat16), 5, size)
    seen = windows([run] * (models + step.lazy), 0, size, (size,))
    compiled = _programs.adder.__wrapped__((), f, step.lazy, None).lower(mine, [], np.zeros(2, np.uint32), seen).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * size


@pytest.mark.parametrize("direct", [True, False])
def test_reading_moves_only_what_begins_between_two_entries(tmp_path, monkeypatch, direct):
    data = np.random.default_rng(0).integers(0, 256, 5 * _direct.PAGE, np.uint8)
    data.tofile(tmp_path / "f")
    if not direct:
        monkeypatch.setattr(_direct, "_open", lambda file, mode: (_direct.os.open(file, mode), False))
    reader, room = _direct.Reader(), _direct.buffer(4 * _direct.PAGE)
    read = functools.partial(reader.read, str(tmp_path / "f"), room=room, width=4)
    for offset in (0, 8, 9, 63, 4095, 4096, 5002):
        begin = read(offset, 5000)
        assert begin % 4 == 0 and room.ctypes.data % _direct.PAGE == 0
        if direct and not reader.buffered:  # not refused by this file system
            assert begin == offset % _direct.PAGE - offset % 4
        np.testing.assert_array_equal(room[begin : begin + 5000], data[offset : offset + 5000])
    with pytest.raises(OSError, match="is cut short: asked for 5000 bytes from 16000 on, got 4480"):
        read(16000, 5000)
    reader.close()
