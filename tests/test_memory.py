"""Memory stays bounded, and as it was projected: peaks of whole processes."""

import json
import re
import shutil
import sys
import threading

import dask
import dask.array as da
import nibabel as nib
import numpy as np
import pytest
import xarray as xr
from dask.local import get_sync

import chunkglm as cg
from chunkglm import budget, job, plan, streamed
from chunkglm.cli import main
from chunkglm.errors import InputError, MemoryBudgetError
from chunkglm.store.saving import saving_memory
from chunkglm.testing import peak_rss, write_simulated_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="peak memory is measured with getrusage")

SHAPE = (64, 64, 40)
MIB = 2**20
SETUP = """
import warnings
import numpy as np, scipy.ndimage, xarray as xr, zarr
import chunkglm.cli, chunkglm as cg
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for volumes in (160, 640):
        write_simulated_run(
            folder / f"{volumes}.nii",
            folder / f"{volumes}_design.npz",
            folder / "mask.nii.gz",
            shape=SHAPE,
            n_volumes=volumes,
            overwrite=True,
        )
    image = nib.load(folder / "160.nii")
    values = np.asanyarray(image.dataobj)[..., :96]
    for name, dtype in (("float64", np.float64), ("scaled", np.int16), ("packed", np.int16)):
        # Noise in all bits, which nothing compresses.
        noise = np.random.default_rng(1).random(values.shape) if name == "float64" else 0
        other = nib.Nifti1Image((values + noise).astype(dtype), image.affine)
        other.header.set_xyzt_units("mm", "sec")
        other.header.set_zooms((3.0, 3.0, 3.0, 2.0))
        if name == "scaled":
            other.header.set_slope_inter(0.5, 10.0)
        other.to_filename(folder / f"{name}{'.nii.gz' if name == 'packed' else '.nii'}")
    short = np.load(folder / "160_design.npz")
    np.savez(folder / "96_design.npz", X=short["X"][:96], conditions=short["conditions"])
    full = nib.Nifti1Image(np.ones(SHAPE, np.uint8), image.affine)
    full.to_filename(folder / "full.nii.gz")
    return folder


def peak_of(arguments):
    """Peak of a command above its imports, in MiB."""
    statements = f"try:\n    chunkglm.cli.main({arguments!r})\nexcept SystemExit as e:\n    assert not e.code"
    base, peak = peak_rss(statements, setup=SETUP)
    return (peak - base) / MIB


def peak_of_run(data, output, n_runs, volumes, memory="1GiB"):
    """Peak of the whole job above its imports, in MiB."""
    arguments = ["-q", "run", *[str(data / f"{volumes}.nii")] * n_runs]
    arguments += [word for _ in range(n_runs) for word in ("--design", str(data / f"{volumes}_design.npz"))]
    arguments += ["--mask", str(data / "mask.nii.gz"), "--contrast", "d=DSt - SSt", "--smoothing-fwhm", "5"]
    arguments += ["--output", str(output), "--memory", memory]
    return peak_of(arguments)


def test_peak__does_not_grow_with_volumes_or_runs_and_keeps_to_the_budget(data, tmp_path):
    # Which thread is where at the peak is chance: the higher of two is nearer to what can be.
    short = max(peak_of_run(data, tmp_path / f"short{n}", 1, 160, memory="160MiB") for n in (1, 2))
    long = peak_of_run(data, tmp_path / "long", 1, 640, memory="160MiB")
    many = peak_of_run(data, tmp_path / "many", 3, 160, memory="160MiB")
    raw = 640 * 64 * 64 * 40 * 4 / MIB
    # The longer design has more drifts, and so more sums.
    assert long < 1.15 * short + 24, "four times the volumes"
    assert many < 1.15 * short + 24, "three times the runs"
    assert max(short, long, many) < 160, "the budget"
    assert long < raw / 2


def test_peak__of_an_export_is_a_few_blocks(data, tmp_path):
    store, back = tmp_path / "run.zarr", tmp_path / "back.nii"
    cg.convert(data / "640.nii", store)
    peak = peak_of(["export", str(store), "--output", str(back)])
    raw = 640 * 64 * 64 * 40 * 2 / MIB
    assert peak < raw / 1.5
    assert back.read_bytes() == (data / "640.nii").read_bytes()


# ----------------------------------------------------------------------------------------------------- the projection


def job_words(data, source, n_runs=1, *options):
    """Words of a job that draws nothing."""
    words = ["run", *[str(data / source)] * n_runs]
    words += ["--design", str(data / ("160_design.npz" if source == "160.nii" else "96_design.npz"))] * n_runs
    words += [str(data / word) if word.endswith(".nii.gz") else word for word in options]
    return [*words, *([] if "--contrast" in options else ["--contrast", "d=DSt - SSt"]), "--no-report"]


CASES = [
    ("packed.nii.gz", 2, "--mask", "full.nii.gz", "--smoothing-fwhm", "5"),
    ("packed.nii.gz", 1),
    ("float64.nii", 1, "--mask", "full.nii.gz"),
    ("scaled.nii", 1, "--mask", "mask.nii.gz"),
    ("scaled.nii", 1, "--noise-model", "auto"),
    ("packed.nii.gz", 1, "--mask", "mask.nii.gz", "--noise-model", "ar3", "--contrast", "f=DSt; SSt; DSp"),
]


def call(words, capsys):
    """Exit status of a command, and what it said."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def planned(words, capsys):
    code, out, err = call([*words, "--plan", "--json"], capsys)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak__is_at_most_what_was_projected_and_what_is_allowed(data, tmp_path, capsys, case):
    words = [*job_words(data, *case), "--output", str(tmp_path / "out")]
    code, out, err = call([*words, "--memory", "2MiB"], capsys)
    assert (code, out) == (1, "")
    least = re.search(r"Allow (\d+MiB) or more", err)[1]
    assert not (tmp_path / "out").exists()
    # What the message asks for is enough, and less is not.
    below = f"{int(least.removesuffix('MiB')) - 1}MiB"
    assert call([*words, "--memory", below, "--plan"], capsys)[0] == 1
    plan_ = planned([*words, "--memory", least], capsys)
    assert plan_["peak"] <= plan_["memory"]
    peak = peak_of(["-q", *words, "--memory", least]) * MIB
    assert peak <= plan_["peak"] <= plan.parse_memory(least)
    # Nor is it absurd.
    assert peak > 0.3 * plan_["peak"]


