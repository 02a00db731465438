"""`python -m edgecomp.sweep FOLDER`: goes on with a sweep whose bundle is complete, on a machine that has only what bundles run on."""
from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from edgecomp.sweep.job import Job
from edgecomp.sweep.running import go_on
from edgecomp_runtime.errors import EdgecompError


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m edgecomp.sweep", description=__doc__)
    parser.add_argument("folder", type=Path, help="with sweep.job.json and bundle/, as `edgecomp sweep --prepare` leaves it")
    parser.add_argument("--data", type=Path, help="where the questions are here, if elsewhere")
    parser.add_argument("--image-folder", type=Path, help="where their pictures are here, if elsewhere")
    parser.add_argument("--repeats", type=int, help="of each timing; 0 times nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes that answer questions")
    parser.add_argument("--threads", type=int, help="of the process that is timed")
    given = parser.parse_args()
    try:
        changes = {"data": given.data and str(given.data.resolve()), "image_folder": given.image_folder and str(given.image_folder.resolve()),
                   "repeats": given.repeats}
        if changes := {key: value for key, value in changes.items() if value is not None}:
            dataclasses.replace(Job.load(given.folder), **changes).save(given.folder)
        _, failed = go_on(given.folder, jobs=given.jobs, threads=given.threads, say=lambda line: print(line, file=sys.stderr, flush=True))
    except EdgecompError as error:
        sys.exit(f"edgecomp: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
