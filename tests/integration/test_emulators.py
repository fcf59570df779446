# SPDX-License-Identifier: Apache-2.0
"""Programs in a user-mode emulator: the recorder's library lies in the process twice, once as code and once as the emulated
program's data."""

import os
import shutil

import pytest

from vmckpt_harness import VMCKPT

pytestmark = [
    pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built"),
    pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-x86_64 (package qemu-user) is not installed"),
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
