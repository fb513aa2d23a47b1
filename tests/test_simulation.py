import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr import federated
from fedlr.algorithms import fedavg, local_only
from fedlr.federated import checkpoints, local, protocol, rounds, servers, stopping
from fedlr.federated.rounds import recording, simulation

ROOT = Path(__file__).resolve().parents[1]


def squared_error(weights, inputs, target):
    return (inputs @ weights - target) ** 2 / 2


def smallest_loss():
    """A rule with a memory that never fires, and a state that it calls the best."""

    def update(info, memory):
        loss = jnp.min(info.losses).astype(jnp.float32)
        return stopping.Verdict(loss < 0, loss < memory), jnp.minimum(loss, memory)

    return stopping.Rule(lambda: jnp.float32(jnp.inf), update)


def parameter_norm(state):
    return {"norm": jnp.linalg.norm(state.params), "moment": state.server.server[0].mu}


def build(dtype=jnp.float64, step_size=0.1):
    """FedAvg with mini-batches and Adam at the server: a state with ints, and randomness."""
    rng = np.random.default_rng(1)
    mask = np.arange(5) < np.array([5, 2, 1, 4])[:, None]
    arrays = (rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 5)))
    data = protocol.ClientData(*(jnp.asarray(array, dtype) for array in arrays), jnp.asarray(mask))
    update = local.local_sgd(squared_error, optax.sgd(step_size), num_steps=2, batch_size=2)
    algorithm = fedavg.build(update, server=servers.from_optax(optax.adam(0.05)))
    start = algorithm.init(jnp.array([0.3, -0.2, 0.5], dtype), data, key=jax.random.key(0))
    return algorithm, start, data


@functools.cache
def average(dtype=jnp.float64):
    return build(dtype)


RULE = smallest_loss()
NORM = rounds.Evaluation(parameter_norm, every=3)


def simulate(folder=None, num_rounds=13, dtype=jnp.float64, every=4, **changes):
    """The run that most tests are about, written to a folder if there is one."""
    algorithm, start, data = average(dtype)
    options = {
        "cohort_size": 2,
        "key": jax.random.key(7),
        "stop": RULE,
        "evaluate": NORM,
        "segment_rounds": 5,
        "output": None if folder is None else rounds.Output(folder, checkpoint_every=every),
        "progress": False,
        **changes,
    }
    algorithm, start, data = (
        options.pop(name, default)
        for name, default in (("algorithm", algorithm), ("start", start), ("data", data))
    )
    return federated.simulate(algorithm, start, data, num_rounds=num_rounds, **options)


@functools.cache
def uninterrupted(num_rounds=13, dtype=jnp.float64):
    return simulate(num_rounds=num_rounds, dtype=dtype)


def assert_same(results, expected):
    """Compare state and records bit by bit."""
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def read_log(folder):
    """Return the first line of a log and the others without their times."""
    text = (Path(folder) / "log.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    header, *lines = [json.loads(line) for line in text.splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return header, lines


def steps(folder):
    return [int(path.stem.partition("-")[2]) for path in sorted(Path(folder).glob("*.ckpt"))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert_same(simulate(folder), uninterrupted())
    return folder


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_run_in_pieces_is_the_run_in_one(dtype, tmp_path, whole):
    for num_rounds in (1, 4, 6, 12, 13):
        state, infos = simulate(tmp_path, num_rounds, dtype)
        assert infos.losses.shape == (num_rounds, 2)
        assert state.round == num_rounds
        assert state.params.dtype == infos.losses.dtype == dtype
    assert_same((state, infos), uninterrupted(dtype=dtype))
    assert len(read_log(tmp_path)[1]) == 13
    if dtype == jnp.float64:
        assert read_log(tmp_path) == read_log(whole)
    assert steps(tmp_path) == [12, 13]


def test_a_run_that_is_over_does_no_round(whole, monkeypatch):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}

    monkeypatch.setattr(recording, "log", pytest.fail)
    monkeypatch.setattr(recording, "save", pytest.fail)
    assert_same(simulate(whole), uninterrupted())
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


@pytest.mark.parametrize("part", ["log", "save"])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_crash_in_between_changes_nothing(part, calls, tmp_path, whole, monkeypatch):
    function, counted = getattr(recording, part), []

    def failing(*args):
        counted.append(1)
        # The first checkpoint is that of the start.
        if len(counted) == calls + (part == "save"):
            raise OSError(28, "No space left on device")
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recording, part, failing)
        with pytest.raises(OSError, match="No space left"):
            simulate(tmp_path)
    assert_same(simulate(tmp_path), uninterrupted())
    assert read_log(tmp_path) == read_log(whole)


