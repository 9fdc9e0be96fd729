"""Training runs one after the other, without what the libraries around them print."""

from __future__ import annotations

import os
import warnings


def quieten() -> None:
    """Offline, on one thread, without progress bars and warnings; of the whole process."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
