"""The largest size of everything that varies in a plan's graphs, and the capacities at which a cache is looked at. All follow from the manifest."""
from __future__ import annotations

from edgecomp_runtime.cuts import TEXT_ROWS
from edgecomp_runtime.manifest import Manifest, PlanInfo

PREFILL_ROWS = 256  # of a prompt at a time on a CPU: activations grow with it (attention's with the whole window), speed hardly does
BUCKET = 256  # rows of the smallest one
ENGINE_PREFILL_ROWS, ENGINE_LOGIT_ROWS = 512, 1  # what engines are built for; activations grow with the former, with the window as factor


def limits(manifest: Manifest, plan: PlanInfo, prefill_rows: int, logit_rows: int) -> dict[str, int]:
    """The largest size of each symbol in the shapes of a plan's decoder graphs; a vision graph takes one picture at a time.

    Args:
        manifest: the bundle's.
        plan: one of its plans.
        prefill_rows: of a prompt, taken at a time where it may be taken in parts: a picture that is cut, or rows that see each other
            both ways, come in one.
        logit_rows: whose logits are asked for at a time.
    """
    window = max(plan.cache_rows)
    rows = window if plan.cuts or manifest.decoder.bidirectional else min(prefill_rows, window)
    found = {"batch": 1, "images": manifest.vision.max_images, "rows": rows, "logit_rows": logit_rows, "text_rows": max(TEXT_ROWS, rows),
             "capacity": window, "bucket": plan.cache_rows[0]}
    for cut in plan.cuts:
        found |= {f"rows.{cut.layer}": min(rows, plan.cache_rows[cut.layer]), f"bucket.{cut.layer}": plan.cache_rows[cut.layer],
                  f"capacity.{cut.layer}": plan.cache_rows[cut.layer]}
    return found


def buckets(capacity: int) -> list[int]:
    """How many rows of a cache are looked at: doubled from one to the next, so that a token reads at most twice what it needs."""
    found = [BUCKET]
    while found[-1] < capacity:
        found.append(2 * found[-1])
    return [*found[:-1], capacity]


def bucket(rows: int, capacity: int) -> int:
    """The smallest of the buckets that holds so many rows."""
    return next(size for size in buckets(capacity) if size >= rows)
