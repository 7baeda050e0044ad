"""usage: compile.py NVRTC_FOLDER FILE.cu…

Compiles kernels as kiln does on a GPU's machine, for every generation that it is for, and says what
each takes of registers. Fails where one does not compile, or warns."""

import ctypes
import itertools
import pathlib
import re
import sys

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
# kernels/gpu/cuda/compile.rs has the same.
OPTIONS = ["--std=c++17", "--device-as-default-execution-space"]
# What a file is compiled for, where that is more than one thing: kernels/gpu/attention.rs has the same.
VARIANTS = {
    "attention.cu": [("bf16", 32), ("bf16", 64), ("bf16", 128)],
    "attention_fma.cu": [("float", 32), ("float", 64), ("float", 128), ("float", 256), ("bf16", 256)],
}


class Nvrtc:
    def __init__(self, folder):
        library = pathlib.Path(folder) / "nvidia" / "cu13" / "lib"
        for name in sorted(library.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(library / "libnvrtc.so.13"))

    def text(self, program, what):
        size = ctypes.c_size_t()
        getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw[: size.value]

    def compile(self, name, source, architecture):
        """The log, and the machine code where there is one."""
        program = ctypes.c_void_p()
        options = [*OPTIONS, f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        assert self.library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None) == 0
        failed = self.library.nvrtcCompileProgram(program, len(options), array)
        log = self.text(program, "ProgramLog").decode(errors="replace").rstrip("\0")
        code = b"" if failed else self.text(program, "CUBIN")
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        return log, code


def sources(file):
    """A file's names and sources, with the headers as kernels/gpu/mod.rs puts them in."""
    text = re.sub(r'#include "(gpu/\w+\.cuh)"', lambda match: (file.parent / match[1]).read_text(), file.read_text())
    if file.name not in VARIANTS:
        yield file.name, text
    for element, head_dim in VARIANTS.get(file.name, []):
        yield f"{file.name} {element} {head_dim}", f"#define ELEMENT {element}\n#define HEAD_DIM {head_dim}\n{text}"


def main(folder, files):
    nvrtc, broken, compiled = Nvrtc(folder), 0, 0
    for file in map(pathlib.Path, files):
        for (name, source), architecture in itertools.product(list(sources(file)), ARCHITECTURES):
            log, code = nvrtc.compile(file.name, source, architecture)
            if not code or "warning" in log:
                broken += 1
                print(f"{name} for {architecture}:\n{log}", file=sys.stderr)
                continue
            compiled += 1
            registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
            spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
            said = f", {spills} bytes spilled" if spills else ""
            print(f"{name} {architecture}: {len(registers)} kernels, at most {max(registers)} registers{said}")
    print(f"compile: {compiled} modules compiled, {broken} broken")
    return 1 if broken else 0


sys.exit(main(sys.argv[1], sys.argv[2:]))
