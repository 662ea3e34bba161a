"""What `agq-gguf doctor --program` says of programs: made-up ones of each kind, and how it reads their files."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agq_gguf.errors import InputError
from agq_gguf.inspection.elf import read_elf
from agq_gguf.inspection.program import Program, examine
from agq_gguf.native import backend_path

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="ELF files, LD_PRELOAD"),
    pytest.mark.needs("cc"),
]

# Empty functions with the names of llama.cpp's, and a program whose parts are chosen by macros.
BASE = 'const char *ggml_version(void) { return "0.26.0"; }\n'
GGML = """
void ggml_backend_load(void) {}
void ggml_backend_reg_by_name(void) {}
const char *name = "GGML_BACKEND_PATH";
void ggml_backend_load_all_from_path(void) {}
void ggml_backend_load_all(void) { ggml_backend_load_all_from_path(); }
#ifdef LINKED_IN
void ggml_backend_cpu_reg(void);
void start(void) { ggml_backend_cpu_reg(); }
#endif
"""
CPU = "void ggml_backend_cpu_reg(void) {}\n"
LLAMA = "void ggml_backend_load_all(void); void llama_backend_init(void) { ggml_backend_load_all(); }\n"
MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
void llama_backend_init(void); void ggml_backend_load_all(void); const char *ggml_version(void);
int main(int n, char **arguments) {
    if (n > 1 && strcmp(arguments[1], "--version") == 0) return puts("version: 7 (abc)") < 0;
    if (n > 1 && strcmp(arguments[1], "--list-devices") == 0) {
        puts("Available devices:");
        if (!getenv("GGML_BACKEND_PATH")) return 0;
#ifdef REFUSES
        fprintf(stderr, "0.00.1 E agq: ggml 9.9.9 cannot run AGQ4: the struct is another\\n");
#else
        puts("  AGQ: kernels (2 MiB, 1 MiB free)");
#endif
        return 0;
    }
    ggml_version();
#ifdef CALLS_INIT
    llama_backend_init();
#endif
#ifdef LOADS_ALL
    ggml_backend_load_all();
#endif
#ifdef PARSER
    if (getenv("LLAMA_ARG_OVERRIDE_TENSOR")) ggml_backend_load_all();
#endif
    return 0;
}
"""


def compile_c(folder: Path, name: str, source: str, *options: str) -> Path:
    (folder / f"{name}.c").write_text(source)
    subprocess.run(["cc", f"{name}.c", "-o", name, "-fPIC", "-w", *options], cwd=folder, check=True)
    return folder / name


def build(folder: Path, *macros: str, linked_in: bool = True) -> Path:
    """A program `main`, with libraries of its own beside it."""
    here = ("-L.", "-Wl,-rpath,$ORIGIN", "-shared")
    base = compile_c(folder, "libggml-base.so.0.26.0", BASE, "-shared", "-Wl,-soname,libggml-base.so.0")
    for link in ("libggml-base.so.0", "libggml-base.so"):
        (folder / link).symlink_to(base.name)
    compile_c(folder, "libggml-cpu.so", CPU, "-shared")
    options = ("-DLINKED_IN", "-Wl,--no-as-needed", "-lggml-cpu") if linked_in else ()
    compile_c(folder, "libggml.so", GGML, *here, *options)
    compile_c(folder, "libllama.so", LLAMA, *here, "-lggml")
    libraries = ("-Wl,--no-as-needed", "-L.", "-lllama", "-lggml", "-lggml-base", "-Wl,-rpath,$ORIGIN")
    return compile_c(folder, "main", MAIN, *(f"-D{macro}" for macro in macros), *libraries)


def verdict(program: Path) -> tuple[Program, bool, bool]:
    found = examine(program, backend_path())
    return found, found.backend_path.works, found.preload.works


@pytest.mark.parametrize(
    ("macros", "linked_in", "by_variable", "because", "by_preload"),
    [
        (["CALLS_INIT"], True, False, "it never looks for others", True),
        (["CALLS_INIT", "LOADS_ALL"], True, True, "main looks for all backends when it starts", True),
        (["CALLS_INIT", "PARSER"], True, False, "LLAMA_ARG_OVERRIDE_TENSOR='^$=CPU'", True),
        (["CALLS_INIT"], False, True, "separate files", True),
        ([], True, False, "it never looks for others", False),
    ],
)
def test_ways(
    macros: list[str], linked_in: bool, by_variable: bool, because: str, by_preload: bool, tmp_path: Path
) -> None:
    found, variable, preload = verdict(build(tmp_path, *macros, linked_in=linked_in))
    assert (variable, preload) == (by_variable, by_preload)
    assert because in found.backend_path.reason
    assert "llama_backend_init through the dynamic linker" in found.preload.reason
    assert found.version == "version: 7 (abc)"
    assert found.accepts_plugin and found.acceptance == "AGQ: kernels (2 MiB, 1 MiB free)"
    assert found.ggml_version == "0.26.0" and found.ggml_library == str(tmp_path / "libggml-base.so.0.26.0")


def test_a_ggml_that_refuses(tmp_path: Path) -> None:
    found, variable, preload = verdict(build(tmp_path, "CALLS_INIT", "LOADS_ALL", "REFUSES"))
    assert found.accepts_plugin is False and not variable and not preload
    assert found.acceptance == "ggml 9.9.9 cannot run AGQ4: the struct is another"
    assert found.acceptance in found.preload.reason


