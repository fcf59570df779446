// Named places at which tests make the supervisor fail (tests/faults): with VMCKPT_FAULT=kill:NAME in its environment it kills
// itself there with SIGKILL, as the out-of-memory killer might; with VMCKPT_FAULT=pause:NAME it waits there for 30 s, so that the
// test can kill something else; with VMCKPT_FAULT=wait:NAME it says so and waits until the file $VMCKPT_FAULT_GO is there. Costs
// one comparison per phase of a checkpoint.
#pragma once

namespace vmckpt {

void fault_point(const char* name);

}  // namespace vmckpt
