r"""How uncertain estimated autoregressive coefficients are, at orders of 2 and more.

For order 1 this is tabulated from exact traces (:mod:`chunkglm.kernels.autocorrelation`); a table over several coefficients
would be too large. Here the design is taken to act on each frequency on its own: of noise with the spectrum
:math:`S(\omega) = |1 - \sum_i \rho_i e^{-i \omega}|^{-2}` residuals keep the part :math:`h(\omega)`, which is 1 less the power
of the orthonormal regressors at that frequency. With c for :math:`\cos l \omega` and sums over frequencies,

.. math::
    g_l &= \sum h S c_l / \sum h S \\
    J_{li} &= \partial g_l / \partial \rho_i = \sum h S (c_l - g_l) \frac{\partial \log S}{\partial \rho_i} / \sum h S \\
    C_{lm} &= 2 \sum (h S)^2 (c_l - g_l) (c_m - g_m) / (\sum h S)^2

are the expectation of the autocorrelation of residuals, its slope, and its covariance (the delta method for quotients of
sums of independent terms; without a design this is the formula of Bartlett 1946, Supplement to the Journal of the Royal
Statistical Society 8:27-41). The coefficients that solve for what is observed then have the covariance
:math:`J^{-1} C J'^{-1}`. Next to the bounds J is nearly singular; but no coefficient is less certain than one that may be
anything between -1 and 1, so that the inverse covariance is :math:`J' C^{-1} J + 3 I`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.fft import fft

from chunkglm.kernels.autocorrelation import lag_expectations

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from chunkglm.kernels.basis import Basis

    Floats = NDArray[np.float64]

LEAST_INFORMATION = 3.0
"""Of a coefficient: 1 over the variance of an even distribution between -1 and 1."""

RIDGE = 1e-9
"""Part of the variance of all observed autocorrelations that is added to each."""


class Frequencies(NamedTuple):
    """What a design leaves of each frequency.

    Attributes
    ----------
    left : ndarray, shape (T,)
        h, at the frequencies pi (f + 1/2) / T.
    cosine, sine : ndarray, shape (N, T)
        Of the lags 1 to N.
    exact : ndarray, shape (N,)
        The exact slope of each lag at white noise, as part of that of the formula: fewer pairs of volumes across gaps.
    """

    left: Floats
    cosine: Floats
    sine: Floats
    exact: Floats


def make_frequencies(basis: Basis) -> Frequencies:
    """Find what a design leaves of each frequency.

    Parameters
    ----------
    basis : Basis
        Of order N.

    Returns
    -------
    Frequencies
    """
    n, N, r = basis.rows.shape[1], basis.order, basis.rank
    half = np.exp(-0.5j * np.pi * np.arange(n) / n)
    power = (np.abs(fft(basis.rows[:r] * half, 2 * n)[:, :n]) ** 2).sum(axis=0)
    angle = np.multiply.outer(np.arange(1, N + 1), np.pi * (np.arange(n) + 0.5) / n)
    left, cosine = (basis.n_kept - power) / n, np.cos(angle)
    G = lag_expectations(basis)
    exact = (np.diagonal(G)[1:] - G[1:, 0] / G[0, 0] * G[0, 1 : N + 1]) / G[0, 0]
    formula = 2 * (cosine**2 @ left / left.sum() - (cosine @ left / left.sum()) ** 2)
    return Frequencies(left, cosine, np.sin(angle), exact / formula)


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def coefficient_covariance(rho: Floats, frequencies: Frequencies) -> tuple[Floats, Floats]:
    """Compute the covariance of estimated coefficients, and what they do to the residual variance.

    Parameters
    ----------
    rho : ndarray, shape (N, V)
    frequencies : Frequencies

    Returns
    -------
    covariance : ndarray, shape (V, N, N)
        NaN where ``rho`` is.
    slope : ndarray, shape (N, V)
        Derivative of the logarithm of the expected residual variance with respect to the coefficients that are used.
    """
    h, cosine, sine, exact = frequencies
    real, imaginary = 1 - cosine.T @ rho, sine.T @ rho
    S = 1 / (real**2 + imaginary**2)
    # (lag, frequency, voxel)
    of_log_S = 2 * S * (cosine[:, :, None] * real - sine[:, :, None] * imaginary)
    hS = h[:, None] * S
    total = hS.sum(axis=0)
    centred = cosine[:, :, None] - (cosine @ hS / total)[:, None]
    J = np.einsum("lfv,ifv->vli", centred * hS, of_log_S) / total[:, None, None] * exact[:, None]
    weighted = centred * hS
    C = 2 * np.einsum("lfv,mfv->vlm", weighted, weighted) / (total**2)[:, None, None]
    # Where one frequency has all the power, lags say the same, and C is singular.
    C += RIDGE * np.einsum("vll->v", C)[:, None, None] * np.eye(len(rho))
    slope = -np.einsum("f,ifv->iv", h, of_log_S) / h.sum()
    finite = np.isfinite(C).all(axis=(1, 2)) & np.isfinite(J).all(axis=(1, 2))
    unit = np.eye(len(rho))
    C, J = (np.where(finite[:, None, None], values, unit) for values in (C, J))
    information = np.einsum("vli,vlj->vij", J, np.linalg.solve(C, J))
    values, vectors = np.linalg.eigh(information)
    # What rounding makes of an eigenvalue next to 0 is not to make a variance negative.
    covariance = np.einsum(
        "vik,vk,vjk->vij", vectors, 1 / (np.maximum(values, 0) + LEAST_INFORMATION), vectors
    )
    covariance = np.where(finite[:, None, None], covariance, np.nan)
    return covariance, slope
