#include "restart/vdso_plan.h"

#include <algorithm>
#include <cstring>

#include "catch.h"
#include <sys/auxv.h>
#include <unistd.h>

using namespace vmckpt;

namespace {

constexpr uint64_t kOldPlace = 0x7000'0000, kParking = 0x1000'0000, kFreePlace = 0x2000'0000, kTape = 0x3000'0000;

std::string own_code(const std::vector<Vma>& maps) {
  auto code = std::find_if(maps.begin(), maps.end(), [](const Vma& vma) { return vma.name == "[vdso]"; });
  REQUIRE(code != maps.end());
  return {reinterpret_cast<const char*>(code->start), code->bytes()};
}

// A target that had its vdso at kOldPlace.
pb::AddressSpace space_with(const std::string& code) {
  pb::AddressSpace space;
  pb::Mapping* mapping = space.add_mappings();
  mapping->set_kind(pb::Mapping::VDSO);
  mapping->set_name("[vdso]");
  mapping->set_start(kOldPlace);
  mapping->set_end(kOldPlace + code.size());
  space.set_vdso_code(code);
  return space;
}

}  // namespace

TEST_CASE("functions of another kernel's vdso jump to this kernel's, wherever that will lie") {
  const std::vector<Vma> maps = *read_maps(::getpid());
  const std::string code = own_code(maps);
  std::string old_code = code;
  old_code.back() = static_cast<char>(~old_code.back());
  auto plan = make_vdso_plan(space_with(old_code), maps, late_number(0), late_number(1));
  REQUIRE(plan.ok());
  REQUIRE_FALSE(plan->jumps.empty());
  TapeDraft tape;
  plan_vdso_return(*plan, tape);
  const std::vector<uint8_t> bytes = tape.lay_out(kTape, Tape{}, {kParking, kFreePlace});
  const std::vector<TapeCall>& calls = tape.all_calls();
  auto copy = std::find_if(calls.begin(), calls.end(), [](const TapeCall& call) { return call.number == kOpCopyBytes; });
  REQUIRE(copy != calls.end());
  TapeCall placed;
  std::memcpy(&placed, bytes.data() + sizeof(Tape) + static_cast<size_t>(copy - calls.begin()) * sizeof placed, sizeof placed);
  CHECK(placed.args[0] == kOldPlace);
  REQUIRE(placed.args[2] == code.size());
  const uint8_t* patched = bytes.data() + (placed.args[1] - kTape);
  const uint64_t code_offset = ::getauxval(AT_SYSINFO_EHDR) - plan->parts.front().start;
  for (const VdsoPlan::Jump& jump : plan->jumps) {
    uint64_t target = 0;
    std::memcpy(&target, patched + jump.at, sizeof target);
    // The same function in the code itself: old and new have it at the same place here.
    CHECK(target == kFreePlace + code_offset + (jump.at - 2));
    CHECK((patched[jump.at - 2] == 0x48 && patched[jump.at - 1] == 0xb8));    // movabs rax
    CHECK((patched[jump.at + 8] == 0xff && patched[jump.at + 9] == 0xe0));    // jmp rax
  }
  CHECK(known_number(*syscall_instruction(*plan), {kParking, kFreePlace}) - (kFreePlace + code_offset) < code.size());
}
