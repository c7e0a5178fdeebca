"""How often a study calls equal rows different, by the number of seeds and by how much seeds vary.

    python benchmarks/few_seeds.py [--draws 200000] [--json] [--quick]

Two rows with the same law: the difference of their means varies over users and over seeds, both normal, and
the spread over users is known, as it nearly is with many users. Its p-value is Student's with Satterthwaite's
degrees of freedom (eval/intervals/interval.py). The first draws also go through the package's own comparison,
and the two must agree. The table has the share of the draws with p <= .05; exact would be 5 %.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from scipy.special import ndtri, stdtr

from eval.intervals import Resampled, compare

SEEDS = (2, 3, 4, 5, 10)
RATIOS = {
    "seeds vary not at all": 0.0,
    "as much as users": 1.0,
    "ten times as much": 10.0,
    "users do not": np.inf,
}
"""Variance of the mean over seeds, over that over users."""
USERS = 500
REPLICATES = 400
CHECKED = 50
TOLERANCE = 0.01


def p_values(values: np.ndarray, of_users: float) -> np.ndarray:
    """float64[draws], of differences whose mean over seeds has a known variance over users.

    Args:
        values: float64[draws, S], the difference of each seed.
        of_users: variance of their mean over users.
    """
    num_seeds = values.shape[1]
    of_seeds = values.var(axis=1, ddof=1) / num_seeds
    total = of_users + of_seeds
    degrees = total**2 / np.maximum(of_seeds**2 / (num_seeds - 1), 1e-300)
    return 2 * stdtr(np.minimum(degrees, 1e12), -np.abs(values.mean(axis=1)) / np.sqrt(total))


def draw(rng: np.random.Generator, draws: int, num_seeds: int, ratio: float) -> tuple[np.ndarray, float]:
    """(values [draws, S] of equal rows, variance of their mean over users)."""
    of_users = 0.0 if np.isinf(ratio) else 1.0
    of_seeds = 1.0 if np.isinf(ratio) else ratio
    shared = rng.normal(scale=np.sqrt(of_users), size=(draws, 1))  # the same users look at every seed
    return shared + rng.normal(scale=np.sqrt(of_seeds * num_seeds), size=(draws, num_seeds)), of_users


def package_p(values: np.ndarray, of_users: float) -> float:
    """The p-value of the package for one draw."""
    spread = ndtri((np.arange(REPLICATES) + 0.5) / REPLICATES)
    spread *= np.sqrt(of_users) / spread.std(ddof=1)
    settings = {"n": USERS, "smooth": True, "bounds": (-np.inf, np.inf), "users": USERS}
    zero = Resampled(0.0, np.zeros(REPLICATES), seed_values=np.zeros(len(values)), **settings)
    other = Resampled(float(values.mean()), values.mean() + spread, seed_values=values, **settings)
    return compare(zero, other).p_value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=200_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="20,000 draws")
    options = parser.parse_args()
    draws = 20_000 if options.quick else options.draws
    found: dict[str, dict[str, float]] = {}
    for num_seeds in SEEDS:
        rng = np.random.default_rng(num_seeds)
        found[str(num_seeds)] = {}
        for name, ratio in RATIOS.items():
            values, of_users = draw(rng, draws, num_seeds, ratio)
            p = p_values(values, of_users)
            for row, expected in zip(values[:CHECKED], p[:CHECKED], strict=True):
                mine = package_p(row, of_users)
                if abs(mine - max(expected, 1 / (REPLICATES + 1))) > TOLERANCE:
                    raise SystemExit(f"the package says p = {mine:.4f}, the formula {expected:.4f}")
            found[str(num_seeds)][name] = float((p <= 0.05).mean())
    if options.json:
        print(json.dumps({"draws": draws, "share": found}))
        return
    print(f"equal rows called different at 5 %, {draws:,} draws")
    print("| seeds | " + " | ".join(RATIOS) + " |")
    print("|---" * (len(RATIOS) + 1) + "|")
    for num_seeds, row in found.items():
        print(f"| {num_seeds} | " + " | ".join(f"{100 * share:.1f} %" for share in row.values()) + " |")


if __name__ == "__main__":
    main()
