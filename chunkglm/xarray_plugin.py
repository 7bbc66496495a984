"""NIfTI for xarray: ``xr.open_dataset("bold.nii.gz", engine="nifti")``."""

from __future__ import annotations

import math
import os
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from chunkglm import nifti, plan, slabs
from chunkglm.convert import LONGEST_T_R, SHORTEST_T_R
from chunkglm.errors import ChunkGLMError, ChunkGLMWarning, InputError, NiftiError
from chunkglm.grids import grid_coords
from chunkglm.schema import RUN, SPACE, annotate

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import ClassVar

    from chunkglm.nifti import Location


BLOCK_BYTES = 32 * plan.MIB
"""The largest block of volumes that is a chunk, decoded, unless one volume is larger."""


class NiftiBackend(BackendEntrypoint):
    """Opens NIfTI images lazily, with millimetres, seconds and everything that :func:`chunkglm.to_nifti` needs."""

    description: ClassVar[str] = "Open NIfTI images (.nii, .nii.gz, .hdr/.img) lazily, using chunkglm"
    open_dataset_parameters: ClassVar[tuple[str, ...]] = ("filename_or_obj", "drop_variables")

    def open_dataset(
        self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None
    ) -> xr.Dataset:
        """Open a NIfTI image.

        Only the header is read. With ``chunks={}`` a chunk is a block of whole volumes. A ``.nii.gz`` may be read in any
        order: it is decompressed from its start once, and from places that were passed by then. To look at; for fits of
        whole brains, convert: a run store has chunks of slices, and is fitted in blocks of these.

        Parameters
        ----------
        filename_or_obj : path
            ``.nii``, ``.nii.gz`` or either file of a ``.hdr``/``.img`` pair; NIfTI-1 or NIfTI-2, of any real type.
        drop_variables : str or iterable of str, optional
            Variables to leave out.

        Returns
        -------
        Dataset
            ``bold`` (time, z, y, x), or ``image`` (z, y, x) where the image has three dimensions: physical values, as
            nibabel gives them. ``time`` in seconds, if the header has a repetition time that can be right; ``x``,
            ``y``, ``z`` and ``grid`` as in a run store.

        Raises
        ------
        InputError
            If it is a URL or an open file.
        SourceNotFoundError, NiftiError
            If there is no such file, or it is not an image of at most four dimensions. Both, and SourceReadError, also
            when values are read: if the file is cut off, damaged, or not any more what was opened.
        """
        place = nifti.locate(_path_of(filename_or_obj))
        if len(place.header.shape) > 4:
            raise NiftiError(
                f"{place.name} is a {len(place.header.shape)}-D image of shape {place.header.shape} (x, y, z, time, ...); "
                "images of up to four dimensions are opened. Split it into these first, for example with nibabel."
            )
        dropped = [drop_variables] if isinstance(drop_variables, str) else drop_variables or []
        ds = annotate(_dataset(place), RUN).drop_vars(dropped, errors="ignore")
        ds.set_close(partial(slabs.release, place))
        return ds

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether it is a path that ends as those of NIfTI files do; a pair, which others have too, must be NIfTI."""
        if not isinstance(filename_or_obj, (str, os.PathLike)):
            return False
        name = str(os.fspath(filename_or_obj)).lower()
        if not name.endswith(nifti.SUFFIXES) or name.endswith((".nii", ".nii.gz")):
            return name.endswith(nifti.SUFFIXES)
        try:
            nifti.locate(_path_of(filename_or_obj))
        except (ChunkGLMError, OSError):
            return False
        return True


class NiftiArray(BackendArray):
    """The values of an image, read when they are indexed.

    Parameters
    ----------
    place : Location
        Where they lie.
    ndim : int
        3 or 4: whether there is a dimension of time.
    """

    def __init__(self, place: Location, ndim: int) -> None:
        self.place = place
        self.shape = place.shape[-ndim:]
        self.dtype = slabs.values_dtype(place)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray[Any, Any]:
        return slabs.read_slab(self.place, (*[0] * (4 - len(key)), *key))


def _path_of(source: Any) -> str:
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"A {type(source).__name__} cannot be opened with engine='nifti'; accepted is the path of a .nii, .nii.gz, .hdr "
            "or .img file. Write it to a file, and give its path."
        )
    path = os.fspath(source)
    if not isinstance(path, str) or "://" in path:
        raise InputError(
            f"{path!r} cannot be opened with engine='nifti', which reads local files in any order; accepted is the path of "
            "a .nii, .nii.gz, .hdr or .img file. Download it first, or make a run store of it with chunkglm.convert, "
            "which takes URLs."
        )
    # Workers of a cluster may run in other folders.
    return str(Path(path).expanduser().absolute())


def _dataset(place: Location) -> xr.Dataset:
    header = place.header
    is_run = len(header.shape) == 4
    array = NiftiArray(place, 4 if is_run else 3)
    dims = ("time", *SPACE) if is_run else SPACE
    variable = xr.Variable(dims, indexing.LazilyIndexedArray(array))
    if is_run:
        variable.encoding["preferred_chunks"] = {"time": _time_block(place, array.dtype.itemsize)}
    if header.scaled:
        variable.encoding |= {
            "dtype": header.dtype.newbyteorder("="),
            "scale_factor": header.slope,
            "add_offset": header.intercept,
        }
    coords = grid_coords(header.affine, place.shape[1:], header.raw)
    t_r = _time_step(place) if is_run else None
    if t_r is not None:
        coords["time"] = xr.Variable("time", t_r * np.arange(place.shape[0]), {"units": "s"})
    return xr.Dataset({"bold" if is_run else "image": variable}, coords=coords)


def _time_block(place: Location, itemsize: int) -> int:
    """Volumes in a chunk: as many as in a run store, if that is not too much memory."""
    fitting = BLOCK_BYTES // (math.prod(place.shape[1:]) * itemsize)
    return min(plan.bold_chunks(place.shape, itemsize).time, max(fitting, 1), place.shape[0])


def _time_step(place: Location) -> float | None:
    """Repetition time in the header, if it can be right."""
    t_r = place.header.t_r
    if t_r is None or SHORTEST_T_R <= t_r <= LONGEST_T_R:
        return t_r
    warnings.warn(
        f"{place.name} has a repetition time of {t_r:g} s in its header, which is hardly meant, so its volumes have no "
        "times. Give them in seconds: ds.assign_coords(time=t_r * numpy.arange(ds.sizes['time'])).",
        ChunkGLMWarning,
        stacklevel=2,
    )
    return None