@pytest.mark.parametrize("donate", [False, True])
def test_an_interrupt_keeps_what_is_done(donate, tmp_path, whole, monkeypatch):
    function, counted = recording.log, []

    def interrupted(run, progress):
        counted.append(1)
        if len(counted) == 2:
            # In the middle of a line.
            with (tmp_path / "log.jsonl").open("a") as file:
                file.write('{"round": 3, "lo')
            raise KeyboardInterrupt
        return function(run, progress)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "log", interrupted)
        with pytest.warns(UserWarning, match="simulate: interrupted after 4 rounds"):
            state, infos = simulate(tmp_path, donate=donate)
    assert state.round == len(infos.losses) == 4
    assert steps(tmp_path) == [0, 4]
    header, lines = read_log(whole)
    assert read_log(tmp_path) == (header, lines[:4])
    assert_same(simulate(tmp_path), uninterrupted())
    assert read_log(tmp_path) == (header, lines)


def test_donated_states_give_the_same_run_and_leave_the_start(tmp_path, whole):
    algorithm, start, data = build()
    before = jax.tree.map(np.array, start)
    results = simulate(
        tmp_path, algorithm=algorithm, start=start, data=data, donate=True, segment_rounds=2
    )
    assert_same(results, uninterrupted())
    assert_same(start, before)
    assert read_log(tmp_path) == read_log(whole)


def test_a_donated_state_is_written_over():
    algorithm, start, data = average()
    args = (algorithm, start, (RULE.init(), start), data, jax.random.key(7), np.int32(2))
    options = {"cohort_size": 2, "stop": RULE, "length": 2}
    reused = [
        function.lower(*args, **options).compile().memory_analysis().alias_size_in_bytes
        for function in (simulation._segment, simulation._donating_segment)
    ]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(args[1:3]))
    assert reused == [0, size]


def test_an_interrupt_within_a_donating_segment_leaves_the_checkpoints(tmp_path, monkeypatch):
    function, counted = simulation._donating_segment, []

    def interrupted(*args, **options):
        counted.append(1)
        results = function(*args, **options)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return results

    with monkeypatch.context() as patch:
        patch.setattr(simulation, "_donating_segment", interrupted)
        with pytest.raises(KeyboardInterrupt):
            simulate(tmp_path, donate=True)
    assert steps(tmp_path) == [0, 4]
    assert_same(simulate(tmp_path), uninterrupted())


def start_process(folder, before=""):
    """Begin a very long run in another process, after a few lines of preparation."""
    code = f"""
import os, signal, sys
from tests import conftest, test_simulation
from fedlr.federated.rounds import recording
{before}
test_simulation.simulate(sys.argv[1], 1_000_000, every=3)
"""
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT)


def assert_goes_on(folder, tmp_path):
    """Do some more rounds, and compare with a run of so many rounds that nothing disturbed."""
    num_rounds = max(steps(folder)) + 7
    expected = simulate(tmp_path / "whole", num_rounds, every=1000)
    assert_same(simulate(folder, num_rounds, every=3), expected)
    assert len(expected[1].losses) == num_rounds
    assert read_log(folder) == read_log(tmp_path / "whole")
    assert not list(folder.glob("*.part"))


@pytest.mark.slow
def test_a_run_that_is_killed_somewhere_goes_on(tmp_path):
    folder = tmp_path / "killed"
    process = start_process(folder)
    try:
        while max(steps(folder), default=0) < 6:
            assert process.poll() is None
            time.sleep(0.001)
        # Somewhere in the next checkpoints.
        time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert_goes_on(folder, tmp_path)


