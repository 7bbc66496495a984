"""The page for clusters says nothing that does not exist: options, settings and names; most of it needs no cluster to know."""

import ast
import re
import shlex
from pathlib import Path

import click
import dask
import pytest
import yaml

import chunkglm as cg
from chunkglm import cli
from chunkglm import cluster as clusters

PAGE = Path(__file__).parents[1] / "notebooks" / "cluster.md"


def blocks(text, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text):
    """The commands of chunkglm and dask in the shell's blocks and in the text, with variables replaced, as lists of words."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    variables = dict(
        re.fullmatch(r'(job|address)="?(.*?)"?', line).groups()
        for line in lines
        if line.startswith(("job=", "address="))
    )
    found = []
    for line in lines:
        for name, value in variables.items():
            line = line.replace(f"${name}", "tcp://host:8786" if name == "address" else value)  # noqa: PLW2901
        for program in ("chunkglm", "dask"):
            match = re.match(rf"(srun (--\S+ )*)?({program} .*?)( &)?$", line)
            if match:
                found.append(shlex.split(match[3], comments=True))
    return found


def parse(words):
    """Have a command's words read as its program would read them, and nothing more."""
    if words[0] == "chunkglm":
        command = cli.cli.commands[words[1]]
    else:
        module = pytest.importorskip(
            f"distributed.cli.dask_{words[1]}", reason="distributed is not installed"
        )
        command = module.main
    return command.make_context(words[1], words[2:])


def test_commands__have_the_options_that_are_given():
    found = commands(PAGE.read_text(encoding="utf-8"))
    verbs = {" ".join(words[:2]) for words in found}
    assert verbs == {"chunkglm check", "chunkglm run", "dask scheduler", "dask worker"}
    assert len(found) >= 9
    for words in found:
        context = parse(words)
        if words[1] == "run":
            scheduler, workers = context.params["scheduler"], context.params["workers"]
            clusters.check_scheduler(scheduler, workers, context.params["performance_report"])
            assert len(context.params["runs"]) == len(context.params["designs"]) == 2


def test_options_in_the_text_exist():
    text = re.sub(r"^```.*?^```$", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    quoted = {
        option
        for span in re.findall(r"`([^`]+)`", text)
        if not span.startswith(("salloc", "#SBATCH", "srun"))
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)
    }
    ours = {name for option in cli.cli.commands["run"].params for name in option.opts}
    worker = pytest.importorskip("distributed.cli.dask_worker", reason="distributed is not installed").main
    known = ours | {name for option in worker.params for name in option.opts}
    assert quoted
    assert sorted(quoted - known) == []


def test_the_settings_of_slurm_jobs_are_understood():
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    (text,) = blocks(PAGE.read_text(encoding="utf-8"), "yaml")
    settings = yaml.safe_load(text)["jobqueue"]["slurm"]
    with (
        dask.config.set({f"jobqueue.slurm.{name}": value for name, value in settings.items()}),
        clusters.slurm_cluster(8, 2**30) as cluster,
    ):
        script = cluster.job_script()
    assert "#SBATCH --cpus-per-task=4" in script
    assert "#SBATCH --mem=4G" in script
    assert "--nworkers 4" in script
    assert "#SBATCH -p normal" in script


def test_python__names_what_there_is():
    found = blocks(PAGE.read_text(encoding="utf-8"), "python")
    assert found
    for block in found:
        used = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cg"
        }
        assert used
        assert sorted(used - set(dir(cg))) == []


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (PAGE.parent / target).exists()


def test_the_check_sees_an_option_that_is_not_there():
    text = "```bash\nchunkglm run run1.nii.gz --design d.csv --contrast a --output o --in-the-cloud\n```\n"
    (words,) = commands(text)
    with pytest.raises(click.NoSuchOption, match="in-the-cloud"):
        parse(words)
