"""The rehearsal of a Tesla T4: its code is assembled for another card and seen, its limits hold, and all is undone."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import host, t4

ROOT = Path(__file__).parents[1]
# Compiles a kernel for sm_75 without a GPU, through the assembler in $TRITON_PTXAS_PATH.
AHEAD_OF_TIME = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def double(pointer, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(pointer + at, 2 * tl.load(pointer + at))

source = ASTSource(fn=triton.jit(double), signature={"pointer": "*fp32", "n": "constexpr"}, constexprs={(1,): 128})
open(sys.argv[1], "wb").write(triton.compile(source, target=GPUTarget("cuda", 75, 32)).asm["cubin"])
"""


def in_process(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is there on Linux")
def test_the_wrapper_assembles_a_t4s_ptx_for_another_card_and_notes_its_target(tmp_path):
    from triton import knobs

    wrapper = t4.write_ptxas_wrapper(tmp_path, knobs.nvidia.ptxas.path, "sm_90")
    (tmp_path / "kernel.py").write_text(AHEAD_OF_TIME)
    env = {"TRITON_PTXAS_PATH": str(wrapper), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(tmp_path / "kernel.py"), str(tmp_path / "cubin")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "targets").read_text() == ".target sm_75\n"
    flags = struct.unpack_from("<I", (tmp_path / "cubin").read_bytes(), 48)[0]  # e_flags of the ELF header
    assert 90 in {flags & 0xFF, flags >> 8 & 0xFF}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal of a machine without a GPU")
def test_without_a_gpu_it_is_refused_in_one_line():
    with pytest.raises(ValueError, match="--rehearse-t4 .* no such GPU"), t4.rehearse():
        pass
    assert not host.rehearsing_t4()


def test_what_is_known_of_the_card_is_forgotten():
    from torch._inductor.runtime.hints import DeviceProperties

    DeviceProperties.create(torch.device("cpu"))
    assert DeviceProperties.create.cache_info().currsize
    t4._forget_the_card()
    assert not DeviceProperties.create.cache_info().currsize


def decode_exactly(cases: int = 12) -> None:
    """Decode random NF4 weights as fp16 and bf16 and compare every bit with bitsandbytes' CUDA kernels."""
    import bitsandbytes.functional as bnb

    from helpers.nf4 import dequantize_nf4
    from helpers.nf4_reference import random_quantised

    draw = random.Random(3407)
    for _ in range(cases):
        weight, state = random_quantised(draw, "cuda", (torch.float16, torch.bfloat16))
        assert torch.equal(dequantize_nf4(weight, state), bnb.dequantize_4bit(weight, state))


@pytest.mark.gpu
def test_a_t4s_code_runs_right_is_seen_and_undone():
    capability, environment = torch.cuda.get_device_capability(), dict(os.environ)
    decode_exactly()  # compiled for the card at hand: must not be reused inside
    x = torch.randn(1000, device="cuda", dtype=torch.float16)
    with t4.rehearse():
        assert torch.cuda.get_device_capability() == (7, 5)
        assert torch.cuda.get_device_properties(0).multi_processor_count == 40
        assert not torch.cuda.is_bf16_supported(including_emulation=False)
        assert host.machine().startswith("T4 rehearsal on ") and "T4 rehearsal on Tesla" not in host.machine()
        decode_exactly()
        here = t4.targets().total()
        assert here > 0
        with t4.rehearse():  # a trainer inside a notebook that rehearses already
            compiled = torch.compile(lambda x: torch.sin(x) * 2 + x)(x)
        torch.testing.assert_close(compiled, torch.sin(x) * 2 + x)
        assert t4.targets().total() > here  # compiled by Inductor's workers
        assert set(t4.targets()) == {".target sm_75"} and "sm_75" in t4.proof()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(15 * 1024**3, dtype=torch.uint8, device="cuda")
        assert torch.cuda.mem_get_info()[1] == t4.MEMORY_BYTES
    assert torch.cuda.get_device_capability() == capability and dict(os.environ) == environment
    with pytest.raises(RuntimeError, match="no rehearsal"):
        t4.targets()
    torch.empty(15 * 1024**3, dtype=torch.uint8, device="cuda")
    decode_exactly()
    assert torch.cuda.get_device_properties(0).major == capability[0]


@pytest.mark.gpu
def test_a_process_started_in_a_rehearsal_rehearses_too():
    """As torchrun's ranks do; what they assemble is counted here."""
    code = (
        "from helpers import t4\n"
        "from tests.test_t4 import decode_exactly\n"
        "with t4.rehearsal_if_asked():\n    decode_exactly(3)\n    print(t4.proof())\n"
    )
    with t4.rehearse():
        done = in_process(code, LOCAL_RANK="0")
        assert done.returncode == 0, done.stderr
        assert "sm_75" in done.stdout and f"run on {os.environ[t4.CARD]}" in done.stdout
        assert set(t4.targets()) == {".target sm_75"}
