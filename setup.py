"""Builds gradext._C, without torch: the C++ kernels always, the CUDA kernels where nvcc is found.

    GRADEXT_CUDA        0 builds without CUDA; 1 makes a missing nvcc, and whatever it cannot compile, an error; unset
                        takes what is there and works: without CUDA kernels Triton and plain torch do their part, and
                        without any compiled kernel plain torch does
    GRADEXT_CUDA_ARCHS  GPU targets such as "80;90", or "native" for the GPUs of this machine

Everything else about the package is in pyproject.toml.
"""

import hashlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "gradext" / "_version.py"))["__version__"]
CAPABILITY = re.compile(r"(\d+)(?:\.|, )(\d+)")  # "9.0" of nvidia-smi, "(9, 0)" of torch
DEFAULT_ARCHS = ["75", "80", "86", "89", "90", "100", "120"]


def source_hash() -> str:
    """What native.py compares, to tell a binary built from other sources."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        digest.update(path.relative_to(ROOT / "csrc").as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    wanted = os.environ.get("GRADEXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"GRADEXT_CUDA must be 0, 1 or unset, not {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")
    if wanted == "1" and not nvcc:
        raise SystemExit(
            "GRADEXT_CUDA=1, but nvcc is neither in CUDA_HOME nor on PATH: install the CUDA toolkit or set "
            "CUDA_HOME to it, or build without CUDA by GRADEXT_CUDA=0"
        )
    return nvcc


def output_of(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CudaError(f"{command[0]} does not run: {error}.") from None
    if result.returncode:
        raise CudaError(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stdout + result.stderr


def cuda_archs(nvcc: str) -> list[str]:
    asked = os.environ.get("GRADEXT_CUDA_ARCHS", "").replace(",", ";").strip("; ")
    if asked == "native":
        asked = ";".join(native_archs())
    known = {line.removeprefix("compute_") for line in output_of(nvcc, "--list-gpu-arch").split()}
    archs = [arch.strip() for arch in asked.split(";")] if asked else DEFAULT_ARCHS
    missing = [arch for arch in archs if arch.rstrip("af") not in known]
    if asked and missing:
        raise SystemExit(
            f"GRADEXT_CUDA_ARCHS={asked}: {nvcc} does not know {', '.join(missing)}; "
            f"it knows {', '.join(sorted(known, key=int))}"
        )
    if missing:
        print(f"gradext: {nvcc} does not know the GPU targets {', '.join(missing)}; they are left out")
    archs = [arch for arch in archs if arch not in missing]
    if not archs:
        raise CudaError(f"{nvcc} knows none of the GPU targets; set GRADEXT_CUDA_ARCHS or GRADEXT_CUDA=0.")
    return archs


def native_archs() -> list[str]:
    """The targets of this machine's GPUs. nvcc's own -arch=native builds sm_75 where it sees none, unsaid."""
    query = "import torch; print(*(torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())))"
    answers = []
    for command in (["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], [sys.executable, "-c", query]):
        try:
            answers.append(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
        except (OSError, subprocess.TimeoutExpired):
            continue
        found = sorted({int(major) * 10 + int(minor) for major, minor in CAPABILITY.findall(answers[-1])})
        if found:
            return [str(capability) for capability in found]
    raise SystemExit(
        "GRADEXT_CUDA_ARCHS=native: neither nvidia-smi nor torch tells the compute capability of a GPU "
        'of this machine; name the targets, such as GRADEXT_CUDA_ARCHS="90", or leave it out to build for all'
    )


def arch_flags(archs: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{ptx_arch(archs)},code=compute_{ptx_arch(archs)}"]


def ptx_arch(archs: list[str]) -> str:
    """The target of the PTX, of which the driver makes code for GPUs that none of the others fits: the oldest."""
    return min(archs, key=lambda arch: int(arch.rstrip("af")))


def told(message: str) -> None:
    """What pip shows only with -v goes into the log in any case."""
    print(f"gradext: {message}", file=sys.stderr, flush=True)


# Instruction sets that the CPU kernel is compiled for, beside the one that all machines have.
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512bf16": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bf16"],
}


class CudaError(Exception):
    """nvcc failed; its own message is on the screen."""


class BuildNative(build_ext):
    """Compiles the objects in parallel, the CPU kernel once for each instruction set, and links them."""

    def build_extension(self, ext: Extension) -> None:
        must = os.environ.get("GRADEXT_CUDA") == "1"
        nvcc = find_nvcc()
        if not nvcc and shutil.which("hipcc"):
            told("AMD's ROCm is not supported: no kernels are built for it, and plain torch runs there")
        try:
            if nvcc and self.with_cuda(ext, nvcc, must):
                return
            self.compile_and_link(ext, None, [])
        except (CCompilerError, OSError) as error:
            if must:
                raise
            told(
                f"no kernels could be compiled ({error}); gradext is installed without them and runs on plain torch. "
                "They need g++ or clang on Linux: install one (apt install g++, dnf install gcc-c++, conda install "
                "gxx; CXX chooses it), then install gradext again"
            )

    def with_cuda(self, ext: Extension, nvcc: str, must: bool) -> bool:
        """Whether all was built with CUDA kernels. Raises where they must be, or where the rest does not compile."""
        try:
            archs = cuda_archs(nvcc)
            self.compile_and_link(ext, nvcc, archs)
        except CudaError as error:
            if must:
                raise SystemExit(f"gradext: {error}") from None
            told(f"{error} They are left out, and Triton takes their place.")
            return False
        return True

    def compile_and_link(self, ext: Extension, nvcc: str | None, archs: list[str]) -> None:
        print(f"gradext: CUDA {'by ' + nvcc + ' for ' + ', '.join(archs) if nvcc else 'left out'}")
        macros = [("GRADEXT_VERSION", VERSION), ("GRADEXT_SOURCE_HASH", source_hash())]
        if nvcc:
            macros += [("GRADEXT_WITH_CUDA", "1"), ("GRADEXT_CUDA_ARCHS", "_".join(archs))]
            macros += [("GRADEXT_CUDA_PTX", ptx_arch(archs))]

        jobs = []
        for name in ("outer", "sq_norm", "device") if nvcc else ():
            jobs.append(lambda name=name: self.compile_cuda(nvcc, archs, name))
        jobs.append(lambda: self.compile_cpp("csrc/bindings.cpp", macros))
        jobs.append(lambda: self.compile_cpp("csrc/cpu/outer_kernel.cpp", [("GRADEXT_ISA", "baseline")]))
        if platform.machine() in ("x86_64", "AMD64"):
            for isa, flags in X86_ISAS.items():
                macro = [("GRADEXT_ISA", isa)]
                jobs.append(
                    lambda macro=macro, flags=flags: self.compile_cpp("csrc/cpu/outer_kernel.cpp", macro, flags)
                )
        for name in ("outer", "threads", "workspace"):
            jobs.append(lambda name=name: self.compile_cpp(f"csrc/cpu/{name}.cpp", []))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [obj for made in pool.map(lambda job: job(), jobs) for obj in made]

        libraries = [*self.cuda_library_flags(nvcc), "-lcudart_static", "-lrt", "-ldl"] if nvcc else []
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*libraries, "-pthread", "-s"],
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def compile_cpp(self, source: str, macros: list[tuple[str, str]], flags: list[str] | None = None) -> list[str]:
        variant = dict(macros).get("GRADEXT_ISA", "")
        return self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp) / variant),
            macros=macros,
            include_dirs=[pybind11.get_include(), *self.include_dirs],
            extra_postargs=[
                *(
                    "-std=c++17",
                    "-O3",
                    "-g0",
                    "-fvisibility=hidden",
                    "-pthread",
                    "-Wall",
                    "-Wextra",
                    "-Wno-psabi",
                ),
                *(flags or []),
            ],
            depends=[str(path) for path in (ROOT / "csrc").rglob("*.h")],
        )

    def compile_cuda(self, nvcc: str, archs: list[str], name: str) -> list[str]:
        target = Path(self.build_temp) / "cuda" / f"{name}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-O3", "-std=c++17", "--threads", "0", *arch_flags(archs)]
        command += [
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden,-O3",
            "-c",
            f"csrc/cuda/{name}.cu",
            "-o",
            str(target),
        ]
        print(" ".join(command))
        if subprocess.run(command).returncode:
            raise CudaError(
                f"{nvcc} could not compile the CUDA kernels (its message is above). "
                "GRADEXT_CUDA=0 builds without them; CUDA_HOME chooses another toolkit."
            )
        return [str(target)]

    def cuda_library_flags(self, nvcc: str) -> list[str]:
        """The folders of the toolkit's libraries, which nvcc knows for every layout."""
        plan = output_of(nvcc, "-dryrun", "-o", "a.out", "a.o")
        line = next(line for line in plan.splitlines() if "LIBRARIES=" in line)
        return line.split("LIBRARIES=")[1].replace('"', "").split()


def description() -> str:
    """README for a package index, which has none of the files that README links to: their paths in place of links."""
    text = re.sub(r"!\[[^]]*\]\((?!https:)[^)]*\)\n", "", (ROOT / "README.md").read_text())
    text = re.sub(r"\[([^]]+)\]\((?!https:)\1\)", r"`\1`", text)
    return re.sub(r"\[([^]]+)\]\((?!https:)([^)]+)\)", r"\1 (`\2`)", text)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    # Optional: where nothing was built there is nothing to copy, and that is no error.
    ext_modules=[Extension("gradext._C", sources=[], language="c++", optional=os.environ.get("GRADEXT_CUDA") != "1")],
    cmdclass={"build_ext": BuildNative},
)
