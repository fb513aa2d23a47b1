"""Best PSNR at n = 100 of the reference: float32 NumPy, 40 views, pixel-driven splatting."""

__all__ = ["best_psnr", "margin"]

SIGMAS = (0.05, 0.1)

# By method, at both noise levels, noise seed 1.
_FIRST_SEED = {
    "single client": (21.09, 19.08),
    "FIRM": (21.46, 19.45),
    "FIRM+": (21.46, 19.45),
    "FedPGD": (21.46, 19.45),
    "FedAvg": (17.03, 16.54),
    "factor averaging 20": (17.35, 17.22),
    "factor averaging 41": (17.50, 17.27),
    "low rank without coupling 20": (21.42, 19.51),
    "CompJF 10": (20.42, 19.85),
    "CompJF 20": (21.98, 20.18),
    "CompJF 30": (21.93, 20.02),
    "CompJF 41": (21.84, 19.89),
    "CompRandJF 10": (19.62, 19.05),
    "CompRandJF 20": (21.52, 20.08),
    "CompRandJF 30": (21.91, 20.29),
    "CompRandJF 41": (21.97, 20.18),
    "FullDecomp 10": (21.41, 20.06),
    "FullDecomp 20": (21.87, 19.95),
    "FullDecomp 41": (21.65, 19.65),
    "CompJF 35,10,14,16": (21.97, 20.20),
    "CompRandJF 35,10,14,16": (21.96, 20.24),
    "Top-k 2200": (13.66, 13.63),
    "Top-k 4940": (21.29, 19.64),
    "CSR 4890": (21.01, 19.49),
    "growing ranks, known noise 41": (21.95, 19.33),
    "FIRM + TV": (23.25, 21.41),
    "CompJF 30 + TV": (22.85, 21.41),
    "CompJF 20 + TV": (22.27, 21.26),
    "CompRandJF 30 + TV": (22.26, 21.11),
}
_OTHER_SEEDS = {
    2: {"FIRM": (21.45, 19.43), "CompJF 20": (21.88, 20.15), "CompRandJF 20": (21.38, 19.88)},
    3: {"FIRM": (21.50, 19.53), "CompJF 20": (21.90, 20.15), "CompRandJF 20": (21.49, 20.07)},
}


def best_psnr(method: str, sigma: float, seed: int) -> float | None:
    """Return the best PSNR of the reference in dB, None where it has none.

    Args:
        method: Name of the method, see `methods`.
        sigma: Noise level.
        seed: Seed of the noise.
    """
    known = {1: _FIRST_SEED, **_OTHER_SEEDS}.get(seed, {}).get(method)
    return None if known is None or sigma not in SIGMAS else known[SIGMAS.index(sigma)]


def margin(method: str, sigma: float) -> float | None:
    """Return the best PSNR minus that of FIRM in dB, noise seed 1, None where it has none.

    Args:
        method: Name of the method, see `methods`.
        sigma: Noise level.
    """
    best, firm = best_psnr(method, sigma, 1), best_psnr("FIRM", sigma, 1)
    return None if best is None or firm is None else best - firm
