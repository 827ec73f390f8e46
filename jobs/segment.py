"""Labels an archive of frames on a Ray cluster; takes the options of `unet-ray segment`.

On the cluster that RAY_ADDRESS names, or with `ray job submit`:

    ray job submit --working-dir . -- python jobs/segment.py \
        --model s3://bucket/runs/carla --frames s3://bucket/archive --out s3://bucket/labels

Expect a line as each phase begins and one every 30 s with frames done of the known total, then the totals, the class
shares and the place of the output. Submitted again after a kill, it labels what has no record yet, and nothing twice.
"""

import sys

from unet_ray.cli import end_process, run_command

if __name__ == "__main__":
    end_process(lambda: run_command("segment", sys.argv[1:]))
