"""From NIfTI to a run store, in one pass over the file and within bounded memory."""

from __future__ import annotations

import hashlib
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from chunkglm import budget, grids, nifti, plan
from chunkglm import store as stores
from chunkglm.blocks import placeholder, single_blas_thread
from chunkglm.errors import InputError, MaskError
from chunkglm.kernels.masking import box_of, epi_mask
from chunkglm.kernels.smoothing import make_scratch, make_smoother, sigma_voxels, smooth_volume
from chunkglm.schema import FORMAT_VERSION, NUMERICAL_VERSION, RUN, SPACE, annotate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from chunkglm.kernels.smoothing import Smoother
    from chunkglm.nifti import ImageLike, RunReader
    from chunkglm.plan import Place
    from chunkglm.store import StoreWriter
    from chunkglm.store.places import StoreLike

    Consumer = Callable[[int, NDArray[Any]], None]

SHORTEST_T_R, LONGEST_T_R = 0.01, 60.0
"""Seconds; a repetition time outside them in a header is more likely one with the wrong unit."""

SAMPLE = 4
"""Volumes that are looked at before any work."""


def convert(
    source: ImageLike,
    store: StoreLike,
    *,
    mask: ImageLike | xr.DataArray | None = None,
    t_r: float | None = None,
    smoothing_fwhm: float | None = None,
    memory: int | str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Convert a NIfTI run to a run store.

    The file is read once, in blocks of volumes. The store holds its values exactly, in the file's dtype, unless
    ``smoothing_fwhm`` is given; then it holds the smoothed values as float32, in the mask if one is
    given, and NaN outside of it. The mask is found in, or applied to, and the mean image is taken of, the unsmoothed
    signal.

    A store that was made from the same content with the same options is left as it is. Where that was cut off, it goes
    on: the file is read again, but no chunk that is complete is made again.

    Parameters
    ----------
    source : path, URL or nibabel image
        4-D NIfTI-1 or NIfTI-2: ``.nii``, ``.nii.gz``, or a ``.hdr``/``.img`` pair; any real dtype and byte order.
    store : path or URL
        Where the store will be. A name that begins with BIDS entities, such as ``run-<label>``, makes it part of a study
        (see :func:`chunkglm.open_study`), which plain xarray opens too if its folder is named ``*.zarr``.
    mask : path, nibabel image or DataArray, optional
        Voxels to fit, on the grid of the run. Without it the brain is found in the temporal mean.
    t_r : float, optional
        Repetition time in seconds; needed where the header has none, and wins over the header.
    smoothing_fwhm : float, optional
        Full width at half maximum of a Gaussian kernel, in mm.
    memory : int or str, optional
        What may be used besides the interpreter and its imports, such as ``"512MiB"``; by default what Dask's configuration
        ``chunkglm.memory`` says, or else 2 GiB. It changes no result.
    overwrite : bool
        Replace an existing store, also one of the same content.
    resume : bool
        Continue what was begun; otherwise start anew.
    progress : callable, optional
        Called with the number of finished volumes and of all volumes, from one thread at a time.

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
    StoreExistsError
        If something else is there, or was begun, and ``overwrite`` is not given.
    BusyStoreError, StoreError
        If another process is writing the store, or it cannot be written.

    Notes
    -----
    Smoothing is by a Gaussian of standard deviation ``fwhm / sqrt(8 ln 2)`` along each axis of the grid, cut at four of
    them, with the volume reflected at its edges (see :mod:`chunkglm.kernels.smoothing`). Without a mask, the brain is found
    by the histogram of the temporal mean, as in nilearn 0.14.1 (``compute_epi_mask``): see :mod:`chunkglm.kernels.masking`.
    """
    options: dict[str, Any] = {"mask": mask, "t_r": t_r, "smoothing_fwhm": smoothing_fwhm}
    memory = budget.allowed(memory)
    if not overwrite and is_converted(source, store, **options):
        return stores.open_run(store)
    return convert_run(
        source,
        store,
        **options,
        memory=memory,
        n_threads=plan.available_cpus(),
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )


def convert_run(
    source: ImageLike,
    store: StoreLike,
    *,
    mask: ImageLike | xr.DataArray | None,
    t_r: float | None,
    smoothing_fwhm: float | None,
    memory: int,
    n_threads: int,
    overwrite: bool,
    resume: bool = True,
    progress: Callable[[int, int], None] | None,
    consume: Consumer | None = None,
    aside: bool = False,
) -> xr.Dataset:
    """Convert a run, as :func:`convert` does, and let its values be used while they come by.

    Parameters
    ----------
    source, store, mask, t_r, smoothing_fwhm, overwrite, resume, progress
        See :func:`convert`.
    memory : int
        Bytes; fewer threads are used where they would need more.
    n_threads : int
        Threads at most. It changes no result.
    consume : callable, optional
        Called with the number of a voxel block (see :func:`chunkglm.plan.voxel_blocks`) and its next volumes
        ``(n, z, y, x)``, in physical units and as the store holds them. The volumes of a voxel block come in order;
        different blocks from different threads. The array is valid during the call.
    aside : bool
        Do not mind another process that was given the same work: see :func:`chunkglm.store.site.building`.

    Returns
    -------
    Dataset
    """
    _check_width(smoothing_fwhm)
    stores.check_free(store, overwrite=overwrite)
    with nifti.open_reader(source) as reader:
        repetition_time = _repetition_time(reader, t_r)
        grid = grids.Grid(reader.shape[1:], reader.header.affine)
        given_mask = None if mask is None else nifti.read_mask(mask, grid, reader.name)
        smoother = _smoother(reader, smoothing_fwhm, given_mask)
        needed = _memory_needed(reader, smoother, given_mask)
        n_threads = plan.most_threads(memory, needed, n_threads, f"Converting {reader.name}")
        chunks = plan.bold_chunks(reader.shape, _stored_dtype(reader, smoothing_fwhm).itemsize)
        template = _template(reader, repetition_time, smoothing_fwhm, chunks, masked=mask is not None)
        made_of = _made_of(reader, repetition_time, smoothing_fwhm, given_mask)
        with stores.writing(store, made_of, overwrite=overwrite, resume=resume, aside=aside) as writer:
            shapes = {"bold": tuple(chunks), "mask": grid.shape, "mean_image": grid.shape}
            writer.create(stores.savable(template), shapes)
            pipeline = _Pipeline(
                reader, writer, chunks, smoother, given_mask, consume=consume, progress=progress
            )
            mean = pipeline.run(n_threads)
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
                {**made_of, "source": reader.sha256},
                {
                    "source_name": reader.file_name,
                    "source_size": reader.size,
                    "source_sha256": reader.sha256,
                    "mask_source": "epi" if mask is None else "given",
                },
            )
    return stores.open_run(store)


def _made_of(
    reader: RunReader, t_r: float, fwhm: float | None, mask: NDArray[np.bool_] | None
) -> dict[str, Any]:
    """Hashes of what the store of a run is made of, all but its data."""
    return {
        "kind": "run",
        "format version": FORMAT_VERSION,
        "numerical version": NUMERICAL_VERSION,
        "header": hashlib.sha256(reader.header.raw).hexdigest(),
        "repetition time": t_r,
        "smoothing": fwhm,
        "mask": None if mask is None else mask_sha256(mask),
    }


def mask_sha256(mask: NDArray[np.bool_]) -> str:
    """Hash of a mask, which lies on the grid of a run."""
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()


def run_made_of(
    source: ImageLike,
    *,
    mask: ImageLike | xr.DataArray | None,
    t_r: float | None,
    smoothing_fwhm: float | None,
    sha256: str | None = None,
) -> dict[str, Any]:
    """Hashes of what a conversion is made of.

    Parameters
    ----------
    source, mask, t_r, smoothing_fwhm
        See :func:`convert`.
    sha256 : str, optional
        Hash of the source, if it is known; otherwise the source is read.

    Returns
    -------
    dict
        As :func:`chunkglm.store.made_of` gives it of the store.
    """
    with nifti.open_reader(source) as reader:
        grid = grids.Grid(reader.shape[1:], reader.header.affine)
        given_mask = None if mask is None else nifti.read_mask(mask, grid, reader.name)
        made_of = _made_of(reader, _repetition_time(reader, t_r), smoothing_fwhm, given_mask)
    return {**made_of, "source": nifti.source_sha256(source) if sha256 is None else sha256}


def is_converted(
    source: ImageLike,
    store: StoreLike,
    *,
    mask: ImageLike | xr.DataArray | None,
    t_r: float | None,
    smoothing_fwhm: float | None,
    sha256: str | None = None,
) -> bool:
    """Whether a conversion would make again what is there.

    Parameters
    ----------
    source, store, mask, t_r, smoothing_fwhm
        See :func:`convert`.
    sha256 : str, optional
        Hash of the source, if it is known.

    Returns
    -------
    bool
    """
    options: dict[str, Any] = {"mask": mask, "t_r": t_r, "smoothing_fwhm": smoothing_fwhm, "sha256": sha256}
    return stores.made_of(store) is not None and stores.is_up_to_date(store, run_made_of(source, **options))


class Description(NamedTuple):
    """What a conversion will make.

    Attributes
    ----------
    run : Dataset
        The run, with its coordinates, attributes and chunks; ``bold`` and ``mean_image`` are zeros, lazily, and so is ``mask``
        if none is given.
    needed : callable
        From a number of threads to bytes of memory.
    examining : int
        Bytes of memory that it takes to look at ``SAMPLE`` volumes.
    scaled : bool
        Whether what is stored means other values than it holds.
    """

    run: xr.Dataset
    needed: Callable[[int], int]
    examining: int
    scaled: bool


def describe_run(
    source: ImageLike,
    *,
    mask: ImageLike | xr.DataArray | None,
    t_r: float | None,
    smoothing_fwhm: float | None,
) -> Description:
    """Tell what a conversion will make, without reading the data.

    Parameters
    ----------
    source, mask, t_r, smoothing_fwhm
        See :func:`convert`.

    Returns
    -------
    Description
    """
    _check_width(smoothing_fwhm)
    with nifti.open_reader(source) as reader:
        grid = grids.Grid(reader.shape[1:], reader.header.affine)
        given_mask = None if mask is None else nifti.read_mask(mask, grid, reader.name)
        chunks = plan.bold_chunks(reader.shape, _stored_dtype(reader, smoothing_fwhm).itemsize)
        smoother = _smoother(reader, smoothing_fwhm, given_mask)
        t_r = _repetition_time(reader, t_r)
        ds = _template(reader, t_r, smoothing_fwhm, chunks, masked=mask is not None)
        ds = ds if given_mask is None else ds.assign(mask=(SPACE, given_mask))
        sample = plan.examining_memory(math.prod(grid.shape), reader.header.dtype.itemsize, SAMPLE)
        return Description(
            ds,
            _memory_needed(reader, smoother, given_mask),
            sample,
            reader.header.scaled and smoother is None,
        )


def _check_width(smoothing_fwhm: float | None) -> None:
    if smoothing_fwhm is not None and not (np.isfinite(smoothing_fwhm) and smoothing_fwhm > 0):
        raise InputError(
            f"The smoothing width is {smoothing_fwhm} mm; it must be positive. Leave it out for no smoothing."
        )


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


def _memory_needed(
    reader: RunReader, smoother: Smoother | None, mask: NDArray[np.bool_] | None
) -> Callable[[int], int]:
    """From a number of threads to the memory that a conversion needs."""
    shape, itemsize = reader.shape, reader.header.dtype.itemsize
    smoothed = None if smoother is None else smoother.shape
    return lambda n: plan.convert_memory(shape, itemsize, n, smoothed=smoothed, found=mask is None)


def _template(
    reader: RunReader, t_r: float, fwhm: float | None, chunks: plan.Chunks, *, masked: bool
) -> xr.Dataset:
    """Make the store's metadata: everything but the values of bold, mask and mean image."""
    header, (n_time, *volume) = reader.header, reader.shape
    bold = xr.Variable(
        ("time", *SPACE), placeholder(reader.shape, _stored_dtype(reader, fwhm), tuple(chunks))
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
            "mask": xr.Variable(SPACE, placeholder(tuple(volume), bool)),
            "mean_image": xr.Variable(SPACE, placeholder(tuple(volume), np.float32)),
        },
        coords=grids.grid_coords(header.affine, volume, header.raw),
        attrs={
            "kind": "run",
            "repetition_time": t_r,
            "processing": _processing(fwhm, masked=masked),
            "numerical_version": NUMERICAL_VERSION,
        },
    )
    ds = ds.assign_coords(time=("time", t_r * np.arange(n_time), {"units": "s"}))
    if fwhm is not None:
        ds.attrs["smoothing_fwhm"] = float(fwhm)
    return annotate(ds, RUN)


