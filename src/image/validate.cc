#include "image/validate.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <unordered_map>

#include <sys/user.h>

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include "core/page.h"
#include "image/schema.pb.h"

namespace vmckpt {
namespace {

constexpr size_t kIdBytes = 16;
constexpr size_t kSiginfoBytes = 128;
constexpr size_t kSockFilterBytes = 8;
constexpr size_t kMaxFilterInstructions = 4096;  // BPF_MAXINSNS
constexpr size_t kMaxFilters = 32768;            // far above MAX_INSNS_PER_PATH
constexpr size_t kMinXstateBytes = 576;          // FXSAVE area and XSAVE header
constexpr size_t kMaxXstateBytes = 65536;        // AMX needs 11008
constexpr size_t kMaxCommandNameBytes = 15;      // TASK_COMM_LEN less the NUL
constexpr size_t kMaxAffinityBytes = 8192;
constexpr size_t kMaxAuxvBytes = 4096;
constexpr size_t kMaxVdsoBytes = size_t{1} << 20;
constexpr uint32_t kMaxSignal = 64;
constexpr uint64_t kMaxFileBytes = uint64_t{1} << 62;

static_assert(kImagePageBytes == kPageBytes);  // memory's pages are the image's
constexpr uint64_t page_round_up(uint64_t value) { return (value + kImagePageBytes - 1) / kImagePageBytes * kImagePageBytes; }
constexpr bool page_aligned(uint64_t value) { return value % kImagePageBytes == 0; }

std::string range_text(uint64_t start, uint64_t end) { return fmt::format("{:#x}-{:#x}", start, end); }

std::string record_text(const PageRecord& record) {
  // The sum may wrap in a hostile record; it is only shown.
  std::string range = range_text(record.address, record.address + record.bytes);
  if (record.object == 0) return "page record of memory " + range;
  return fmt::format("page record of captured file {} at {}", record.object, range);
}

// Where the content of a record lies; not whether its store is there, which the metadata tells.
Result<void> check_content(const PageRecord& record, uint64_t data_end) {
  constexpr const char* kCure = "use a newer vmckpt";
  if (record.reserved != 0) return error(record_text(record) + " has reserved bytes that are not zero");
  switch (record.kind) {
    case PageKind::kData: break;
    case PageKind::kZero:
    case PageKind::kAbsent:
    case PageKind::kInBase:
      if (record.codec != PageCodec::kNone || record.offset != 0 || record.stored_bytes != 0 || record.stored_xxh3 != 0) {
        return error(record_text(record) + " stores something, which records of its kind do not");
      }
      if ((record.kind == PageKind::kInBase) == (record.store == kStoreThisFile)) {
        return error(fmt::format("{} names the store {}, which records of its kind cannot", record_text(record), record.store));
      }
      if (record.kind != PageKind::kInBase) return {};
      return error(record_text(record) + " has its content in a base image, which this vmckpt cannot read", kCure);
    default:
      return error(fmt::format("{} is of kind {}, which this vmckpt does not know", record_text(record),
                               static_cast<int>(record.kind)), kCure);
  }
  // What is stored elsewhere is refused when the metadata has said what that is.
  const bool here = record.store == kStoreThisFile;
  if (here && (record.offset < kImagePageBytes || record.offset > data_end || data_end - record.offset < record.stored_bytes)) {
    return error(fmt::format("{} has its content at file offset {}, outside the page data", record_text(record), record.offset));
  }
  if (record.stored_bytes == 0 || record.stored_bytes > record.bytes) {
    return error(fmt::format("{} has {} bytes stored", record_text(record), record.stored_bytes));
  }
  switch (record.codec) {
    case PageCodec::kNone: break;
    case PageCodec::kZstd: return error(record_text(record) + " is compressed (zstd), which this vmckpt cannot read", kCure);
    default:
      return error(fmt::format("{} has the codec {}, which this vmckpt does not know", record_text(record),
                               static_cast<int>(record.codec)), kCure);
  }
  if (record.stored_bytes != record.bytes) {
    return error(fmt::format("{} is not compressed and has {} bytes stored instead of {}", record_text(record),
                             record.stored_bytes, record.bytes));
  }
  if (!page_aligned(record.offset)) {
    return error(fmt::format("{} has its content at offset {}, which is not page aligned", record_text(record), record.offset));
  }
  return {};
}

Result<void> check_store(const PageRecord& record, const google::protobuf::RepeatedPtrField<pb::PageStore>& stores) {
  if (record.store == kStoreThisFile) return {};
  if (record.store > static_cast<uint32_t>(stores.size())) {
    return error(fmt::format("{} has its content in store {}; the image names {}", record_text(record), record.store,
                             stores.size()));
  }
  return error(fmt::format("{} has its content in store {}, which is another image than this one; this vmckpt cannot read it",
                           record_text(record), record.store),
               "use a newer vmckpt");
}

// Walks the whole message: text without NUL, enums that this version knows, no fields that it does not know. Ignoring
// an unknown field would restart something other than what was checkpointed.
Result<void> check_fields(const google::protobuf::Message& message) {
  const auto& descriptor = *message.GetDescriptor();
  const auto& reflection = *message.GetReflection();
  const auto& unknown = reflection.GetUnknownFields(message);
  if (!unknown.empty()) {
    return error(
        fmt::format("{} has a field {} that this vmckpt does not know", descriptor.name(), unknown.field(0).number()),
        "use the vmckpt that made the image, or a newer one");
  }
  std::vector<const google::protobuf::FieldDescriptor*> fields;
  reflection.ListFields(message, &fields);
  for (const auto* field : fields) {
    int count = field->is_repeated() ? reflection.FieldSize(message, field) : 1;
    for (int i = 0; i < count; ++i) {
      if (field->cpp_type() == google::protobuf::FieldDescriptor::CPPTYPE_MESSAGE) {
        VMCKPT_TRY(check_fields(field->is_repeated() ? reflection.GetRepeatedMessage(message, field, i)
                                                     : reflection.GetMessage(message, field)));
      } else if (field->cpp_type() == google::protobuf::FieldDescriptor::CPPTYPE_ENUM) {
        int value = field->is_repeated() ? reflection.GetRepeatedEnumValue(message, field, i)
                                         : reflection.GetEnumValue(message, field);
        if (field->enum_type()->FindValueByNumber(value) == nullptr) {
          return error(fmt::format("{}.{} has the value {} that this vmckpt does not know", descriptor.name(),
                                   field->name(), value),
                       "use the vmckpt that made the image, or a newer one");
        }
      } else if (is_text_field(*field)) {
        std::string scratch;
        const std::string& text = field->is_repeated()
                                      ? reflection.GetRepeatedStringReference(message, field, i, &scratch)
                                      : reflection.GetStringReference(message, field, &scratch);
        if (text.find('\0') != std::string::npos) {
          return error(fmt::format("{}.{} has a NUL byte in its text", descriptor.name(), field->name()));
        }
      }
    }
  }
  return {};
}

Result<void> check_absolute(const std::string& path, const std::string& owner) {
  if (path.empty() || path[0] != '/')
    return error(fmt::format("{} has the path \"{}\", not an absolute one", owner, path));
  return {};
}

Result<void> check_signals(const google::protobuf::RepeatedPtrField<pb::Signal>& signals, const std::string& owner) {
  for (const auto& signal : signals) {
    if (signal.number() < 1 || signal.number() > kMaxSignal) {
      return error(fmt::format("{} has a pending signal numbered {}", owner, signal.number()));
    }
    if (signal.info().size() != kSiginfoBytes) {
      return error(fmt::format("{} has a pending signal with {} bytes of siginfo instead of {}", owner,
                               signal.info().size(), kSiginfoBytes));
    }
  }
  return {};
}

Result<void> check_target(const pb::Target& target) {
  if (target.target_id().size() != kIdBytes) {
    return error(fmt::format("the target's id has {} bytes instead of {}", target.target_id().size(), kIdBytes));
  }
  if (target.name().empty() || target.name().find('/') != std::string::npos) {
    return error(fmt::format("the target's name \"{}\" is empty or has a slash", target.name()));
  }
  return {};
}

Result<void> check_process(const pb::Process& process) {
  if (process.pid() <= 0) return error(fmt::format("the process has the PID {}", process.pid()));
  if (process.process_group() < 0 || process.session() < 0) {
    return error(fmt::format("the process has the process group {} and the session {}", process.process_group(),
                             process.session()));
  }
  if (process.command_name().size() > kMaxCommandNameBytes) return error("the process's command name is too long");
  if (process.umask() > 0777) return error(fmt::format("the process has the umask {:#o}", process.umask()));
  if (!process.working_directory().empty())
    VMCKPT_TRY(check_absolute(process.working_directory(), "working directory"));
  if (!process.root_directory().empty()) VMCKPT_TRY(check_absolute(process.root_directory(), "root directory"));

  std::set<uint32_t> resources, handled, intervals;
  std::set<int32_t> timers;
  for (const auto& limit : process.limits()) {
    if (limit.resource() >= 16 || !resources.insert(limit.resource()).second) {
      return error(fmt::format("the resource limit {} is unknown or there twice", limit.resource()));
    }
  }
  for (const auto& action : process.actions()) {
    if (action.number() < 1 || action.number() > kMaxSignal || !handled.insert(action.number()).second) {
      return error(fmt::format("the signal action {} is unknown or there twice", action.number()));
    }
  }
  for (const auto& timer : process.interval_timers()) {
    if (timer.which() > 2 || !intervals.insert(timer.which()).second) {
      return error(fmt::format("the interval timer {} is unknown or there twice", timer.which()));
    }
    if (timer.value_us() < 0 || timer.interval_us() < 0) return error("an interval timer has a negative time");
  }
  for (const auto& timer : process.posix_timers()) {
    if (timer.id() < 0 || !timers.insert(timer.id()).second) {
      return error(fmt::format("the POSIX timer id {} is negative or there twice", timer.id()));
    }
    if (timer.value_ns() < 0 || timer.interval_ns() < 0) {
      return error(fmt::format("the POSIX timer {} has a negative time", timer.id()));
    }
  }
  return check_signals(process.pending(), "the process");
}

Result<void> check_thread(const pb::Thread& thread) {
  const std::string owner = fmt::format("thread {}", thread.tid());
  auto wrong_size = [&](const char* what, size_t bytes) {
    return error(fmt::format("{} has {} bytes of {}", owner, bytes, what));
  };
  if (thread.name().size() > kMaxCommandNameBytes) return error(owner + " has a name that is too long");
  if (thread.registers().size() != sizeof(user_regs_struct)) return wrong_size("registers", thread.registers().size());
  if (thread.xstate().size() < kMinXstateBytes || thread.xstate().size() > kMaxXstateBytes) {
    return wrong_size("extended state", thread.xstate().size());
  }
  if (thread.affinity().size() > kMaxAffinityBytes || thread.affinity().size() % 8 != 0) {
    return wrong_size("affinity", thread.affinity().size());
  }
  if (thread.nice() < -20 || thread.nice() > 19)
    return error(fmt::format("{} has the nice value {}", owner, thread.nice()));
  if (thread.debug_registers_size() != 0 && thread.debug_registers_size() != 8) {
    return error(fmt::format("{} has {} debug registers", owner, thread.debug_registers_size()));
  }
  if (thread.has_credentials() && (thread.credentials().uid_size() != 4 || thread.credentials().gid_size() != 4)) {
    return error(fmt::format("{} has {} user ids and {} group ids instead of 4 each", owner,
                             thread.credentials().uid_size(), thread.credentials().gid_size()));
  }
  if (static_cast<size_t>(thread.filters_size()) > kMaxFilters) {
    return error(fmt::format("{} has {} seccomp filters", owner, thread.filters_size()));
  }
  for (const auto& filter : thread.filters()) {
    size_t bytes = filter.program().size();
    if (bytes == 0 || bytes % kSockFilterBytes != 0 || bytes / kSockFilterBytes > kMaxFilterInstructions) {
      return wrong_size("seccomp filter", bytes);
    }
  }
  return check_signals(thread.pending(), owner);
}

Result<void> check_threads(const pb::Image& image) {
  if (image.threads_size() == 0) return error("there is no thread");
  if (image.threads(0).tid() != image.process().pid()) {
    return error(
        fmt::format("the first thread is {}, not the leader {}", image.threads(0).tid(), image.process().pid()));
  }
  std::set<int32_t> tids;
  for (const auto& thread : image.threads()) {
    if (thread.tid() <= 0 || !tids.insert(thread.tid()).second) {
      return error(fmt::format("the thread id {} is not positive or there twice", thread.tid()));
    }
    VMCKPT_TRY(check_thread(thread));
  }
  return {};
}

using CapturedById = std::unordered_map<uint64_t, const pb::CapturedFile*>;

Result<void> check_mapping(const pb::Mapping& mapping, const CapturedById& captured) {
  const std::string owner = "mapping " + range_text(mapping.start(), mapping.end());
  if (!page_aligned(mapping.start()) || !page_aligned(mapping.end()) || mapping.start() >= mapping.end()) {
    return error(owner + " is empty or not of whole pages");
  }
  if (mapping.end() > kLargestUserSpaceEnd) return error(owner + " is outside user space");
  if (mapping.protection() > 7) return error(fmt::format("{} has the protection {:#x}", owner, mapping.protection()));
  if (!page_aligned(mapping.file_offset()) || mapping.file_offset() > kMaxFileBytes) {
    return error(fmt::format("{} has the file offset {:#x}", owner, mapping.file_offset()));
  }
  switch (mapping.kind()) {
    case pb::Mapping::ANONYMOUS:
    case pb::Mapping::AIO_RING:
    case pb::Mapping::VCPU_RUN:
    case pb::Mapping::VDSO: return {};
    case pb::Mapping::FILE_PRIVATE:
    case pb::Mapping::FILE_SHARED: return check_absolute(mapping.file().path(), owner);
    case pb::Mapping::CAPTURED:
    case pb::Mapping::CAPTURED_PRIVATE:
      if (captured.count(mapping.captured_id()) != 0) return {};
      return error(fmt::format("{} is of the captured file {}, which is not there", owner, mapping.captured_id()));
    default: return error(fmt::format("{} is of the unknown kind {}", owner, static_cast<int>(mapping.kind())));
  }
}

Result<CapturedById> index_captured(const pb::AddressSpace& memory) {
  CapturedById captured;
  for (const auto& file : memory.captured()) {
    if (file.id() == 0 || !captured.emplace(file.id(), &file).second) {
      return error(fmt::format("the captured file id {} is zero or there twice", file.id()));
    }
    if (file.size_bytes() > kMaxFileBytes) {
      return error(fmt::format("captured file {} has a size of {} bytes", file.id(), file.size_bytes()));
    }
    if (file.kind() == pb::CapturedFile::UNKNOWN) {
      return error(fmt::format("captured file {} is of an unknown kind", file.id()));
    }
    const bool is_named = file.kind() == pb::CapturedFile::NAMED, has_path = !file.path().empty();
    if (has_path && !is_named && file.kind() != pb::CapturedFile::KEPT) {
      return error(fmt::format("captured file {} has a path, and is of no kind that has one", file.id()));
    }
    if (is_named || has_path) VMCKPT_TRY(check_absolute(file.path(), fmt::format("captured file {}", file.id())));
    if (file.has_segment() && (file.segment().mode() > 0777 || file.segment().size_bytes() == 0 || file.segment().size_bytes() > kMaxFileBytes ||
                               page_round_up(file.segment().size_bytes()) != page_round_up(file.size_bytes()))) {
      return error(fmt::format("captured file {} is no System V segment", file.id()));
    }
  }
  return captured;
}

// Each ring of Linux AIO fits to its mapping and to itself (modules/aio.cc).
Result<void> check_aio_rings(const pb::AddressSpace& memory) {
  constexpr uint64_t kHeaderBytes = 32, kEventBytes = 32;
  auto ring = memory.aio_rings().begin();
  for (const pb::Mapping& mapping : memory.mappings()) {
    if (mapping.kind() != pb::Mapping::AIO_RING) continue;
    const bool fits = ring != memory.aio_rings().end() && ring->address() == mapping.start() &&
                      kHeaderBytes + ring->slots() * kEventBytes == mapping.end() - mapping.start() && ring->head() < ring->slots() &&
                      ring->pending().size() % kEventBytes == 0 && ring->pending().size() / kEventBytes < ring->slots();
    if (!fits) return error(fmt::format("the AIO ring at {:#x} is not what its mapping says", mapping.start()));
    ++ring;
  }
  if (ring != memory.aio_rings().end()) return error(fmt::format("the AIO ring at {:#x} is not mapped", ring->address()));
  return {};
}

Result<void> check_memory(const pb::AddressSpace& memory) {
  const CapturedById captured = VMCKPT_TRY(index_captured(memory));
  uint64_t previous_end = 0;
  for (const auto& mapping : memory.mappings()) {
    VMCKPT_TRY(check_mapping(mapping, captured));
    if (mapping.start() < previous_end) {
      return error(fmt::format("mapping {} overlaps the one before it or is out of order",
                               range_text(mapping.start(), mapping.end())));
    }
    previous_end = mapping.end();
  }
  VMCKPT_TRY(check_aio_rings(memory));
  previous_end = 0;
  for (const auto& guard : memory.guards()) {
    if (!page_aligned(guard.start()) || !page_aligned(guard.end()) || guard.start() >= guard.end() || guard.start() < previous_end ||
        guard.end() > kLargestUserSpaceEnd) {
      return error(fmt::format("guard region {} is not of whole pages in user space, or out of order", range_text(guard.start(), guard.end())));
    }
    previous_end = guard.end();
  }
  if (memory.auxv().size() > kMaxAuxvBytes || memory.auxv().size() % 16 != 0) {
    return error(fmt::format("the auxiliary vector has {} bytes", memory.auxv().size()));
  }
  uint64_t vdso_bytes = 0;  // that are free for it at restart
  for (const auto& mapping : memory.mappings()) {
    if (mapping.kind() == pb::Mapping::VDSO && mapping.name() == "[vdso]") vdso_bytes = mapping.end() - mapping.start();
  }
  if (memory.vdso_code().size() > std::min<uint64_t>(vdso_bytes, kMaxVdsoBytes)) {
    return error(fmt::format("the vdso has {} bytes, its mapping {}", memory.vdso_code().size(), vdso_bytes));
  }
  return {};
}

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using IdsByKind = std::map<pb::Reference, std::set<uint64_t>>;

uint64_t unsigned_value(const Message& message, const FieldDescriptor& field) {
  const auto& reflection = *message.GetReflection();
  return field.cpp_type() == FieldDescriptor::CPPTYPE_UINT32 ? reflection.GetUInt32(message, &field)
                                                              : reflection.GetUInt64(message, &field);
}

std::string name_of(pb::Reference kind) {
  switch (kind) {
    case pb::CAPTURED_FILE:
    case pb::CAPTURED_FILE_OR_NONE: return "captured file";
    case pb::PIPE: return "pipe";
    case pb::TERMINAL: return "terminal";
    case pb::OPEN_FILE: return "open file";
    case pb::OPEN_FILE_IF_INSIDE: return "socket";
    default: return "object";
  }
}

// The ids of all objects in lists that the schema says to define some.
Result<void> collect_ids(const pb::DescriptorTable& table, IdsByKind& ids) {
  std::vector<const FieldDescriptor*> fields;
  table.GetReflection()->ListFields(table, &fields);
  for (const FieldDescriptor* field : fields) {
    const pb::Reference kind = field->options().GetExtension(pb::defines);
    if (kind == pb::NOTHING) continue;
    for (int i = 0; i < table.GetReflection()->FieldSize(table, field); ++i) {
      const Message& object = table.GetReflection()->GetRepeatedMessage(table, field, i);
      const uint64_t id = unsigned_value(object, *object.GetDescriptor()->FindFieldByName("id"));
      if (!ids[kind].insert(id).second) return error(fmt::format("the {} id {} is there twice", name_of(kind), id));
    }
  }
  return {};
}

bool is_inside(const Message& message) {
  const FieldDescriptor* peer = message.GetDescriptor()->FindFieldByName("peer");
  return peer != nullptr && peer->cpp_type() == FieldDescriptor::CPPTYPE_ENUM &&
         message.GetReflection()->GetEnumValue(message, peer) == pb::PEER_INSIDE;
}

// Every field that is the id of something, here and in the messages within. A field that is not there has the id 0.
Result<void> check_references(const Message& message, const IdsByKind& ids, const std::string& owner) {
  const auto& descriptor = *message.GetDescriptor();
  for (int i = 0; i < descriptor.field_count(); ++i) {
    const FieldDescriptor& field = *descriptor.field(i);
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      const auto& reflection = *message.GetReflection();
      const int count = field.is_repeated() ? reflection.FieldSize(message, &field) : reflection.HasField(message, &field);
      for (int k = 0; k < count; ++k) {
        VMCKPT_TRY(check_references(field.is_repeated() ? reflection.GetRepeatedMessage(message, &field, k)
                                                        : reflection.GetMessage(message, &field), ids, owner));
      }
      continue;
    }
    const pb::Reference said = field.options().GetExtension(pb::refers_to);
    if (said == pb::NOTHING) continue;
    const uint64_t id = unsigned_value(message, field);
    if (said == pb::OPEN_FILE_IF_INSIDE && !is_inside(message)) continue;
    if (said == pb::CAPTURED_FILE_OR_NONE && id == 0) continue;
    const pb::Reference kind = said == pb::OPEN_FILE_IF_INSIDE     ? pb::OPEN_FILE
                               : said == pb::CAPTURED_FILE_OR_NONE ? pb::CAPTURED_FILE
                                                                   : said;
    const auto known = ids.find(kind);
    if (known != ids.end() && known->second.count(id) != 0) continue;
    return error(fmt::format("{} refers to the {} {}, which is not there", owner, name_of(said), id));
  }
  return {};
}

// Who an object or a record of KVM belongs to is its module's to check. Here: that reading the image takes no more than its size.
Result<void> check_kvm(const pb::Kvm& kvm) {
  constexpr int kMaxKvmObjects = 16384;  // four times KVM_MAX_VCPUS
  if (kvm.objects_size() > kMaxKvmObjects) return error(fmt::format("there are {} KVM objects", kvm.objects_size()));
  std::set<uint32_t> ids;
  for (const pb::KvmObject& object : kvm.objects()) {
    if (!ids.insert(object.id()).second) return error(fmt::format("the KVM object id {} is there twice", object.id()));
  }
  return {};
}

// Numbers and the references between descriptors; what else each kind of object needs is its module's to check.
Result<void> check_descriptors(const pb::DescriptorTable& table, const CapturedById& captured) {
  IdsByKind ids;
  for (const auto& [id, file] : captured) ids[pb::CAPTURED_FILE].insert(id);
  VMCKPT_TRY(collect_ids(table, ids));
  std::set<int32_t> numbers;
  for (const auto& file : table.files()) {
    for (const auto& number : file.numbers()) {
      if (number.number() < 0 || !numbers.insert(number.number()).second) {
        return error(fmt::format("the descriptor {} is negative or there twice", number.number()));
      }
    }
    if (file.numbers().empty()) return error(fmt::format("the open file {} has no number", file.id()));
  }
  for (const auto& file : table.files()) {
    const FieldDescriptor* object = object_of(file);
    if (object == nullptr) return error(fmt::format("descriptor {} is of an unknown kind", file.id()));
    VMCKPT_TRY(check_references(file.GetReflection()->GetMessage(file, object), ids, fmt::format("descriptor {}", file.id())));
  }
  return {};
}

}  // namespace

