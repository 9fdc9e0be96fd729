"""The engine against plain hooks and against the tools people would use instead; see ``benchmarks/engine/main.py``.

python benchmarks/engine.py --json engine.json
"""

from engine.main import main  # the folder beside this file, not this file: a package comes first

if __name__ == "__main__":
    main()
