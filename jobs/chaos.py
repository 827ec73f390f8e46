"""Plays faults against real labelling jobs on a real Ray, and says which of them the outputs survived.

    python jobs/chaos.py --out /tmp/chaos                          # all, small: 24 minutes on two busy cores
    python jobs/chaos.py --out /tmp/chaos --scenarios node_lost disk_full_working --seed 7
    python jobs/chaos.py --out /tmp/chaos --size large             # 2,000 frames, 20 kills: 34 minutes, busy

Expect a line a scenario, then a table; the same goes to OUT/chaos.json. Exit code 1 where one failed. It draws its own
archive and model, and what it leaves in OUT (jobs' logs, outputs) is there to be looked at. Linux only; the two
scenarios of a full disk need `unshare` to be allowed to mount.
"""

import argparse
import json
import sys
from pathlib import Path

from unet_ray.chaos import scenarios, trials


def main() -> int:
    """Plays the scenarios and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for all that is made; OUT/stage is emptied")
    parser.add_argument("--seed", type=int, default=0, help="decides frames, model and the moments of the faults")
    parser.add_argument("--scenarios", nargs="+", choices=list(scenarios.SCENARIOS), default=list(scenarios.SCENARIOS))
    parser.add_argument("--size", choices=list(trials.SIZES), default="small")
    options = parser.parse_args()
    stage = trials.Stage(options.out.resolve() / "stage", trials.SIZES[options.size], options.seed)
    outcomes = []
    for name in options.scenarios:
        outcomes.append(scenarios.run(stage, name))
        print(f"{name}: {outcomes[-1].verdict} after {outcomes[-1].seconds:g} s", flush=True)
    print(scenarios.table(outcomes))
    (options.out / "chaos.json").write_text(json.dumps(scenarios.as_json(outcomes), indent=1) + "\n")
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
