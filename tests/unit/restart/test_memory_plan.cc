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

const std::vector<pid_t> kNoHelpers;

}  // namespace

TEST_CASE("what was anonymous is read, however long it is") {
  pb::AddressSpace space;
  *space.add_mappings() = anonymous(0x10000000, 64u << 20, PROT_READ | PROT_WRITE);
  auto image = image_with_runs(space, {{0x10000000, 16u << 20}, {0x13000000, 4096}});
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, GuestRam(), kNoFile, kNoHelpers, tape).ok());
  CHECK(count(tape, SYS_mmap) == 1);
  CHECK((tape.all_calls().front().args[3] & MAP_ANONYMOUS) != 0);
  CHECK(count(tape, kOpReadList) == 1);
}

TEST_CASE("helpers read along, each under a number that is free, and are gone before the tape goes on") {
  pb::AddressSpace space;
  *space.add_mappings() = anonymous(0x10000000, 64u << 20, PROT_READ | PROT_WRITE);
  auto image = image_with_runs(space, {{0x10000000, 64u << 20}});
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, GuestRam(), kNoFile, {4001, 4002}, tape).ok());
  std::vector<int64_t> order;
  for (const TapeCall& call : tape.all_calls()) order.push_back(call.number);
  CHECK(order == std::vector<int64_t>{SYS_mmap, kOpThread, kOpThread, kOpReadList, kOpJoin, kOpJoin});
  // A helper that cannot be made is one reader less.
  CHECK((tape.all_calls()[1].flags & kTapeMustSucceed) == 0);
  CHECK((tape.all_calls()[4].flags & kTapeMustSucceed) != 0);
}

TEST_CASE("little content is not worth a helper") {
  pb::AddressSpace space;
  *space.add_mappings() = anonymous(0x10000000, 1u << 20, PROT_READ | PROT_WRITE);
  auto image = image_with_runs(space, {{0x10000000, 1u << 20}});
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, GuestRam(), kNoFile, {4001, 4002}, tape).ok());
  CHECK(count(tape, kOpThread) == 0);
}

TEST_CASE("advice on huge pages comes before the content that is to lie in them") {
  pb::AddressSpace space;
  pb::Mapping mapping = anonymous(0x10000000, 4u << 20, PROT_READ | PROT_WRITE);
  mapping.add_advice("hg");
  *space.add_mappings() = mapping;
  auto image = image_with_runs(space, {{0x10000000, 4u << 20}});
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, GuestRam(), kNoFile, kNoHelpers, tape).ok());
  std::vector<int64_t> order;
  for (const TapeCall& call : tape.all_calls()) order.push_back(call.number);
  CHECK(order == std::vector<int64_t>{SYS_mmap, SYS_madvise, kOpReadList});
}

TEST_CASE("a read-only mapping with content gets its protection after its content") {
  pb::AddressSpace space;
  *space.add_mappings() = anonymous(0x10000000, 1u << 20, PROT_READ);
  auto image = image_with_runs(space, {{0x10000000, 8192}});
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, GuestRam(), kNoFile, kNoHelpers, tape).ok());
  std::vector<int64_t> order;
  for (const TapeCall& call : tape.all_calls()) order.push_back(call.number);
  CHECK(order == std::vector<int64_t>{SYS_mmap, kOpReadList, SYS_mprotect});
}

TEST_CASE("a stack stays one mapping that grows down, however long its content") {
  pb::AddressSpace space;
  pb::Mapping stack = anonymous(0x10000000, 8u << 20, PROT_READ | PROT_WRITE);
  stack.add_advice("gd");
  *space.add_mappings() = stack;
  auto image = image_with_runs(space, {{0x10000000, 8u << 20}});
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, GuestRam(), kNoFile, kNoHelpers, tape).ok());
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
  REQUIRE(plan_memory(space, *image, GuestRam(), kNoFile, kNoHelpers, tape).ok());
  const TapeCall& last = tape.all_calls().back();
  CHECK(last.number == SYS_madvise);
  CHECK(last.args[2] == MADV_DONTFORK);
}

TEST_CASE("pages that are zeros cost nothing in anonymous memory and are written over a mapped file") {
  pb::AddressSpace space;
  *space.add_mappings() = anonymous(0x10000000, 1u << 20, PROT_READ | PROT_WRITE);
  pb::Mapping file = anonymous(0x20000000, 4u << 20, PROT_READ);
  file.set_kind(pb::Mapping::FILE_PRIVATE);
  file.mutable_file()->set_path("/bin/tiny");
  *space.add_mappings() = file;
  auto image = image_with_runs(space, {{0x10000000, 8192, PageKind::kZero}, {0x10004000, 4096, PageKind::kAbsent},
                                       {0x20001000, 3u << 20, PageKind::kZero}, {0x20301000, 4096, PageKind::kAbsent}});
  MappingSources sources = kNoFile;
  sources.file = [](const pb::Mapping&) -> Result<int> { return 5; };
  TapeDraft tape;
  REQUIRE(plan_memory(space, *image, GuestRam(), sources, kNoHelpers, tape).ok());
  std::vector<int64_t> order;
  for (const TapeCall& call : tape.all_calls()) order.push_back(call.number);
  CHECK(order == std::vector<int64_t>{SYS_mmap, SYS_mmap, kOpCopyBytes, kOpCopyBytes, kOpCopyBytes, SYS_mprotect});
  CHECK(tape.all_calls()[2].args[0] == 0x20001000);
  CHECK(tape.all_calls()[2].args[2] == kMaxRecordBytes);
}
