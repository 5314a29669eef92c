"""Count the machine instructions of the NF4 decoders, for GPUs that are not here.

Triton compiles ahead of time for any architecture with its own `ptxas` and needs no GPU for it; its `nvdisasm` shows
the result. The decoders unroll everything, so the static count of a kernel over the elements that one thread makes is
the work per element. `python -m helpers.sass` prints the table.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import triton
from packaging import version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .nf4 import dequantize_kernel, launch_options

CAPABILITIES = (75, 80, 90, 100)
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def compile_ahead(kernel: triton.JITFunction, types: dict[str, str], constants: dict, capability: int, num_warps: int):
    """Compile `kernel` for sm_`capability`.

    Args:
        types: Triton type of every run-time argument ("*u8", "*fp16", "i32"). Pointers and integers are taken as
            multiples of 16, as those of a large weight are, unless the kernel asks not to be specialized on it.
        constants: value of every `tl.constexpr` argument.

    Returns: `triton.compiler.CompiledKernel`; its `asm` holds "ttgir", "ptx" and "cubin".
    """
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (param.num,): [["tt.divisibility", 16]]
            for param in kernel.params
            if param.name in types and not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


def opcodes(compiled) -> list[str]:
    """The SASS opcodes of a compiled kernel, modifiers included ("STG.E.128"), in program order, padding included."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _OPCODE.findall(listing)


def summarize(compiled, elements: float) -> dict[str, float]:
    """What matters of a decoder whose threads make `elements` outputs each."""
    ops = opcodes(compiled)
    names = Counter(op.split(".")[0] for op in ops)
    return {
        "instructions per element": round(len(ops) / elements, 2),
        "16-byte stores": sum(op.startswith("STG") and ".128" in op for op in ops),
        "other stores": sum(op.startswith("STG") and ".128" not in op for op in ops),
        "conversions per element": round((names["F2F"] + names["F2FP"]) / elements, 2),
        "global loads": names["LDG"],
        "loads with eviction hints": sum(op.startswith("LDG") and (".EF" in op or ".EL" in op) for op in ops),
        "barriers": names["BAR"],
        "spills": names["STL"] + names["LDL"],
    }


def compile_decoder(capability: int, dtype: torch.dtype, n: int = 2**24, **choices):
    """`dequantize_kernel` as `dequantize_nf4` would launch it for `n` elements: (compiled, outputs of a thread).

    Args:
        choices: blocksize, blocksize2, fp4, words, asm, hints of `launch_options`.
    """
    options = launch_options(n, dtype, divmod(capability, 10), **choices)
    num_warps = options.pop("num_warps")
    del options["block_shift"]
    types = {"packed_ptr": "*u8", "absmax_ptr": "*u8" if options["NESTED"] else "*fp32"}
    types |= dict.fromkeys(("code2_ptr", "absmax2_ptr", "offset_ptr"), "*fp32")
    types |= {"out_ptr": f"*{_DTYPES[dtype]}", "n_elements": "i32", "block_shift": "i32"}
    compiled = compile_ahead(dequantize_kernel, types, options, capability, num_warps)
    return compiled, options["GROUPS"] * options["GROUP"] / (32 * num_warps)


def compile_plain(capability: int, dtype: torch.dtype):
    """The baseline of `helpers.bench_nf4`, a table load and a multiplication for every element, the same way."""
    from .nf4_baselines import plain_kernel

    types = {"packed_ptr": "*u8", "absmax_ptr": "*u8", "n_elements": "i32"}
    types |= dict.fromkeys(("code2_ptr", "absmax2_ptr", "offset_ptr", "table_ptr"), "*fp32")
    types["out_ptr"] = f"*{_DTYPES[dtype]}"
    constants = {"BLOCKSIZE": 64, "BLOCKSIZE2": 256, "STEP": 128, "STEPS": 8}
    return compile_ahead(plain_kernel, types, constants, capability, 4), 64


