"""Run a benchmark by name."""

import importlib
import pkgutil
import sys
from pathlib import Path

NAMES = sorted(
    module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name[0] != "_"
)

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"Usage: python -m benchmarks NAME [options], with NAME one of {', '.join(NAMES)}")
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
