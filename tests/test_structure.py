"""Imports go down only, and the two walls stand: bookkeeping without jax, models without requests."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A module of jinfer may import from its own floor and from those below it. Every part has a floor.
FLOORS = [
    {
        "config",
        "mesh",
        "errors",
        "interrupts",
        "token_ids",
        "text",
        "cli",
        "compile_cache",
        "platform",
        "assets",
    },
    {"layers", "weights"},
    {"models", "sampling", "cache"},
    {"pooling", "defaults"},
    {"request"},
    {"schedule", "outputs", "kv_plan", "stats"},
    {"packing", "slots", "step", "admission"},
    {"programs", "weight_update"},
    {"runner"},
    {"engine", "async_engine"},
    {"llm", "scoring", "prompts", "arguments"},
    {"serve", "__init__"},
]
FLOOR = {part: height for height, parts in enumerate(FLOORS) for part in parts}
HOST_ONLY = {
    "cache",
    "schedule",
    "request",
    "outputs",
    "config",
    "cli",
    "text",
    "pooling",
    "defaults",
    "stats",
    "interrupts",
}


def imports(file: Path) -> list[str]:
    """Every module or name a file imports, at any depth, as dotted absolute names."""
    names = []
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def part(file: Path) -> str:
    return Path(file.relative_to(ROOT / "jinfer").parts[0]).stem


def imported_by(folder: str) -> list[tuple[Path, str]]:
    return [(file.relative_to(ROOT), name) for file in files(folder) for name in imports(file)]


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_kernels_stand_alone():
    assert [
        pair for pair in imported_by("pallas_kernels") if within(pair[1], "jinfer", "serve", "tools")
    ] == []


def test_engine_does_not_know_its_users():
    upward = [pair for pair in imported_by("jinfer") if within(pair[1], "serve", "tools")]
    # jinfer/serve.py is the door: it joins the engine with the server, and nothing else imports it.
    assert [pair for pair in upward if pair[0] != Path("jinfer/serve.py") or within(pair[1], "tools")] == []


def test_every_part_of_the_engine_has_a_floor():
    assert sorted({part(file) for file in files("jinfer")} - FLOOR.keys()) == []


def test_imports_inside_the_engine_go_down():
    wrong = []
    for file in files("jinfer"):
        for name in imports(file):
            below = name.split(".")[1] if name.startswith("jinfer.") else ""
            if below in FLOOR and FLOOR[below] > FLOOR.get(part(file), len(FLOORS)):
                wrong.append((str(file.relative_to(ROOT)), name))
    assert wrong == []


def test_host_bookkeeping_does_not_import_jax():
    host = [file for file in files("jinfer") if part(file) in HOST_ONLY]
    assert [(file.name, name) for file in host for name in imports(file) if within(name, "jax", "flax")] == []


def test_models_and_layers_see_arrays_not_requests():
    pairs = imported_by("jinfer/models") + imported_by("jinfer/layers")
    assert [pair for pair in pairs if within(pair[1], "jinfer.request", "jinfer.schedule")] == []


def test_server_uses_public_names_only():
    private = {part(file) for file in files("jinfer")} - {"__init__"}
    names = [(file, name.split(".")) for file, name in imported_by("serve") if within(name, "jinfer")]
    assert [(file, name) for file, name in names if len(name) > 2 or name[-1] in private] == []
