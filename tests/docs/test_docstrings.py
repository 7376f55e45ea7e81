"""What docstrings of public names say: arguments and fields, shapes of tensors, units, errors."""

import ast
import dataclasses
import inspect
import re
import textwrap

import pytest

import kvruntime

UNITS = {
    "bytes": r"bytes|MiB|GiB",
    "seconds": r"seconds|\bs\b",
    "pages": "pages",
    "tokens": "token",
}
CHECKS = {  # whose name says what they raise
    "check_positive": "ValueError",
    "require": "WillNeverFit",
    "row_numbers": "ValueError",
}


def said(thing, owner=None):
    """The docstring, and that of its class, whose words hold for its methods."""
    return " ".join(f"{inspect.getdoc(thing) or ''}\n{inspect.getdoc(owner) or ''}".split())


def callables():
    for name in kvruntime.__all__:
        thing = getattr(kvruntime, name)
        if inspect.isfunction(thing):
            yield pytest.param(thing, None, id=name)
        elif inspect.isclass(thing) and not issubclass(thing, Exception):
            for method, value in vars(thing).items():
                function = value.__func__ if isinstance(value, classmethod) else value
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield pytest.param(function, thing, id=f"{name}.{method}")


def classes():
    for name in kvruntime.__all__:
        thing = getattr(kvruntime, name)
        if inspect.isclass(thing):
            yield pytest.param(thing, id=name)


@pytest.mark.parametrize(("function", "owner"), [*callables()])
def test_every_argument_is_explained(function, owner):
    text = said(function, owner)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", "cls") or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        assert re.search(rf"\b{name}\b", text), f"{name} is not in: {text}"


@pytest.mark.parametrize(("function", "owner"), [*callables()])
def test_tensors_have_shapes(function, owner):
    annotations = map(str, inspect.get_annotations(function).values())
    if any(re.search(r"\b(Tensor|NDArray)\b", one) for one in annotations):
        assert re.search(r"\[[\w, *+:.]+\]|row numbers", said(function, owner))


@pytest.mark.parametrize(("function", "owner"), [*callables()])
def test_errors_are_named(function, owner):
    """Those that its own lines raise, and those of checks that it calls."""
    tree, raised = ast.parse(textwrap.dedent(inspect.getsource(function))), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            raised.add(getattr(node.exc.func, "id", None))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in CHECKS:
            raised.add(CHECKS[node.func.id])
    text = said(function, owner)
    for error in raised - {None, "AssertionError"}:
        assert re.search(rf"[Rr]aises?\b.*\b{error}\b", text), f"{error} is not in: {text}"


@pytest.mark.parametrize("thing", [*classes()])
def test_fields_are_explained_with_their_units(thing):
    text = said(thing)
    for name in (
        [one.name for one in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
    ):
        assert re.search(rf"\b{name}\b", text), f"{name} is not in: {text}"
        for ending, unit in UNITS.items():
            if name.endswith(f"_{ending}"):
                assert re.search(unit, text), f"{name}: in what unit?"


@pytest.mark.parametrize("thing", [*classes()])
def test_errors_say_when_and_what_was_changed(thing):
    if issubclass(thing, Exception) and thing is not kvruntime.KVRuntimeError:
        text = said(thing)
        assert len(text.split()) >= 6, text
