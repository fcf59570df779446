# SPDX-License-Identifier: Apache-2.0
"""All peers, in the order in which the tables show them."""

from peers.background_snapshot import BackgroundSnapshot
from peers.criu import Criu
from peers.migrate import MigrateLive, MigrateStopped
from peers.savevm import Savevm
from peers.vmckpt import Vmckpt

ALL = (Vmckpt, BackgroundSnapshot, MigrateLive, MigrateStopped, Savevm, Criu)
