"""Builds the package and, where nvcc is found, its CUDA extension ``moe_engine._C``.

Two environment variables steer the build:

    MOE_ENGINE_REQUIRE_CUDA=1   fail the install if the extension cannot be built
    MOE_ENGINE_CUDA_ARCHS       architectures to compile for, default "90a,100a"

pip shows what is printed here only with ``-v``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

DEFAULT_ARCHS = "90a,100a"
REQUIRE_CUDA = os.environ.get("MOE_ENGINE_REQUIRE_CUDA", "") == "1"
CUDA_ARCHS = os.environ.get("MOE_ENGINE_CUDA_ARCHS", DEFAULT_ARCHS)
if not set(CUDA_ARCHS.split(",")) <= set(DEFAULT_ARCHS.split(",")):
    sys.exit(
        f"MOE_ENGINE_CUDA_ARCHS is {CUDA_ARCHS!r}; the kernels are for {DEFAULT_ARCHS}, "
        "one of them or both"
    )
ARCH_FLAGS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS.split(",")]


def say(message: str) -> None:
    # One write, because several compilers report at once.
    sys.stdout.write(f"moe_engine._C: {message}\n")
    sys.stdout.flush()


def find_nvcc() -> str:
    """Path of nvcc: from PATH, else from CUDA_HOME, else from /usr/local/cuda, else empty."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [None, *(f"{home}/bin" for home in homes if home)]
    return next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), "")


class BuildWithNvcc(build_ext):
    """Compiles each source with one nvcc process, side by side, and links them with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext``; `CompileError` with nvcc's output if a compilation fails."""
        if self.editable_mode:
            for stale in Path("moe_engine").glob("_C.*.so"):
                stale.unlink()  # the install would go on using it if this build fails
        objects_dir = Path(self.build_temp)
        objects_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)

        objects = [objects_dir / f"{Path(source).stem}.o" for source in ext.sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.compile_source, ext.sources, objects))
        # cudart is linked statically and its symbols stay hidden: the module loads on a machine
        # without a driver, and beside the cudart that PyTorch brings.
        hide = "-Xlinker=--exclude-libs=ALL"
        command = ["-shared", "-cudart=static", hide, *ARCH_FLAGS, "-o", str(output)]
        self.run_nvcc([*command, *map(str, objects)])
        say(f"built for {', '.join(f'sm_{arch}' for arch in CUDA_ARCHS.split(','))}")

    def compile_source(self, source: str, target: Path) -> None:
        """Compile one file of csrc/ to an object file."""
        import pybind11

        command = ["-c", source, "-o", str(target), "-std=c++17", "-O3"]
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        if source.endswith(".cu"):
            command += ARCH_FLAGS
        else:
            command += [
                f'-DMOE_ENGINE_CUDA_ARCHS="{CUDA_ARCHS}"',
                f"-I{pybind11.get_include()}",
                f"-I{sysconfig.get_path('include')}",
            ]
        self.run_nvcc(command)

    def run_nvcc(self, arguments: list[str]) -> None:
        """Run nvcc; `CompileError` if it fails, after printing what it said."""
        command = [NVCC, *arguments]
        say(" ".join(command))
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            say(f"FAILED, nvcc said:\n{done.stdout}")
            raise CompileError(f"nvcc failed with exit status {done.returncode}")
        if done.stdout:
            say(done.stdout)


NVCC = find_nvcc()
if not NVCC:
    if REQUIRE_CUDA:
        raise SystemExit("MOE_ENGINE_REQUIRE_CUDA=1, but nvcc is not on PATH nor in CUDA_HOME")
    say("skipped, nvcc is not on PATH nor in CUDA_HOME; PyTorch does its work")
    extensions = []
else:
    csrc = Path("csrc")
    extensions = [
        Extension(
            "moe_engine._C",
            sources=sorted(str(path) for path in csrc.iterdir() if path.suffix in (".cpp", ".cu")),
            depends=sorted(str(path) for path in csrc.iterdir() if path.suffix in (".h", ".cuh")),
            # setuptools goes on without an optional extension that fails to compile.
            optional=not REQUIRE_CUDA,
        )
    ]

setup(
    packages=[*find_packages(include=["moe_engine", "moe_engine.*"]), "moe_engine.kernels"],
    # Not a top-level package: `kernels` on the package index is another project.
    package_dir={"moe_engine.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWithNvcc},
)
