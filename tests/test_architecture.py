"""The table in docs/architecture.md is the law: this reads it, reads every import, and names those that break it."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path for package in ("smpl_jax", "chatpose_jax") for path in (ROOT / package).rglob("*.py"))
OPEN_TO_ALL = {
    "chatpose_jax.errors",
    "chatpose_jax.locks",
    "chatpose_jax.named",
    "chatpose_jax.orbax_s3",
    "chatpose_jax.processes",
    "chatpose_jax.settings",
    "chatpose_jax.storage",
    "chatpose_jax.__version__",
}
# Not in the core install, or too slow to load for everyone: only the function that needs one imports it.
LAZY_ONLY = {"torch", "matplotlib", "skimage", "fast_simplification", "scipy", "peft", "smplx", "body_models"}
# A model must be usable without the machinery of data, settings and tokens.
FOREIGN_TO_MODELS = {"grain", "ml_collections", "transformers", "orbax", "optax", "tensorboardX"}


def within(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def law() -> dict[str, set[str]]:
    """Package -> packages that it may import, from the table's first and last columns."""
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]*) \|$", (ROOT / "docs/architecture.md").read_text(), flags=re.M)
    rows = [(name, cell) for name, cell in rows if name.startswith(("smpl_jax", "chatpose_jax"))]
    names = {name for name, _ in rows}
    table = {}
    for name, cell in rows:
        quoted = re.findall(r"`([\w.]+)`", cell)
        listed = {short if short.startswith("smpl_jax") else f"chatpose_jax.{short}" for short in quoted}
        if cell.startswith("all but"):
            listed = {row for row in names if not within(row, listed)}
        table[name] = names if cell == "everything" else listed
    return table


LAW = law()


def dotted(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str | None:
    """The longest row of the table that a module belongs to; None for ``chatpose_jax`` itself, which only hands out names."""
    return max((row for row in LAW if within(module, {row})), key=len, default=None)


def imports(path: Path, *, root: Path = ROOT, at_load: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of what a file imports; ``at_load`` leaves out what a function imports when it is called."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - (path.name == "__init__.py")
                package = dotted(path, root).rsplit(".", up)[0] if up else dotted(path, root)
                base = f"{package}.{base}".rstrip(".")
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        if not (at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


def test_the_table_covers_every_package() -> None:
    assert {"smpl_jax", "chatpose_jax.models", "chatpose_jax.cli"} <= LAW.keys()
    assert LAW["smpl_jax"] == set()
    assert LAW["chatpose_jax.models"] == {"smpl_jax.rotations", "smpl_jax.pose", "smpl_jax.frames"}
    assert not {"chatpose_jax.train", "chatpose_jax.data.readers"} & LAW["chatpose_jax.chat"]
    assert package_of("chatpose_jax.data.readers.llava") == "chatpose_jax.data.readers"
    assert not within("chatpose_jax.data.prepare", LAW["chatpose_jax.data.readers"])
    homeless = {dotted(path) for path in MODULES if package_of(dotted(path)) is None} - {"chatpose_jax"} - OPEN_TO_ALL
    assert not homeless, f"not in the table of docs/architecture.md: {homeless}"


@pytest.mark.parametrize("package", sorted(LAW))
def test_arrows_point_one_way(package: str) -> None:
    allowed = LAW[package] | OPEN_TO_ALL
    if package == "smpl_jax":
        allowed -= OPEN_TO_ALL
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in MODULES
        if package_of(dotted(path)) == package
        for name, line in imports(path)
        if within(name, {"smpl_jax", "chatpose_jax"}) and not within(name, allowed) and package_of(name) != package
    ]
    assert not broken, f"{package} may import {sorted(LAW[package])}:\n" + "\n".join(broken)


def test_optional_packages_are_imported_where_they_are_used() -> None:
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in MODULES
        for name, line in imports(path, at_load=True)
        if within(name, LAZY_ONLY)
    ]
    assert not broken, "\n".join(broken)


def test_models_and_generation_stand_on_jax_and_flax_alone() -> None:
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in MODULES
        if package_of(dotted(path)) in {"chatpose_jax.models", "chatpose_jax.generate"}
        for name, line in imports(path)
        if within(name, FOREIGN_TO_MODELS | LAZY_ONLY)
    ]
    assert not broken, "\n".join(broken)


# Every command has these; a helper that two packages export is one function.
SHARED_NAMES = {"add_arguments", "run", "main", "one_line"}


def test_one_name_is_one_thing() -> None:
    """No two public classes or functions of the packages have the same name."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    twice = {name: where for name, where in places.items() if len(where) > 1 and name not in SHARED_NAMES}
    assert not twice, twice


def test_relative_imports_and_lazy_ones_are_seen(tmp_path: Path) -> None:
    """The reader itself: a rule that it cannot see would never be broken."""
    path = tmp_path / "chatpose_jax" / "models" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from ..data import batches\nfrom . import layers\nimport smpl_jax.io\ndef f():\n    import torch\n"
    )
    at_load = {"chatpose_jax.data.batches", "chatpose_jax.models.layers", "smpl_jax.io"}
    assert {name for name, _ in imports(path, root=tmp_path)} == at_load | {"torch"}
    assert {name for name, _ in imports(path, root=tmp_path, at_load=True)} == at_load


def test_no_path_of_one_machine_is_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    homes = re.compile(rb"(?<![\w.~/-])/(?:home|root|Users|work)/[\w.-]+")
    found = []
    for name in filter(None, listing.split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" not in data:
            found += [f"{name}: {match.group().decode()}" for match in homes.finditer(data)]
    assert not found, "\n".join(found)


def test_nobody_is_sent_to_a_package_index_for_this_project() -> None:
    """It is not published: under its name anyone could register a package. What installs it is a path, such as ".[gpu]"."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    advice = re.compile(rb"chatpose-jax\[|install (?:-\S+ )*['\"`]?chatpose[-_]jax")
    paths = [ROOT / name for name in filter(None, listing.split("\0"))]
    assert [str(path) for path in paths if path.is_file() and advice.search(path.read_bytes())] == []