_PATCHING = threading.Lock()  # kernels are compiled side by side


@functools.cache
def _unsloth_module():
    """Unsloth's module of NF4 kernels where it is installed, loaded alone (the package patches others)."""
    spec = importlib.util.find_spec("unsloth")
    path = Path(spec.submodule_search_locations[0], "kernels", "nf4.py") if spec else None
    if path is None or not path.exists():
        return None
    loaded = importlib.util.module_from_spec(importlib.util.spec_from_file_location("_alone.nf4", path))
    launch = SimpleNamespace(launch=None, relaunch=None, tag_compile_cache=lambda *args: None)
    stubs = {"_alone": ModuleType("_alone"), "_alone.triton_launch": launch, "unsloth_zoo": ModuleType("unsloth_zoo"),
             "unsloth_zoo.utils": SimpleNamespace(Version=version.parse)}  # fmt: skip
    with mock.patch.dict(sys.modules, stubs):
        loaded.__spec__.loader.exec_module(loaded)
    return loaded


def compile_unsloth(capability: int, dtype: torch.dtype, n: int = 2**24):
    """The kernel of an installed Unsloth, in the setting that it chooses for `n` elements; None where there is none."""
    with _PATCHING:
        if (module := _unsloth_module()) is None:
            return None
        with mock.patch.object(module, "_capability", lambda index: divmod(capability, 10)):
            rows, num_warps, words, evict, lookup = module._config_for(n // 2, 32, torch.device("cuda", 0))
    types = {"W_ptr": "*u8", "absmax_ptr": "*u8", "out_ptr": f"*{_DTYPES[dtype]}"}
    types |= dict.fromkeys(("code2_ptr", "absmax2_ptr", "offset_ptr", "lut_ptr"), "*fp32")
    types |= dict.fromkeys(("n_elements", "n_bytes", "n_blocks"), "i32")
    constants = {"HALF": 32, "BLOCKSIZE2_SHIFT": 8, "NESTED": True, "USE_MUL_RN": module._HAS_MUL_RN, "ROWS": rows,
                 "WORDS": words, "EVICT": "evict_first" if evict else "", "LUT_MODE": lookup}  # fmt: skip
    compiled = compile_ahead(module._nf4_dequant_kernel, types, constants, capability, num_warps)
    return compiled, rows * 64 / (32 * num_warps)


KERNELS = {
    "ours, inline PTX": compile_decoder,
    "ours, Triton only": functools.partial(compile_decoder, asm=False),
    "plain": compile_plain,
    "Unsloth": compile_unsloth,
}


def table(capabilities: Sequence[int] = CAPABILITIES, kernels: Sequence[str] = tuple(KERNELS)) -> list[dict]:
    """A row for every architecture, dtype and kernel: NF4, blocks of 64, double quantization."""

    def row(case: tuple[int, torch.dtype, str]) -> dict | None:
        capability, dtype, name = case
        if (found := KERNELS[name](capability, dtype)) is None:
            return None
        arch = {"arch": f"sm_{capability}", "dtype": str(dtype).removeprefix("torch."), "kernel": name}
        return {**arch, **summarize(*found)}

    _unsloth_module()  # before there are threads: while it loads, sys.modules is patched
    cases = itertools.product(capabilities, (torch.float16, torch.bfloat16), kernels)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [found for found in pool.map(row, cases) if found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", type=int, nargs="*", default=CAPABILITIES, help="for example 75 90")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="count only this one (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    args = parser.parse_args()
    rows = table(args.capabilities, args.kernel or tuple(KERNELS))
    if args.json:
        print(json.dumps({"triton": triton.__version__, "rows": rows}))
    else:
        print(f"Triton {triton.__version__}\n\n" + " | ".join(rows[0]))
        print("\n".join(" | ".join(str(value) for value in row.values()) for row in rows))


if __name__ == "__main__":
    main()
