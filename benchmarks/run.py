"""`make bench`: `clearhead bench` from the root of the checkout.

python -m benchmarks.run                     # measure and print; every option of `clearhead bench` works
python -m benchmarks.run --quick
python -m benchmarks.run --save              # and write benchmarks/results/bench-cpu-DATE.json
python -m benchmarks.run --save --page docs/benchmarks.md
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from clearhead.cli import main

if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])  # where --save finds benchmarks/results
    sys.exit(main(["bench", *sys.argv[1:]]))
