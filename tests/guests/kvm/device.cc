// SPDX-License-Identifier: Apache-2.0

#include "device.h"

#include <sys/random.h>

#include <cinttypes>

namespace tiny {
namespace {

std::string text_of(const char* format, uint64_t one, uint64_t two = 0, uint64_t three = 0) {
  char buffer[160];
  std::snprintf(buffer, sizeof buffer, format, one, two, three);
  return buffer;
}

uint64_t number_of(const uint8_t* data, size_t bytes) {
  uint64_t value = 0;
  std::memcpy(&value, data, bytes);
  return value;
}

uint64_t low_bytes(uint64_t value, size_t bytes) { return bytes >= 8 ? value : value & ((1ULL << 8 * bytes) - 1); }

bool is_within(uint64_t address, uint64_t start, uint64_t bytes) { return address - start < bytes; }

template <typename Numbers>
std::string list_of(const Numbers& numbers) {
  std::string list;
  for (uint64_t number : numbers) list += (list.empty() ? "" : ", ") + std::to_string(number);
  return "[" + list + "]";
}

}  // namespace

Device::Device(const Options& options, Machine& machine)
    : machine_(machine),
      vcpus_(options.vcpus),
      lose_answer_(static_cast<uint64_t>(options.lose_answer)),
      own_(static_cast<size_t>(options.vcpus) + 1) {
  must("getrandom", getrandom(nonce_.data(), sizeof nonce_, 0));
  for (PerVcpu& own : own_) {
    must("getrandom", getrandom(&own.counter, sizeof own.counter, 0));
    must("getrandom", getrandom(&own.increment, sizeof own.increment, 0));
  }
  std::printf("NONCE %08x%08x%08x%08x\n", nonce_[0], nonce_[1], nonce_[2], nonce_[3]);
  std::fflush(stdout);
}

// ---- the two ways to the registers ----------------------------------------------------------------------------------

void Device::read_port(int vcpu, uint16_t port, uint8_t* data, size_t bytes) {
  std::lock_guard lock(mutex_);
  reads_++;
  if (port == REG_COUNTER) return step_counter(own_[vcpu], data, bytes);
  uint64_t value = read_register(vcpu, port);
  std::memcpy(data, &value, bytes);
}

void Device::write_port(int vcpu, uint16_t port, const uint8_t* data, size_t bytes) {
  std::lock_guard lock(mutex_);
  writes_++;
  if (port == REG_SEQUENCE) return step_sequence(vcpu, data, bytes);
  write_register(vcpu, port, number_of(data, bytes));
}

void Device::read_memory(int vcpu, uint64_t address, uint8_t* data, size_t bytes) {
  std::lock_guard lock(mutex_);
  reads_++;
  if (is_within(address, COUNTER_ADDRESS, 0x2000)) return step_counter(own_[vcpu], data, bytes);
  uint64_t value = ~0ULL;  // what a bus without a device answers
  if (is_within(address, DEVICE_ADDRESS, 0x1000)) {
    value = read_register(vcpu, static_cast<uint16_t>(address - DEVICE_ADDRESS));
  }
  std::memcpy(data, &value, bytes);
}

void Device::write_memory(int vcpu, uint64_t address, const uint8_t* data, size_t bytes) {
  std::lock_guard lock(mutex_);
  writes_++;
  if (is_within(address, SEQUENCE_ADDRESS, 0x2000) || is_within(address, ROM_ADDRESS, ROM_BYTES)) {
    step_sequence(vcpu, data, bytes);
  } else if (is_within(address, COALESCED_ADDRESS, 0x1000)) {  // the ring was full
    step_coalesced(address, data, bytes);
  } else if (is_within(address, DEVICE_ADDRESS, 0x1000)) {
    write_register(vcpu, static_cast<uint16_t>(address - DEVICE_ADDRESS), number_of(data, bytes));
  } else {
    fail_locked(vcpu, text_of("write of %" PRIu64 " bytes to 0x%" PRIx64, bytes, address));
  }
}

void Device::drain(kvm_coalesced_mmio_ring* ring) {
  std::lock_guard lock(mutex_);
  const uint32_t entries = (4096 - sizeof *ring) / sizeof ring->coalesced_mmio[0];
  while (ring->first != __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE)) {
    const kvm_coalesced_mmio& entry = ring->coalesced_mmio[ring->first];
    step_coalesced(entry.phys_addr, entry.data, entry.len);
    __atomic_store_n(&ring->first, (ring->first + 1) % entries, __ATOMIC_RELEASE);
  }
}

