"""The pipeline's stages and what they share."""

import gc
import os

# Torch, diffusers and Ray make millions of objects while they load, none of them garbage: Python's own thresholds cost a
# fifth of the time that the imports take (`time python -c "import tasks.kd_trainee"`, with and without this line).
gc.set_threshold(50_000, 20, 100)

if not os.environ.get("RAY_ADDRESS"):
    # Read when Ray is imported. Without it a private Ray puts the host's outer address in place of a loopback one, and
    # serves everybody there.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
