"""Rung 3 for Hopper, without one: NVIDIA's compiler takes every kernel, spills no registers and makes no product wait."""

import jax
import jax.numpy as jnp
import pytest

from jaxmerge._kernels import _dispatch as dispatch
from jaxmerge._kernels.arg_specs import BYTES, LONG, VIT, cases
from scripts.bench import hopper


def test_what_the_compiler_says_is_understood():
    text = """
ptxas info    : (C7519) warpgroup.arrive is injected in around line 392 by compiler to allow use of registers in GMMA
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ... in function 'f'
ptxas info    : Function properties for f
    32 bytes stack frame, 48 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 32 bytes cumulative stack size, 1 bytes smem
"""
    assert hopper.parsed(text) == hopper.Kernel(registers=168, spilled=80, waits=1)


def test_without_the_compiler_there_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(hopper, "at_hand", lambda: False)
    with pytest.raises(ValueError, match=r"no CUDA compiler.*pip install"):
        hopper.main(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_compile_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(hopper, "at_hand", lambda: True)
    with pytest.raises(ValueError, match=r"no kernel is of match and of a model named like 'VGG'"):
        hopper.main(ops=("match",), only="VGG", out=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hopper.at_hand(), reason="the CUDA plugin is not installed (the extra cuda13)")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("spec", [VIT[2], VIT[7], LONG[1], BYTES[0]], ids=lambda s: s.name)
def test_every_kernel_compiles(spec, dtype):
    compiled = 0
    for op, (shapes, static) in cases(spec, 4, dtype).items():
        with dispatch.aim("gpu", hopper.KIND):
            if dispatch.refusals(op, "mosaic_gpu", shapes, **static):
                continue
        found = hopper.kernels(getattr(dispatch.implementation(op, "mosaic_gpu"), op), *shapes, **static)
        compiled += len(found)
        assert all(kernel.waits == 0 for kernel in found), (op, found)
        if op != "peaks":  # whose lists of neighbours fill all registers: what is spilled is read once a tile of keys
            assert all(kernel.spilled == 0 for kernel in found), (op, found)
        if op == "attend":  # two blocks of 256 lanes on a multiprocessor, which has 65 536 registers
            assert all(kernel.registers <= 128 for kernel in found), found
    assert compiled > len(cases(spec, 4, dtype)) // 2


@pytest.mark.slow
@pytest.mark.skipif(not hopper.at_hand(), reason="the CUDA plugin is not installed (the extra cuda13)")
def test_what_does_not_fit_is_refused():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def large(_, out, room):
        room[...] = jnp.ones_like(room)
        out[...] = room[:128]

    call = plgpu.kernel(
        large, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), scratch_types=[plgpu.SMEM((128 * 1024,), jnp.float32)]
    )
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"(?i)shared memory|smem|resource"):
        hopper.kernels(call, jax.ShapeDtypeStruct((128,), jnp.float32))
