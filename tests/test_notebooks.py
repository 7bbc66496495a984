"""The notebooks run, and their outputs are those that their code gives."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="nbclient is not installed")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

LARGEST = 400_000
"""Bytes of a notebook with its outputs."""

# In a process of its own: what jupyter warns of is not ours.
RUN = """
import sys, nbformat
from nbclient import NotebookClient
book = nbformat.read(sys.argv[1], 4)
NotebookClient(book, timeout=240, kernel_name="python3").execute(cwd=sys.argv[3])
nbformat.write(book, sys.argv[2])
"""


def code_cells(path):
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def outputs(path, kind):
    return [
        output for cell in code_cells(path) for output in cell["outputs"] if output["output_type"] == kind
    ]


def printed(path):
    """What the cells of a notebook print."""
    return ["".join(output["text"]) for output in outputs(path, "stream") if output["name"] == "stdout"]


def shown(path):
    """What they show as text, but for objects of other packages; and where they show pictures."""
    texts = ["".join(output["data"]["text/plain"]) for output in outputs(path, "execute_result")]
    pictures = [
        "image/png" in output["data"]
        for kind in ("display_data", "execute_result")
        for output in outputs(path, kind)
    ]
    return [text for text in texts if not text.startswith("<")], pictures


def execute(notebook, folder, **environment):
    """Run a notebook from its first cell to its last; returns the executed copy."""
    done = folder / notebook.name
    own = {
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
        "TMPDIR": str(folder),
    }
    others = {key: value for key, value in os.environ.items() if key != "CHUNKGLM_REAL_DATA"}
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(notebook), str(done), str(folder)],
        env=others | own | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return done


def test_notebooks__are_there():
    assert [path.name for path in NOTEBOOKS] == [
        "1-two-sessions.ipynb",
        "2-twelve-runs.ipynb",
        "3-new-questions.ipynb",
        "4-larger-than-memory.ipynb",
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook__runs_and_prints_what_it_shows(notebook, tmp_path):
    done = execute(notebook, tmp_path)
    assert printed(done) == printed(notebook)
    assert shown(done) == shown(notebook)
    assert len(shown(notebook)[0]) > 2
    # Nothing is left beside it, and nothing complained.
    assert not [output for output in outputs(done, "stream") if output["name"] == "stderr"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook__as_it_is_committed(notebook):
    text = notebook.read_text("utf-8")
    assert len(text) < LARGEST
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not outputs(notebook, "error")
    assert not [output for output in outputs(notebook, "stream") if output["name"] == "stderr"]
    assert not re.search(r"/(tmp|home|root|Users)/", text)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])


def test_notebook__of_twelve_runs_on_real_ones(real_data, tmp_path):
    done = execute(FOLDER / "2-twelve-runs.ipynb", tmp_path, CHUNKGLM_REAL_DATA=str(real_data))
    assert printed(done)[0] == "12 runs, 121 volumes each: face - house\n"


def test_notebook__the_check_sees_an_error(tmp_path):
    book = json.loads(NOTEBOOKS[0].read_text("utf-8"))
    book["cells"] = [cell for cell in book["cells"] if cell["cell_type"] == "code"][:1]
    book["cells"][0]["source"] = ["raise ValueError('as it should')"]
    path = tmp_path / "broken.ipynb"
    path.write_text(json.dumps(book), "utf-8")
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(AssertionError, match="as it should"):
        execute(path, folder)
