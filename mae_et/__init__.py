"""mae_et: masked autoencoders pre-trained under the EfficientTrain++ curriculum."""

import os

# Before torch loads OpenMP: idle threads of the step must sleep, not spin, while loader workers want the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
