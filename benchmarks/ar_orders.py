"""Noise of higher orders: fitting from stores at every voxel's own coefficients, against nilearn's clusters of voxels."""

from __future__ import annotations

from benchmarks import refit

NOISE_MODELS = ("ar1", "ar2", "ar3")


def main(arguments: list[str]) -> None:
    """Print a table for each order."""
    refit.main(arguments, noise_models=NOISE_MODELS, name="ar_orders")
