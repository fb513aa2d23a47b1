"""Time scico's projector in an environment of its own, on request over standard input.

scico pins an older JAX, so that it cannot run beside the toolkit. Started with the path of an .npz
file (`images`, `sinograms`, `angles`, `phantom`, `reference`), it says what it needs and how far
off it is, and then answers every line "forward" or "adjoint" on standard input with one JSON line:
CPU and wall seconds of one call for the whole batch.
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scico.linop.xray import XRayTransform2D  # pyright: ignore[reportMissingImports]


def main(path: str) -> None:
    data = np.load(path)
    images, sinograms = jnp.asarray(data["images"]), jnp.asarray(data["sinograms"])
    # its angles are a quarter turn ahead; dx is the pixel's width
    operator = XRayTransform2D(
        images.shape[1:],
        jnp.asarray(data["angles"]) + np.float32(np.pi / 2),
        dx=np.ones(2, np.float32),
        det_count=sinograms.shape[2],
    )
    forward = jax.jit(lambda x: jax.lax.map(operator, x))
    adjoint = jax.jit(lambda y: jax.lax.map(operator.T, y))
    calls = {"forward": (forward, images), "adjoint": (adjoint, sinograms)}
    compiled = {name: call.lower(argument).compile() for name, (call, argument) in calls.items()}
    reference = data["reference"]
    error = np.linalg.norm(operator(jnp.asarray(data["phantom"])) - reference)
    about = {"error_bins": float(error / np.linalg.norm(reference))}
    for name, call in compiled.items():
        memory: Any = call.memory_analysis()
        about[f"{name}_bytes"] = memory.temp_size_in_bytes
        jax.block_until_ready(call(calls[name][1]))
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        call, argument = compiled[line.strip()], calls[line.strip()][1]
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(call(argument))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"cpu": cpu, "wall": wall}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
