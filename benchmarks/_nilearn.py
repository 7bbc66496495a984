"""What the benchmarks compare with, by nilearn: the same steps on the same files, in a process of its own."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path


def main() -> None:
    """Fit runs, test contrasts in each, combine them by fixed effects, write maps; as much of that as is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--design", action="append", required=True)
    parser.add_argument("--mask", required=True)
    parser.add_argument("--smoothing-fwhm", type=float)
    parser.add_argument("--noise-model", default="ar1")
    parser.add_argument("--contrasts", type=int, default=0, help="number of contrasts")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    import numpy as np
    import pandas as pd
    from nilearn.glm.contrasts import compute_fixed_effects
    from nilearn.glm.first_level import FirstLevelModel

    models, dofs = [], []
    for run, path in zip(options.runs, options.design, strict=True):
        stored = np.load(path)
        design = pd.DataFrame(stored["X"], columns=[str(name) for name in stored["conditions"]])
        model = FirstLevelModel(
            mask_img=options.mask, smoothing_fwhm=options.smoothing_fwhm, noise_model=options.noise_model
        )
        models.append(model.fit(run, design_matrices=design))
        dofs.append(len(design) - np.linalg.matrix_rank(design.to_numpy()))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    for number in range(options.contrasts):
        weights = contrast_weights(number)
        effects, variances = [], []
        for label, model in enumerate(models, start=1):
            n_columns = model.design_matrices_[0].shape[1]
            padded = np.pad(weights, (0, n_columns - len(weights)))
            found = model.compute_contrast(padded, output_type="all")
            effects.append(found["effect_size"])
            variances.append(found["effect_variance"])
            if options.output and options.contrasts == 1:
                for name, image in found.items():
                    image.to_filename(options.output / f"run-{label}_{name}.nii.gz")
        combined = compute_fixed_effects(effects, variances, options.mask, dofs=dofs)
        if options.output:
            for name, image in zip(("effect", "variance", "t", "z"), combined, strict=True):
                image.to_filename(options.output / f"contrast-{number}_{name}.nii.gz")


def contrast_weights(number: int) -> list[float]:
    """Weights of the four conditions, another set for every number."""
    return [-1.0, -1.0, 1.0, 1.0] if number == 0 else [float((number >> bit & 3) - 1.5) for bit in range(4)]


if __name__ == "__main__":
    main()