// ---- the registers --------------------------------------------------------------------------------------------------

void Device::step_counter(PerVcpu& own, uint8_t* data, size_t bytes) {
  if (++answers_ != lose_answer_) own.counter++;
  std::memcpy(data, &own.counter, bytes);
}

void Device::step_sequence(int vcpu, const uint8_t* data, size_t bytes) {
  PerVcpu& own = own_[vcpu];
  uint64_t value = number_of(data, bytes);
  if (!own.sequence_known) {
    own.sequence_known = true;
    own.sequence = value;
    return;
  }
  own.sequence++;
  if (value != low_bytes(own.sequence, bytes)) {
    fail_locked(vcpu, text_of("write of %" PRIu64 " bytes, 0x%" PRIx64 " instead of 0x%" PRIx64, bytes, value,
                              low_bytes(own.sequence, bytes)));
  }
}

// Each vCPU has a word of the zone for its own.
void Device::step_coalesced(uint64_t address, const uint8_t* data, size_t bytes) {
  uint64_t vcpu = (address - COALESCED_ADDRESS) / 4;
  if (vcpu >= own_.size()) return fail_locked(0, text_of("collected write to 0x%" PRIx64, address));
  uint64_t value = number_of(data, bytes);
  uint64_t expected = low_bytes(++own_[vcpu].coalesced, bytes);
  if (value == expected) return;
  fail_locked(static_cast<int>(vcpu), text_of("collected write 0x%" PRIx64 " instead of 0x%" PRIx64, value, expected));
}

uint64_t Device::read_register(int vcpu, uint16_t reg) {
  PerVcpu& own = own_[vcpu];
  switch (reg) {
    case REG_INCREMENT: return own.increment;
    case REG_NONCE:
      if (nonce_words_told_ == nonce_.size()) return 0;
      return std::exchange(nonce_[nonce_words_told_++], 0);
    case REG_PERMIT: return permit_;
    case REG_VCPU: return static_cast<uint64_t>(vcpu);
    case REG_VCPUS: return static_cast<uint64_t>(vcpus_);
    case REG_FEATURES: return machine_.features();
    default: fail_locked(vcpu, text_of("read of register 0x%" PRIx64, reg)); return 0;
  }
}

void Device::write_register(int vcpu, uint16_t reg, uint64_t value) {
  PerVcpu& own = own_[vcpu];
  if (reg >= REG_ACKNOWLEDGE && reg < REG_ACKNOWLEDGE + 4 * SOURCES) {
    size_t source = (reg - REG_ACKNOWLEDGE) / 4;
    acknowledged_[source]++;
    if (value != acknowledged_[source] || value != raised_[source]) {
      fail_locked(vcpu, text_of("interrupt %" PRIu64 " of source %" PRIu64 ", raised were %" PRIu64, value, source,
                                raised_[source]));
    }
    return;
  }
  if (reg >= REG_TICKS && reg < REG_TICKS + 4 * TICKS) {
    ticks_[(reg - REG_TICKS) / 4] = value;
    return;
  }
  switch (reg) {
    case REG_TEXT: return take_text(vcpu, std::string(1, static_cast<char>(value)));
    case REG_HEX: return take_text(vcpu, text_of("%08" PRIx64, value));
    case REG_END:
      own.ended = true;
      if (value == END_ALL) all_ended_ = true;
      return;
    case REG_INCREMENT:
      if (value != low_bytes(++own.increment, 4)) {
        fail_locked(vcpu, text_of("increment to 0x%" PRIx64 " instead of 0x%" PRIx64, value, own.increment));
      }
      own.increment = value;
      return;
    case REG_READY: ready_for_interrupts_ = true; return;
    case REG_PASSES:
      own.passes = value;
      if (machine_.is_split()) raise_if_due(SOURCE_LEVEL);
      return;
    case REG_DOORBELLS: own.doorbells = value; return;
    default: fail_locked(vcpu, text_of("write of register 0x%" PRIx64, reg));
  }
}

