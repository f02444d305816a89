"""What card this is: name, versions, and the two ceilings that everything else is held against.

    python benchmarks/gpu/bench_card.py
"""

import argparse
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kit import GIB, ROOT, Part, part_parser

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "peft", "bitsandbytes", "liger-kernel")


def versions() -> dict[str, str]:
    """What computes here, and the repository's commit."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found | {"commit": commit.stdout.strip()}


def copy_rate(part: Part) -> float:
    """GB a second that a copy of 1 GiB reads and writes."""
    import torch

    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / part.milliseconds(lambda: target.copy_(source)) / 1e6


def product_rate(part: Part) -> float:
    """TFLOP a second of a bf16 product of random matrices of 8192 x 8192."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / part.milliseconds(lambda: left @ right) / 1e9


def card(part: Part) -> dict[str, Any]:
    """The card's name, memory its rates, and the time to launch a kernel."""
    import os

    import torch

    figures: dict[str, Any] = {"versions": versions(), "host_cores": os.cpu_count()}
    if part.dry:
        return figures | {"card": "none, a dry run", "memory_gib": 0}
    facts = torch.cuda.get_device_properties(0)
    figures |= {
        "card": facts.name,
        "memory_gib": round(facts.total_memory / GIB, 2),
        "limit_gib": part.limit_gib,
        "compute_capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    figures["copy_gb_per_sec"] = round(copy_rate(part))
    figures["bf16_tflops"] = round(product_rate(part))
    one = torch.zeros(1, device="cuda")
    figures["launch_us"] = round(part.milliseconds(lambda: [one.zero_() for _ in range(1000)]), 2)
    return figures


def main(args: argparse.Namespace) -> None:
    """Measures and writes."""
    part = Part("card", args)
    part.measure("card", 30, card, part)


if __name__ == "__main__":
    main(part_parser(__doc__).parse_args())
