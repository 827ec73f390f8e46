"""What the processor or GPU of this machine can compute in."""

from __future__ import annotations

import os
import subprocess


def has_bfloat16(device: str) -> bool:
    """Whether this machine's `cpu` or `gpu` multiplies in bfloat16: AVX512-BF16, AMX, or every GPU since Ampere."""
    if device == "gpu":
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return all(float(line) >= 8 for line in answer.split())
    if not os.path.exists("/proc/cpuinfo"):
        return False
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags
