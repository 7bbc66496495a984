"""Fitting runs while they are converted.

The sums of every voxel block are taken as its volumes come by, in the order and in the pieces in which they would be read
from the store: the estimates are those of a fit from the store to the last bit.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkglm import plan
from chunkglm.blocks import Rows, as_blocks, blank, nothing, scatter, single_blas_thread
from chunkglm.glm import FIT_DIMS, assemble, estimates_of, rows_of
from chunkglm.kernels.glm import fit_sums
from chunkglm.kernels.sums import Accumulator
from chunkglm.schema import SPACE
from chunkglm.store import chunk_shapes, savable

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from chunkglm.glm import FitPlan
    from chunkglm.plan import Place
    from chunkglm.store import StoreWriter


def spatial_chunks(fit_plan: FitPlan) -> tuple[tuple[int, ...], ...] | None:
    """Chunks along z, y, x that all runs have; None if they have not the same, or the runs are not fitted as they come.

    They are not where a mean of the run is needed first, or volumes are dropped.
    """
    found = {as_blocks(one.run["bold"]).data.chunks[1:] for one in fit_plan.runs}
    one_pass = all(one.model.scaling != "run" and not one.drops for one in fit_plan.runs)
    return found.pop() if one_pass and len(found) == 1 else None


def create_fit(writer: StoreWriter, fit_plan: FitPlan, chunks: tuple[tuple[int, ...], ...]) -> None:
    """Write everything of a fit but what is estimated at voxels.

    Parameters
    ----------
    writer : StoreWriter
    fit_plan : FitPlan
    chunks : tuple of tuple of int
        Along z, y, x.
    """
    ds: xr.Dataset = savable(assemble(fit_plan, blank(fit_plan.n_rows, len(fit_plan.runs), chunks)))
    writer.create(ds, chunk_shapes(ds))


class StreamedRun:
    """One run of a fit, whose blocks come in while it is converted.

    Parameters
    ----------
    fit_plan : FitPlan
    number : int
        Of the run.
    chunks : tuple of tuple of int
        Along z, y, x.
    """

    def __init__(self, fit_plan: FitPlan, number: int, chunks: tuple[tuple[int, ...], ...]) -> None:
        self._fit_plan, self._number = fit_plan, number
        self._plan = one = fit_plan.runs[number]
        z, y, x = (sum(sizes) for sizes in chunks)
        lengths = plan.Chunks(1, *(sizes[0] for sizes in chunks))
        self._places = plan.voxel_blocks((z, y, x), lengths)
        self._mask: NDArray[np.bool_] = one.mask.transpose(*SPACE).to_numpy()
        self._sums = [self._accumulator(place) for place in self._places]

    def _accumulator(self, place: Place) -> Accumulator | None:
        voxels = np.flatnonzero(self._mask[place])
        model = self._plan.model
        return Accumulator(model.basis, voxels, finite=model.reference_rules) if voxels.size else None

    def add(self, number: int, block: NDArray[Any]) -> None:
        """Add the next volumes (n, z, y, x) of a voxel block, numbered as :func:`chunkglm.plan.voxel_blocks` does."""
        sums = self._sums[number]
        if sums is not None:
            sums.add(block)

    def write(self, writer: StoreWriter, content: str, n_threads: int) -> None:
        """Estimate, and write what was estimated, once all volumes were added.

        Parameters
        ----------
        writer : StoreWriter
        content : str
            Hash of everything that the estimates are made of.
        n_threads : int
        """
        writer.claim(self._number, content, (*FIT_DIMS, "mask"))
        with single_blas_thread(), ThreadPoolExecutor(n_threads) as pool:
            for _ in pool.map(lambda number: self._write_block(writer, number), range(len(self._places))):
                pass

    def _write_block(self, writer: StoreWriter, number: int) -> None:
        place = self._places[number]
        starts = tuple(part.start for part in place)
        rows = Rows(self._rows(number)[:, None], ("run", *SPACE), self._fit_plan.n_rows)
        values = {name: one.values for name, one in estimates_of(rows, self._fit_plan).items()}
        values["mask"] = self._mask[place][None]
        for name, one in values.items():
            writer.write_block(name, (self._number, *[0] * (one.ndim - 4), *starts), one)

    def _rows(self, number: int) -> NDArray[np.float64]:
        """Estimates of a voxel block, (rows, z, y, x); its sums are used up."""
        sums, self._sums[number] = self._sums[number], None
        mask, n_rows = self._mask[self._places[number]], self._fit_plan.n_rows
        if sums is None:
            return nothing(n_rows, mask.shape)
        estimates = fit_sums(sums.sums(), self._plan.model)
        return scatter(rows_of(estimates, self._plan.columns, self._fit_plan.n_lags), mask)