def test_peak__of_many_runs_is_that_of_some(data, tmp_path, capsys):
    """They are combined some at a time."""
    image = nib.load(data / "160.nii")
    short = nib.Nifti1Image(np.asanyarray(image.dataobj)[..., :16], image.affine, image.header)
    short.to_filename(tmp_path / "16.nii")
    X = np.random.default_rng(1).standard_normal((16, 2))
    np.savez(tmp_path / "16_design.npz", X=X, conditions=["SSt", "DSt"])

    def words(n_runs, name):
        runs = [str(tmp_path / "16.nii")] * n_runs
        designs = [word for _ in range(n_runs) for word in ("--design", str(tmp_path / "16_design.npz"))]
        more = ["--mask", str(data / "full.nii.gz"), "--contrast", "d=DSt - SSt", "--no-report"]
        return ["run", *runs, *designs, *more, "--output", str(tmp_path / name)]

    some, many = (planned([*words(n, "none"), "--memory", "100MiB"], capsys)["peak"] for n in (9, 16))
    assert some == many
    assert peak_of(["-q", *words(16, "many"), "--memory", "100MiB"]) * MIB <= many


def test_peak__of_many_threads_is_at_most_what_was_projected(data, tmp_path, capsys):
    words = [
        *job_words(data, *CASES[0]),
        "--n-threads",
        "4",
        "--memory",
        "1GiB",
        "--output",
        str(tmp_path / "out"),
    ]
    plan_ = planned(words, capsys)
    assert max(stage["at_a_time"] for stage in plan_["stages"]) == 4
    peak = peak_of(["-q", *words]) * MIB
    assert 0.3 * plan_["peak"] < peak <= plan_["peak"]


