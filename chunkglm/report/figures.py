"""Figures that need no pyplot and draw any name as text (extra ``report``: matplotlib)."""

from __future__ import annotations

import io
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

from chunkglm.errors import MissingDependencyError
from chunkglm.maps import write_whole

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
    return _rendered(figure, "png", dpi=dpi, metadata={"Software": None})


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure completely or not at all, in the format that the name ends with.

    Raises
    ------
    StoreError
        If it cannot be written.
    """
    write_whole(path, _rendered(figure, path.suffix.lower().removeprefix("."), dpi=150))


def _rendered(figure: Figure, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, **options)
    return stream.getvalue()
