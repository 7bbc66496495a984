"""Figures that need no pyplot and draw any name as text (extra ``report``: matplotlib)."""

from __future__ import annotations

import io
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

from chunkglm.errors import MissingDependencyError, StoreError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


@cache
def figure_class() -> type[Figure]:
    """Make the class of figures that notebooks show without pyplot."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise MissingDependencyError(
            "Pictures and reports need matplotlib, which is not installed. Install it with: pip install 'chunkglm[report]'"
        ) from error

    class Picture(Figure):
        """A figure that shows itself, and that draws any text without complaint."""

        def draw(self, renderer: Any) -> None:
            with warnings.catch_warnings():
                # A name in a script that the font lacks is drawn as boxes.
                warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
                super().draw(renderer)

        def _repr_png_(self) -> bytes:
            return png(self)

    return Picture


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure completely or not at all, in the format that the name ends with.

    Raises
    ------
    StoreError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=150)
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"{path} was not written: {error}. Check the folder and its free space.") from error
    finally:
        partial.unlink(missing_ok=True)