// ---- what is printed ------------------------------------------------------------------------------------------------

void Device::take_text(int vcpu, const std::string& text) {
  std::string& line = own_[vcpu].line;
  line += text;
  if (!line.ends_with('\n')) return;
  if (line.starts_with("FAIL")) right_ = false;
  std::fputs(line.c_str(), stdout);
  std::fflush(stdout);
  line.clear();
}

void Device::fail_locked(int vcpu, const std::string& text) {
  right_ = false;
  std::printf("FAIL vcpu %d: %s\n", vcpu, text.c_str());
  std::fflush(stdout);
}

void Device::fail(int vcpu, const std::string& text) {
  std::lock_guard lock(mutex_);
  fail_locked(vcpu, text);
}

std::string Device::counts() {
  std::lock_guard lock(mutex_);
  doorbells_ += machine_.take_doorbells();
  std::vector<uint64_t> passes;
  uint64_t rung = 0;
  for (int vcpu = 0; vcpu < vcpus_; vcpu++) {
    passes.push_back(own_[vcpu].passes);
    rung += own_[vcpu].doorbells;
  }
  auto elapsed = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start_);
  std::string text = "{\"elapsed_us\": " + std::to_string(elapsed.count());
  auto add = [&](const char* name, const std::string& value) { text += std::string(", \"") + name + "\": " + value; };
  add("passes", list_of(passes));
  add("reads", std::to_string(reads_));
  add("writes", std::to_string(writes_));
  add("interrupted_runs", std::to_string(interrupted_runs_));
  add("raised", list_of(raised_));
  add("acknowledged", list_of(acknowledged_));
  add("resampled", std::to_string(resampled_));
  add("pit_ticks", std::to_string(ticks_[TICKS_PIT]));
  add("lapic_ticks", std::to_string(ticks_[TICKS_LAPIC]));
  add("doorbells_heard", std::to_string(doorbells_));
  add("doorbells_rung", std::to_string(rung));
  add("right", right_ ? "true" : "false");
  return text + "}";
}

// ---- the main thread's part -----------------------------------------------------------------------------------------

void Device::set_permit(uint32_t stages) {
  std::lock_guard lock(mutex_);
  permit_ = stages;
}

void Device::note_interrupted_run() {
  std::lock_guard lock(mutex_);
  interrupted_runs_++;
}

void Device::end_level_interrupt(int vcpu, int vector) {
  std::lock_guard lock(mutex_);
  resampled_++;
  if (vector == VECTOR_LEVEL && resampled_ <= raised_[SOURCE_LEVEL]) return;
  fail_locked(vcpu, text_of("end %" PRIu64 " of vector %" PRIu64 ", raised were %" PRIu64, resampled_,
                            static_cast<uint64_t>(vector), raised_[SOURCE_LEVEL]));
}

void Device::raise_if_due(int source) {
  const uint32_t features = machine_.features();
  if (!(features & FEATURE_EVENTFDS) || !(features & FEATURE_LAPIC)) return;
  if (!ready_for_interrupts_ || all_ended_) return;
  if (source == SOURCE_IRQFD && !(features & FEATURE_IOAPIC)) return;
  if (acknowledged_[source] != raised_[source]) return;
  if (source == SOURCE_LEVEL && resampled_ != raised_[source]) return;
  raised_[source]++;
  machine_.raise(source);
}

// One interrupt of each source is under way at most, so none can hide in another and the numbers must agree exactly.
void Device::raise_interrupts() {
  std::lock_guard lock(mutex_);
  if (machine_.take_resample()) resampled_++;
  for (int source = 0; source < SOURCES; source++) raise_if_due(source);
}

bool Device::has_ended() {
  std::lock_guard lock(mutex_);
  int ended = 0;
  for (const PerVcpu& own : own_) ended += own.ended;
  return all_ended_ || ended >= vcpus_;
}

bool Device::is_right() {
  std::lock_guard lock(mutex_);
  return right_;
}

}  // namespace tiny
