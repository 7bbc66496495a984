"""From NIfTI to a run store, in one pass over the file and within bounded memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from chunkglm import grids, nifti, plan
from chunkglm import store as stores
from chunkglm.errors import InputError, MaskError
from chunkglm.kernels.masking import epi_mask
from chunkglm.kernels.smoothing import sigma_voxels, smooth_volume
from chunkglm.schema import NUMERICAL_VERSION, RUN, SPACE, annotate

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from numpy.typing import NDArray

    from chunkglm.nifti import ImageLike, RunReader
    from chunkglm.store import StoreLike, StoreWriter

SHORTEST_T_R, LONGEST_T_R = 0.01, 60.0
"""Seconds; a repetition time outside them in a header is more likely one with the wrong unit."""


def convert(
    source: ImageLike,
    store: StoreLike,
    *,
    mask: ImageLike | xr.DataArray | None = None,
    t_r: float | None = None,
    smoothing_fwhm: float | None = None,
    memory: int | str = "1GiB",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Convert a NIfTI run to a run store.

    The file is read once, in blocks of volumes. The store holds its values exactly, in the file's dtype, unless
    ``smoothing_fwhm`` is given; then it holds the smoothed values as float32. The mask is found in, or applied
    to, and the mean image is taken of, the unsmoothed signal.

    Parameters
    ----------
    source : path, URL or nibabel image
        4-D NIfTI-1 or NIfTI-2: ``.nii``, ``.nii.gz``, or a ``.hdr``/``.img`` pair; any real dtype and byte order.
    store : path or URL
        Where the store will be. In a folder named ``*.zarr`` it becomes part of a study (see
        :func:`chunkglm.open_study`) if it is called ``run-<label>``.
    mask : path, nibabel image or DataArray, optional
        Voxels to fit, on the grid of the run. Without it the brain is found in the temporal mean.
    t_r : float, optional
        Repetition time in seconds; needed where the header has none, and wins over the header.
    smoothing_fwhm : float, optional
        Full width at half maximum of a Gaussian kernel, in mm.
    memory : int or str
        What may be used besides the interpreter and its imports, such as ``"512MiB"``.
    overwrite : bool
        Replace an existing store.
    progress : callable, optional
        Called with the number of finished volumes and of all volumes.

    Returns
    -------
    Dataset
        The run, opened from the store.

    Raises
    ------
    NiftiError, SourceNotFoundError, MaskError, GridMismatchError, InputError
        If something about the input cannot be right.
    MemoryBudgetError
        If ``memory`` is too little.
    StoreExistsError, StoreError
        If the store cannot be written.

    Notes
    -----
    Smoothing is by a Gaussian of standard deviation ``fwhm / sqrt(8 ln 2)`` along each axis of the grid, cut at four of
    them, with the volume reflected at its edges (``scipy.ndimage.gaussian_filter1d``). Without a mask, the brain is found
    by the histogram of the temporal mean, as in nilearn 0.14.1 (``compute_epi_mask``): see :mod:`chunkglm.kernels.masking`.
    """
    if smoothing_fwhm is not None and not (np.isfinite(smoothing_fwhm) and smoothing_fwhm > 0):
        raise InputError(
            f"The smoothing width is {smoothing_fwhm} mm; it must be positive. Leave it out for no smoothing."
        )
    stores.check_free(store, overwrite=overwrite)
    with nifti.open_reader(source) as reader:
        repetition_time = _repetition_time(reader, t_r)
        grid = grids.Grid(reader.shape[1:], reader.header.affine)
        given_mask = None if mask is None else nifti.read_mask(mask, grid, reader.name)
        n_threads = _threads(reader, memory, smooth=smoothing_fwhm is not None)
        chunks = plan.bold_chunks(reader.shape, _stored_dtype(reader, smoothing_fwhm).itemsize)
        template = _template(reader, repetition_time, smoothing_fwhm, chunks)
        with stores.writing(store, overwrite=overwrite) as writer, ThreadPoolExecutor(n_threads) as pool:
            shapes = {"bold": tuple(chunks), "mask": grid.shape, "mean_image": grid.shape}
            writer.create(stores.savable(template), shapes)
            process = _smoother(reader, smoothing_fwhm, chunks.time, pool)
            mean = _stream(reader, writer, chunks, process, pool=pool, progress=progress)
            found = epi_mask(mean) if given_mask is None else given_mask
            if not found.any():
                raise MaskError(
                    f"No brain was found in {reader.name}: the temporal mean has no clear gap between background "
                    "and brain. Give a mask (mask= or --mask)."
                )
            writer.array("mask")[...] = found
            with np.errstate(over="ignore"):
                writer.array("mean_image")[...] = mean.astype(np.float32)
            writer.finish(
                {
                    "source_name": reader.file_name,
                    "source_size": reader.size,
                    "source_sha256": reader.sha256,
                    "mask_source": "epi" if mask is None else "given",
                }
            )
    return stores.open_run(store)