KILL_IN_CHECKPOINT = """
calls, fsync = [], os.fsync
def kill(descriptor):
    calls.append(1)
    if len(calls) == 9:
        os.truncate(descriptor, 500)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = kill
"""
KILL_IN_LOG = """
log = recording.log
def kill(run, progress):
    log(run, progress)
    if recording.num_done(progress) > 10:
        path = run.output.folder + "/log.jsonl"
        os.truncate(path, os.path.getsize(path) - 20)
        os.kill(os.getpid(), signal.SIGKILL)
recording.log = kill
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "half"),
    [(KILL_IN_CHECKPOINT, "checkpoint-00000012.part"), (KILL_IN_LOG, "log.jsonl")],
    ids=["checkpoint", "log"],
)
def test_a_run_that_is_killed_while_it_writes_goes_on(before, half, tmp_path):
    folder = tmp_path / "killed"
    assert start_process(folder, before).wait() == -signal.SIGKILL
    assert steps(folder) == [6, 9]
    assert not (folder / half).read_bytes().endswith(b"\n")
    assert_goes_on(folder, tmp_path)


@pytest.fixture(scope="module")
def alone():
    """Clients that halve their distance to their targets in every round."""
    data = protocol.ClientData((), jnp.array([[1.0], [3.0]]), jnp.ones((2, 1), bool))
    update = local.projected_gradient(lambda image, _: image, step_size=0.5)
    algorithm = local_only.build(update)
    return algorithm, algorithm.init(jnp.zeros(1), data, key=jax.random.key(0)), data


def run_alone(alone, **options):
    return federated.simulate(
        *alone, key=jax.random.key(0), progress=False, segment_rounds=4, **options
    )


def test_the_memory_of_a_rule_is_kept_and_a_run_that_it_ended_stays_ended(alone, tmp_path):
    algorithm, start, data = alone
    still = protocol.FederatedAlgorithm(
        algorithm.init,
        lambda state, *args, **options: (
            state._replace(round=state.round + 1),
            algorithm.round(state, *args, **options)[1],
        ),
    )
    options = {"stop": stopping.stagnation(patience=6)}
    expected = run_alone((still, start, data), num_rounds=20, **options)
    assert len(expected[1].losses) == 7
    output = rounds.Output(tmp_path, checkpoint_every=2)
    for num_rounds in (3, 5, 20, 30):
        found = run_alone((still, start, data), num_rounds=num_rounds, output=output, **options)
    assert_same(found, expected)
    # No round improved on the first one, so its state is returned.
    assert found[0].round == 0
    assert len(read_log(tmp_path)[1]) == 7


def test_weakly_typed_leaves_stay_so(tmp_path):
    # A strong float64 would neither multiply a float32 nor fit into the state again.
    def round(state, clients, cohort, *, key):
        params = state.params * state.server
        zeros = jnp.zeros(len(cohort), jnp.int32)
        info = protocol.RoundInfo(jnp.sum(params)[None], jnp.ones(1), zeros, zeros)
        return state._replace(params=params, round=state.round + 1), info

    algorithm = protocol.FederatedAlgorithm(pytest.fail, round)
    start = protocol.FederatedState(
        jnp.ones(3, jnp.float32), (), jnp.full(3, 0.9), jnp.zeros((), jnp.int32)
    )
    assert start.server.weak_type
    data = jnp.zeros((1, 2))
    expected = run_alone((algorithm, start, data), num_rounds=5)
    for num_rounds in (3, 5):
        found = run_alone(
            (algorithm, start, data), num_rounds=num_rounds, output=rounds.Output(tmp_path)
        )
    assert_same(found, expected)


def test_one_trace_with_files_and_evaluation(tmp_path):
    algorithm, start, data = build()
    traces, looks = [], []

    def counted(*args, **options):
        traces.append(1)
        return algorithm.round(*args, **options)

    def look(state):
        looks.append(1)
        return state.params

    watched = protocol.FederatedAlgorithm(algorithm.init, counted)
    for num_rounds in (7, 9):
        simulate(
            tmp_path,
            num_rounds,
            algorithm=watched,
            start=start,
            data=data,
            evaluate=rounds.Evaluation(look, every=3),
        )
    assert (len(traces), len(looks)) == (1, 1)


def test_evaluation_is_of_the_states_that_enter_every_so_many_rounds(whole):
    _, infos = uninterrupted()
    norms, moments = infos.evaluation["norm"], infos.evaluation["moment"]
    assert norms.shape == (13,)
    assert moments.shape == (13, 3)
    due = np.arange(13) % 3 == 0
    assert np.isnan(norms[~due]).all()
    for number in (0, 3, 12):
        state = average()[1]
        if number:
            state, _ = simulate(num_rounds=number, stop=None, evaluate=None)
        np.testing.assert_allclose(norms[number], np.linalg.norm(state.params), rtol=1e-15)
        np.testing.assert_array_equal(moments[number], state.server.server[0].mu)
    lines = read_log(whole)[1]
    assert ["evaluation" in line for line in lines] == due.tolist()
    assert lines[3]["evaluation"] == {"moment": moments[3].tolist(), "norm": norms[3]}


def test_evaluation_follows_the_rounds_of_the_state(alone, tmp_path):
    algorithm, start, data = alone
    middle = start._replace(round=jnp.int32(4))
    evaluate = rounds.Evaluation(lambda state: state.params[1, 0], every=3)
    _, infos = run_alone(
        (algorithm, middle, data), num_rounds=4, evaluate=evaluate, output=rounds.Output(tmp_path)
    )
    # It enters round 6 after two rounds.
    np.testing.assert_array_equal(infos.evaluation, [np.nan, np.nan, 2.25, np.nan])
    lines = read_log(tmp_path)[1]
    assert [line["round"] for line in lines] == [4, 5, 6, 7]
    assert [line.get("evaluation") for line in lines] == [None, None, 2.25, None]


def test_evaluation_does_not_change_the_run():
    plain = simulate(evaluate=None)
    state, infos = uninterrupted()
    assert_same((state, infos._replace(evaluation=())), plain)


def test_evaluations_that_do_not_fit_are_refused(alone):
    def refuse(message, function=lambda state: state.params, every=1, algorithm=alone[0]):
        evaluate = rounds.Evaluation(function, every)
        with pytest.raises(ValueError, match=message):
            run_alone((algorithm, *alone[1:]), num_rounds=1, evaluate=evaluate)

    refuse("simulate: got every 0, expected an integer from 1", every=0)
    refuse(
        r"simulate: got evaluation\['n'\] of dtype int32, expected floating",
        lambda state: {"n": state.round},
    )
    refuse(
        "simulate: got evaluate and an algorithm with evaluation, expected one",
        algorithm=federated.with_evaluation(alone[0], lambda state: state.params),
    )


def test_the_log_says_what_ran_and_what_every_round_did(whole):
    header, lines = read_log(whole)
    assert header == {
        "fedlr": "0.1.0",
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "mesh": {},
        "num_clients": 4,
        "cohort_size": 2,
    }
    _, infos = uninterrupted()
    assert [line["round"] for line in lines] == list(range(13))
    for index, line in enumerate(lines):
        info = jax.tree.map(lambda leaf, index=index: leaf[index], infos)
        np.testing.assert_allclose(line["loss"], np.mean(info.losses), rtol=1e-15)
        weighted = np.average(info.losses, weights=info.weights)
        np.testing.assert_allclose(line["weighted_loss"], weighted, rtol=1e-14)
        assert line["uplink_bytes"] == line["downlink_bytes"] == 2 * 3 * 8
        assert line["metrics"]["loss"] == line["loss"]


def log_of(info, tmp_path):
    """Return the line of a single record."""
    output = rounds.Output(tmp_path)
    run = recording.Run(output, {}, {}, ((), (), info), first_round=0, every=1)
    infos = jax.tree.map(lambda leaf: np.asarray(leaf)[None], info)
    progress = recording.Progress((), (), (infos,), (np.array([0.5]),), np.array(False))
    recording.log(run, progress)
    return json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)


def test_bytes_are_summed_beyond_int32(tmp_path):
    info = protocol.RoundInfo(
        np.zeros(3), np.ones(3), np.full(3, 2**31 - 1, np.int32), np.full(3, 2**30, np.int32)
    )
    line = log_of(info, tmp_path)
    assert line["uplink_bytes"] == 3 * (2**31 - 1)
    assert line["downlink_bytes"] == 3 * 2**30
    assert line["seconds"] == 0.5
    assert "metrics" not in line
    assert "evaluation" not in line


def test_what_is_no_number_is_null_and_weightless_losses_do_not_count(tmp_path):
    info = protocol.RoundInfo(
        losses=np.array([np.nan, 2.0, 4.0], np.float32),
        weights=np.array([0.0, 3.0, 1.0], np.float32),
        uplink_bytes=np.zeros(3, np.int32),
        downlink_bytes=np.zeros(3, np.int32),
        metrics={
            "infinite": np.array([1.0, np.inf, 1.0]),
            "half": jnp.array([1, 2, 3], jnp.bfloat16),
            "flag": np.array(True),
            "count": np.array(3, np.int32),
            "wide": np.zeros((3, 2)),
        },
        evaluation=np.array([1.5, np.nan, -np.inf]),
    )
    line = log_of(info, tmp_path)
    assert line["loss"] is None
    assert line["weighted_loss"] == 2.5
    assert line["metrics"] == {"infinite": None, "half": 2.0, "flag": True, "count": 3}
    assert line["evaluation"] == [1.5, None, None]


def test_the_loss_of_a_cohort_without_weight_is_null(tmp_path):
    zeros = np.zeros(2, np.int32)
    line = log_of(protocol.RoundInfo(np.ones(2), np.zeros(2), zeros, zeros), tmp_path)
    assert line["loss"] == 1.0
    assert line["weighted_loss"] is None


def wider():
    """The same clients, and a model of another shape."""
    _, _, data = average()
    data = data._replace(inputs=jnp.concatenate([data.inputs, data.inputs], axis=-1))
    algorithm, _, _ = average()
    start = algorithm.init(jnp.zeros(6), data, key=jax.random.key(0))
    return {"start": start, "data": data, "evaluate": None}


def changes():
    """Return what is changed in the call, and what is said of it."""
    _, start, data = average()
    fewer = jax.tree.map(lambda leaf: leaf[:3], data)
    sgd = fedavg.build(local.local_sgd(squared_error, optax.sgd(0.1), num_steps=2, batch_size=2))
    other, program = "with another ", "with another algorithm, stopping rule or evaluation"
    return {
        "clients": ({"data": fewer}, r"of num_clients 4, expected num_clients 3"),
        "cohort": ({"cohort_size": 3}, r"of cohort_size 2, expected cohort_size 3"),
        "all": ({"cohort_size": None}, r"of cohort_size 2, expected cohort_size 4"),
        "rounds": ({"num_rounds": 12}, r"of 13 rounds, expected at most num_rounds 12"),
        "key": ({"key": jax.random.key(8)}, other + "key"),
        "data": ({"data": data._replace(targets=data.targets + 1)}, other + "data of the clients"),
        "start": ({"start": start._replace(params=start.params + 1)}, other + "start state"),
        "step": ({"algorithm": build(step_size=0.2)[0]}, program),
        "rule": ({"stop": smallest_loss_of_sum()}, program),
        "look": ({"evaluate": NORM._replace(every=2)}, program),
        "optimizer": (
            {"algorithm": sgd, "start": sgd.init(start.params, data, key=jax.random.key(0)),
             "evaluate": None},
            r"with \.state\.server\.server.* expected no such leaf",
        ),
        "shape": (wider(), r"with \.state\.params of float64\[3\], expected float64\[6\]"),
        "stop": ({"stop": None}, r"with \.memory\[0\] of float32\[\], expected no such leaf"),
    }  # fmt: skip


def smallest_loss_of_sum():
    rule = smallest_loss()
    return rule._replace(
        update=lambda info, memory: rule.update(info._replace(losses=2 * info.losses), memory)
    )


CHANGES = [
    *("clients", "cohort", "all", "rounds", "key", "data", "start"),
    *("step", "rule", "look", "optimizer", "shape", "stop"),
]


@pytest.fixture(scope="module")
def made():
    made = changes()
    assert list(made) == CHANGES
    return made


@pytest.mark.parametrize("name", CHANGES)
def test_checkpoints_of_another_run_are_refused(name, made, whole):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    change, message = made[name]
    with pytest.raises(ValueError, match=r"simulate: got checkpoint .*00000013.ckpt.*" + message):
        simulate(whole, **change)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_the_last_good_checkpoint_is_used_and_named(tmp_path, whole):
    simulate(tmp_path)
    path = tmp_path / "checkpoint-00000013.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    text = r"simulate: skipped damaged checkpoint-00000013.ckpt .* used is checkpoint-00000012.ckpt"
    with pytest.warns(UserWarning, match=text):
        found = simulate(tmp_path)
    assert_same(found, uninterrupted())
    assert read_log(tmp_path) == read_log(whole)
    # The damaged one was replaced.
    assert_same(simulate(tmp_path), uninterrupted())


def test_if_no_checkpoint_is_good_the_run_is_refused_and_nothing_lost(tmp_path):
    simulate(tmp_path, 5)
    for path in tmp_path.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-3])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"simulate: got folder .* with only damaged .*00000005"):
        simulate(tmp_path, 5)
    assert sorted(tmp_path.iterdir()) == before


def test_a_log_that_is_lost_or_spoilt_is_written_anew(tmp_path, whole):
    simulate(tmp_path)
    log = tmp_path / "log.jsonl"
    content = log.read_bytes()
    for spoilt in (None, content + b'{"round"', content[:100]):
        log.unlink()
        if spoilt is not None:
            log.write_bytes(spoilt)
        simulate(tmp_path)
        assert log.read_bytes() == content


def test_a_log_without_checkpoints_is_not_overwritten(tmp_path):
    (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"with a log.jsonl but without checkpoints, expected"):
        simulate(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_folders_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"got folder .*expected a folder that can be written"):
            simulate(folder)

    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "fsync", denied)
    with pytest.raises(ValueError, match=r"\(.*Permission denied\), expected a folder that can be"):
        simulate(tmp_path / "new")


def test_outputs_that_count_nothing_are_refused(tmp_path):
    for name in ("checkpoint_every", "keep"):
        output = rounds.Output(tmp_path)._replace(**{name: 0})
        with pytest.raises(ValueError, match=f"simulate: got {name} 0, expected an integer from 1"):
            simulate(output=output)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_version_is_used_with_a_warning(tmp_path, monkeypatch):
    simulate(tmp_path, 5)
    monkeypatch.setattr(jax, "__version__", "0.99")
    text = r"checkpoint-00000005.ckpt was written by .*, this is .*'jax': '0.99'.* may differ"
    with pytest.warns(UserWarning, match=text):
        found = simulate(tmp_path)
    assert_same(found, uninterrupted())
    # The log says where the run began, and the next call knows where it went on.
    assert read_log(tmp_path)[0]["jax"] != "0.99"
    simulate(tmp_path)


def test_states_that_cannot_be_saved_are_refused_at_once(tmp_path, alone):
    algorithm, start, data = alone

    def round(state, *args, **options):
        return algorithm.round(state._replace(server=()), *args, **options)

    def keeping(state, *args, **options):
        new, info = round(state, *args, **options)
        return new._replace(server=state.server), info

    holding = start._replace(server=jax.random.key(3))
    keeping = protocol.FederatedAlgorithm(algorithm.init, keeping)
    with pytest.raises(ValueError, match=r"save: got leaf \.state\.server of dtype key<fry>"):
        run_alone((keeping, holding, data), num_rounds=3, output=rounds.Output(tmp_path))
    assert checkpoints.find_latest(tmp_path) is None
