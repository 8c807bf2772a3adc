"""The package as installed: its stub, its version, its public names."""

import ast
import importlib.metadata
import importlib.resources
import inspect
import types

import pybn
from pybn import _core

PACKAGE = importlib.resources.files("pybn")


def public(names):
    return {name for name in names if not name.startswith("_") or name == "__version__"}


def stub():
    return ast.parse((PACKAGE / "_core.pyi").read_text()).body


def parameter_names(function):
    arguments = function.args
    assert arguments.kwarg is None
    star = [] if arguments.vararg is None else ["*" + arguments.vararg.arg]
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args)] + star + [a.arg for a in arguments.kwonlyargs]


def test_the_stub_has_the_names_of_the_core():
    names = set()
    for node in stub():
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    assert public(names) == public(vars(_core))


def test_the_stub_has_the_parameters_of_the_core():
    compared = 0
    for node in stub():
        if isinstance(node, ast.FunctionDef):
            signature, *overloads = getattr(_core, node.name).__doc__.strip().splitlines()
            assert not overloads, node.name
            (actual,) = ast.parse(f"def {signature}: ...").body
            assert parameter_names(node) == parameter_names(actual), node.name
            compared += 1
    assert compared >= 15


def test_the_stub_has_the_types_of_the_attributes():
    types_of = {node.target.id: ast.unparse(node.annotation) for node in stub() if isinstance(node, ast.AnnAssign)}
    assert types_of
    for name, type_name in types_of.items():
        value = getattr(_core, name)
        assert type(value).__name__ == type_name.partition("[")[0]
        if type_name == "tuple[str, ...]":
            assert value
            assert all(type(item) is str for item in value)


def test_there_is_one_version():
    assert pybn.__version__ == _core.__version__ == importlib.metadata.version("pybn")


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_all_is_sorted_and_names_everything_public():
    assert pybn.__all__ == sorted(set(pybn.__all__))
    ours = {
        name
        for name, value in vars(pybn).items()
        if not isinstance(value, types.ModuleType) and getattr(value, "__module__", "").startswith("pybn")
    }
    assert public(ours) - {"configure_from_environment"} <= set(pybn.__all__)


def test_everything_public_exists_and_is_documented():
    for name in pybn.__all__:
        value = getattr(pybn, name)
        assert inspect.getdoc(value), name
        if inspect.isclass(value):
            for method, function in inspect.getmembers(value, inspect.isfunction):
                assert method.startswith("_") or inspect.getdoc(function), f"{name}.{method}"


def test_parameters_of_public_functions_are_annotated():
    for name in pybn.__all__:
        value = getattr(pybn, name)
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(p.annotation is not p.empty for p in signature.parameters.values()), name