def _repetition_time(reader: RunReader, given: float | None) -> float:
    t_r = reader.header.t_r if given is None else given
    if t_r is None:
        raise InputError(
            f"{reader.name} has no repetition time in its header. Give it in seconds: t_r= or --t-r."
        )
    if not (np.isfinite(t_r) and t_r > 0):
        raise InputError(f"The repetition time is {t_r} s; it must be positive.")
    if given is None and not SHORTEST_T_R <= t_r <= LONGEST_T_R:
        raise InputError(
            f"{reader.name} has a repetition time of {t_r:g} s in its header, which is hardly meant. Give it in "
            "seconds: t_r= or --t-r."
        )
    return float(t_r)


def _stored_dtype(reader: RunReader, fwhm: float | None) -> np.dtype[Any]:
    return np.dtype(np.float32) if fwhm is not None else reader.header.dtype.newbyteorder("=")


def _threads(reader: RunReader, memory: int | str, *, smooth: bool) -> int:
    def needed(n: int) -> int:
        itemsize = reader.header.dtype.itemsize
        return plan.convert_memory(reader.shape, itemsize, 4 if smooth else itemsize, n, smooth=smooth)

    what = f"Converting {reader.name}"
    return plan.most_threads(plan.parse_memory(memory), needed, plan.available_cpus(), what)


def _template(reader: RunReader, t_r: float, fwhm: float | None, chunks: plan.Chunks) -> xr.Dataset:
    """Make the store's metadata: everything but the values of bold, mask and mean image."""
    import dask.array as da  # noqa: PLC0415  (placeholders of arrays that are written block by block)

    header, (n_time, *volume) = reader.header, reader.shape
    bold = xr.Variable(
        ("time", *SPACE), da.zeros(reader.shape, dtype=_stored_dtype(reader, fwhm), chunks=chunks)
    )
    if header.scaled and fwhm is None:
        bold.encoding = {
            "dtype": bold.dtype,
            "scale_factor": header.slope,
            "add_offset": header.intercept,
        }
    ds = xr.Dataset(
        {
            "bold": bold,
            "mask": xr.Variable(SPACE, da.zeros(tuple(volume), dtype=bool, chunks=-1)),
            "mean_image": xr.Variable(SPACE, da.zeros(tuple(volume), dtype=np.float32, chunks=-1)),
        },
        coords=grids.grid_coords(header.affine, volume, header.raw),
        attrs={
            "kind": "run",
            "repetition_time": t_r,
            "processing": _processing(fwhm),
            "numerical_version": NUMERICAL_VERSION,
        },
    )
    ds = ds.assign_coords(time=("time", t_r * np.arange(n_time), {"units": "s"}))
    if fwhm is not None:
        ds.attrs["smoothing_fwhm"] = float(fwhm)
    return annotate(ds, RUN)


def _processing(fwhm: float | None) -> list[str]:
    return [] if fwhm is None else [f"smoothed by a Gaussian of {fwhm:g} mm full width at half maximum"]


def _smoother(
    reader: RunReader, fwhm: float | None, length: int, pool: ThreadPoolExecutor
) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Make the function from a block of stored values to the block to keep, which is valid until the next."""
    if fwhm is None:
        return lambda block: block
    header = reader.header
    sigma = sigma_voxels(fwhm, grids.voxel_sizes(header.affine)[::-1].tolist())
    smoothed = np.empty((length, *reader.shape[1:]), dtype=np.float32)

    def smooth(volume: NDArray[Any], out: NDArray[np.float32]) -> None:
        values = volume.astype(np.float64) * header.slope + header.intercept if header.scaled else volume
        with np.errstate(over="ignore"):
            out[...] = smooth_volume(values, sigma)

    def smooth_block(block: NDArray[Any]) -> NDArray[Any]:
        out = smoothed[: len(block)]
        for _ in pool.map(smooth, block, out):
            pass
        return out

    return smooth_block


def _stream(
    reader: RunReader,
    writer: StoreWriter,
    chunks: plan.Chunks,
    process: Callable[[NDArray[Any]], NDArray[Any]],
    *,
    pool: ThreadPoolExecutor,
    progress: Callable[[int, int], None] | None,
) -> NDArray[np.float64]:
    """Store the run block by block; returns its temporal mean in physical units, shape (z, y, x)."""
    bold = writer.array("bold")
    n_time, n_z = reader.shape[:2]
    total = np.zeros(reader.shape[1:])

    def write_slab(start: int, block: NDArray[Any], z: int) -> None:
        slab = slice(z, min(z + chunks.z, n_z))
        bold[start : start + len(block), slab] = block[:, slab]

    # Closing waits for the block that is being read, before the file is closed.
    with closing(_ahead(reader.blocks(chunks.time))) as blocks:
        for start, block in blocks:
            with np.errstate(invalid="ignore", over="ignore"):
                for volume in block:
                    total += volume
            kept = process(block)
            slabs = [pool.submit(write_slab, start, kept, z) for z in range(0, n_z, chunks.z)]
            for slab in slabs:
                slab.result()
            if progress is not None:
                progress(start + len(block), n_time)
    mean: NDArray[np.float64] = total / n_time * reader.header.slope + reader.header.intercept
    return mean


def _ahead(
    blocks: Iterator[tuple[int, NDArray[Any]]],
) -> Generator[tuple[int, NDArray[Any]]]:
    """Yield the same blocks, each read while the one before it is worked on."""
    with ThreadPoolExecutor(1) as reading:
        pending = reading.submit(next, blocks, None)
        while (item := pending.result()) is not None:
            pending = reading.submit(next, blocks, None)
            yield item
