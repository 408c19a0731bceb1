"""Every kernel compiles for a GPU, on machines without one."""

import os
import subprocess
import sys
from pathlib import Path

from kernel_examples import needs_triton

KERNELS = {
    "_group_score_kernel",
    "_largest_entries_kernel",
    "_last_kernel",
    "_line_head_kernel",
    "_prototype_cosine_kernel",
    "_shaped_energy_kernel",
}


@needs_triton
def test_every_kernel_compiles_and_its_numbers_stay_in_registers(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, Path(__file__).with_name("compile_for_gpu.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == KERNELS
    assert {precision for name, precision, *_ in lines if name == "_line_head_kernel"} == {"ieee", "tf32"}
    # A few addresses of the surroundings of a loop may go to the stack, the tiles in the loop (16 kB and more) may not.
    assert max(int(stack) for *_, stack, _ in lines) <= 64
    assert max(int(shared) for *_, shared in lines) <= 99 * 1024  # what a GeForce or an A10 has, too
