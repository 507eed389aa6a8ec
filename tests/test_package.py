"""What a user installs and what the README promises: a wheel that works anywhere, links that hold, computed figures."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.test_architecture import MODULES, imports

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import importlib, json, pkgutil, sys
from pathlib import Path
import chatpose_jax, smpl_jax
home = Path(sys.argv[1])
seen = []
for package in (smpl_jax, chatpose_jax):
    assert Path(package.__file__).is_relative_to(home), package.__file__
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # The generator of the default body takes optional packages; a __main__ runs when imported.
        if module.name.startswith("smpl_jax.default_body.") or module.name.endswith("__main__"):
            continue
        importlib.import_module(module.name)
        seen.append(module.name)
print(json.dumps({"seen": seen, "vertices": smpl_jax.load_body().num_vertices}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, ROOT]
    subprocess.run(command, check=True, cwd=folder)
    return next(folder.glob("*.whl"))


def tracked(*folders: str) -> set[str]:
    listing = subprocess.run(["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, check=True, text=True)
    return {name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()}


def test_the_wheel_holds_code_body_tokenizer_and_configs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    configs = {f"chatpose_jax/{name}" for name in tracked("configs")}
    assert any(name.endswith(".py") for name in configs)
    missing = (tracked("smpl_jax", "chatpose_jax") | configs) - held
    assert not missing, sorted(missing)
    assert {"smpl_jax/default_body/body.npz", "smpl_jax/py.typed", "chatpose_jax/py.typed"} <= held
    assert any(re.fullmatch(r"chatpose_jax/processing/data/.*/tokenizer\.json", name) for name in held)
    assert {f"chatpose_jax/demo_model/{name}" for name in ("config.json", "params/manifest.ocdbt", "README.md")} <= held
    strays = {
        name for name in held if name.split("/")[0] not in {"smpl_jax", "chatpose_jax"} and ".dist-info/" not in name
    }
    assert not strays, sorted(strays)


def test_the_archive_of_sources_holds_what_the_wheel_is_made_of(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    missing = tracked("smpl_jax", "chatpose_jax", "configs") - held
    assert not missing, sorted(missing)


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Every module loads from the installed copy, the body that it carries is found, and its model answers."""
    pytest.importorskip("jax")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--target",
        tmp_path / "lib",
        wheel,
    ]
    subprocess.run(install, check=True, cwd=tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", PROBE, tmp_path / "lib"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert {"smpl_jax.rotations", "chatpose_jax.models.chatpose", "chatpose_jax.cli.main"} <= set(report["seen"])
    assert report["vertices"] == 6890
    asked = [sys.executable, "-m", "chatpose_jax.cli", "chat", "--prompt", "Show me someone who kneels.", "--json"]
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "toy" in done.stderr and len(json.loads(done.stdout)["poses"]) == 1
    version = [sys.executable, "-m", "chatpose_jax.cli", "--version"]
    assert (
        b"chatpose-jax"
        in subprocess.run(version, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout
    )


def distributions(requirements: list[str]) -> set[str]:
    """Normalised names of requirements, without versions, extras and markers."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in requirements}  # type: ignore[index]


def imported(*, at_load: bool, modules: Sequence[Path] = MODULES) -> dict[str, str]:
    """Distribution -> one place that imports from it, of all that modules import and Python does not bring along."""
    pytest.importorskip("skimage")  # else nothing here knows that it comes with scikit-image
    homes = importlib.metadata.packages_distributions()
    found = {}
    for path in modules:
        for name, line in imports(path, at_load=at_load):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top in {"smpl_jax", "chatpose_jax"}:
                continue
            # A namespace package, such as google, has several homes; one that is not installed is called as its module is.
            for home in homes.get(top) or [top]:
                found.setdefault(
                    re.sub(r"[-_.]+", "-", home).lower(), f"{path.relative_to(ROOT)}:{line} imports {name}"
                )
    return found


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = distributions(PROJECT["dependencies"])
EXTRAS = {name: distributions(lines) for name, lines in PROJECT["optional-dependencies"].items()}


def test_what_is_imported_is_declared() -> None:
    """What happens to be installed by others goes when they change their minds. Extras are for what a function imports."""
    server = [path for path in MODULES if "serve" in path.parts[:-1]]  # imported by its own command only
    others = [path for path in MODULES if path not in server]
    for modules, known in ((others, CORE), (server, CORE | EXTRAS["serve"])):
        found = imported(at_load=True, modules=modules)
        missing = {home: place for home, place in found.items() if home not in known}
        assert not missing, f"imported with the package, but no dependency: {missing}"
    optional = set().union(*(names for name, names in EXTRAS.items() if name != "dev"))
    missing = {home: place for home, place in imported(at_load=False).items() if home not in CORE | optional}
    assert not missing, f"imported, but neither a dependency nor in an extra: {missing}"


PLUGINS = {"gcsfs": "fsspec", "s3fs": "fsspec"}
"""Packages that another one imports by name: fsspec takes that of an address."""


def test_what_is_declared_is_imported() -> None:
    used = dict(imported(at_load=False))
    used |= {name: "" for name, host in PLUGINS.items() if host in used}
    idle = {name: sorted(names - used.keys()) for name, names in {"core": CORE, **EXTRAS}.items() if name != "dev"}
    assert not any(idle.values()), idle


def test_the_readme_holds_the_computed_memory_table() -> None:
    computed = subprocess.run(
        [sys.executable, ROOT / "tools/memory_table.py"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, check=True, text=True,
    ).stdout.strip()  # fmt: skip
    shown = re.search(r"<!-- memory table.*?-->\n(.*?)\n<!-- end -->", (ROOT / "README.md").read_text(), flags=re.S)
    assert shown, "README.md has lost the markers of its memory table"
    assert shown.group(1).strip() == computed, "run: python tools/memory_table.py, and paste what it prints"


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = re.sub(r"<!--.*?-->|```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    broken = [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()]
    assert not broken, f"{page}: {broken}"
    here, sections = (ROOT / page).parent, re.findall(r"\]\((?![a-z]+://)([^)\s#]*)#([^)]+)\)", text)
    broken = [f"{link}#{name}" for link, name in sections if name not in headings(here / link if link else ROOT / page)]
    assert not broken, f"{page} has links to sections that are not there: {broken}"


def headings(page: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found}


def test_the_index_of_the_documentation_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    unnamed = [
        path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md" and f"({path.name})" not in index
    ]
    assert not unnamed, f"docs/README.md does not name {unnamed}"
