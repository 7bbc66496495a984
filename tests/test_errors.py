"""Every kind of error is documented, is a builtin kind too, and is raised somewhere."""

import ast
import inspect
from pathlib import Path

import pytest

import chunkglm as cg
from chunkglm import errors

KINDS = [
    one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, errors.ChunkGLMError)
]
CONCRETE = [one for one in KINDS if one is not errors.ChunkGLMError]


def raised():
    """Names of what is raised or made as an error anywhere in the package."""
    found = set()
    for path in Path(cg.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found.add(node.func.id)
            if isinstance(node, ast.Call):
                found |= {one.id for one in node.args if isinstance(one, ast.Name)}
    return found


@pytest.mark.parametrize("kind", CONCRETE, ids=lambda kind: kind.__name__)
def test_a_kind(kind):
    builtin = [
        one
        for one in kind.__mro__
        if one.__module__ == "builtins" and one not in (Exception, BaseException, object)
    ]
    assert builtin, "a caller can catch it as a builtin kind"
    assert len(inspect.getdoc(kind)) > 20
    assert kind.__name__ in raised()
    with pytest.raises(builtin[0]):
        raise kind("words")
    assert str(kind("words")) == "words"


def test_the_module_describes_its_kinds():
    text = inspect.getdoc(errors)
    for kind in CONCRETE:
        assert kind.__name__ in text
