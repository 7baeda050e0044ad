"""usage: compile.py NVRTC_FOLDER FILE.cu…

Compiles kernels as kiln does on a GPU's machine, for every generation that it is for, and says what
each takes of registers. Fails where one does not compile, warns or spills."""

import ctypes
import pathlib
import re
import sys

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
# kernels/gpu/cuda/compile.rs has the same.
OPTIONS = ["--std=c++17", "--device-as-default-execution-space"]


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


def with_headers(file):
    """A kernel's source as kernels/gpu/mod.rs makes it."""
    header = lambda match: (file.parent / match[1]).read_text()
    return re.sub(r'#include "(gpu/\w+\.cuh)"', header, file.read_text())


def main(folder, files):
    nvrtc, broken, compiled = Nvrtc(folder), 0, 0
    for file in map(pathlib.Path, files):
        for architecture in ARCHITECTURES:
            log, code = nvrtc.compile(file.name, with_headers(file), architecture)
            registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
            if not code or "warning" in log or any(spills):
                broken += 1
                print(f"{file} for {architecture}:\n{log}", file=sys.stderr)
                continue
            compiled += 1
            print(f"{file.name} {architecture}: {len(registers)} kernels, at most {max(registers)} registers")
    print(f"compile: {compiled} modules compiled, {broken} broken")
    return 1 if broken else 0


sys.exit(main(sys.argv[1], sys.argv[2:]))
