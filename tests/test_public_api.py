"""What `import peerd` offers is whole: each exported signature is written with exported types only."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module

import pytest

import peerd

# open_peer, Peer.model, SwarmModel.session and so on make these: applications never call the classes themselves.
MADE_FOR_THE_APPLICATION = {"Peer", "SwarmModel", "Session", "Generation", "Pass", "Checkpoint", "ServedBlocks"}
# What peerd's own rooms use of one another, and no application should.
BETWEEN_ROOMS = {
    *(
        "Peer.prober",
        "Peer.relay",
        "Peer.reservations",
        "Session.how_far",
        "Session.live",
        "Session.draw",
        "Session.observe",
        "Session.submit",
        "ServedSpan.adapter_room",
        "ServedSpan.head",
        "ServedSpan.task",
        "Checkpoint.grid",
        "Checkpoint.read_codes",
        "Checkpoint.weights",
        "ServedBlocks.meters",
        "SwarmModel.compiled",
        "SwarmModel.end_answer",
        "SwarmModel.head",
        "SwarmModel.meters",
        "SwarmModel.open_span",
        "SwarmModel.prepare_grammars",
        "SwarmModel.score",
        "SwarmModel.start_answer",
        "ChainRules.permitted",
        "Manifest.permits",
    ),
    *(f"{facade}.swarm" for facade in peerd.__all__ if facade.startswith("RemoteModel")),
}
CALLABLE = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(import_module(module)))


@cache
def names_in(module: str) -> dict[str, tuple[str, str]]:
    """The names that a module imports, for type checkers too: where each comes from, and what it is called there."""
    found = {}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found[alias.asname or alias.name] = (node.module, alias.name)
    return found


def definition(module: str, name: str) -> tuple[str, ast.stmt | None]:
    """Where a name is defined, and the statement that does it; None where that is not in peerd."""
    for node in tree_of(module).body:
        if isinstance(node, (ast.ClassDef, *CALLABLE)) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets):
            return module, node
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return module, node
    source, original = names_in(module).get(name, ("", ""))
    return definition(source, original) if source.startswith("peerd.") else (source, None)


def types_in(module: str, annotation: ast.expr | None) -> Iterator[str]:
    """The names of peerd's own types in an annotation; aliases are looked through, unless they are exported."""
    if annotation is None:
        return
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from types_in(module, ast.parse(node.value, mode="eval").body)
        elif isinstance(node, ast.Name):
            where, statement = definition(module, node.id)
            if isinstance(statement, ast.ClassDef) or (statement is not None and node.id in peerd.__all__):
                yield f"{where}.{node.id}"
            elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and not isinstance(statement.value, ast.Call):
                yield from types_in(where, statement.value)


def signature_types(module: str, function: ast.stmt) -> Iterator[str]:
    assert isinstance(function, CALLABLE)
    arguments = function.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        yield from types_in(module, argument.annotation if argument else None)
    yield from types_in(module, function.returns)


def public_types(name: str) -> Iterator[tuple[str, str]]:
    """Each public signature or field of an exported thing, inherited ones too, with a type of peerd's in it."""
    yield from public_types_of(name, *definition(peerd._MODULE_OF.get(name, peerd._ERRORS), name))


def public_types_of(name: str, module: str, statement: ast.stmt | None) -> Iterator[tuple[str, str]]:
    if isinstance(statement, CALLABLE):
        yield from ((name, found) for found in signature_types(module, statement))
    if not isinstance(statement, ast.ClassDef):
        return
    for base in statement.bases:
        if isinstance(base, ast.Name):
            yield from public_types_of(name, *definition(module, base.id))
    for node in statement.body:
        if isinstance(node, CALLABLE):
            is_ours = node.name == "__init__" and name in MADE_FOR_THE_APPLICATION
            if not is_ours and (not node.name.startswith("_") or node.name.startswith("__")):
                yield from ((f"{name}.{node.name}", found) for found in signature_types(module, node))
        elif (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
        ):
            yield from ((f"{name}.{node.target.id}", found) for found in types_in(module, node.annotation))


def exported() -> set[str]:
    found = set()
    for name in peerd.__all__:
        if name != "__version__":
            module, _ = definition(peerd._MODULE_OF.get(name, peerd._ERRORS), name)
            found.add(f"{module}.{name}")
    return found


@pytest.mark.parametrize("name", [name for name in peerd.__all__ if name != "__version__"])
def test_an_exported_signature_has_exported_types_only(name: str) -> None:
    missing = {(where, found) for where, found in public_types(name) if found not in exported()}
    assert {(where, found) for where, found in missing if where not in BETWEEN_ROOMS} == set()


def test_what_is_exported_is_there_and_named_alike_for_type_checkers() -> None:
    for name in peerd.__all__:
        assert getattr(peerd, name) is not None
    checked = next(node for node in ast.walk(tree_of("peerd")) if isinstance(node, ast.If))
    for_checkers = {}
    for node in checked.body:
        if isinstance(node, ast.ImportFrom):
            for_checkers |= {alias.name: node.module for alias in node.names}
    at_run_time = {name: peerd._MODULE_OF.get(name, peerd._ERRORS) for name in peerd.__all__ if name != "__version__"}
    assert for_checkers == at_run_time
    assert {name: definition(module, name)[0] for name, module in at_run_time.items()} == at_run_time
    assert set(peerd._MODULE_OF) <= set(peerd.__all__)


def test_importing_peerd_loads_no_torch() -> None:
    program = "import peerd, sys; peerd.open_peer; peerd.Span; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
