"""Draw the built-in data: `python -m common.draw_shapes ROOT [--layout LAYOUT] [--domain DOMAIN] [--seed N]`."""

import argparse
from pathlib import Path

from common.datasets.shapes import LOOKS, WRITERS, make_shapes
from common.errors import report_errors


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the built-in data.")
    parser.add_argument("root", type=Path, help="folder of the dataset; existing files stay unchanged")
    parser.add_argument("--layout", choices=sorted(WRITERS), default="voc")
    parser.add_argument("--domain", choices=sorted(LOOKS), default="a")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_shapes(args.root, args.layout, seed=args.seed, domain=args.domain)
    print(f"{args.root}: built-in data, {args.layout} layout, domain {args.domain}, seed {args.seed}")


if __name__ == "__main__":
    main()
