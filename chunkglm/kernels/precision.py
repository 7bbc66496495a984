r"""The precision matrix of autoregressive noise, with gaps, and what least squares needs of it.

Noise of order N is :math:`W n = w` with w white and :math:`W = I - \sum_i \rho_i S^i`, S the shift down by one sample with
a first row of zeros: the first samples are filtered by as much as there is before them. Its precision matrix
:math:`A = W'W` is, but for the last N samples, that of an endless recording,

.. math:: A = g_0 I + \sum_{k=1}^N g_k (S^k + S'^k) - \text{(at the end)}, \qquad g_k = \sum_i a_i a_{i+k},

with :math:`a = (1, -\rho_1, \dots, -\rho_N)`; the rows that would follow the last one take off
:math:`\sum_{m=1}^N a_{m+i} a_{m+j}` at the samples i and j before it.

Censored samples c are taken out of the covariance, not of the precision matrix: of the kept samples k,

.. math:: (V_{kk})^{-1} = A_{kk} - A_{kc} A_{cc}^{-1} A_{ck}

(the inverse of a block of an inverse), which is what a regressor for each censored sample does. As A reaches N samples
far, gaps that are further apart have nothing to do with each other, and the second term is a small matrix at the kept
samples about each gap. So the precision matrix has a few *features*: its diagonals g, and its entries at each kind of
edge. All that is quadratic in the data or the design is a sum of a few products, one for each feature, that are
accumulated once and weighted by every voxel's own features.

The normal equations are solved by Cholesky factors, column by column for many voxels at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from chunkglm.kernels.basis import Basis, Edge

    Floats = NDArray[np.float64]


class Precision(NamedTuple):
    """Features of the precision matrix of the kept samples, at V voxels.

    Attributes
    ----------
    diagonals : ndarray, shape (N + 1, V)
        g.
    edges : list of ndarray, shape (n, n, V)
        For each edge of the basis what is taken off at its n neighbours.
    """

    diagonals: Floats
    edges: list[Floats]


def make_precision(basis: Basis, rho: Floats) -> Precision:
    """Compute the features for the coefficients of each voxel.

    Parameters
    ----------
    basis : Basis
    rho : ndarray, shape (N, V)

    Returns
    -------
    Precision
    """
    order, V = rho.shape
    a = np.concatenate([np.ones((1, V)), -rho])
    g = np.stack([(a[: order + 1 - k] * a[k:]).sum(axis=0) for k in range(order + 1)])
    H = np.zeros((order, order, V))
    for m in range(1, order + 1):
        H[: order + 1 - m, : order + 1 - m] += a[m:, None] * a[None, m:]
    return Precision(g, [_at_edge(edge, g, H) for edge in basis.edges])


def _at_edge(edge: Edge, g: Floats, H: Floats) -> Floats:
    order, V = H.shape[1:]
    if not edge.censored:
        back = [-offset for offset in edge.neighbours]
        return H[np.ix_(back, back)]
    places = (*edge.censored, *edge.neighbours)
    c = len(edge.censored)
    # A_cc with A_kc below it.
    block = np.zeros((len(places), c, V))
    for column, j in enumerate(edge.censored):
        for row, i in enumerate(places):
            if abs(i - j) <= order:
                block[row, column] = g[abs(i - j)]
                if edge.to_end is not None and edge.to_end - min(i, j) < order:
                    block[row, column] -= H[edge.to_end - i, edge.to_end - j]
    factor = factorise(block)[c:]
    weights: Floats = np.einsum("ikv,jkv->ijv", factor, factor)
    return weights


def normal_matrix(basis: Basis, precision: Precision) -> Floats:
    """Q' V^-1 Q of each voxel, shape (r, r, V)."""
    features = [precision.diagonals]
    for weights in precision.edges:
        n = len(weights)
        features += [weights[i, : i + 1] for i in range(n)]
    out: Floats = (basis.table @ np.concatenate(features)).reshape(basis.rank, basis.rank, -1)
    return out


def right_hand_side(basis: Basis, precision: Precision, products: Floats, near: Floats) -> Floats:
    """Q' V^-1 y of each voxel, shape (r, V).

    Parameters
    ----------
    basis : Basis
    precision : Precision
    products : ndarray, shape (N + 1, r, V)
        Q'y and Q'(S^k + S'^k)y.
    near : ndarray, shape (n_near, V)
        The samples about edges.
    """
    out: Floats = np.einsum("kv,krv->rv", precision.diagonals, products)
    for edge, weights in zip(basis.edges, precision.edges, strict=True):
        weighted = np.einsum("ijv,mjv->miv", weights, near[edge.samples])
        q = basis.near_rows[edge.samples]
        out -= q.reshape(-1, basis.rank).T @ weighted.reshape(-1, weighted.shape[-1])
    return out


def quadratic_form(
    basis: Basis, precision: Precision, squares: Floats, lagged: Floats, near: Floats
) -> Floats:
    """Quadratic form y' V^-1 y of each voxel, shape (V,).

    Parameters
    ----------
    basis : Basis
    precision : Precision
    squares : ndarray, shape (V,)
        Sum of squares.
    lagged : ndarray, shape (N, V)
        Sums of products at each lag.
    near : ndarray, shape (n_near, V)
        The samples about edges.
    """
    out: Floats = precision.diagonals[0] * squares + 2 * (precision.diagonals[1:] * lagged).sum(axis=0)
    for edge, weights in zip(basis.edges, precision.edges, strict=True):
        y = near[edge.samples]
        out -= np.einsum("ijv,miv,mjv->v", weights, y, y, optimize=["einsum_path", (0, 1), (0, 1)])
    return out


def factorise(block: Floats) -> Floats:
    """Cholesky factors of many symmetric matrices, and the forward substitution of rows below them.

    Parameters
    ----------
    block : ndarray, shape (p + q, p, ...)
        Matrices M (p, p), of which the lower triangle is read, and rows B (q, p) below them. Overwritten.

    Returns
    -------
    ndarray, shape (p + q, p, ...)
        ``block``: L with M = LL' (what is above its diagonal means nothing), and B L'^-1 below. NaN where M is
        not positive definite.
    """
    for j in range(block.shape[1]):
        column = block[j:, j]
        if j:
            column -= np.einsum("ik...,k...->i...", block[j:, :j], block[j, :j])
        column /= np.sqrt(column[0])
    return block


def substitute_back(factor: Floats, rhs: Floats) -> Floats:
    """Solve L' x = rhs for each voxel.

    Parameters
    ----------
    factor : ndarray, shape (p or more, p, V)
        From :func:`factorise`.
    rhs : ndarray, shape (p, V)

    Returns
    -------
    ndarray, shape (p, V)
    """
    x = rhs.copy()
    for j in range(len(x) - 1, -1, -1):
        x[j] -= np.einsum("iv,iv->v", factor[j + 1 : len(x), j], x[j + 1 :])
        x[j] /= factor[j, j]
    return x


def invert(matrix: Floats) -> Floats:
    """Inverses of many symmetric matrices, shape (p, p, ...); NaN where they are not positive definite."""
    p = len(matrix)
    unit = np.broadcast_to(np.eye(p).reshape(p, p, *(1,) * (matrix.ndim - 2)), matrix.shape)
    below = factorise(np.concatenate([matrix, unit]))[p:]
    out: Floats = np.einsum("ik...,jk...->ij...", below, below)
    return out
