"""Helpers behind the notebooks: image sets, backbones, feature banks, OOD detectors, metrics and figures."""

import os

# GNU OpenMP's threads wait actively for a long time by default, which slows PyTorch several times over as soon
# as another process wants a core. A short wait costs some 5 % on an idle machine. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
