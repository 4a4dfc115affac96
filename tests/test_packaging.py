"""What is shipped: a wheel that runs from an empty folder, and metadata that agree with one another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from presentation.fabricate_study import fabricate_study

from probekit.presentation.paper.figures import FIGURES
from probekit.presentation.study_folder import TABLES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def ran(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel that is built from it and from nothing else."""
    pytest.importorskip("hatchling", reason="needs hatchling: pip install 'probekit[test]'")
    folder = tmp_path_factory.mktemp("shipped")
    ran(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder / "source", filter="data")
    (unpacked,) = (folder / "source").iterdir()
    ran(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=unpacked)
    return folder


@pytest.fixture(scope="module")
def installed(shipped) -> Path:
    """The wheel in a folder of its own; what it needs comes from this Python."""
    (wheel,) = shipped.glob("*.whl")
    site = shipped / "site"
    ran(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=shipped)
    return site


@pytest.mark.second
def test_the_wheel_holds_the_package_and_nothing_else(shipped):
    (wheel,) = shipped.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"probekit", f"probekit-{PROJECT['version']}.dist-info"}
    tracked = ran("git", "ls-files", "probekit", cwd=ROOT).stdout.split() if (ROOT / ".git").exists() else []
    assert set(tracked) <= set(names), "everything of the package is in the wheel"
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 60e6


@pytest.mark.second
def test_the_source_distribution_builds_the_tests_too(shipped):
    (source,) = shipped.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "figures/making.py",
    } <= names


@pytest.mark.second
def test_the_readme_of_the_wheel_leads_to_the_repository(shipped):
    (wheel,) = shipped.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        described = archive.read(name).decode()
    home, tag = PROJECT["urls"]["Homepage"], f"v{PROJECT['version']}"
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", described)
    assert len(links) == len(re.findall(r"\]\(", (ROOT / "README.md").read_text(encoding="utf-8"))) > 5
    for picture, address in [link for link in links if "colab." not in link[1]]:
        before = f"{home}/{'raw' if picture else 'blob'}/{tag}/"
        assert address.startswith(before), address
        assert (ROOT / address.removeprefix(before).partition("#")[0]).is_file(), address


@pytest.mark.second
def test_the_wheel_runs_from_an_empty_folder(installed, tmp_path):
    def probekit(*arguments: object) -> str:
        return ran(installed / "bin" / "probekit", *arguments, cwd=tmp_path, PYTHONPATH=str(installed)).stdout

    where = ran(
        sys.executable, "-c", "import probekit; print(probekit.__file__)", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert Path(where.stdout.strip()).is_relative_to(installed), "not this checkout"
    assert PROJECT["version"] in probekit("--version")
    models = json.loads(probekit("models", "--json"))["models"]
    assert {model["name"] for model in models} >= {"tales-untied", "tales-tied", "tales-layerskip"}
    assert all(Path(model["path"]).is_relative_to(installed) for model in models)
    assert "king" in probekit(
        "lens", "tales-layerskip", "Once upon a time there lived a king who", "--html", "lens.html"
    )
    assert (tmp_path / "lens.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    study = fabricate_study(
        tmp_path / "study", ("tales-tied",), depth=3, prompts=4, tokens=8, draft_lengths=(1, 2), probed=True
    )
    made = json.loads(probekit("figures", study, "--format", "svg", "--json"))["files"]
    drawn = [name for name, figure in FIGURES.items() if figure.needs != "attribution"]  # which this study lacks
    assert len(made) == len(drawn) + len(TABLES) + 1
    probekit("report", study)
    assert {path.name for path in tmp_path.iterdir()} == {"lens.html", "study"}, "nothing else is left in the folder"


def test_versions_agree():
    import probekit

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert probekit.__version__ == PROJECT["version"] == str(citation["version"])
    assert PROJECT["license"] == citation["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    assert set(PROJECT["keywords"]) <= set(citation["keywords"])


def test_the_versions_that_are_tested_are_in_the_ranges():
    pinned = {
        pin.name: Version(next(iter(pin.specifier)).version)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
        for pin in [Requirement(line)]
    }
    extras = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        if requirement.name != PROJECT["name"] and requirement.name in pinned:
            assert pinned[requirement.name] in requirement.specifier, requirement
    assert {Requirement(each).name for each in PROJECT["dependencies"]} <= set(pinned)


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_templates_are_whole(path):
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "workflows":
        assert {"name", "permissions", "jobs"} <= set(document)
        for job in document["jobs"].values():
            assert job["runs-on"] == "ubuntu-latest"
            assert all("uses" in step or "run" in step for step in job["steps"])
    elif path.parent.name == "ISSUE_TEMPLATE" and path.name != "config.yml":
        assert {"name", "description", "body"} <= set(document)
        assert len({part["id"] for part in document["body"]}) == len(document["body"])


def test_actions_are_pinned_to_commits():
    """A tag can be moved by whoever owns, or takes over, the action's repository; the release has rights to publish."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    uses = re.findall(r"uses: (.*)", text)
    assert uses
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", each) for each in uses), uses
    assert len({each.partition("@")[0] for each in uses}) == len(set(uses)), "one version of each"


def test_what_workflows_run_is_there():
    """Commands that continuous integration calls exist: the Makefile's goals, the extras, the versions."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    for extra in ("test", "docs"):
        assert f"'.[{extra}]'" in text
        assert extra in PROJECT["optional-dependencies"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    torch = next(line for line in pins.splitlines() if line.startswith("torch=="))
    assert torch in text
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    ruff = next(line for line in pins.splitlines() if line.startswith("ruff==")).partition("==")[2]
    assert f"rev: v{ruff}" in hooks, "pre-commit formats as `make check` does"


@pytest.mark.parametrize("name", ["CODE_OF_CONDUCT.md", "SECURITY.md", "CONTRIBUTING.md"])
def test_pages_of_the_project_name_no_address_that_is_not_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "@" not in text.replace("@github", ""), "reports go through GitHub, not to an address"
