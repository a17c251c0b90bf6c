"""What every test has: one thread per process, no network, a cache of its own."""

from __future__ import annotations

import os
import tempfile

# Before torch is imported, here and in subprocesses. The models are tiny and the workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="attnopt-tests-")