const FieldDescriptor* object_of(const pb::OpenFile& file) {
  std::vector<const FieldDescriptor*> fields;
  file.GetReflection()->ListFields(file, &fields);
  const FieldDescriptor* object = nullptr;
  for (const FieldDescriptor* field : fields) {
    if (!field->is_extension()) continue;
    if (object != nullptr) return nullptr;
    object = field;
  }
  return object;
}

bool is_text_field(const FieldDescriptor& field) {
  return field.type() == FieldDescriptor::TYPE_STRING || field.options().GetExtension(pb::show) == pb::TEXT;
}

Result<void> check_records(const std::vector<PageRecord>& records, uint64_t data_end) {
  const PageRecord* previous = nullptr;
  for (const PageRecord& record : records) {
    if (record.bytes == 0 || record.bytes > kMaxRecordBytes || !page_aligned(record.bytes)) {
      return error(fmt::format("{} has a length of {} bytes", record_text(record), record.bytes));
    }
    // The sum cannot wrap: `bytes` is small and the end is checked against a limit far below 2^64.
    if (!page_aligned(record.address) || record.address > kMaxFileBytes - record.bytes) {
      return error(record_text(record) + " is not page aligned or out of range");
    }
    VMCKPT_TRY(check_content(record, data_end));
    if (previous != nullptr &&
        (record.object < previous->object ||
         (record.object == previous->object && record.address < previous->address + previous->bytes))) {
      return error(record_text(record) + " overlaps the one before it or is out of order");
    }
    previous = &record;
  }
  return {};
}

