"""Eight CPU devices for every test, set before jax starts."""

import os

from jaxlib.version import __version_info__

# Thousands of small programs are compiled and run once: LLVM's optimiser, and the code generator for fusions that goes through
# MLIR, cost more than they save. HLO, which is what tests look at, is the same without them.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if __version_info__ < (0, 11):  # later ones have no other generator
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu, where installed, compiles ahead of time and must not look for a TPU host.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the Hub; those of the Hub have a server of their own

import gc
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(config, items):
    """Tests of a GPU run where JAX is told to use one."""
    if "cuda" not in os.environ["JAX_PLATFORMS"]:
        away = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if item not in set(away)]


def pytest_collection_finish():
    """What was imported stays: the collector, which took a seventh of the time, need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request) -> Mesh:
    """A 4 x 2 mesh (data, model) of virtual devices, once with Auto and once with Explicit axes."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(request.param,) * 2)


@pytest.fixture(scope="session")
def golden():
    """golden("tokens/tome_a") -> {name: array}: outputs of official implementations."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as z:
            return {k: z[k] for k in z.files}

    return load


@pytest.fixture
def unchecked():
    """Without the run-time type checker, which only tests have: our own messages are what a user sees."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
