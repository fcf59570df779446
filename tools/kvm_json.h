// Virtual machines of an image in KVM's own terms, for vmckpt inspect.
#pragma once

#include "image_json.h"
#include "modules/kvm.pb.h"

namespace vmckpt {

// One object per VM: its interrupt controllers, memory slots, routes, irqfds, ioeventfds, capabilities and vCPUs.
Json kvm_to_json(const pb::Kvm& kvm);

}  // namespace vmckpt
