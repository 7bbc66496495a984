"""Coverage-guided fuzzing of the parsers of foreign content: headers, designs, expressions.

    python tests/fuzz.py header|design|expression [-runs=1000000] [-max_total_time=60] [other options of libFuzzer]

needs atheris (extra ``dev``; Linux). A parser may refuse with an error of chunkglm, and nothing else; what was found
otherwise stays in the tests of the parser. Inputs that were found to be interesting are kept in ``.fuzz/`` for the next time.
"""

import io
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["chunkglm"]):
    from chunkglm import design, expressions, nifti
    from chunkglm.errors import ChunkGLMError

COLUMNS = ["face", "house", "trial type", "x0"]
KINDS = sorted(design._READERS)
warnings.simplefilter("ignore")


def header(data):
    """A header with its extensions, and what is known of a run from it."""
    raw = nifti._read_header(io.BytesIO(data), "fuzz.nii")
    found = nifti._describe(raw, "fuzz.nii")
    assert found.n_volumes >= 1
    assert found.volume_bytes > 0
    assert np.isfinite(found.affine).all()


def design_matrix(data):
    """A design of any kind of file; the first byte says which."""
    kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
    values, names = design._READERS[kind](io.BytesIO(data[1:]), "fuzz")
    frame = design._frame(values, names, "fuzz")
    assert np.isfinite(frame.to_numpy()).all()
    assert len(set(frame.columns)) == frame.shape[1]


def expression(data):
    """A contrast as the command line takes it."""
    text = data.decode("utf-8", "surrogateescape")
    name, definition = expressions.parse_definition(text)
    rows = expressions.contrast_rows(definition, COLUMNS, name=name)
    assert rows.weights.shape[1] == len(COLUMNS)
    assert np.isfinite(rows.weights).all()
    assert rows.weights.any()


PARSERS = {"header": header, "design": design_matrix, "expression": expression}


def seeds(which):
    """Inputs that are right, to begin with."""
    if which == "expression":
        texts = [
            "face - house",
            "a=0.5*face + 0.5*house - `trial type`",
            "F=face; house",
            "w=[1,-1,0,0]",
            "[[1,0],[0,1]]",
            "-(face)/3 + 2e-1*x0",
        ]
        return [text.encode() for text in texts]
    if which == "design":
        archive = io.BytesIO()
        np.savez(archive, X=np.eye(3), conditions=np.array(["a", "b", "c"]))
        contents = {
            ".csv": b"a,b\n1,2\n3,4.5e-3\n",
            ".tsv": b"\ta\tb\n0\t1\t2\n1\t3\t4\n",
            ".npz": archive.getvalue(),
            ".mat": b"/NumWaves 2\n/NumPoints 2\n/PPheights 1 1\n\n/Matrix\n1 2\n3 4\n",
        }
        return [bytes([KINDS.index(kind)]) + content for kind, content in contents.items() if kind in KINDS]
    import nibabel as nib

    made = []
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        image = kind(np.zeros((3, 4, 5, 6), np.int16), np.diag([2.0, 2, 2, 1]))
        image.header.set_xyzt_units("mm", "sec")
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"some words"))
        made.append(image.to_bytes()[:700])
    return made


def main():
    """Fuzz one parser."""
    which = sys.argv[1] if len(sys.argv) > 1 else ""
    if which not in PARSERS:
        sys.exit(__doc__)
    parse = PARSERS[which]

    def one(data):
        try:
            parse(data)
        except ChunkGLMError as error:
            assert str(error)

    found = Path(__file__).parents[1] / ".fuzz" / which
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(seeds(which)):
            (Path(folder) / str(number)).write_bytes(content)
        prefix = f"-artifact_prefix={found.parent}/"
        atheris.Setup([sys.argv[0], str(found), folder, prefix, "-max_len=4096", *sys.argv[2:]], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