def test_linked_statically(tmp_path: Path) -> None:
    program = compile_c(tmp_path, "main", BASE + GGML + LLAMA.split(";", 1)[1] + MAIN, "-DCALLS_INIT", "-DLOADS_ALL")
    found, variable, preload = verdict(program)
    assert not variable and not preload
    assert "linked in statically" in found.preload.reason
    assert found.version is None and found.accepts_plugin is None  # it was not run


def test_without_llama() -> None:
    found, variable, preload = verdict(Path(shutil.which("ls") or "/bin/ls"))
    assert not variable and not preload and found.version is None
    assert "hold llama.cpp" in found.preload.reason and "agq_gguf.register()" in found.preload.reason


def test_a_library_is_missing(tmp_path: Path) -> None:
    program = build(tmp_path, "CALLS_INIT")
    (tmp_path / "libllama.so").unlink()
    found, variable, preload = verdict(program)
    assert found.missing_libraries == ["libllama.so"] and not variable and not preload
    assert found.preload.reason == "it cannot start: libllama.so not found"


def test_rights_of_the_owner(tmp_path: Path) -> None:
    program = build(tmp_path, "CALLS_INIT", "LOADS_ALL")
    program.chmod(0o4755)
    found, variable, preload = verdict(program)
    assert variable and not preload and "ignores the variable" in found.preload.reason


def test_a_path_with_spaces(tmp_path: Path) -> None:
    program, folder = build(tmp_path, "CALLS_INIT", "LOADS_ALL"), tmp_path / "a b"
    folder.mkdir()
    copy = Path(shutil.copy(backend_path(), folder))
    found = examine(program, copy)
    assert found.backend_path.works and not found.preload.works
    assert f"the path {copy} holds a space" in found.preload.reason


def test_a_plugin_that_cannot_be_preloaded(tmp_path: Path) -> None:
    """It needs a library that is not there."""
    program = build(tmp_path, "CALLS_INIT")
    compile_c(tmp_path, "libabsent.so", "void absent(void) {}", "-shared")
    plugin = compile_c(
        tmp_path, "plugin.so", "int nothing;", "-shared", "-L.", "-Wl,--no-as-needed", "-labsent"
    )  # fmt: skip
    (tmp_path / "libabsent.so").unlink()
    found = examine(program, plugin)
    assert not found.preload.works and "libabsent.so: cannot open shared object file" in found.preload.reason


def test_another_processor(tmp_path: Path) -> None:
    program = build(tmp_path, "CALLS_INIT")
    data = bytearray(program.read_bytes())
    data[18:20] = (243).to_bytes(2, "little")  # RISC-V
    program.write_bytes(data)
    found, variable, preload = verdict(program)
    assert not variable and not preload and "another processor" in found.preload.reason


def test_what_is_no_program(tmp_path: Path) -> None:
    script, text = tmp_path / "script", tmp_path / "text"
    script.write_text("#!/usr/bin/env python3\n")
    text.write_text("")
    for path, message in (
        (script, r"a script \(#!/usr/bin/env python3\); name the program that it starts"),
        (text, "not a program of Linux"),
        (tmp_path / "none", "no such program"),
    ):
        with pytest.raises(InputError, match=message):
            examine(path, backend_path())


# files


@pytest.mark.needs("nm")
@pytest.mark.parametrize("style", ["sysv", "gnu"])
def test_symbols_are_those_of_nm(style: str, tmp_path: Path) -> None:
    source = '#include <math.h>\n#include <stdio.h>\nint given; void used(void); void call(void) { used(); puts(""); }'
    library = compile_c(tmp_path, "lib.so", source, "-shared", f"-Wl,--hash-style={style}")
    bare = compile_c(tmp_path, "bare.so", "void used(void); static void call(void) { used(); }", "-shared",
                     f"-Wl,--hash-style={style}", "-nostdlib")  # fmt: skip
    for path in (library, bare, backend_path()):
        found = read_elf(path)
        for names, option in ((found.defined, "--defined-only"), (found.undefined, "--undefined-only")):
            lines = subprocess.run(["nm", "-D", option, path], capture_output=True, text=True, check=True).stdout
            assert names == {line.split()[-1].split("@")[0] for line in lines.splitlines()}
    assert "libc.so.6" in read_elf(library).needed and read_elf(library).interpreter is None


def test_malformed_files(tmp_path: Path) -> None:
    """Whatever bytes are in the header, the tables and the symbols: an error of ours, or an answer."""
    original = compile_c(tmp_path, "lib.so", "int given; void used(void); void call(void) { used(); }", "-shared")
    data, choose = original.read_bytes(), random.Random(3)
    refused = 0
    for i in range(400):
        changed = bytearray(data)
        for _ in range(choose.choice((1, 4, 64))):
            at = choose.randrange(4, 0x800)
            changed[at] = choose.choice((0, 1, 0x7F, 0xFF, changed[at] ^ 1 << choose.randrange(8)))
        path = tmp_path / "changed.so"
        path.write_bytes(changed[: choose.randrange(5, len(data))] if i % 4 == 0 else changed)
        try:
            read_elf(path)
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 50
    (tmp_path / "32.so").write_bytes(data[:4] + b"\x01" + data[5:])
    with pytest.raises(InputError, match="32 bits"):
        read_elf(tmp_path / "32.so")
