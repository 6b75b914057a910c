"""DeepSpeed on a CPU, where it communicates by gloo and by shared memory, for which it compiles a module once."""

import os
import sys
from pathlib import Path


os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
