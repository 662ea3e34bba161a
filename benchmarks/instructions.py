"""Counts instructions per multiply-accumulate of the kernels and of stock ggml's for the same CPU, under QEMU.

    python benchmarks/instructions.py [--stock LIBGGML_CPU_FOR_AARCH64] [--tokens 64] [--rows 256] [--columns 2048]

Needs g++-aarch64-linux-gnu, qemu-user (7.2 or later) and a C compiler. --stock takes a libggml-cpu.so, built for
aarch64 with i8mm; docs/arm.md says how. Counts do not depend on the machine. The count of one call is the difference of
two runs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SYSROOT = "/usr/aarch64-linux-gnu"


def command(*words: str | Path) -> str:
    """Runs a program and returns its output; exits with the output if it fails."""
    result = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def build(folder: Path, toolchain: bool) -> Path:
    """Builds the program `instructions`, for this machine or with the toolchain file for aarch64."""
    arguments = [f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}"] if toolchain else []
    command("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DAGQ_BUILD_BENCHMARKS=ON", *arguments)
    command("cmake", "--build", folder, "--target", "instructions")
    return folder / "instructions"


def build_plugin(folder: Path) -> Path:
    """Builds the QEMU plugin that counts instructions."""
    version = re.search(r"version (\d+)", command("qemu-aarch64", "--version"))
    api = 1 if version and int(version[1]) < 9 else 2
    library = folder / "count_plugin.so"
    source = ROOT / "benchmarks" / "count_plugin.c"
    command("cc", "-shared", "-fPIC", "-O2", f"-DAGQ_QEMU_API={api}", source, "-o", library)
    return library


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", type=Path, help="libggml-cpu.so for aarch64 with dotprod and i8mm")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=2048)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plugin = build_plugin(folder)
        arm, native = build(folder / "arm", True), build(folder / "native", False)

        def per_product(emulator: list[str | Path], driver: Path, kernel: str, how: str | Path, tokens: int) -> float:
            counts = []
            for calls in (2, 3):
                shape = [str(options.rows), str(options.columns), str(tokens), str(calls)]
                text = command(*emulator, "-plugin", plugin, "-d", "plugin", driver, kernel, how, *shape)
                found = re.search(r"instructions: (\d+)", text)
                assert found, text
                counts.append(int(found[1]))
            return (counts[1] - counts[0]) / (options.rows * options.columns * tokens)

        on_arm: list[str | Path] = ["qemu-aarch64", "-L", SYSROOT, "-cpu", "max"]
        on_x86: list[str | Path] = ["qemu-x86_64", "-cpu", "max"]
        for tokens in (options.tokens, 1):
            print(f"\n{options.rows} x {options.columns}, {tokens} token{'s' if tokens > 1 else ''}\n")
            print("| kernel | activations | instructions per multiply-accumulate | ratio |")
            print("|---|---|---|---|")
            stock = {}
            if options.stock:
                for kernel, isa in (("q4_0_4x4", "neon_dotprod"), ("q4_0_4x8", "neon_i8mm")):
                    stock[isa] = per_product(on_arm, arm, kernel, options.stock.resolve(), tokens)
                    print(f"| stock {kernel} | 8 bits | {stock[isa]:.4f} | |")
            eight: dict[str, float] = {}
            for emulator, driver, kernel, bits in [
                (on_arm, arm, "neon_dotprod", 8),
                (on_arm, arm, "neon_i8mm", 8),
                (on_arm, arm, "neon", 8),
                (on_arm, arm, "neon", 4),
                (on_x86, native, "avx2", 8),
                (on_x86, native, "avx2", 4),
            ]:
                value = per_product(emulator, driver, kernel, str(bits), tokens)
                ratio = ""
                if bits == 4:
                    ratio = f"{value / eight[kernel]:.2f} of 8 bits"
                elif kernel in stock:
                    ratio = f"{value / stock[kernel]:.2f} of stock"
                eight.setdefault(kernel, value)
                print(f"| {kernel} | {bits} bits | {value:.4f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
