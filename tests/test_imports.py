"""Imports point one way, `--help` loads no torch, and nothing unpickles or runs remote code."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("steer_heal/**/*.py"), *ROOT.glob("eval/**/*.py")])

# From the ground up; a module imports from rows above its own, and from its own where said so.
ROWS: tuple[tuple[frozenset[str], bool], ...] = (
    (frozenset({"config", "records", "artifacts", "losses", "fresh", "model_folder"}), True),
    (
        frozenset(
            {
                "stack",
                "hooks",
                "changes",
                "stages",
                "rounds",
                "gate",
                "trait",
                "model",
                "scoring",
                "steering",
                "condition",
                "headroom",
                "brokenness",
                "drafts",
                "gates",
                "overlap",
                "manifest",
                "trainer",
                "targets",
                "head",
                "reach",
                "memory",
                "batch_sizes",
                "plan",
                "case",
                "checks",
                "servable",
                "merge",
                "vector_files",
                "imported",
                "cache",
                "proof",
            }
        ),
        True,
    ),
    (
        frozenset(
            {"doctor", "vector", "dose", "generate", "calibrate", "filter", "heal", "evaluate"}
        ),
        False,
    ),
    (
        frozenset(
            {
                "unbarred",
                "loop",
                "saved",
                "summary",
                "wording",
                "guards",
                "round_table",
                "watch",
                "figures",
                "report",
                "progress",
                "verdict",
                "browse",
                "palette",
                "page",
                "chart",
                "charts",
                "drift_map",
                "round_charts",
                "filter_charts",
                "drift_table",
                "compare",
                "compare_page",
                "listing",
                "judge",
                "apart",
                "bench",
                "speed",
                "side_by_side",
                "speed_models",
                "speed_sampling",
                "speed_heal",
                "peers",
                "studies",
                "study_table",
                "study",
                "card",
                "export",
                "examine",
                "chat",
                "chat_server",
                "pictures",
                "lint",
            }
        ),
        True,
    ),
    (frozenset({"cli"}), False),
    (frozenset({"__main__"}), False),
)
APART = "organism"  # trains the embedded model; the loop knows nothing of it


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> list[str]:
    """Full dotted names, wherever in the file the import stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            module = node.module or ""
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def own_modules(names: list[str]) -> set[str]:
    """Modules of steer_heal by their first part: steer_heal.organism.world -> organism."""
    modules = {path.stem for path in ROOT.glob("steer_heal/*.py")} | {APART}
    parts = [name.split(".") for name in names if name.split(".")[0] == "steer_heal"]
    return {part[1] for part in parts if len(part) > 1 and part[1] in modules}


def row_of(module: str) -> int:
    rows = [index for index, (names, _) in enumerate(ROWS) if module in names]
    assert len(rows) == 1, f"steer_heal/{module}.py has no place in the order of imports"
    return rows[0]


def top_level() -> list[Path]:
    return [path for path in ROOT.glob("steer_heal/*.py") if path.stem != "__init__"]


def test_imports_point_one_way() -> None:
    wrong = []
    for path in top_level():
        row = row_of(path.stem)
        inside = ROWS[row][1]
        for name in own_modules(imported(parsed(path))):
            if name == APART or row_of(name) > row or (row_of(name) == row and not inside):
                wrong.append(f"{path.stem} -> {name}")
    assert wrong == []


def test_no_import_goes_round_in_a_circle() -> None:
    """Within a row too: whoever is imported does not, in turn, import the importer."""
    edges = {path.stem: own_modules(imported(parsed(path))) for path in top_level()}

    def reach(module: str, seen: tuple[str, ...]) -> None:
        assert module not in seen, " -> ".join((*seen, module))
        for name in sorted(edges.get(module, ())):
            reach(name, (*seen, module))

    for module in edges:
        reach(module, ())


def test_no_stage_imports_another() -> None:
    stages = ROWS[2][0]
    for stage in stages:
        path = ROOT / "steer_heal" / f"{stage}.py"
        assert not own_modules(imported(parsed(path))) & stages, stage


def test_the_loop_imports_every_stage() -> None:
    """Else the rule above would hold of files that nobody runs."""
    assert ROWS[2][0] <= own_modules(imported(parsed(ROOT / "steer_heal" / "loop.py")))


def test_reports_load_no_model() -> None:
    """They read saved files alone: nothing that they reach can load or run one."""
    edges = {path.stem: own_modules(imported(parsed(path))) for path in top_level()}
    reached = {"report", "compare_page", "listing"}
    while more := {name for module in reached for name in edges[module]} - reached:
        reached |= more
    assert not reached & ({"model", "stack", "hooks", "scoring", "loop"} | ROWS[2][0])


def test_probes_know_nothing_of_rounds() -> None:
    probes = sorted(ROOT.glob("eval/**/*.py"))
    assert len(probes) > 5
    for path in probes:
        names = imported(parsed(path))
        assert not [name for name in names if name.split(".")[0] == "steer_heal"], path


def test_the_embedded_model_is_trained_without_the_loop() -> None:
    for path in ROOT.glob("steer_heal/organism/*.py"):
        assert own_modules(imported(parsed(path))) <= {APART, "errors", "config", "hooks"}, path


def test_only_one_file_of_the_loop_registers_hooks() -> None:
    found = [path.stem for path in top_level() if "register_forward" in path.read_text()]
    assert found == ["hooks"]


PICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
LOADERS = {"np.load", "numpy.load", "pickle.load", "pickle.loads", "torch.save"}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_remote_code(path: Path) -> None:
    tree = parsed(path)
    assert not {name.split(".")[0] for name in imported(tree)} & PICKLES
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        assert called(call) not in LOADERS, f"line {call.lineno}"
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        assert called(call) != "torch.load" or "weights_only" in given, f"line {call.lineno}"
        for name, bad in (("trust_remote_code", True), ("weights_only", False)):
            value = given.get(name)
            assert not (isinstance(value, ast.Constant) and value.value is bad), (
                f"{name}={bad} in line {call.lineno}"
            )
            assert name not in given or isinstance(value, ast.Constant), f"line {call.lineno}"


def in_a_fresh_process(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


HEAVY = "{'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'matplotlib', 'plotly'}"


def test_the_command_line_imports_no_torch() -> None:
    done = in_a_fresh_process(
        f"import sys, steer_heal.cli; print(sorted({HEAVY} & set(sys.modules)))"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def loaded_by(command: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """A command that has ended, and the heavy modules that it loaded."""
    done = in_a_fresh_process(
        "import sys, atexit\n"
        f"atexit.register(lambda: print('LOADED', sorted({HEAVY} & set(sys.modules))))\n"
        f"sys.argv = {['steer-heal', *command.split()]!r}\n"
        "from steer_heal.cli import main; main()"
    )
    return done, done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("command", ["--help", "round --help", "settings"])
def test_help_imports_no_torch(command: str) -> None:
    done, loaded = loaded_by(command)
    assert (done.returncode, loaded) == (0, "LOADED []"), done.stderr
    assert len(done.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    "setting", ["model=/nowhere", "trait=nowhere", "evaluate.suite=nowhere", "heal.rank=0"]
)
def test_what_a_run_cannot_be_made_of_is_refused_before_torch_is_loaded(setting: str) -> None:
    done, loaded = loaded_by(f"round {setting}")
    assert (done.returncode, loaded) == (2, "LOADED []"), done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
