"""Four clients reconstruct their coupled images together: `python -m demo [--out FOLDER]`.

Every client holds a noisy, undersampled scan of its own image (51 views of 128 x 128 pixels); the
images are tied by w_4 = 0.5 w_1 + 0.3 w_2 + 0.2 w_3. The scans are closed-form line integrals, so
the data do not come from the projector that reconstructs. Printed is a table of every method at
two noise levels; written are `demo.png` and `demo.json`. A few lines on linked tensors follow.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from demo import linked
from fedlr import federated, proximal, synthetic, tomography
from fedlr.algorithms import comp_jf, fedavg, firm, local_only
from fedlr.federated import channels, compressors, local, protocol, ranks, stopping

SIGMAS = (0.05, 0.1)
SEGMENT = 10


class Method(NamedTuple):
    """An algorithm, the start its `init` wants, how to see its images, and whether they spoil."""

    algorithm: protocol.FederatedAlgorithm
    start: jax.Array
    images: Callable[[protocol.FederatedState], jax.Array]
    stops_early: bool = True


def build_methods(forward, coefficients, start, step_size, rank) -> dict[str, Method]:
    """Build the methods in the order of the table; each records its images in every round."""
    gradient = local.projected_gradient(forward, step_size=step_size)
    dense = partial(firm.build, forward, coefficients, step_size=step_size)
    low_rank = partial(comp_jf.build, forward, coefficients, step_size=step_size)
    decomposed = channels.states(compressors.truncated_tucker((rank, rank)))
    smooth = partial(proximal.total_variation, weight=0.004)
    # Beyond this rank a message is larger than the image.
    largest = int(start.shape[-1] / (1 + math.sqrt(2.0)))
    growing = ranks.grow(start=min(8, largest))

    def own(state):
        return state.params

    def repeated(state):
        return jnp.broadcast_to(state.params, start.shape)

    methods = {
        "FedAvg": Method(fedavg.build(gradient), start[0], repeated),
        "single client": Method(local_only.build(gradient), start[0], own),
        "FIRM": Method(dense(), start, own),
        # Its images go on getting better when they begin to fit the noise.
        "FIRM + TV": Method(dense(proximal=smooth), start, own, stops_early=False),
        f"FullDecomp {rank}": Method(dense(uplink=decomposed, downlink=decomposed), start, own),
        f"CompRandJF {rank}": Method(
            low_rank(ranks=(rank, rank), joint_basis=comp_jf.sketched()), start, comp_jf.images
        ),
        f"CompJF {rank}": Method(low_rank(ranks=(rank, rank)), start, comp_jf.images),
        "CompJF, growing": Method(
            low_rank(ranks=(largest, largest), client_ranks=growing), start, comp_jf.images
        ),
    }
    return {
        name: method._replace(algorithm=federated.with_evaluation(method.algorithm, method.images))
        for name, method in methods.items()
    }


def reconstruct(method: Method, clients, num_rounds: int) -> tuple[Any, float, float]:
    """Run one method; its records, seconds per round and seconds of compiling (0 if cached)."""
    init_key, run_key = jax.random.split(jax.random.key(1))
    state = method.algorithm.init(method.start, clients, key=init_key)
    drive = partial(
        federated.simulate,
        method.algorithm,
        state,
        clients,
        key=run_key,
        segment_rounds=SEGMENT,
    )
    start = time.perf_counter()
    drive(num_rounds=1, progress=False)
    first = time.perf_counter() - start
    start = time.perf_counter()
    _, infos = drive(num_rounds=num_rounds)
    each = (time.perf_counter() - start) / num_rounds
    return infos, each, max(first - each, 0.0)


def summarize(infos, scans, clients, *, stops_early: bool) -> dict[str, Any]:
    """Find the best round and the one whose images the corrected rule returns, or the last."""
    images, truth = np.asarray(infos.evaluation), np.asarray(scans.images)
    curve = psnr(images, truth)
    stop, best, fired = len(curve) - 1, int(curve.argmax()), False
    if stops_early:
        rule = stopping.corrected(scans.noise_levels, stopping.num_measurements(clients))
        outcome = stopping.replay(rule, infos._replace(evaluation=()))
        stop, fired = int(outcome.best), bool(outcome.fired)
    checked = [*range(5, len(curve), 5), stop]
    similarity = np.asarray(ssim(jnp.asarray(images[checked]), jnp.asarray(truth)))
    return {
        "best_psnr": float(curve[best]),
        "best_round": best,
        "best_ssim": float(similarity.max()),
        "stop_psnr": float(curve[stop]),
        "stop_round": stop,
        "stop_ssim": float(similarity[-1]),
        "stopped_by_rule": fired,
        "uplink_bytes": infos.uplink_bytes.sum(axis=1).tolist(),
        "downlink_bytes": infos.downlink_bytes.sum(axis=1).tolist(),
        "psnr": curve.tolist(),
        "images_at_stop": images[stop],
    }


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the mean PSNR over the clients in dB; the range is each truth's largest value."""
    peak = truth.max(axis=(-2, -1))
    error = ((images - truth) ** 2).mean(axis=(-2, -1))
    return (10.0 * np.log10(peak**2 / error)).mean(axis=-1)


