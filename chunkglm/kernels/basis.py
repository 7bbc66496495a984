r"""A design matrix as its column space: an orthonormal basis in which products at lag 1 are diagonal.

Censored volumes are rows of zeros in that basis, as they are in the data: every product over time is then one over the
kept volumes, and every product at a lag one over pairs of them.

What the noise model of order N needs besides are the places where the precision matrix of the noise is not that of an
endless gapless recording (see :mod:`chunkglm.kernels.precision`): the end of the run, and the gaps.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.intp]

SPANNED = 1e-12
"""A constant is spanned by a design that leaves less than this part of it."""


class Edge(NamedTuple):
    """A gap, or the end of the run, and the kept volumes about it: all M places of the run that look alike.

    Attributes
    ----------
    censored : tuple of int
        Offsets of the censored volumes of the gap from the first of them; empty for the end of the run.
    neighbours : tuple of int, length n
        Offsets of the kept volumes within the order of the model from any of them; at the end of the run, from
        the last kept volume (0, -1, ...).
    to_end : int or None
        Offset of the last kept volume of the run, where it is so near that it matters.
    samples : ndarray, shape (M, n)
        Where the neighbours are among ``Basis.near``.
    """

    censored: tuple[int, ...]
    neighbours: tuple[int, ...]
    to_end: int | None
    samples: Indices


class Basis(NamedTuple):
    """Everything that fitting and contrasts need of a design matrix, at noise models of up to order N.

    Attributes
    ----------
    rows : ndarray, shape ((N + 1) r + 1 + N, T)
        What the data is multiplied by: Q'; Q'(S^k + S'^k) for each lag k; an indicator of the kept volumes; the same
        shifted, (S^k + S'^k). Zero at censored volumes.
    totals : ndarray, shape ((N + 1) r + 1 + N,)
        Sums of ``rows`` over time: what they give for a constant.
    cross : ndarray, shape (N, r, r)
        Q'(S^k + S'^k)Q; diagonal at lag 1.
    kept : ndarray of bool, shape (T,)
        Volumes that are not censored.
    near : ndarray of int, shape (n_near,)
        The kept volumes about gaps and the end.
    near_rows : ndarray, shape (n_near, r)
        Rows of Q there.
    edges : tuple of Edge
    table : ndarray, shape (r * r, F)
        What the features of a precision matrix (its diagonals, and its entries at edges) are multiplied by to give
        the normal matrix.
    to_beta : ndarray, shape (P, r)
        From coordinates in Q to regression coefficients; where r < P, to those of least norm in units of the
        largest entry of each column.
    spans_constant : bool
        Whether a constant signal is fitted exactly.
    """

    rows: Floats
    totals: Floats
    cross: Floats
    kept: NDArray[np.bool_]
    near: Indices
    near_rows: Floats
    edges: tuple[Edge, ...]
    table: Floats
    to_beta: Floats
    spans_constant: bool

    @property
    def rank(self) -> int:
        """Rank r of the design."""
        return int(self.to_beta.shape[1])

    @property
    def order(self) -> int:
        """Largest order N of the noise model."""
        return len(self.cross)

    @property
    def n_kept(self) -> int:
        """Number of volumes that are not censored."""
        return int(self.kept.sum())

    @property
    def gapless(self) -> bool:
        """Whether the run has no edge but its end."""
        return all(not edge.censored for edge in self.edges)


def make_basis(design: Floats, kept: NDArray[np.bool_] | None = None, *, order: int = 1) -> Basis:
    """Decompose a design matrix.

    Parameters
    ----------
    design : ndarray, shape (T, P), float64
    kept : ndarray of bool, shape (T,), optional
        Volumes that are not censored, at least one; all by default.
    order : int
        Order N of the autoregressive noise, 0 for ordinary least squares.

    Returns
    -------
    Basis
    """
    kept = np.ones(len(design), dtype=bool) if kept is None else kept
    used = design[kept]
    # Units of regressors differ by many orders of magnitude, which must not decide on the rank.
    peak = np.abs(used).max(axis=0)
    peak[peak == 0] = 1.0
    U, s, Vt = np.linalg.svd(used / peak, full_matrices=False)
    rank = int((s > s[0] * max(used.shape) * np.finfo(np.float64).eps).sum())
    to_beta = (Vt[:rank].T / s[:rank]) / peak[:, None]
    Q = np.zeros((len(design), rank))
    Q[kept] = U[:, :rank]
    if order:
        cross = Q.T @ shift_both(Q, 1)
        _, R = np.linalg.eigh((cross + cross.T) / 2)
        Q, to_beta = Q @ R, to_beta @ R
    indicator = kept.astype(np.float64)
    lags = range(1, order + 1)
    rows = np.vstack(
        [
            Q.T,
            *(shift_both(Q, k).T for k in lags),
            indicator,
            *(shift_both(indicator[:, None], k).T for k in lags),
        ]
    )
    rows[:, ~kept] = 0
    unfitted = indicator - Q @ (Q.T @ indicator)
    cross = np.array([Q.T @ shift_both(Q, k) for k in lags]).reshape(order, rank, rank)
    cross = (cross + cross.transpose(0, 2, 1)) / 2
    near, edges = _edges(kept, order)
    return Basis(
        rows=rows,
        totals=rows.sum(axis=1),
        cross=cross,
        kept=kept,
        near=near,
        near_rows=Q[near],
        edges=edges,
        table=_table(Q, cross, near, edges),
        to_beta=to_beta,
        spans_constant=bool(np.linalg.norm(unfitted) < SPANNED * np.sqrt(len(used))),
    )


def shift_both(Z: Floats, lag: int) -> Floats:
    """Add the rows before and behind: (S^lag + S'^lag) Z."""
    out = np.zeros_like(Z)
    out[lag:] += Z[:-lag]
    out[:-lag] += Z[lag:]
    return out


def _edges(kept: NDArray[np.bool_], order: int) -> tuple[Indices, tuple[Edge, ...]]:
    """The end and the gaps of a run, those that look alike together, and the kept volumes about them."""
    if order == 0:
        return np.empty(0, dtype=np.intp), ()
    last = int(np.flatnonzero(kept)[-1])
    # What was censored behind the last kept volume has no influence on the model of those before it.
    censored = np.flatnonzero(~kept[:last])
    gaps = np.split(censored, np.flatnonzero(np.diff(censored) > order) + 1) if censored.size else []
    places: dict[tuple[tuple[int, ...], tuple[int, ...], int | None], list[Indices]] = defaultdict(list)
    tail = np.array([last - j for j in range(order) if last >= j and kept[last - j]])
    places[(), tuple(int(t) for t in tail - last), 0].append(tail)
    for gap in gaps:
        about = np.unique(np.add.outer(gap, np.arange(-order, order + 1)))
        about = about[(about >= 0) & (about <= last)]
        about = about[kept[about]]
        to_end = last - int(gap[0]) if gap[-1] > last - order else None
        alike = (tuple(int(t) for t in gap - gap[0]), tuple(int(t) for t in about - gap[0]), to_end)
        places[alike].append(about)
    near = np.unique(np.concatenate([about for found in places.values() for about in found]))
    edges = (Edge(*alike, np.searchsorted(near, np.stack(found))) for alike, found in places.items())
    return near, tuple(edges)


def _table(Q: Floats, cross: Floats, near: Indices, edges: tuple[Edge, ...]) -> Floats:
    """Normal matrices, flat, of each feature of the precision matrix alone."""
    r = Q.shape[1]
    columns = [np.eye(r), *cross]
    for edge in edges:
        q = Q[near[edge.samples]]
        for i in range(q.shape[1]):
            for j in range(i + 1):
                product = q[:, i].T @ q[:, j]
                columns.append(-product if i == j else -product - product.T)
    return np.stack(columns, axis=-1).reshape(r * r, len(columns))


def reference_rank(design: Floats) -> int:
    """Find the rank by the reference's rule: singular values above ``eps`` times the sum of all absolute entries.

    Source: nilearn 0.14.1, ``OLSModel.df_resid``.
    """
    tolerance = np.abs(design).sum() * np.finfo(np.float64).eps
    return int((np.linalg.svd(design, compute_uv=False) > tolerance).sum())
