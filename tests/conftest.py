import os
import platform
import urllib.error
import urllib.request

# Compiling is what the tests cost. LLVM's optimizations are a third of that; the notebooks and the
# benchmarks run with them. And what is compiled once serves both workers and the next run on the
# same machine; `pytest --cache-clear` forgets it.
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


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Nothing from the user's folders and nothing from the net: an empty cache, and file: only."""
    urlopen = urllib.request.urlopen

    def local_only(url, **options):
        if url.startswith("file:"):
            return urlopen(url, **options)
        raise urllib.error.URLError("offline")

    monkeypatch.setattr(urllib.request, "urlopen", local_only)
    monkeypatch.delenv("FEDLR_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "fedlr"
