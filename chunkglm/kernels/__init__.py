"""Numerical kernels: plain functions from numpy arrays to numpy arrays, with numpy and scipy only."""
