"""First-level fMRI models and fixed effects on chunked arrays.

>>> import chunkglm as cg
>>> run = cg.convert("run1.nii.gz", "study.zarr/run-1", mask="mask.nii.gz", smoothing_fwhm=5)  # doctest: +SKIP
>>> fit = cg.fit(run, "design1.csv")  # doctest: +SKIP
>>> cg.contrast(fit, "face - house").z_score  # doctest: +SKIP
"""

from chunkglm import errors
from chunkglm._version import __version__
from chunkglm.contrasts import contrast
from chunkglm.convert import convert
from chunkglm.design import read_design
from chunkglm.fixed_effects import fixed_effects
from chunkglm.glm import fit
from chunkglm.nifti import to_nifti
from chunkglm.report import plot, report
from chunkglm.store import open_run, open_store, open_study, save, verify

__all__ = [
    "__version__",
    "contrast",
    "convert",
    "errors",
    "fit",
    "fixed_effects",
    "open_run",
    "open_store",
    "open_study",
    "plot",
    "read_design",
    "report",
    "save",
    "to_nifti",
    "verify",
]
