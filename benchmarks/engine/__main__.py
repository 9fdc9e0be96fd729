"""The engine against plain hooks and against the tools people would use instead.

    python benchmarks/engine --json engine.json

What is measured, and all options: ``main.py`` beside this file.
"""

import sys
from pathlib import Path

# Run as a folder, this file's own folder is on the path, and not the one that the package ``engine`` lies in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.main import main

if __name__ == "__main__":
    main()