def _processing(fwhm: float | None, *, masked: bool) -> list[str]:
    if fwhm is None:
        return []
    where = ", in the mask" if masked else ""
    return [f"smoothed by a Gaussian of {fwhm:g} mm full width at half maximum{where}"]


def _smoother(reader: RunReader, fwhm: float | None, mask: NDArray[np.bool_] | None) -> Smoother | None:
    """How volumes are smoothed: as far as the mask needs them, where there is one."""
    if fwhm is None:
        return None
    header = reader.header
    return make_smoother(
        reader.shape[1:],
        sigma_voxels(fwhm, grids.voxel_sizes(header.affine)[::-1].tolist()),
        header.dtype,
        box=None if mask is None else box_of(mask),
        slope=header.slope,
        intercept=header.intercept,
    )


class _GivenUpError(Exception):
    """Another thread failed."""


class _Pipeline:
    """A run on its way from the file to the store.

    Every thread does the same: it takes the next block of volumes from the file, one thread at a time, then smooths
    and stores it, while others take theirs. What is summed over time is summed voxel block by voxel block, in order.
    """

    def __init__(
        self,
        reader: RunReader,
        writer: StoreWriter,
        chunks: plan.Chunks,
        smoother: Smoother | None,
        mask: NDArray[np.bool_] | None,
        *,
        consume: Consumer | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._reader, self._writer, self._chunks = reader, writer, chunks
        self._smoother, self._consume, self._progress = smoother, consume, progress
        # Of a smoothed run, what lies outside of a mask is left out.
        self._mask = mask if smoother is not None else None
        self._places = plan.voxel_blocks(reader.shape[1:], chunks)
        self._starts = iter(range(0, reader.shape[0], chunks.time))
        self._reading = threading.Lock()
        self._state = threading.Condition()
        self._failed = False
        self._done = 0
        # Of each voxel block the number of the volume whose turn it is.
        self._next = [0] * len(self._places)
        self._total = np.zeros(reader.shape[1:])

    def run(self, n_threads: int) -> NDArray[np.float64]:
        """Store the run; returns its temporal mean in physical units, shape (z, y, x)."""
        reader = self._reader
        with single_blas_thread(), ThreadPoolExecutor(n_threads) as pool:
            try:
                working = [pool.submit(self._work) for _ in range(n_threads)]
                for one in working:
                    # An interrupt reaches this thread only.
                    with suppress(_GivenUpError):
                        one.result()
            except BaseException:
                self._give_up()
                raise
        reader.finish()
        mean: NDArray[np.float64] = (
            self._total / reader.shape[0] * reader.header.slope + reader.header.intercept
        )
        return mean

    def _give_up(self) -> None:
        with self._state:
            self._failed = True
            self._state.notify_all()

    def _work(self) -> None:
        """Take blocks until there is none."""
        reader, smoother = self._reader, self._smoother
        length = min(self._chunks.time, reader.shape[0])
        raw = np.empty((length, *reader.shape[1:]), dtype=reader.native_dtype)
        smoothed = scratch = None
        if smoother is not None:
            smoothed, scratch = np.empty((length, *smoother.shape), dtype=np.float32), make_scratch(smoother)
        chunk = _Chunk(self._chunks, smoother, self._mask, reader.native_dtype)
        try:
            while (taken := self._take(raw)) is not None:
                start, block, content = taken
                first = start // self._chunks.time
                self._writer.claim(first, content, ("bold",))
                indices = [(first, *self._index(place)) for place in self._places]
                written = [self._writer.has("bold", index) for index in indices]
                # What is there from before is not made again, unless it is to be used, too.
                needed = self._consume is not None or not all(written)
                made = block
                if needed and smoother is not None and smoothed is not None and scratch is not None:
                    made = smoothed[: len(block)]
                    with np.errstate(over="ignore", invalid="ignore"):
                        for volume, out in zip(block, made, strict=True):
                            smooth_volume(volume, smoother, scratch, out)
                for number, place in enumerate(self._places):
                    values = chunk.fill(made, place) if needed else None
                    if values is not None and not written[number]:
                        self._writer.write_chunk("bold", indices[number], values)
                    with self._turn(number, start, len(block)):
                        self._sum(number, block, values)
                self._advance(len(block))
        except BaseException:
            self._give_up()
            raise

    def _take(self, raw: NDArray[Any]) -> tuple[int, NDArray[Any], str] | None:
        """Read the next block; its first volume, its values, and a hash of the file up to its end; None after the last."""
        with self._reading:
            start = None if self._failed else next(self._starts, None)
            if start is None:
                return None
            block = raw[: self._reader.shape[0] - start]
            self._reader.read(block, start)
            return start, block, self._reader.read_so_far()

    def _index(self, place: Place) -> tuple[int, ...]:
        """Index of a voxel block among the chunks of a volume."""
        return tuple(part.start // length for part, length in zip(place, self._chunks[1:], strict=True))

    @contextmanager
    def _turn(self, number: int, start: int, length: int) -> Iterator[None]:
        """Wait until all earlier volumes of a voxel block were summed."""
        with self._state:
            self._state.wait_for(lambda: self._failed or self._next[number] == start)
            if self._failed:
                raise _GivenUpError
        yield
        with self._state:
            self._next[number] = start + length
            self._state.notify_all()

    def _sum(self, number: int, block: NDArray[Any], values: NDArray[Any] | None) -> None:
        place = self._places[number]
        total, volumes = self._total[place], block[(slice(None), *place)]
        if block.dtype.kind in "iu" and block.dtype.itemsize <= 2:
            # Exact, and half the work.
            total += volumes.sum(axis=0, dtype=np.int32)
        else:
            with np.errstate(invalid="ignore", over="ignore"):
                for volume in volumes:
                    total += volume
        if self._consume is not None and values is not None:
            header = self._reader.header
            if self._smoother is None and header.scaled:
                # As xarray decodes what is stored.
                values = values.astype(np.float64)
                values *= header.slope
                values += header.intercept
            self._consume(number, values)

    def _advance(self, n_volumes: int) -> None:
        with self._state:
            self._done += n_volumes
            if self._progress is not None:
                self._progress(self._done, self._reader.shape[0])


class _Chunk:
    """A chunk of the store, made from the part of it that was smoothed; NaN outside of the mask, if there is one."""

    def __init__(
        self,
        chunks: plan.Chunks,
        smoother: Smoother | None,
        mask: NDArray[np.bool_] | None,
        dtype: np.dtype[Any],
    ) -> None:
        self._buffer = np.empty(math.prod(chunks), dtype=dtype if smoother is None else np.float32)
        self._box = None if smoother is None else smoother.box
        self._mask = mask

    def fill(self, block: NDArray[Any], place: Place) -> NDArray[Any]:
        """The values at a place, valid until the next; ``block`` holds those in the box."""
        shape = (len(block), *(part.stop - part.start for part in place))
        if self._box is None or self._mask is None:
            values = self._buffer[: math.prod(shape)].reshape(shape)
            values[...] = block[(slice(None), *place)]
            return values
        if not self._mask[place].any():
            # One value, broadcast, which costs little to store.
            return np.broadcast_to(np.float32(np.nan), shape)
        values = self._buffer[: math.prod(shape)].reshape(shape)
        values.fill(np.nan)
        inside, source, masked = [], [], []
        for part, made in zip(place, self._box, strict=True):
            start, stop = max(part.start, made.start), min(part.stop, made.stop)
            inside.append(slice(start - part.start, stop - part.start))
            source.append(slice(start - made.start, stop - made.start))
            masked.append(slice(start, stop))
        part_of_block = block[(slice(None), *source)]
        np.copyto(values[(slice(None), *inside)], part_of_block, where=self._mask[tuple(masked)])
        return values
