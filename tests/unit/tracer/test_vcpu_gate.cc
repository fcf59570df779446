// Where kvm_run of each vCPU is: what the recorder has seen, held against what /proc shows.
#include "catch.h"
#include "tracer/vcpu_gate.h"

using namespace vmckpt;

namespace {

KvmObject vcpu(uint64_t number, uint64_t mapped, uint64_t run = 0) {
  KvmObject object{};
  object.kind = KvmKind::kVcpu;
  object.number = number;
  object.mapped = mapped;
  object.run = run;
  return object;
}

std::vector<uint64_t> runs_of(std::vector<KvmObject> objects, const std::vector<RunMapping>& mappings) {
  objects.insert(objects.begin(), KvmObject{});
  find_runs(mappings, objects);
  std::vector<uint64_t> runs;
  for (size_t i = 1; i < objects.size(); ++i) runs.push_back(objects[i].run);
  return runs;
}

RunMapping at(uint64_t start, const char* name) { return {RemoteAddr(start), name}; }

}  // namespace

TEST_CASE("the mappings of kvm_run are found among all others", "[vcpu_gate]") {
  const auto mappings = run_mappings(
      "7f10a000-7f10d000 rw-s 00000000 00:0e 1059                       anon_inode:kvm-vcpu:0\n"
      "7f10d000-7f110000 rw-s 00001000 00:0e 1059                       anon_inode:kvm-vcpu:1\n"
      "7f110000-7f113000 rw-s 00000000 00:0e 1059                       anon_inode:kvm-vcpu:12\n"
      "7f200000-7f203000 rw-s 00000000 00:01 77                         /memfd:anon_inode:kvm-vcpu:3 (deleted)\n"
      "7f300000-7f303000 rw-p 00000000 00:00 0 \n");
  REQUIRE(mappings.size() == 2);
  CHECK(mappings[0].start == RemoteAddr(0x7f10a000));
  CHECK(mappings[1].start == RemoteAddr(0x7f110000));
  CHECK(mappings[1].name == "anon_inode:kvm-vcpu:12");
}

TEST_CASE("kvm_run is where the recorder saw it mapped, if it is there", "[vcpu_gate]") {
  const std::vector<RunMapping> mappings = {at(0x1000, "anon_inode:kvm-vcpu:0"), at(0x5000, "anon_inode:kvm-vcpu:1")};
  CHECK(runs_of({vcpu(0, 0x1000), vcpu(1, 0x5000)}, mappings) == std::vector<uint64_t>{0x1000, 0x5000});
}

TEST_CASE("a kvm_run that was unmapped is nowhere, though something else lies there", "[vcpu_gate]") {
  const std::vector<RunMapping> mappings = {at(0x1000, "anon_inode:kvm-vcpu:0")};
  CHECK(runs_of({vcpu(0, 0x1000), vcpu(1, 0x5000, 0x5000)}, mappings) == std::vector<uint64_t>{0x1000, 0});
  CHECK(runs_of({vcpu(0, 0x1000), vcpu(1, 0x1000, 0x1000)}, mappings) == std::vector<uint64_t>{0x1000, 0});
}

TEST_CASE("a kvm_run that was moved, or mapped unseen, is found by the vCPU's number", "[vcpu_gate]") {
  const std::vector<RunMapping> mappings = {at(0x1000, "anon_inode:kvm-vcpu:0"), at(0x9000, "anon_inode:kvm-vcpu:1")};
  CHECK(runs_of({vcpu(0, 0x1000), vcpu(1, 0x5000)}, mappings) == std::vector<uint64_t>{0x1000, 0x9000});
  CHECK(runs_of({vcpu(0, 0), vcpu(1, 0)}, mappings) == std::vector<uint64_t>{0x1000, 0x9000});
  // Its descriptor's number was reused, and what was mapped then is no kvm_run.
  CHECK(runs_of({vcpu(0, 0x7000, 0x1000), vcpu(1, 0x7000, 0x9000)}, mappings) == std::vector<uint64_t>{0x1000, 0x9000});
}

TEST_CASE("an address that two vCPUs have had is the younger one's", "[vcpu_gate]") {
  CHECK(runs_of({vcpu(0, 0x1000), vcpu(0, 0x1000)}, {at(0x1000, "anon_inode:kvm-vcpu:0")}) == std::vector<uint64_t>{0, 0x1000});
}

TEST_CASE("names without the vCPU's number, of older kernels, are enough where the address is known", "[vcpu_gate]") {
  const std::vector<RunMapping> mappings = {at(0x5000, "anon_inode:kvm-vcpu"), at(0x1000, "anon_inode:kvm-vcpu")};
  CHECK(runs_of({vcpu(0, 0x1000), vcpu(1, 0x5000)}, mappings) == std::vector<uint64_t>{0x1000, 0x5000});
}