Result<void> check_metadata(const pb::Image& image) {
  VMCKPT_TRY(check_fields(image));
  if (!image.has_target() || !image.has_process() || !image.has_memory()) {
    return error("the metadata has no target, process or memory");
  }
  VMCKPT_TRY(check_target(image.target()));
  VMCKPT_TRY(check_process(image.process()));
  VMCKPT_TRY(check_threads(image));
  VMCKPT_TRY(check_memory(image.memory()));
  VMCKPT_TRY(check_kvm(image.kvm()));
  for (const pb::PageStore& store : image.page_stores()) {
    if (store.base_image_id().size() != kIdBytes) {
      return error(fmt::format("a page store is no image: its id has {} bytes instead of {}", store.base_image_id().size(),
                               kIdBytes));
    }
  }
  return check_descriptors(image.descriptors(), VMCKPT_TRY(index_captured(image.memory())));
}

Result<void> check_records_belong(const pb::Image& image, const std::vector<PageRecord>& records) {
  const CapturedById captured = VMCKPT_TRY(index_captured(image.memory()));
  auto mapping = image.memory().mappings().begin();
  const auto mappings_end = image.memory().mappings().end();
  for (const PageRecord& record : records) {
    VMCKPT_TRY(check_store(record, image.page_stores()));
    if (record.object != 0) {
      auto file = captured.find(record.object);
      if (file == captured.end()) return error(record_text(record) + " belongs to no captured file of this image");
      uint64_t whole_pages = (file->second->size_bytes() + kImagePageBytes - 1) / kImagePageBytes * kImagePageBytes;
      if (record.address + record.bytes > whole_pages) {
        return error(fmt::format("{} is beyond the file's {} bytes", record_text(record), file->second->size_bytes()));
      }
      continue;
    }
    // Both lists are sorted: one pass over them together.
    while (mapping != mappings_end && mapping->end() <= record.address) ++mapping;
    if (mapping == mappings_end || record.address < mapping->start() ||
        record.address + record.bytes > mapping->end()) {
      return error(record_text(record) + " is not within one mapping");
    }
    if (mapping->kind() != pb::Mapping::ANONYMOUS && mapping->kind() != pb::Mapping::FILE_PRIVATE &&
        mapping->kind() != pb::Mapping::CAPTURED_PRIVATE) {
      return error(record_text(record) + " is in a mapping that is not private");
    }
  }
  return {};
}

}  // namespace vmckpt