def test_peak__of_the_functions_is_within_what_they_are_given(data, tmp_path):
    """Where nothing was told to the allocator, and blocks of eight voxel blocks could be in flight."""
    names = {"run": str(data / "160.nii"), "folder": str(tmp_path), "design": str(data / "160_design.npz")}
    setup = f"{SETUP}\nimport dask\nnames = {names!r}\ndask.config.set(num_workers=8)\n"
    setup += "warnings.simplefilter('error')\n"
    runs, fits, contrasts = (
        "names['folder'] + '/run-1.zarr'",
        "names['folder'] + '/fit.zarr'",
        "names['folder'] + '/c.zarr'",
    )
    steps = {
        "convert": f"cg.convert(names['run'], {runs}, memory='130MiB')",
        "fit": f"cg.save(cg.fit(cg.open_run({runs}), names['design']), {fits}, memory='130MiB')",
        "contrasts": f"cg.save(cg.contrast(cg.open_store({fits}), {{'a': 'DSt', 'b': 'SSt - DSt'}}), {contrasts}, memory='130MiB')",
        "combine": f"cg.save(cg.fixed_effects(cg.open_store({contrasts})), names['folder'] + '/f.zarr', memory='130MiB')",
    }
    for name, statement in steps.items():
        base, peak = peak_rss(statement, setup=setup)
        assert peak - base <= 130 * MIB, name


# ------------------------------------------------------------------------------------------------- blocks in flight


class Watched:
    """Counts how many blocks are made at a time, and notes what dask was told."""

    def __init__(self):
        self.lock, self.now, self.most, self.told = threading.Lock(), 0, 0, set()

    def __call__(self, block):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.told.add(dask.config.get("num_workers", None))
        threading.Event().wait(0.01)
        with self.lock:
            self.now -= 1
        return block

    def dataset(self):
        """Sixteen blocks of 1 MiB, which nothing is known of but their size."""
        blocks = da.zeros((16, 128, 1024), chunks=(1, 128, 1024)).map_blocks(
            self, dtype=float, meta=np.empty((0, 0, 0)), name="watched"
        )
        return xr.Dataset({"values": (("z", "y", "x"), blocks)})


@pytest.mark.parametrize("n", [1, 2, 3])
def test_save__works_on_as_many_blocks_at_a_time_as_the_budget_holds(tmp_path, n):
    watched = Watched()
    ds = watched.dataset()
    needed = saving_memory(ds)
    assert needed(2) - needed(1) >= 3 * 2**20
    with dask.config.set(num_workers=8):
        cg.save(ds, tmp_path / "a.zarr", memory=needed(n))
        assert dask.config.get("num_workers") == 8
    assert watched.told == {n}
    assert watched.most <= n
    # With room for more than there are threads, it is theirs to say.
    watched.told.clear()
    with dask.config.set(num_workers=2):
        cg.save(ds, tmp_path / "b.zarr", memory="4GiB")
    assert watched.told == {2}


def test_save__refuses_what_does_not_fit_and_what_it_asks_for_is_enough(tmp_path):
    ds = Watched().dataset()
    for scheduler in ("threads", "sync", get_sync, None):
        with dask.config.set(scheduler=scheduler):
            with pytest.raises(
                MemoryBudgetError, match=r"Saving .*a\.zarr needs about .* and 33\.0 MiB are"
            ) as refused:
                cg.save(ds, tmp_path / "a.zarr", memory="33MiB")
            assert not (tmp_path / "a.zarr").exists()
            enough = re.search(r"Allow (\d+MiB)", str(refused.value))[1]
            cg.save(ds, tmp_path / "a.zarr", memory=enough, overwrite=True)
            assert float(cg.open_store(tmp_path / "a.zarr")["values"].sum()) == 0
            shutil.rmtree(tmp_path / "a.zarr")


# ------------------------------------------------------------------------------------------------- one budget for all


def test_memory__comes_from_the_argument_or_the_configuration_or_the_default(monkeypatch):
    assert budget.allowed() == plan.parse_memory(budget.DEFAULT) == 2 * 2**30
    with dask.config.set({"chunkglm.memory": "300MiB"}):
        assert budget.allowed() == 300 * MIB
        assert budget.allowed("1GiB") == 2**30
    monkeypatch.setenv("DASK_CHUNKGLM__MEMORY", "123MiB")
    with dask.config.set(dask.config.collect(paths=[])):
        assert budget.allowed() == 123 * MIB
    with dask.config.set({"chunkglm.memory": "much"}), pytest.raises(InputError, match="'much'"):
        budget.allowed()


