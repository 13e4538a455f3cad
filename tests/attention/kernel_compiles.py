"""Compile the kernel for CUDA devices, which needs no such device; print registers and spills.

    python tests/attention/kernel_compiles.py

It says that Triton and ptxas accept the kernel, and nothing of a run on a GPU.
"""

import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pivottrace_verl.attention import kernel_code, kernel_tokens

POINTERS = {
    "query": "*bf16",
    "slots": "*i64",
    **dict.fromkeys(("key_scale", "query_scale", "state", "out", "sinks", "shares"), "*fp32"),
    **dict.fromkeys(("starts", "lengths", "table", "prompts", "responses", "written"), "*i32"),
    **dict.fromkeys(("scale", "soft_cap"), "fp32"),
}
CASES = {  # compute capability, keys
    "ampere": (80, "*bf16"),
    "ada_fp8": (89, "*fp8e4nv"),
    "hopper": (90, "*bf16"),
    "hopper_fp8": (90, "*fp8e4nv"),
}


def compiled(function, capability, constants, **pointers):
    types = {name: "i32" for name in function.arg_names} | POINTERS | pointers
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=function,
        signature={name: types[name] for name in function.arg_names},
        constexprs=constants,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def usage(code):
    """What the driver's tools say of registers, stack and shared memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return told.strip().splitlines()[-1].strip()


def main():
    for name, (capability, keys) in CASES.items():
        # Qwen2.5-7B: 28 query heads, 4 KV heads of size 128.
        shared = {"SPLITS": 8, "ROWS": 1, "GROUPS": 1}
        walk = {
            "HEADS": 7,
            "HEADS_PADDED": 16,
            "KV_HEADS": 4,
            "SIZE": 128,
            "SIZE_PADDED": 128,
            "TILE": 64,
            "SCALED_KEYS": keys == "*fp8e4nv",
            "SCALED_QUERY": keys == "*fp8e4nv",
            "WIDE": False,
            "query_size": 1,
            "keys_size": 1,
        }
        for capped in (False, True):
            constants = walk | shared | {"CAPPED": capped}
            code = compiled(kernel_code.walk, capability, constants, keys=keys, query=keys)
            print(name, "walk capped" if capped else "walk", usage(code))
        tokens = {"slots": "*i32", "owners": "*i32", "tokens": "*fp32", "owner": "*i32"}
        code = compiled(
            kernel_tokens.choices, capability, {"TILE": 4096, "logits_word": 1},
            logits="*bf16", **tokens,
        )  # fmt: skip
        print(name, "choices", usage(code))
        merge = {"HEADS": 28, "HEADS_PADDED": 32, "LEARNT_SINKS": True, "TELLS": True}
        print(name, "merge", usage(compiled(kernel_code.merge, capability, merge | shared)))


if __name__ == "__main__":
    main()
