"""A design matrix as its column space: an orthonormal basis in which lag products are diagonal."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

SPANNED = 1e-12
"""A constant is spanned by a design that leaves less than this part of it."""


class Basis(NamedTuple):
    """Everything that fitting and contrasts need of a design matrix.

    Attributes
    ----------
    rows : ndarray, shape (2 r + 1, T)
        Q', Q'(S + S') and a row of ones: what the data is multiplied by.
    totals : ndarray, shape (2 r + 1,)
        Sums of ``rows`` over time: what they give for a constant.
    lag : ndarray, shape (r,)
        The diagonal of Q'(S + S')Q.
    last : ndarray, shape (r,)
        The last row of Q.
    to_beta : ndarray, shape (P, r)
        From coordinates in Q to regression coefficients; where r < P, to those of least norm in units of the
        largest entry of each column.
    spans_constant : bool
        Whether a constant signal is fitted exactly.
    """

    rows: Floats
    totals: Floats
    lag: Floats
    last: Floats
    to_beta: Floats
    spans_constant: bool

    @property
    def rank(self) -> int:
        """Rank r of the design."""
        return len(self.lag)


def make_basis(design: Floats) -> Basis:
    """Decompose a design matrix.

    Parameters
    ----------
    design : ndarray, shape (T, P), float64

    Returns
    -------
    Basis
    """
    # Units of regressors differ by many orders of magnitude, which must not decide on the rank.
    peak = np.abs(design).max(axis=0)
    peak[peak == 0] = 1.0
    U, s, Vt = np.linalg.svd(design / peak, full_matrices=False)
    rank = int((s > s[0] * max(design.shape) * np.finfo(np.float64).eps).sum())
    U, s, Vt = U[:, :rank], s[:rank], Vt[:rank]
    cross = U.T @ _shift_both(U)
    lag, R = np.linalg.eigh((cross + cross.T) / 2)
    Q = U @ R
    constant = np.ones(len(Q))
    rows = np.ascontiguousarray(np.vstack([Q.T, _shift_both(Q).T, constant]))
    unfitted = constant - Q @ (Q.T @ constant)
    return Basis(
        rows=rows,
        totals=rows.sum(axis=1),
        lag=lag,
        last=Q[-1].copy(),
        to_beta=(Vt.T / s) @ R / peak[:, None],
        spans_constant=bool(np.linalg.norm(unfitted) < SPANNED * np.sqrt(len(Q))),
    )


def _shift_both(Z: Floats) -> Floats:
    """(S + S') Z."""
    out = np.zeros_like(Z)
    out[1:] += Z[:-1]
    out[:-1] += Z[1:]
    return out


def reference_rank(design: Floats) -> int:
    """Find the rank by the reference's rule: singular values above ``eps`` times the sum of all absolute entries.

    Source: nilearn 0.14.1, ``OLSModel.df_resid``.
    """
    tolerance = np.abs(design).sum() * np.finfo(np.float64).eps
    return int((np.linalg.svd(design, compute_uv=False) > tolerance).sum())
