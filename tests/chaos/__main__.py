"""`python -m tests.chaos VERB`: the campaign by hand, for as long as one likes. JSON on standard output."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any


def main() -> int:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"  # sums are compared bit for bit, and workers share the machine
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # which does not survive a fork
    found = _run(_arguments().parse_args())
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return 1 if found["failures"] else 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, count, text in (
        ("kills", 1000, "kill train, verify, export, project, diagnose and report at their file-system changes"),
        ("disk", 300, "let the same commands meet a full disk at every class of bytes"),
        ("fuzz", 5000, "broken models, pairs and runs through the verbs that read them"),
    ):
        one = verbs.add_parser(verb, help=text)
        one.add_argument("--count", type=int, default=count)
        one.add_argument("--jobs", type=int, default=1)
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--hours", type=float, default=None, help="go on so long instead of to a count")
        one.add_argument("--only", default=None, help="only this scene or group")
        if verb == "fuzz":
            one.add_argument("--case", type=int, default=None, help="only this one, as a summary names it")
    kill = verbs.add_parser("kill", help="one kill anew, as a summary names it")
    kill.add_argument("--scene", required=True)
    kill.add_argument("--bomb", required=True)
    return parser


_WITHOUT_END = 10**9


def _run(given: argparse.Namespace) -> dict[str, Any]:
    until = None
    if getattr(given, "hours", None) is not None:
        given.count, until = _WITHOUT_END, time.time() + 3600 * given.hours
    if given.verb == "kill":
        from tests.chaos import kills

        return kills.one(given.scene, given.bomb)
    if given.verb in ("kills", "disk"):
        from tests.chaos import kills

        return kills.campaign(given.count, given.jobs, given.seed, given.only, disk=given.verb == "disk", until=until)
    from tests.chaos import fuzz

    if given.case is not None:
        return fuzz.one(given.case, given.seed, given.only)
    return fuzz.campaign(given.count, given.jobs, given.seed, given.only, until=until)


if __name__ == "__main__":
    sys.exit(main())
