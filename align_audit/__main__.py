"""``python -m align_audit`` is the command ``align-audit``."""

from align_audit.cli.app import main

if __name__ == "__main__":
    main()
