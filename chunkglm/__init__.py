"""First-level fMRI models and fixed effects on chunked arrays.

>>> import chunkglm as cg
>>> run = cg.convert("run1.nii.gz", "study.zarr/run-1", mask="mask.nii.gz", smoothing_fwhm=5)  # doctest: +SKIP
>>> fit = cg.fit(run, "design1.csv")  # doctest: +SKIP
>>> cg.contrast(fit, "face - house").z_score  # doctest: +SKIP
"""

from chunkglm import accessor as _accessor  # noqa: F401  (registers .glm)
from chunkglm import errors
from chunkglm._version import __version__
from chunkglm.append import append_run
from chunkglm.cluster import watch
from chunkglm.contrasts import contrast
from chunkglm.convert import convert
from chunkglm.design import read_design
from chunkglm.fixed_effects import fixed_effects, leave_one_out
from chunkglm.glm import fit
from chunkglm.nifti import to_nifti
from chunkglm.report import plot, report, time_course
from chunkglm.store import open_run, open_store, open_study, save, verify
from chunkglm.world import at, world

__all__ = [
    "__version__",
    "append_run",
    "at",
    "contrast",
    "convert",
    "errors",
    "fit",
    "fixed_effects",
    "leave_one_out",
    "open_run",
    "open_store",
    "open_study",
    "plot",
    "read_design",
    "report",
    "save",
    "time_course",
    "to_nifti",
    "verify",
    "watch",
    "world",
]
