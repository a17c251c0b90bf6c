"""What every test has: one thread per process, no network, a cache of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before torch is imported, here and in subprocesses. The models are tiny and the workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
_CACHE = tempfile.mkdtemp(prefix="attnopt-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
