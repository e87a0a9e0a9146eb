"""`python -m nr_serve.train RECIPE --corpus DIR --out DIR [--resume]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nr_serve.errors import NrError
from nr_serve.train.trainer import train


def main() -> int:
    """Train; print the adapter file's path."""
    parser = argparse.ArgumentParser(prog="nr_serve.train")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    try:
        print(train(args.recipe, args.out, args.corpus, resume=args.resume))
    except NrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
