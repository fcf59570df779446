#include "modules/aio.h"

#include "catch.h"

namespace vmckpt {

TEST_CASE("a ring of Linux AIO that is not what its mapping says is refused") {
  pb::AddressSpace space;
  CHECK(check_aio_rings(space).ok());
  pb::AioRing& ring = *space.AddExtension(pb::aio_rings);
  ring.set_address(0x7ffffff00000);
  ring.set_slots(127);
  CHECK_THAT(check_aio_rings(space).error().message(), Contains("is not mapped"));
  pb::Mapping& mapping = *space.add_mappings();
  mapping.set_kind(pb::Mapping::AIO_RING);
  mapping.set_start(ring.address());
  mapping.set_end(ring.address() + 4096);
  CHECK(check_aio_rings(space).ok());
  ring.set_head(127);  // one too far
  CHECK_THAT(check_aio_rings(space).error().message(), Contains("not what its mapping says"));
  space.ClearExtension(pb::aio_rings);
  CHECK_THAT(check_aio_rings(space).error().message(), Contains("not what its mapping says"));
}

}  // namespace vmckpt
