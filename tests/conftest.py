import os
import platform

# Compiling is what the tests cost. LLVM's optimizations are a third of that; the benchmarks run
# with them. And what is compiled once serves both workers, the notebooks, the README and the next
# run on the same machine; `pytest --cache-clear` forgets it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{os.getcwd()}/.pytest_cache/d/programs-{platform.node()}"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Free the programs of a module: each keeps pages mapped, and a process may have 65530 maps."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng():
    """A seeded NumPy generator for test data."""
    return np.random.default_rng(0)


@pytest.fixture
def key():
    """A fixed JAX key."""
    return jax.random.key(0)
