import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import timing

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def test_every_benchmark_says_how_many_cores_it_wants():
    with_run = {p.stem for p in FOLDER.glob("*.py") if "\ndef run(size" in p.read_text()}
    found = command.discover()
    assert set(found) == with_run
    assert set(found.values()) <= {1, None}


def test_benchmarks_are_found_by_their_run_and_cores(tmp_path):
    (tmp_path / "one.py").write_text("CORES = 1\ndef run(size): return []\n")
    (tmp_path / "all.py").write_text("CORES = None\ndef run(size): return []\n")
    (tmp_path / "peers.py").write_text("def helper(): ...\n")
    assert command.discover(tmp_path) == {"one": 1, "all": None}


@pytest.fixture
def toy_folder(tmp_path):
    """A copy of the command with one toy benchmark, which asks for one core."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    for name in ("__init__.py", "__main__.py"):
        (package / name).write_text((FOLDER / name).read_text())
    (package / "toy.py").write_text(
        "import os\n"
        "import numpy as np\n"
        "CORES = 1\n"
        "def run(size):\n"
        "    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1\n"
        "    return [{'size_given': size, 'cores_given': cores, 'error': np.float32(0.5),\n"
        "             'threads': os.environ['OMP_NUM_THREADS'], 'xla': os.environ['XLA_FLAGS']}]\n"
    )
    return tmp_path


def test_the_command_pins_a_core_and_writes_json_lines(toy_folder):
    arguments = ["toy", "--size", "full", "--json", "out/toy.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=toy_folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "size_given" in done.stdout
    (line,) = (toy_folder / "out" / "toy.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["benchmark"] == "toy"
    assert (row["size"], row["size_given"]) == ("full", "full")
    assert row["cores_given"] == 1
    assert row["machine"]["cpu"]
    assert row["threads"] == "1"
    assert command.ONE_THREAD_XLA in row["xla"]
    assert row["error"] == 0.5
    assert row["versions"]["jax"]


@pytest.fixture
def tables_folder(toy_folder):
    """The same with a benchmark of two tables, which draws."""
    (toy_folder / "benchmarks" / "several.py").write_text(
        "from pathlib import Path\n"
        "CORES = None\n"
        "TABLES = {name: lambda size, name=name: [{'table': name, 'value': size, 'list': [1, 2]}]\n"
        "          for name in ('first', 'second')}\n"
        "def run(size, only=None):\n"
        "    return [row for name in only or TABLES for row in TABLES[name](size)]\n"
        "def draw(rows, folder):\n"
        "    folder.mkdir(parents=True, exist_ok=True)\n"
        "    file = folder / 'tables.png'\n"
        "    file.write_text(' '.join(row['table'] for row in rows))\n"
        "    return [file]\n"
    )
    return toy_folder


def run_command(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_table_is_renewed_and_the_others_are_kept(tables_folder):
    def values():
        lines = (tables_folder / "out.jsonl").read_text().splitlines()
        return {row["table"]: row["value"] for row in map(json.loads, lines)}

    arguments = ["several", "--json", "out.jsonl", "--only"]
    done = run_command(tables_folder, *arguments, "first")
    assert done.returncode == 0, done.stderr
    assert "2 values" in done.stdout
    assert values() == {"first": "small"}
    assert run_command(tables_folder, *arguments, "second", "--size", "full").returncode == 0
    assert values() == {"first": "small", "second": "full"}
    assert (tables_folder / "out_figures" / "tables.png").read_text() == "first second"
    assert run_command(tables_folder, *arguments, "second,first").returncode == 0
    assert values() == {"first": "small", "second": "small"}


def test_all_tables_are_run_and_replace_the_file(tables_folder):
    (tables_folder / "out.jsonl").write_text('{"table": "old"}\n')
    done = run_command(tables_folder, "several", "--json", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "old" not in (tables_folder / "out.jsonl").read_text()


def test_figures_go_where_they_are_asked_for_and_nowhere_by_themselves(tables_folder):
    before = sorted(tables_folder.iterdir())
    assert run_command(tables_folder, "several").returncode == 0
    assert sorted(tables_folder.iterdir()) == before
    done = run_command(tables_folder, "several", "--only", "second", "--figures", "pictures")
    assert done.returncode == 0, done.stderr
    assert (tables_folder / "pictures" / "tables.png").read_text() == "second"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["several", "--only", "first,third"],
            "--only: got 'third', expected some of: first, second",
        ),
        (["toy", "--only", "first"], "--only: benchmark toy has no tables to choose from"),
        (["toy", "--figures", "here"], "--figures: benchmark toy draws none"),
    ],
)
def test_options_a_benchmark_cannot_serve_are_refused(tables_folder, arguments, message):
    done = run_command(tables_folder, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_every_table_of_reconstruction_and_every_method_has_a_name():
    from benchmarks import methods, problems, reconstruction

    problem = problems.splatting_problem(16, 4, (0.05,), (1,))
    for name in {*reconstruction.QUALITY, *reconstruction.LARGE, *reconstruction.TOY_QUALITY}:
        method = methods.build(name, problem, problem.draw(0))
        assert callable(method.algorithm.round), name
    with pytest.raises(KeyError, match="no such method"):
        methods.build("no such method", problem, problem.draw(0))
    assert set(reconstruction.TABLES) > {"quality", "sweep", "clients", "sketch"}


def test_a_row_is_dominated_by_a_cheaper_and_better_one():
    from benchmarks import reconstruction

    rows = [
        {"sigma": 0.1, "bytes_to_best": cost, "best_psnr": best}
        for cost, best in [(1, 20.0), (2, 20.0), (3, 22.0), (4, 21.0)]
    ]
    assert [reconstruction.undominated(row, rows) for row in rows] == [True, False, True, False]


def test_margins_compare_runs_of_one_length():
    from benchmarks import reconstruction

    def row(method, seed, best_round, best_psnr):
        row = {"method": method, "sigma": 0.1, "seed": seed}
        return row | {"best_round": best_round, "best_psnr": best_psnr}

    rows = [row("FIRM", seed, 5, 20.0 + seed) for seed in (1, 2, 3)]
    rows += [row("FIRM + TV", 1, 249, 29.0), row("FIRM + TV", 2, 119, 24.0)]
    rows += [row("FIRM + TV", 3, 118, 24.5)]
    firm, patient = reconstruction.margins(rows, 120)
    assert (firm["num_seeds"], firm["mean_margin_db"], firm["spread_db"]) == (3, 0.0, 0.0)
    assert (patient["num_seeds"], patient["mean_margin_db"], patient["spread_db"]) == (2, 1.75, 0.5)


def test_a_replayed_stopping_rule_returns_what_simulate_returns():
    import jax
    import jax.numpy as jnp

    from benchmarks import methods, problems, runs
    from fedlr import federated
    from fedlr.federated import stopping

    problem = problems.splatting_problem(16, 6, (0.1,), (1,))
    draw, name = problem.draw(0), "FIRM"
    rule = stopping.corrected(draw.noise_levels, stopping.num_measurements(draw.clients))
    method = methods.build(name, problem, draw)
    state = method.algorithm.init(method.start, draw.clients, key=jax.random.key(2))
    stopped, _ = federated.simulate(
        method.algorithm,
        state,
        draw.clients,
        num_rounds=30,
        key=jax.random.key(3),
        stop=rule,
        progress=False,
    )
    record = runs.run(name, problem, 30)
    (index,) = record.stops["corrected"]
    assert index == int(stopped.round) < 29
    error = jnp.mean((stopped.params - problem.truth) ** 2, axis=(1, 2))
    peak = jnp.max(problem.truth, axis=(1, 2))
    psnr = float(jnp.mean(10 * jnp.log10(peak**2 / error)))
    assert record.psnr[0, index] == pytest.approx(psnr, abs=1e-3)


@pytest.fixture
def noisy_samples(rng):
    """Samples of two modalities; the last two are copies of the first two."""
    from benchmarks import feature_data

    inputs = [rng.standard_normal((12, channels)) for channels in (3, 2)]
    inputs = tuple(np.concatenate([values, values[:2]]) for values in inputs)
    return feature_data.Samples(inputs, rng.standard_normal(14))


def test_a_copy_on_both_sides_of_a_split_is_refused(noisy_samples):
    from benchmarks import feature_data

    owners, held_out = np.arange(14) % 2, np.zeros(14, bool)
    held_out[[1, 2, 12, 13]] = True  # 1 with its copy 13; 0 without its copy 12
    message = "check_no_copies: got 1 test samples that are training samples too, expected none"
    with pytest.raises(ValueError, match=message):
        feature_data.make_problem([feature_data.Draw(noisy_samples, owners, held_out)])
    held_out[0] = True
    problem = feature_data.make_problem([feature_data.Draw(noisy_samples, owners, held_out)])
    assert (problem.train.mask.sum(), problem.test.mask.sum()) == (9, 5)


def test_no_test_sample_has_a_part_in_what_is_standardized(noisy_samples):
    from benchmarks import feature_data

    owners, held_out = np.arange(14) % 3, np.arange(14) % 4 == 1
    held_out[[0, 1, 12, 13]] = True

    def problem(samples):
        return feature_data.make_problem([feature_data.Draw(samples, owners, held_out)])

    found = problem(noisy_samples)
    inputs, targets = feature_data.rows(feature_data.split_of(found.train, 0))
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(inputs.std(axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(targets.std() * found.scales, noisy_samples.targets[~held_out].std())
    shift = 100.0 * held_out
    inputs = tuple(values + shift[:, None] for values in noisy_samples.inputs)
    moved = problem(feature_data.Samples(inputs, noisy_samples.targets + shift))
    np.testing.assert_array_equal(moved.train.targets, found.train.targets)
    np.testing.assert_array_equal(moved.train.inputs.values[0], found.train.inputs.values[0])


def test_clients_by_target_have_their_shares_and_each_holds_some_samples_out(rng):
    from benchmarks import feature_data

    targets = rng.standard_normal(200)
    owners = feature_data.by_target(targets, rng, noise=0.0)
    assert np.bincount(owners).tolist() == [90, 60, 50]
    assert targets[owners == 0].max() < targets[owners == 1].min()
    held_out = feature_data.hold_out(owners, 0.2, rng)
    assert np.bincount(owners[held_out]).tolist() == [18, 12, 10]
    owners = feature_data.dirichlet(targets, 4, 0.1, seed=0)
    assert np.bincount(owners).sum() == 200
    assert np.bincount(owners).min() >= 10


def make_scores(method, errors, head="ridge", num_features=8, has_own_size=False):
    from benchmarks import feature_methods, feature_scores

    table = np.zeros((len(errors), 2, 3, num_features))
    features = feature_methods.Features(method, table, table, None, has_own_size=has_own_size)
    shares = np.tile([0.75, 0.25], (len(errors), 1))
    return feature_scores.Scores(features, head, np.stack([errors, errors]).T, None, shares)


def test_features_are_compared_with_one_head_and_one_size():
    from benchmarks import feature_scores

    errors = np.array([1.0, 2.0, 4.0])
    first = make_scores("first", errors)
    other_head = make_scores("second", errors, head="forest of 100")
    with pytest.raises(ValueError, match=r"compare: got heads \['forest of 100', 'ridge'\]"):
        feature_scores.compare([first, other_head])
    other_size = make_scores("second", errors, num_features=4)
    with pytest.raises(ValueError, match=r"compare: got \[4, 8\] features, expected one number"):
        feature_scores.compare([first, other_size])
    with pytest.raises(ValueError, match=r"compare: got no scores of \['PCA'\]"):
        feature_scores.compare([first], ("PCA",))
    marked = make_scores("raw inputs", errors, num_features=4, has_own_size=True)
    assert [row["features"] for row in feature_scores.compare([first, marked])] == [8, 4]


def test_differences_of_features_are_paired_over_splits(rng):
    from scipy import stats

    from benchmarks import feature_scores

    errors, gains = rng.random(9) + 1, rng.random(9) - 0.2
    scores = [make_scores("first", errors), make_scores("second", errors - gains)]
    same, other = feature_scores.compare(scores, ("first",))
    assert (same["minus first"], same["minus first, p"]) == (0, 1)
    interval = stats.ttest_1samp(-gains, 0).confidence_interval()
    found = [other[f"minus first{end}"] for end in ("", ", low", ", high")]
    np.testing.assert_allclose(found, [-gains.mean(), *interval])
    assert other["minus first, p"] == stats.wilcoxon(errors - gains, errors).pvalue
    np.testing.assert_allclose(other["mse"], (errors - gains).mean())


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["no_such_benchmark"])
    assert "invalid choice" in capsys.readouterr().err


def test_rows_with_equal_columns_share_a_table():
    rows = [{"name": "a", "seconds": 0.123456}, {"name": "bcd", "seconds": 2.0}, {"rounds": 3}]
    assert command.table(rows).splitlines() == [
        "name  seconds",
        "a      0.1235",
        "bcd         2",
        "",
        "rounds",
        "     3",
    ]


def test_cpu_time_counts_work_and_not_waiting():
    def work():
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    calls = []
    measured = timing.measure(
        {
            "work": lambda: (calls.append("work"), work()),
            "wait": lambda: (calls.append("wait"), time.sleep(0.02)),
        },
        repeats=3,
        warmup=1,
    )
    assert calls == ["work", "wait"] * 4
    assert measured["work"].cpu_min >= 0.02
    assert measured["wait"].cpu_median < 0.01
    assert measured["wait"].wall_min >= 0.02
    assert measured["work"].cpu_min <= measured["work"].cpu_median


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="measure: got repeats 0, expected at least 1"):
        timing.measure({}, repeats=0)


def test_compiling_is_timed_every_time():
    def double(x):
        return x + x

    x = np.ones(3)
    assert min(timing.compile_time(double, x) for _ in range(3)) > 1e-4
