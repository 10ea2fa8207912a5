"""One process of several does something alone; the others wait for its end.

    python -m sharding.once           on all but process 0: ends as process 0's command did
    python -m sharding.once <&8       on process 0: its command's exit code comes as a line

scripts/iterate.sh calls it around what is done once. COORDINATOR, PROCESSES and PROCESS_ID say who
is who; sharding/watch.py names one that dies meanwhile. Runs without JAX.
"""

import signal
import sys

from sharding import watch


def main() -> None:
    try:
        place = watch.Flags().place()
        mine = watch.Watch(*place)
    except ValueError as error:
        sys.exit(f"error: {error}")
    stops = (signal.SIGINT, signal.SIGTERM)
    if place[2] > 0:
        for number in stops:
            signal.signal(number, lambda *_: mine.finish(75))
        while True:
            signal.pause()
    for number in stops:  # the command's to obey: its exit code says it
        signal.signal(number, signal.SIG_IGN)
    mine.finish(int(sys.stdin.readline() or 75))  # nothing: the shell that runs it was killed


if __name__ == "__main__":
    main()
