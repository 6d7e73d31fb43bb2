"""A worker that only holds leases: ``python -m tests.lease_process FOLDER SECONDS FIRST END``.

For every line on stdin it tries each of the names n-FIRST to n-(END - 1) once and prints those it got; it holds them
until stdin ends, and says then of each whether it lost it.
"""

import sys
from pathlib import Path

from cache_schema.leases import Lease, Leases


def main() -> None:
    folder, seconds, first, end = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    held: list[Lease] = []
    say("ready")
    with Leases(folder, "worker", seconds) as leases:
        for _ in sys.stdin:
            got = [lease for number in range(first, end) if (lease := leases.claim([f"n-{number}"]))]
            held += got
            say(*(lease.name for lease in got))
        say(*(str(lease.is_lost()) for lease in held))


def say(*words: str) -> None:
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


main()
