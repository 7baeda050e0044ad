"""usage: stubs.py CUDARC FOLDER LIBRARY…

Makes shared libraries to link against where there is no CUDA driver: every function that cudarc's
bindings name is there and answers that there is no device. A binary that was linked so starts here,
and on a GPU's machine finds the real libraries by their names. Never put the stubs on a path there."""

import pathlib
import re
import subprocess
import sys

# library: cudarc's module, the name at run time, and what says that there is no device
LIBRARIES = {
    "cuda": ("driver", "libcuda.so.1", 100),
    "cublas": ("cublas", "libcublas.so.13", 1),
    "cublasLt": ("cublaslt", "libcublasLt.so.13", 1),
    "curand": ("curand", "libcurand.so.10", 101),
    "nvrtc": ("nvrtc", "libnvrtc.so.13", 7),
    "nccl": ("nccl", "libnccl.so.2", 2),
}
# These give a text: as their value, or by a pointer.
TEXTS = re.compile(r"(GetErrorString|GetStatusString|GetStatusName|GetLastError)$")
BY_POINTER = {"cuGetErrorString": "no NVIDIA driver on this machine", "cuGetErrorName": "CUDA_ERROR_NO_DEVICE"}


def function(name, code):
    if name in BY_POINTER:
        return f'int {name}(int e, const char **text) {{ if (text) *text = "{BY_POINTER[name]}"; return 0; }}'
    if TEXTS.search(name):
        return f'const char *{name}(void) {{ return "no CUDA on this machine"; }}'
    return f"int {name}(void) {{ return {code}; }}"


def main(cudarc, folder, libraries):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries:
        module, soname, code = LIBRARIES[library]
        bindings = (pathlib.Path(cudarc) / "src" / module / "sys" / "mod.rs").read_text()
        names = set(re.findall(r"pub (?:unsafe )?fn ((?:cu|nvrtc|nccl|curand|cublas)\w+)\s*\(", bindings))
        source = "\n".join(function(name, code) for name in sorted(names - {"culib"}))
        compiler = ["cc", "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{soname}", "-x", "c", "-"]
        subprocess.run([*compiler, "-o", folder / soname], input=source.encode(), check=True)
        link = folder / f"lib{library}.so"
        link.unlink(missing_ok=True)
        link.symlink_to(soname)


main(sys.argv[1], sys.argv[2], sys.argv[3:])