def test_memory__of_the_configuration_is_that_of_every_function_and_verb(data, tmp_path, capsys):
    run = cg.convert(data / "packed.nii.gz", tmp_path / "run.zarr")
    design = str(data / "96_design.npz")
    fitted = cg.save(cg.fit(run, design), tmp_path / "fit.zarr")
    contrasts = cg.save(cg.contrast(fitted, "DSt"), tmp_path / "contrasts.zarr")
    other = str(tmp_path / "other.zarr")
    verbs = [
        ["convert", str(data / "packed.nii.gz"), other],
        ["fit", str(tmp_path / "run.zarr"), "--design", design, "--output", other],
        ["contrast", str(tmp_path / "fit.zarr"), "--contrast", "DSt", "--output", other],
        ["combine", str(tmp_path / "contrasts.zarr"), "--output", other],
        [*job_words(data, "packed.nii.gz"), "--output", other],
    ]
    calls = [
        lambda: cg.convert(data / "packed.nii.gz", other),
        lambda: cg.save(cg.fit(run, design), other),
        lambda: cg.save(cg.contrast(fitted, "DSt"), other),
        lambda: cg.save(cg.fixed_effects(contrasts), other),
        lambda: cg.fit(run, design, noise_model="auto"),
    ]
    with dask.config.set({"chunkglm.memory": "33MiB"}):
        for one in calls:
            with pytest.raises(MemoryBudgetError, match=r"33\.0 MiB are allowed"):
                one()
        for words in verbs:
            code, _, err = call(["-q", *words], capsys)
            assert code == 1
            assert "33.0 MiB are allowed" in err
            # An option comes before what is configured.
            code, _, err = call(["-q", *words, "--memory", "34MiB"], capsys)
            assert "34.0 MiB are allowed" in err
    assert not (tmp_path / "other.zarr").exists()


# ----------------------------------------------------------------------------------------------------- run --plan


def test_plan__says_the_same_whether_the_output_is_there_or_not_and_computes_nothing(data, tmp_path, capsys):
    output = tmp_path / "out"
    words = [*job_words(data, "packed.nii.gz", 2), "--output", str(output), "--memory", "200MiB"]
    before = planned(words, capsys)
    assert not output.exists()
    names = [stage["name"] for stage in before["stages"]]
    assert names == ["examine inputs", "convert run 1", "convert run 2", "fit", "maps of d"]
    assert before["memory"] == 200 * MIB
    assert before["disk"]["needed"] > 0
    assert call(["-q", *words], capsys)[0] == 0
    files = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    after = planned(words, capsys)
    assert after["stages"] == before["stages"]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == files
    # For people.
    code, out, _ = call([*words, "--plan"], capsys)
    assert code == 0
    for text in ("maps of d", "voxel blocks", "at a time", "200 MiB", "Disk: about", "--dry-run"):
        assert text in out


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (("packed.nii.gz", 1, "--mask", "full.nii.gz"), ("--n-threads", "3", "--memory", "1GiB")),
        (("packed.nii.gz", 1), ("--n-threads", "8", "--memory", "220MiB")),
    ],
    ids=["one pass", "from stores"],
)
def test_plan__is_what_the_job_does(data, tmp_path, capsys, monkeypatch, case, options):
    used = []
    convert_run, pool, threads = job.convert_run, streamed.ThreadPoolExecutor, job.threads

    def converting(source, store, *, memory, n_threads, **given):
        used.append(("convert", n_threads))
        return convert_run(source, store, memory=memory, n_threads=n_threads, **given)

    def estimating(n):
        used.append(("estimate", n))
        return pool(n)

    def computing(n):
        used.append(("compute", n))
        return threads(n)

    monkeypatch.setattr(job, "convert_run", converting)
    monkeypatch.setattr(streamed, "ThreadPoolExecutor", estimating)
    monkeypatch.setattr(job, "threads", computing)
    words = [*job_words(data, *case), *options, "--output", str(tmp_path / "out")]
    stages = {one["name"]: one["at_a_time"] for one in planned(words, capsys)["stages"]}
    assert call(["-q", *words], capsys)[0] == 0
    assert ("compute", stages["maps of d"]) in used
    if "fit" not in stages:
        assert stages["convert and fit run 1"] == stages["estimate run 1"] == 3
        assert {("convert", 3), ("estimate", 3)} < set(used)
    else:
        assert 1 < stages["fit"] < 8
        assert ("compute", stages["fit"]) in used
        # What is asked for at most; the conversion itself finds the same as the plan.
        assert ("convert", 8) in used
        assert not any(what == "estimate" for what, _ in used)
