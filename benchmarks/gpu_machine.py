"""What a GPU machine is, and whether what loratune stands on works there: lines that begin with `= ` sum it up."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform

PACKAGES = (
    "torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "datasets", "pydantic",
    "trl", "liger-kernel", "axolotl", "unsloth",
)  # fmt: skip


def main() -> None:
    """Tell versions, the device, what can't be imported, and how well 4-bit weights come back."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    print("= python", platform.python_version(), ", ".join(found))
    for name in (
        "loratune.training.run",
        "loratune.commands.evaluate",
        "loratune.commands.merge",
        "loratune.cli",
        "bitsandbytes",
        "pytest",
    ):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever it is, it is to be told
            print(f"= {name} can't be imported: {type(error).__name__}: {str(error)[:150]}")
    import torch

    if not torch.cuda.is_available():
        print("= no GPU is in reach")
        return
    free = torch.cuda.mem_get_info()[0] / 2**30
    print(
        f"= {torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}, CUDA {torch.version.cuda},", end=" "
    )
    print(f"{free:.1f} GiB free")
    from bitsandbytes import functional

    weights = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    few, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    lost = (functional.dequantize_4bit(few, state).float() - weights.float()).norm() / weights.float().norm()
    print(f"= nf4 loses {float(lost):.3f} of a normal matrix (0.09 to 0.11 is right)")


if __name__ == "__main__":
    main()
