"""What the assembler reports about a compiled kernel: registers, spills, instructions, and how many blocks fit.

Triton's wheel contains ptxas and nvdisasm, so none of this needs a GPU or CUDA.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from profiling.devices import Device

SHARED_RESERVED = 1024  # bytes of shared memory that the system reserves for each block
SHARED_UNIT = 128  # allocation granularity of shared memory, in bytes
REGISTER_UNIT = 256  # allocation granularity of registers, per warp
WARP_UNIT = 4  # warps are allocated in multiples of this, one per register file

# "/*0f90*/  @!P0 MUFU.EX2 R2, R3 ;", perhaps with a brace in front of a pair that issues together
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)", re.MULTILINE)
REMARK = re.compile(r"^.*(?:\(C\d+\)|warning).*$", re.MULTILINE)


@dataclass(frozen=True)
class Assembly:
    """One assembled kernel."""

    registers: int  # per thread at launch; warp-specialised kernels redistribute them (USETMAXREG)
    spills: int  # bytes stored
    local: int  # bytes of local memory per thread
    instructions: dict[str, int]  # static count by name; special functions by kind (MUFU.EX2)
    remarks: tuple[str, ...]  # warnings and advice of ptxas ("C7510: wgmma ... serialized")


def assemble(kernel: Any) -> Assembly:
    """Assembles a Triton `CompiledKernel` again, this time with ptxas's messages."""
    options = kernel.metadata
    flags = [*([] if options.enable_fp_fusion else ["--fmad=false"]), *(options.ptx_options or "").split()]
    return _assemble(kernel.asm["ptx"], kernel.asm["cubin"], options.target.arch, tuple(flags))


@cache  # cases of one operation often share a kernel
def _assemble(ptx: str, cubin: bytes, arch: int, flags: tuple[str, ...]) -> Assembly:
    with tempfile.TemporaryDirectory() as folder:
        source, binary, again = (Path(folder) / name for name in ("kernel.ptx", "kernel.cubin", "again.cubin"))
        source.write_text(ptx)
        binary.write_bytes(cubin)
        assembler = [get_ptxas(arch).path, "-lineinfo", "-v", f"--gpu-name={sm_arch_from_capability(arch)}"]
        log = _output(*assembler, *flags, str(source), "-o", str(again))
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(binary))

    def largest(pattern: str) -> int:
        return max(map(int, re.findall(pattern, log)), default=0)

    return Assembly(
        registers=largest(r"Used (\d+) registers"),
        spills=largest(r"(\d+) bytes spill stores"),
        local=largest(r"(\d+) bytes stack frame"),
        instructions=instructions(sass),
        remarks=tuple(dict.fromkeys(re.sub(r"^ptxas \w+\s*: *", "", line) for line in REMARK.findall(log))),
    )


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def instructions(sass: str) -> dict[str, int]:
    """How often each instruction occurs in nvdisasm's listing, most frequent first."""
    found = INSTRUCTION.findall(sass)
    count = Counter(name + ("." + kinds.split(".")[1] if name == "MUFU" else "") for name, kinds in found)
    return dict(count.most_common())


def resident_blocks(device: Device, warps: int, registers: int, shared: int) -> int:
    """Blocks of `warps` warps that fit on a multiprocessor at once.

    `registers` are per thread, `shared` is bytes per block. The result is 0 if not even one block may run, because its
    shared memory exceeds the limit of a block.
    """
    if shared > device.shared_bytes_block:
        return 0
    warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = device.registers // warp // WARP_UNIT * WARP_UNIT // warps if warp else device.blocks
    piece = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    return min(device.blocks, device.warps // warps, by_registers, device.shared_bytes // piece)
