"""Clients spread over two processes on one machine give the numbers of one."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from fedlr import federated
from fedlr.algorithms import fedavg, fedloru
from fedlr.federated import clients, local, protocol


def loss(params, inputs, target):
    hidden = jax.numpy.tanh(params["first"] @ inputs)
    return (params["last"] @ hidden - target) ** 2


def algorithms():
    training = {"num_steps": 3, "batch_size": 2}
    return {
        "fedavg": fedavg.build(
            local.local_sgd(loss, optax.sgd(0.1, 0.9), **training), chunk_size=4
        ),
        "fedloru": fedloru.assemble(
            loss, local.Training(optax.sgd(0.1), 3, 2), fedloru.Settings(1, 2), chunk_size=4
        ),
    }


def run_all(mesh=None):
    """Run three rounds of every algorithm; with a mesh, on sharded clients."""
    rng = np.random.default_rng(0)
    data = protocol.ClientData(
        rng.normal(size=(4, 6, 5)).astype(np.float32),
        rng.normal(size=(4, 6)).astype(np.float32),
        np.arange(6) < np.array([6, 3, 5, 1])[:, None],
    )
    params = {
        "first": rng.normal(size=(7, 5)).astype(np.float32),
        "last": rng.normal(size=7).astype(np.float32),
    }
    if mesh is not None:
        data = clients.shard_clients(data, mesh)
        assert not data.targets.is_fully_addressable
    found = {}
    for name, algorithm in algorithms().items():

        def run(data, algorithm=algorithm):
            state = algorithm.init(params, data, key=jax.random.key(1))
            return federated.run(algorithm, state, data, num_rounds=3, key=jax.random.key(0))[0]

        state = jax.jit(run)(data)
        found[name] = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(state.params)]
    return found


def run_one_process(address, rank):
    """Be one of two processes, each with a device of its own; print the params."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=rank)
    assert (jax.device_count(), jax.local_device_count()) == (2, 1)
    mesh = jax.make_mesh((2,), ("clients",), axis_types=(AxisType.Auto,))
    print(json.dumps(run_all(mesh)))


@pytest.mark.slow
def test_two_processes_on_loopback_give_the_numbers_of_one():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    started = []
    for rank in range(2):
        code = f"from tests import test_two_processes as t; t.run_one_process({address!r}, {rank})"
        started.append(
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        )
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    with jax.enable_x64(False):
        expected = run_all()
    for text in printed:
        found = json.loads(text.splitlines()[-1])
        assert found.keys() == expected.keys()
        for name, leaves in expected.items():
            for a, b in zip(found[name], leaves, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
