#include "restart/memory_plan.h"

#include "catch.h"
#include <sys/mman.h>
#include <sys/syscall.h>

#include "unit_image.h"

using namespace vmckpt;

namespace {

size_t count(const TapeDraft& tape, int64_t number) {
  size_t calls = 0;
  for (const TapeCall& call : tape.all_calls()) calls += call.number == number;
  return calls;
}

pb::Mapping anonymous(uint64_t start, uint64_t bytes, uint32_t protection) {
  pb::Mapping mapping;
  mapping.set_kind(pb::Mapping::ANONYMOUS);
  mapping.set_start(start);
  mapping.set_end(start + bytes);
  mapping.set_protection(protection);
  return mapping;
}

const MappingSources kNoFile = {[](const pb::Mapping&) -> Result<int> { return error("no file"); },
                                [](const pb::Mapping&) { return -1; }};

}  // namespace

TEST_CASE("a long run of pages is mapped from the image, a short one is read") {
  pb::AddressSpace space;
  *space.add_mappings() = anonymous(0x10000000, 64u << 20, PROT_READ | PROT_WRITE);
  auto image = image_with_runs(space, {{0x10000000, 16u << 20}, {0x13000000, 4096}});
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, kNoFile, tape).ok());
  CHECK(count(tape, SYS_mmap) == 2);  // the mapping, and the long run over it
  CHECK(count(tape, kOpReadExactly) == 1);
}

TEST_CASE("a read-only mapping with content gets its protection after its content") {
  pb::AddressSpace space;
  *space.add_mappings() = anonymous(0x10000000, 1u << 20, PROT_READ);
  auto image = image_with_runs(space, {{0x10000000, 8192}});
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, kNoFile, tape).ok());
  std::vector<int64_t> order;
  for (const TapeCall& call : tape.all_calls()) order.push_back(call.number);
  CHECK(order == std::vector<int64_t>{SYS_mmap, kOpReadExactly, SYS_mprotect});
}

TEST_CASE("a stack stays one mapping that grows down, however long its content") {
  pb::AddressSpace space;
  pb::Mapping stack = anonymous(0x10000000, 8u << 20, PROT_READ | PROT_WRITE);
  stack.add_advice("gd");
  *space.add_mappings() = stack;
  auto image = image_with_runs(space, {{0x10000000, 8u << 20}});
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, kNoFile, tape).ok());
  CHECK(count(tape, SYS_mmap) == 1);
  CHECK((tape.all_calls().front().args[3] & MAP_GROWSDOWN) != 0);
}

TEST_CASE("fork advice is given again after the content is in place") {
  pb::AddressSpace space;
  pb::Mapping mapping = anonymous(0x10000000, 1u << 20, PROT_READ | PROT_WRITE);
  mapping.add_advice("dc");
  *space.add_mappings() = mapping;
  auto image = image_with_runs(space, {{0x10000000, 4096}});
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, kNoFile, tape).ok());
  const TapeCall& last = tape.all_calls().back();
  CHECK(last.number == SYS_madvise);
  CHECK(last.args[2] == MADV_DONTFORK);
}
