"""Imports go one way, the public names are the promised ones, and files stay readable."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import kvruntime

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("allocator", "policies", "kvruntime")
READ = (*PACKAGES, "tests", "benchmarks")
FLOORS = [  # of kvruntime, from the ground up: a module imports only from floors below its own
    "errors sizes arguments extras frames tracing catalogue storage step reference.tokenizer "
    "reference.emoji",
    "storage.layout storage.memory storage.transfer planning.positions planning.baseline "
    "planning.occupancy",
    "storage.records storage.pages storage.coding planning.shapes models.stand_ins quality",
    "coding storage.pool planning.regions models.checkout models.prompts",
    "options reference.transformer planning.steps",
    "planning.workspace planning.demand planning.roles planning.formats attention.base reference "
    "preset attention.operators models.var",
    "planning.fit planning.rows stats attention.sdpa models.infinity models.emoji reference.train",
    "planning attention.xformers models admission.demand cards",
    "attention attention.cubin step.prepare admission.ledger planning.compare",
    "step.read step.encode admission.shared",
    "step.commit admission.ticket",
    "step.choose step.keep step.refit step.shift admission.admission",
    "step.fold admission",
    "step.run device calls",
    "generation",
    "telemetry",
    "cache origin adapters.embedding adapters.recognition",
    "adapters.interception adapters.locks adapters.caches adapters.emoji adapters.var "
    "adapters.infinity",
    "adapters.serving",
    "adapters.patching",
    "adapters.attachment",
    "adapters.parity",
    "adapters",
    "fold_errors tuning evaluation demo.compare report report.record",
    "report.capture report.charts",
    "report.page demo.trio sampling",
    "demo.pictures demo.table",
    "calibration demo demo.variations cli.common cli.building cli.room",
    "cli.demo cli.doctor cli.plan cli.models cli.sample cli.evaluate cli.vary cli.report",
    "cli",
    "__main__",
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}


def modules(packages=PACKAGES):
    """Each file and its dotted name; a package has the name of its folder."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield path, name.removesuffix(".__init__")


def imports(path):
    """Dotted names of everything a file imports, inside functions too; a name that is imported from
    a package counts as that module where it is one.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def test_the_two_lower_packages_stand_alone():
    for path, name in modules():
        roots = {module.split(".")[0] for module in imports(path)}
        package = name.split(".")[0]
        if package == "allocator":
            assert not roots & {"torch", "policies", "kvruntime"}, name
        elif package == "policies":
            assert not roots & {"allocator", "kvruntime"}, name
        else:
            assert not roots & {"tests", "benchmarks"}, name


def test_imports_inside_kvruntime_go_one_way():
    names = [name for _, name in modules(["kvruntime"]) if name != "kvruntime"]
    assert sorted(names) == sorted(f"kvruntime.{name}" for name in FLOOR), "each has its floor"
    for path, name in modules(["kvruntime"]):
        if name == "kvruntime":
            continue
        mine = FLOOR[name.removeprefix("kvruntime.")]
        for module in imports(path):
            if module.split(".")[0] == "kvruntime":
                below = FLOOR.get(module.removeprefix("kvruntime."), len(FLOORS))
                assert below < mine, f"{name} imports {module}"


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("errors sizes", "storage"),
        ("storage", "step generation cache adapters"),
        ("planning", "step generation cache adapters attention.xformers"),
        ("attention", "step.run generation cache"),
        ("step", "generation cache adapters"),
        ("generation", "cache adapters"),
        ("cache", "adapters.attachment adapters calibration demo cli"),
        ("calibration demo device", "cli"),
    ],
)
def test_the_floors_are_those_of_the_design(lower, upper):
    def of(names):
        return [
            FLOOR[name]
            for name in FLOOR
            if any(name == wanted or name.startswith(f"{wanted}.") for wanted in names.split())
            and name not in ("storage", "step", "attention.cubin", "cli.common")
        ]

    if "attention.xformers" in upper:  # it asks a plan for its formats
        upper = upper.replace(" attention.xformers", "")
        assert FLOOR["attention.xformers"] > FLOOR["planning.demand"]
    assert min(of(upper)) >= max(of(lower)), (lower, upper)


def test_allocator_and_policies_import_downwards_too():
    """Files of each import in one order: none imports one that imports it, however far."""
    graph = {}
    for path, name in modules(["allocator", "policies"]):
        graph[name] = {module for module in imports(path) if module.startswith(name.split(".")[0])}
    done = set()
    while len(done) < len(graph):
        ready = {name for name in graph if name not in done and graph[name] <= done | {name}}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_only_the_attention_back_ends_may_import_xformers_or_triton():
    for path, name in modules(READ):
        if name.startswith(("kvruntime.attention", "tests.interpreter")):
            continue
        roots = {module.split(".")[0] for module in imports(path)}
        assert "xformers" not in roots, name
        if name.split(".")[0] in PACKAGES:
            assert "triton" not in roots, name


def test_no_pickle_but_in_training():
    for path, name in modules():
        text = path.read_text()
        assert "import pickle" not in text or name.endswith("reference.train"), name
        assert text.count("torch.load(") == text.count("weights_only=True"), name


@pytest.mark.parametrize("package", READ)
def test_files_stay_readable(package):
    for path, name in modules([package]):
        lines = path.read_text().splitlines()
        assert len(lines) <= 300, f"{name}: {len(lines)} lines"


def test_functions_stay_readable():
    """At most 70 lines, signature and docstring included."""
    for path, name in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, f"{name}.{node.name}"


PUBLIC = set(
    """
    Admission AdmissionStats Allocation BackendUnavailable CacheGeometry CacheOptions Cancelled
    Embedding EmbeddingError Generation KVRuntimeError OutOfPages PageStateError PagedKVCache Parity
    Policy Pool PoolStats Provenance QueueFull ScaleSchedule ScheduleError Selection Snapshot
    Stats Ticket UnsupportedModel WillNeverFit attach check plan provenance snapshot
    """.split()
)


def test_public_names():
    assert set(kvruntime.__all__) == PUBLIC and kvruntime.__all__ == sorted(kvruntime.__all__)
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").exists()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name):
    """Their docstring, and that of each of their methods that needs explaining."""
    thing = getattr(kvruntime, name)
    own = thing.__doc__ or ""
    assert own.strip() and not own.startswith(f"{name}("), f"{name} has no docstring of its own"
    if inspect.isclass(thing) and issubclass(thing, Exception):
        assert issubclass(thing, kvruntime.KVRuntimeError)
        return
    if not inspect.isclass(thing):
        return
    for method, value in vars(thing).items():
        if inspect.isfunction(value) and not method.startswith("_"):
            arguments = set(inspect.signature(value).parameters) - {"self"}
            assert value.__doc__ or not arguments, f"{name}.{method}"


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


def test_modules_are_documented():
    for path, name in modules(READ):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or (path.name == "__init__.py" and not tree.body), name
