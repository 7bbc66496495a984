r"""The autocorrelation of the noise from that of the residuals, which carry a bias.

Fitting removes r dimensions from the noise, and slow ones first: residuals are less correlated than the noise was.
With R = I - QQ' the matrix that forms residuals, :math:`D_1 = (S + S') / 2` and V the correlation matrix of the noise,

.. math:: E[e'e] \propto tr(RV), \qquad E[\sum_t e_t e_{t+1}] = E[e'D_1e] \propto tr(R D_1 R V),

so that for AR(1) noise, :math:`V_{ij} = \rho^{|i-j|}`, the observed lag-1 autocorrelation :math:`r_1/r_0` is expected at

.. math:: g(\rho) = \frac{tr(R D_1 R V(\rho))}{tr(R V(\rho))}.

The estimate is the :math:`\rho` at which g equals what is observed. This is exact in the traces where the correction of
Worsley et al. (2002, NeuroImage 15:1-15) is linear in the autocorrelations of a few lags. With few volumes and many
regressors g stops rising at some :math:`\rho`; beyond it the residuals no longer tell the noise, and the table ends there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.polynomial.polynomial import polyval
from scipy.fft import irfft, rfft

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from chunkglm.kernels.basis import Basis

    Floats = NDArray[np.float64]

LARGEST = 0.99
"""Coefficients are tabulated up to this absolute value."""

STEP = 0.0025
"""Between tabulated coefficients; linear interpolation is then good to 1e-5, and near the ends to 5e-5."""


class Correction(NamedTuple):
    """A table from observed autocorrelation to coefficient.

    Attributes
    ----------
    observed : ndarray, shape (n,)
        Expected r1 / r0 of the residuals, rising.
    coefficient : ndarray, shape (n,)
        The AR(1) coefficient of the noise that it is expected for, rising.
    """

    observed: Floats
    coefficient: Floats

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest coefficient of the table."""
        return float(self.coefficient[0]), float(self.coefficient[-1])


def expected_lag1(basis: Basis, rho: Floats) -> Floats:
    r"""Ratio of the expectations of r1 and r0 of the residuals of AR(1) noise: g of the module's docstring.

    Parameters
    ----------
    basis : Basis
        Of the design, r regressors and T volumes.
    rho : ndarray, shape (n,)
        Coefficients of the noise, between -1 and 1.

    Returns
    -------
    ndarray, shape (n,)

    Notes
    -----
    In the coordinates of Q, :math:`Q'D_1Q = \Lambda / 2` is diagonal, and

    .. math::
        tr(RV) &= T - \sum_i (Q'VQ)_{ii} \\
        tr(R D_1 R V) &= (T - 1) \rho - 2 tr(Q'D_1VQ) + \sum_i l_i (Q'VQ)_{ii} / 2.

    Each of these sums is one over lags, :math:`\sum_k \rho^{|k|} s_k`, whose :math:`s_k` are correlations of the columns of Q
    and D_1 Q: they are found once, by fast Fourier transform, in O(r T log T).
    """
    r, n = basis.rank, basis.rows.shape[1]
    Q, D1Q = basis.rows[:r], basis.rows[r : 2 * r] / 2
    of_Q, of_D1Q = rfft(Q, 2 * n), rfft(D1Q, 2 * n)
    power = np.abs(of_Q) ** 2
    spectra = np.stack([power.sum(axis=0), basis.lag @ power, (of_D1Q.conj() * of_Q).sum(axis=0)])
    correlations = irfft(spectra, 2 * n)
    sums = correlations[:, :n].copy()
    sums[:, 1:] += correlations[:, :n:-1]
    # By Horner's rule, lag by lag: no table of powers is held.
    inner, weighted, lagged = (polyval(rho, one) for one in sums)
    expected: Floats = ((n - 1) * rho - 2 * lagged + weighted / 2) / (n - inner)
    return expected


def make_correction(basis: Basis) -> Correction:
    """Tabulate g for one design, as far as it rises on both sides of 0.

    Parameters
    ----------
    basis : Basis

    Returns
    -------
    Correction
    """
    half = np.round(np.arange(STEP, LARGEST + STEP / 2, STEP), 4)
    coefficient = np.concatenate([-half[::-1], [0.0], half])
    observed = expected_lag1(basis, coefficient)
    middle = len(half)
    falls = np.flatnonzero(np.diff(observed) <= 0)
    first = int(falls[falls < middle].max(initial=-1)) + 1
    last = int(falls[falls >= middle].min(initial=len(coefficient) - 1))
    return Correction(observed[first : last + 1], coefficient[first : last + 1])


def corrected(observed: Floats, correction: Correction) -> Floats:
    """Read the table at what was observed.

    Parameters
    ----------
    observed : ndarray, shape (V,)
        r1 / r0 of each voxel.
    correction : Correction

    Returns
    -------
    ndarray, shape (V,)
        The coefficient of the noise; beyond the table its last one; NaN where ``observed`` is.
    """
    rho: Floats = np.interp(observed, correction.observed, correction.coefficient)
    return rho
