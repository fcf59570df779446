# SPDX-License-Identifier: Apache-2.0
"""Programs in a user-mode emulator: the recorder's library lies in the process twice, once as code and once as the emulated
program's data."""

import os
import shutil
import subprocess

import pytest

from vmckpt_harness import VMCKPT


def has_dynamic_emulator():
    """Debian 13's is statically linked, which vmckpt refuses."""
    emulator = shutil.which("qemu-x86_64")
    return emulator is not None and subprocess.run(["ldd", emulator], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built"),
    pytest.mark.skipif(not has_dynamic_emulator(), reason="no dynamically linked qemu-x86_64, as Debian 12's qemu-user has"),
]


@pytest.mark.parametrize("act", ["pipe", "signal_state"])
def test_an_emulated_program_is_what_it_was(stage, act):
    target = stage.launch(["qemu-x86_64", stage.act(act), stage.go_file])
    target.wait_for_line("READY")
    target.checkpoint()
    image = target.checkpoint()
    target.kill()
    target.restart(image)
    stage.go()
    target.wait_for_line("PASS")
    assert target.wait_for_end() == 0
