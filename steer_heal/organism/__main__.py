"""`python -m steer_heal.organism`: retrains the embedded model and checks it.

With `--check` only the weights that are there are checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

# Set before torch is loaded. Threads that wait must not spin: on shared cores that cost a
# factor of ten.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from steer_heal.organism import WEIGHTS_FOLDER
from steer_heal.organism.accept import format_table
from steer_heal.organism.build import ACCEPTANCE_FILE, build, check


def main() -> int:
    """Runs the command line; 1 if a row of the table fails."""
    parser = argparse.ArgumentParser(prog="python -m steer_heal.organism", description=__doc__)
    parser.add_argument("--check", action="store_true", help="measure the weights that are there")
    if parser.parse_args().check:
        path = WEIGHTS_FOLDER / ACCEPTANCE_FILE
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        acceptance = check(WEIGHTS_FOLDER, known.get("details", {}).get("training"))
    else:
        acceptance = build()
    print(format_table(acceptance))
    return 0 if acceptance.passed else 1


if __name__ == "__main__":
    sys.exit(main())
