"""The accessor ``.glm``: chunkglm's functions as methods of xarray's objects. It keeps nothing.

>>> z = run.glm.fit(design).glm.contrast("face - house").glm.fixed_effects().z_score  # doctest: +SKIP
>>> z.glm.plot(run.mean_image)  # doctest: +SKIP
"""

from __future__ import annotations

import html
import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any

import xarray as xr

from chunkglm.append import append_run
from chunkglm.contrasts import contrast
from chunkglm.describe import describe
from chunkglm.fixed_effects import fixed_effects, leave_one_out
from chunkglm.glm import fit
from chunkglm.nifti import to_nifti
from chunkglm.report import plot, time_course
from chunkglm.store import save
from chunkglm.world import at, world

if TYPE_CHECKING:
    from collections.abc import Callable


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of a function whose first argument is the object."""

    @wraps(function)
    def method(self: _Accessor, *args: Any, **options: Any) -> Any:
        return function(self._obj, *args, **options)

    first, *others = inspect.signature(function).parameters.values()
    own = first.replace(
        name="self", kind=inspect.Parameter.POSITIONAL_ONLY, annotation=inspect.Parameter.empty
    )
    method.__signature__ = inspect.Signature([own, *others])  # type: ignore[attr-defined]
    return method


class _Accessor:
    """What the three have in common: they hold an object, and say what it is."""

    def __init__(self, obj: Any) -> None:
        self._obj = obj

    def __repr__(self) -> str:
        return _as_text(self._about())

    def _repr_html_(self) -> str:
        return _as_html(self._about())

    def _about(self) -> dict[str, str]:
        methods = [name for name in vars(type(self)) if not name.startswith("_")]
        return describe(self._obj) | {".glm": ", ".join(methods)}


@xr.register_dataset_accessor("glm")  # type: ignore[no-untyped-call]
class DatasetGLM(_Accessor):
    """Functions of runs, fits, contrasts and fixed effects."""

    fit = _method(fit)
    contrast = _method(contrast)
    fixed_effects = _method(fixed_effects)
    leave_one_out = _method(leave_one_out)
    append_run = _method(append_run)
    at = _method(at)
    world = _method(world)
    time_course = _method(time_course)
    save = _method(save)


@xr.register_dataarray_accessor("glm")  # type: ignore[no-untyped-call]
class DataArrayGLM(_Accessor):
    """Functions of maps and other arrays on a voxel grid."""

    at = _method(at)
    world = _method(world)
    plot = _method(plot)
    to_nifti = _method(to_nifti)


@xr.register_datatree_accessor("glm")  # type: ignore[no-untyped-call]
class DataTreeGLM(_Accessor):
    """Functions of studies: trees of runs, fits, contrasts or fixed effects."""

    fit = _method(fit)
    contrast = _method(contrast)
    fixed_effects = _method(fixed_effects)
    leave_one_out = _method(leave_one_out)
    time_course = _method(time_course)
    save = _method(save)


def _as_text(about: dict[str, str]) -> str:
    width = max(len(key) for key in about)
    lines = [f"  {key:{width}}  {value}" for key, value in about.items() if key]
    return "\n".join([f"chunkglm: {about['']}", *lines])


def _as_html(about: dict[str, str]) -> str:
    rows = "".join(
        f"<tr><th style='text-align:left;vertical-align:top'>{html.escape(key)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for key, value in about.items()
        if key
    )
    return f"<div><strong>chunkglm: {html.escape(about[''])}</strong><table>{rows}</table></div>"