@jax.jit
def ssim(images: jax.Array, truth: jax.Array) -> jax.Array:
    """Return the mean SSIM over the clients (Gaussian window, sigma 1.5), for every round."""

    def one(image, reference):
        peak = reference.max()
        return dm_pix.ssim(image[..., None] / peak, reference[..., None] / peak)

    return jnp.mean(jax.lax.map(lambda x: jax.vmap(one)(x, truth), images), axis=-1)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line a method and noise level."""
    heads = ("sigma", "method", "PSNR best", "stop", "SSIM best", "stop", "kB up/round", "down")
    heads += ("compression", "stop at", "MB to stop", "ms/round", "compile s")
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        # What growing ranks send differs from round to round: the mean up to the stop.
        until = max(row["stop_round"], 1)
        up, down = (sum(row[f"{way}link_bytes"][:until]) / until for way in ("up", "down"))
        dense = row["dense_bytes_per_round"]
        lines.append(
            (
                f"{row['sigma']:.2f}",
                row["method"],
                f"{row['best_psnr']:.2f}",
                f"{row['stop_psnr']:.2f}",
                f"{row['best_ssim']:.3f}",
                f"{row['stop_ssim']:.3f}",
                f"{up / 1e3:.1f}",
                f"{down / 1e3:.1f}",
                f"{dense / (up + down):.2f}x" if up else "-",
                f"{row['stop_round']}" + ("" if row["stopped_by_rule"] else " (end)"),
                f"{row['stop_round'] * (up + down) / 1e6:.1f}",
                f"{1e3 * row['seconds_per_round']:.0f}",
                f"{row['compile_seconds']:.1f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = (
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def draw(rows: list[dict[str, Any]], truth: np.ndarray, sigma: float, path: Path) -> None:
    """Draw the truth and every method's four images at one noise level, and PSNR against bytes."""
    shown = [row for row in rows if row["sigma"] == sigma]
    stacks = [("truth", truth)] + [
        (f"{row['method']}\n{row['stop_psnr']:.2f} dB", row["images_at_stop"]) for row in shown
    ]
    figure = plt.figure(figsize=(15, 1.75 * len(stacks)), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(len(truth) * 1.75, 8))
    left, right = halves
    left.suptitle(
        f"sigma = {sigma}, every method where the corrected rule stops it, TV at its last round",
        fontsize=10,
    )
    axes = left.subplots(len(stacks), len(truth))
    for line, (label, images) in zip(axes, stacks, strict=True):
        for client, (axis, image) in enumerate(zip(line, images, strict=True)):
            axis.imshow(image, cmap="gray", vmin=0.0, vmax=truth[client].max())
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=9)
    for client, axis in enumerate(axes[0]):
        axis.set_title(f"client {client + 1}", fontsize=9)
    panels = right.subplots(len(SIGMAS), 1, sharex=True)
    for panel, level in zip(panels, SIGMAS, strict=True):
        for row in rows:
            if row["sigma"] != level:
                continue
            sent = np.add(row["uplink_bytes"], row["downlink_bytes"])
            curve = np.asarray(row["psnr"])
            if not sent.any():
                panel.axhline(
                    row["stop_psnr"], color="gray", ls=":", label=f"{row['method']}, at its stop"
                )
                continue
            megabytes = (np.cumsum(sent) - sent) / 1e6
            (line,) = panel.plot(megabytes[1:], curve[1:], label=row["method"])
            stop = row["stop_round"]
            panel.plot(megabytes[stop], curve[stop], "o", color=line.get_color())
        panel.set(xscale="log", ylabel="mean PSNR (dB)", title=f"sigma = {level}")
        panel.grid(visible=True, alpha=0.3)
    panels[0].legend(fontsize=8, loc="lower right")
    panels[-1].set_xlabel("megabytes sent, up and down, all clients (dot: stop)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to")
    parser.add_argument("--size", type=int, default=128, help="pixels across an image")
    parser.add_argument("--views", type=int, default=51, help="viewing angles of a scan")
    parser.add_argument("--rank", type=int, default=26, help="rank of the joint subspace")
    parser.add_argument("--rounds", type=int, default=120)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    size = options.size
    geometry = tomography.ParallelBeam((size, size), num_bins=math.ceil(math.sqrt(2.0) * size))
    forward = partial(tomography.project, geometry)
    angles = synthetic.uniform_angles(options.views)
    start = jnp.zeros((4, size, size), angles.dtype)
    scan_key, norm_key = jax.random.split(jax.random.key(0))

    rows: list[dict[str, Any]] = []
    methods, truth = {}, np.zeros(start.shape)
    for sigma in SIGMAS:
        scans = synthetic.multimodal_scans(geometry, angles, sigma=sigma, key=scan_key)
        mask = jnp.ones(scans.angles.shape, bool)
        clients = protocol.ClientData(scans.angles, scans.sinograms, mask)
        if not methods:
            norm = local.operator_norm(forward, clients, start[0], key=norm_key)
            methods = build_methods(forward, scans.coefficients, start, 1.0 / norm, options.rank)
        truth = np.asarray(scans.images)
        for name, method in methods.items():
            print(f"sigma {sigma}: {name}", file=sys.stderr)
            infos, each, compiling = reconstruct(method, clients, options.rounds)
            rows.append(
                {
                    "sigma": sigma,
                    "method": name,
                    **summarize(infos, scans, clients, stops_early=method.stops_early),
                    "dense_bytes_per_round": 2 * start.nbytes,
                    "rounds": options.rounds,
                    "seconds_per_round": each,
                    "compile_seconds": compiling,
                }
            )
    print(f"\n{len(start)} clients, {size} x {size} pixels, {options.views} views each")
    patient = ", ".join(name for name, method in methods.items() if not method.stops_early)
    print(f"stop: where the corrected rule stops; of {patient}, which runs on, the last round\n")
    print_table(rows)
    draw(rows, truth, SIGMAS[-1], options.out / "demo.png")
    lines = [{key: value for key, value in row.items() if key != "images_at_stop"} for row in rows]
    (options.out / "demo.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    linked.show()
    print(f"\nwritten: {options.out / 'demo.png'}, {options.out / 'demo.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
