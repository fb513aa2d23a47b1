"""Send updates through a compressor, and count the bytes of arrays by NumPy."""

import functools

import jax
import numpy as np


def send(compressor, update, state=None, *, key):
    state = compressor.init(update) if state is None else state
    return there_and_back(compressor, update, state, key)


@functools.partial(jax.jit, static_argnums=0)
def there_and_back(compressor, update, state, key):
    message, _ = compressor.compress(update, state, key=key)
    return message, compressor.decompress(message)


@functools.partial(jax.jit, static_argnums=0)
def receive_many(compressor, updates, keys):
    """Send the update of every client by a compressor without state."""
    return jax.vmap(lambda update, key: there_and_back(compressor, update, (), key)[1])(
        updates, keys
    )


def bytes_of(*arrays):
    return sum(np.asarray(array).nbytes for array in arrays)
