"""From NIfTI to a run store, in one pass over the file and within bounded memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xarray as xr

from chunkglm import nifti, plan
from chunkglm import store as stores
from chunkglm.errors import InputError, MaskError
from chunkglm.kernels.masking import epi_mask
from chunkglm.kernels.smoothing import sigma_voxels, smooth_volume
from chunkglm.schema import RUN, SPACE, annotate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from chunkglm.nifti import ImageLike, RunReader
    from chunkglm.store import StoreLike, StoreWriter

LONGEST_T_R = 60.0
"""Seconds; a longer repetition time in a header is more likely milliseconds without their unit."""


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
    ``smoothing_fwhm`` is given; then it holds the smoothed values as float32. The mask is found in, or applied to, and the
    mean image is taken of, the unsmoothed signal.

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
    """
    if smoothing_fwhm is not None and not (np.isfinite(smoothing_fwhm) and smoothing_fwhm > 0):
        raise InputError(
            f"The smoothing width is {smoothing_fwhm} mm; it must be positive. Leave it out for no smoothing."
        )
    stores.check_free(store, overwrite=overwrite)
    with nifti.open_reader(source) as reader:
        repetition_time = _repetition_time(reader, t_r)
        grid = nifti.Grid(reader.shape[1:], reader.header.affine)
        given_mask = None if mask is None else nifti.read_mask(mask, grid, reader.name)
        stored = _stored_dtype(reader, smoothing_fwhm)
        n_threads = _threads(reader, stored, memory, smooth=smoothing_fwhm is not None)
        template = _template(reader, repetition_time, smoothing_fwhm, stored)
        with stores.writing(store, overwrite=overwrite) as writer, ThreadPoolExecutor(n_threads) as pool:
            chunks = plan.bold_chunks(reader.shape, stored.itemsize)
            writer.create(stores.savable(template), _chunk_shapes(chunks, template))
            mean = _stream(reader, writer, chunks, _smoother(reader, smoothing_fwhm, pool), pool, progress)
            found = epi_mask(mean) if given_mask is None else given_mask
            if not found.any():
                raise MaskError(
                    f"No brain was found in {reader.name}: the temporal mean has no clear gap between background and brain. "
                    "Give a mask (mask= or --mask)."
                )
            writer.array("mask")[...] = found
            writer.array("mean_image")[...] = mean.astype(np.float32)
            writer.finish(
                {
                    "source_name": os.path.basename(reader.name),  # noqa: PTH119  (URLs too)
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
    if given is None and t_r > LONGEST_T_R:
        raise InputError(
            f"{reader.name} has a repetition time of {t_r:g} s in its header, which is hardly meant. Give it in seconds: t_r= "
            "or --t-r."
        )
    return float(t_r)


def _stored_dtype(reader: RunReader, fwhm: float | None) -> np.dtype[Any]:
    return np.dtype(np.float32) if fwhm is not None else reader.header.dtype.newbyteorder("=")


def _threads(reader: RunReader, stored: np.dtype[Any], memory: int | str, *, smooth: bool) -> int:
    def needed(n: int) -> int:
        return plan.convert_memory(
            reader.shape, reader.header.dtype.itemsize, stored.itemsize, n, smooth=smooth
        )

    budget, wanted = plan.parse_memory(memory), plan.available_cpus()
    fixed = needed(0)
    return plan.threads_within(budget, fixed, needed(1) - fixed, wanted, f"Converting {reader.name}")


def _template(reader: RunReader, t_r: float, fwhm: float | None, stored: np.dtype[Any]) -> xr.Dataset:
    """The store's metadata: everything but the values of bold, mask and mean image."""
    import dask.array as da  # noqa: PLC0415  (placeholders of arrays that are written block by block)

    header, (n_time, *volume) = reader.header, reader.shape
    scale = (
        {"scale_factor": header.slope, "add_offset": header.intercept}
        if header.scaled and fwhm is None
        else {}
    )
    ds = xr.Dataset(
        {
            "bold": xr.Variable(
                ("time", *SPACE), da.zeros(reader.shape, dtype=stored, chunks=-1), attrs=dict(scale)
            ),
            "mask": xr.Variable(SPACE, da.zeros(tuple(volume), dtype=bool, chunks=-1)),
            "mean_image": xr.Variable(SPACE, da.zeros(tuple(volume), dtype=np.float32, chunks=-1)),
        },
        coords=nifti.grid_coords(header.affine, volume, header.raw),
        attrs={"kind": "run", "repetition_time": t_r, "processing": _processing(fwhm)},
    )
    ds = ds.assign_coords(time=("time", t_r * np.arange(n_time), {"units": "s"}))
    if fwhm is not None:
        ds.attrs["smoothing_fwhm"] = float(fwhm)
    return annotate(ds, RUN)


def _processing(fwhm: float | None) -> list[str]:
    return [] if fwhm is None else [f"smoothed by a Gaussian of {fwhm:g} mm full width at half maximum"]


def _chunk_shapes(chunks: plan.Chunks, template: xr.Dataset) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"bold": tuple(chunks)}
    for name in ("mask", "mean_image"):
        shapes[name] = template[name].shape
    return shapes


def _smoother(
    reader: RunReader, fwhm: float | None, pool: ThreadPoolExecutor
) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """What turns a block of stored values into a block to keep."""
    if fwhm is None:
        return lambda block: block
    header = reader.header
    sigma = sigma_voxels(fwhm, nifti.voxel_sizes(header.affine)[::-1].tolist())

    def smooth(volume: NDArray[Any]) -> NDArray[Any]:
        values = volume * header.slope + header.intercept if header.scaled else volume
        return smooth_volume(values, sigma)

    def smooth_block(block: NDArray[Any]) -> NDArray[Any]:
        out = np.empty(block.shape, dtype=np.float32)
        for number, volume in enumerate(pool.map(smooth, block)):
            out[number] = volume
        return out

    return smooth_block


def _stream(
    reader: RunReader,
    writer: StoreWriter,
    chunks: plan.Chunks,
    process: Callable[[NDArray[Any]], NDArray[Any]],
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

    for start, block in _ahead(reader.blocks(chunks.time)):
        for volume in block:
            total += volume
        kept = process(block)
        for _ in pool.map(lambda z, s=start, k=kept: write_slab(s, k, z), range(0, n_z, chunks.z)):  # type: ignore[misc]
            pass
        if progress is not None:
            progress(start + len(block), n_time)
    return total / n_time * reader.header.slope + reader.header.intercept


def _ahead(blocks: Iterator[tuple[int, NDArray[Any]]]) -> Iterator[tuple[int, NDArray[Any]]]:
    """The same blocks, each read while the one before it is worked on."""
    with ThreadPoolExecutor(1) as reading:
        pending = reading.submit(next, blocks, None)
        while (item := pending.result()) is not None:
            pending = reading.submit(next, blocks, None)
            yield cast("tuple[int, NDArray[Any]]", item)
