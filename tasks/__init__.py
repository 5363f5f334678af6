"""The pipeline's stages and what they share."""

import os

if not os.environ.get("RAY_ADDRESS"):
    # Read when Ray is imported. Without it a private Ray puts the host's outer address in place of a loopback one, and
    # serves everybody there.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
