"""Read onnxruntime's profile (Chrome trace JSON) into time per node."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class NodeTimes:
    """Per-node times of a profile.

    Args:
        mean_us: node name to mean microseconds per run; a node without a name is ``<op>#<index>``.
        op: node name to operator.
        runs: how many runs the profile holds.
    """

    mean_us: dict[str, float]
    op: dict[str, str]
    runs: int


def read_profile(path: Path) -> NodeTimes:
    """Sum each node's kernel time over all runs and divide by the number of runs."""
    total: defaultdict[str, float] = defaultdict(float)
    op: dict[str, str] = {}
    runs = 0
    for event in json.loads(path.read_text()):
        name = event.get("name", "")
        if name == "model_run":
            runs += 1
        if event.get("cat") != "Node" or not name.endswith(_SUFFIX):
            continue
        args = event.get("args", {})
        key = name.removesuffix(_SUFFIX) or f"{args.get('op_name', '?')}#{args.get('node_index', '?')}"
        total[key] += event["dur"]
        op[key] = args.get("op_name", "?")
    return NodeTimes({k: v / max(runs, 1) for k, v in total.items()}, op, runs)
