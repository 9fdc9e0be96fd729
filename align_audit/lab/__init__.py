"""The demonstration: a small pretrained model, the stories it was trained on, and two ways to train it on preferences."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "assets" / "model"
"""The shipped model and its tokenizer, as ``from_pretrained`` takes them; ``align_audit.lab.pretrain`` made it."""

__all__ = ["MODEL_DIR"]
