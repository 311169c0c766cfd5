"""Imports go one way: utils <- modules, dataset <- train, predict <- tools."""

import ast

from conftest import ROOT

LEVELS = {"utils": 0, "modules": 1, "dataset": 1, "train": 2, "predict": 2, "tools": 3}


def imports(path):
    """The first part of the name of every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_go_one_way():
    files = [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("tools/*.py")]
    found = [(path.relative_to(ROOT).parts[0].removesuffix(".py"), name) for path in files
             for name in imports(path) if name in LEVELS]
    assert ("train", "utils") in found and {room for room, _ in found} == set(LEVELS)
    wrong = [(room, name) for room, name in found if LEVELS[name] >= LEVELS[room]
             and not (room == name in ("utils", "tools"))]
    assert not wrong
