"""Thin bridge from setuptools to CMake: CMakeLists.txt is the one build truth."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure and build the `_C` target straight into the place setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_type = "Debug" if self.debug else os.environ.get("DSK_BUILD_TYPE", "Release")
        build_dir = Path(
            os.environ.get(
                "DSK_BUILD_DIR", ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
            )
        )
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDSK_MODULE_PATH={target}",
            f"-DDSK_KERNEL_DIR={build_dir / '_kernels'}",
        ]
        configure += os.environ.get("DSK_CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build_dir), "-j", jobs], check=True)
        self.copy_kernels(build_dir / "_kernels", target.parent / "_kernels")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.build_lib).resolve() / "dskernels" / "_kernels"
        self.copy_kernels(built, ROOT / "dskernels" / "_kernels")

    @staticmethod
    def copy_kernels(built: Path, package: Path) -> None:
        """Ship the CUDA kernels beside the module; drop those that are no longer built."""
        shutil.rmtree(package, ignore_errors=True)
        if built.is_dir():
            shutil.copytree(built, package)


setup(
    ext_modules=[Extension("dskernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
