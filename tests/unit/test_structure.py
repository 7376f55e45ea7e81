"""Imports go one way, the public names are the promised ones, and files stay readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvruntime

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("allocator", "policies", "kvruntime")
ORDER = [  # a module imports only from modules further down
    {"cli"},
    {"device", "demo"},
    {"calibration"},
    {"adapters"},
    {"cache"},
    {"executor"},
    {"scheduler", "attention", "quality", "reference"},
    {"pool"},
    {"plan", "quantize"},
    {"catalogue", "formats"},
    {"errors"},
]


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_two_lower_packages_stand_alone():
    for path, name in modules():
        roots = {module.split(".")[0] for module in imports(path)}
        package = name.split(".")[0]
        if package == "allocator":
            assert not roots & {"torch", "policies", "kvruntime"}, name
        elif package == "policies":
            assert not roots & {"allocator", "kvruntime"}, name


def floor(name):
    part = name.split(".")[1]
    return next((i for i, names in enumerate(ORDER) if part in names), None)


def test_imports_inside_kvruntime_go_one_way():
    for path, name in modules():
        if not name.startswith("kvruntime.") or name == "kvruntime.__init__":
            continue
        mine = floor(name)
        assert mine is not None, f"{name} has no place in the order"
        for module in imports(path):
            if module.startswith("kvruntime."):
                same = module.split(".")[1] == name.split(".")[1]
                assert same or floor(module) > mine, f"{name} imports {module}"


def test_only_the_attention_back_ends_may_import_xformers():
    for path, name in modules():
        if not name.startswith("kvruntime.attention"):
            assert "xformers" not in {module.split(".")[0] for module in imports(path)}


def test_no_pickle_but_in_training():
    for path, name in modules():
        text = path.read_text()
        if not name.endswith("reference.train"):
            assert "torch.load" not in text and "import pickle" not in text, name
        assert "torch.load" not in text or "weights_only=True" in text


def test_files_stay_readable():
    for path, name in modules():
        assert len(path.read_text().splitlines()) <= 400, name


def test_public_names():
    assert set(kvruntime.__all__) == {
        "attach",
        "plan",
        "PagedKVCache",
        "KVRuntimeError",
        "OutOfPages",
        "PageStateError",
        "WillNeverFit",
        "ScheduleError",
        "BackendUnavailable",
        "UnsupportedModel",
    }
    for name in kvruntime.__all__:
        thing = getattr(kvruntime, name)
        assert thing.__doc__, f"{name} is not documented"
        if name not in ("attach", "plan", "PagedKVCache"):
            assert issubclass(thing, kvruntime.KVRuntimeError)
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").exists()


def test_importing_is_quiet_and_leaves_plotting_alone():
    code = "import sys, kvruntime; assert not {'matplotlib', 'xformers', 'PIL'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_foreign_package_of_the_same_name_is_named(tmp_path):
    (tmp_path / "policies.py").write_text("")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "import allocator, policies\n"
        "try:\n    import kvruntime\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "needs its own package 'policies'" in done.stdout, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_are_documented(package):
    for path, name in modules():
        if name.split(".")[0] != package:
            continue
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or (path.name == "__init__.py" and not tree.body), name
