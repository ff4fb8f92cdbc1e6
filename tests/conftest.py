"""One thread of torch in tests and the processes they start: two test workers on two cores must not fight."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
