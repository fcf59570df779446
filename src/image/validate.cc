#include "image/validate.h"

#include <algorithm>
#include <cctype>
#include <iterator>
#include <map>
#include <set>
#include <string>

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include "core/page.h"
#include "core/printable.h"
#include "image/one_process.h"
#include "image/page_index.h"
#include "image/schema.pb.h"

namespace vmckpt {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

constexpr const char* kOtherVersion = "use the vmckpt that made the image, or a newer one";

constexpr size_t kMaxVdsoBytes = size_t{1} << 20;
constexpr uint64_t kMaxFileBytes = uint64_t{1} << 62;
constexpr uint64_t kFirstAddressSpace = 0;

static_assert(kImagePageBytes == kPageBytes);  // memory's pages are the image's
constexpr uint64_t page_round_up(uint64_t value) { return (value + kImagePageBytes - 1) / kImagePageBytes * kImagePageBytes; }
constexpr bool page_aligned(uint64_t value) { return value % kImagePageBytes == 0; }

std::string range_text(uint64_t start, uint64_t end) { return fmt::format("{:#x}-{:#x}", start, end); }

std::string record_text(const PageRecord& record) {
  // The sum may wrap in a hostile record; it is only shown.
  std::string range = range_text(record.address, record.address + record.bytes);
  if (record.object == kFirstAddressSpace) return "page record of memory " + range;
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

// Records may have the same content, but not a part of it: each byte is read and checked once, however many records there are.
Result<void> check_stored_ranges(const std::vector<PageRecord>& records) {
  const PageRecord* previous = nullptr;
  for (const PageRecord* record : in_stored_order(records)) {
    if (previous != nullptr && record->store == previous->store && record->offset < previous->offset + previous->stored_bytes) {
      const bool same = record->offset == previous->offset && record->stored_bytes == previous->stored_bytes &&
                        record->codec == previous->codec && record->stored_xxh3 == previous->stored_xxh3;
      if (!same) {
        return error(fmt::format("{} has its content at file offset {} in part in common with the {}", record_text(*record),
                                 record->offset, record_text(*previous)));
      }
    }
    previous = record;
  }
  return {};
}

// A message within others, for what is said about it.
struct Place {
  const Message& message;
  const FieldDescriptor* field;  // of the message around it; null: the image
  const Place* around;
};

// "OpenFile" as "open file", "OPEN_FILE" too.
std::string words_of(const std::string& name) {
  std::string words;
  for (size_t i = 0; i < name.size(); ++i) {
    const bool is_capital = std::isupper(static_cast<unsigned char>(name[i])) != 0;
    const bool begins = is_capital && i > 0 && std::islower(static_cast<unsigned char>(name[i - 1])) != 0;
    if (begins) words += ' ';
    words += name[i] == '_' ? ' ' : static_cast<char>(std::tolower(static_cast<unsigned char>(name[i])));
  }
  return words.starts_with("kvm ") ? "KVM" + words.substr(3) : words;
}

int64_t integer(const Message& message, const FieldDescriptor& field, int at = -1) {
  const auto& r = *message.GetReflection();
  const bool many = at >= 0;
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32: return many ? r.GetRepeatedInt32(message, &field, at) : r.GetInt32(message, &field);
    case FieldDescriptor::CPPTYPE_INT64: return many ? r.GetRepeatedInt64(message, &field, at) : r.GetInt64(message, &field);
    case FieldDescriptor::CPPTYPE_UINT32: return many ? r.GetRepeatedUInt32(message, &field, at) : r.GetUInt32(message, &field);
    case FieldDescriptor::CPPTYPE_ENUM:
      return many ? r.GetRepeatedEnumValue(message, &field, at) : r.GetEnumValue(message, &field);
    case FieldDescriptor::CPPTYPE_UINT64: {
      const uint64_t value = many ? r.GetRepeatedUInt64(message, &field, at) : r.GetUInt64(message, &field);
      return static_cast<int64_t>(std::min<uint64_t>(value, INT64_MAX));
    }
    default: return 0;
  }
}

uint64_t unsigned_value(const Message& message, const FieldDescriptor& field) {
  const auto& reflection = *message.GetReflection();
  return field.cpp_type() == FieldDescriptor::CPPTYPE_UINT32 ? reflection.GetUInt32(message, &field)
                                                              : reflection.GetUInt64(message, &field);
}

// "process 100, thread 101, pending"
std::string text_of(const Place& place) {
  if (place.field == nullptr) return "the image";
  const auto& descriptor = *place.message.GetDescriptor();
  std::string text = place.field->name();
  for (const char* name : {"id", "pid", "tid"}) {
    const FieldDescriptor* field = descriptor.FindFieldByName(name);
    if (field == nullptr || field->is_repeated() || field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) continue;
    text = fmt::format("{} {}", words_of(descriptor.name()), integer(place.message, *field));
  }
  return place.around->field == nullptr ? text : text_of(*place.around) + ", " + text;
}

int entries_of(const Message& message, const FieldDescriptor& field) {
  const auto& reflection = *message.GetReflection();
  return field.is_repeated() ? reflection.FieldSize(message, &field) : reflection.HasField(message, &field);
}

const Message& message_at(const Message& message, const FieldDescriptor& field, int at) {
  const auto& reflection = *message.GetReflection();
  return field.is_repeated() ? reflection.GetRepeatedMessage(message, &field, at) : reflection.GetMessage(message, &field);
}

const std::string& bytes_at(const Message& message, const FieldDescriptor& field, int at, std::string* scratch) {
  const auto& reflection = *message.GetReflection();
  return field.is_repeated() ? reflection.GetRepeatedStringReference(message, &field, at, scratch)
                             : reflection.GetStringReference(message, &field, scratch);
}

// All that the schema declares, and the extensions that are there.
std::vector<const FieldDescriptor*> fields_of(const Message& message) {
  std::vector<const FieldDescriptor*> fields, present;
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) fields.push_back(message.GetDescriptor()->field(i));
  message.GetReflection()->ListFields(message, &present);
  std::copy_if(present.begin(), present.end(), std::back_inserter(fields),
               [](const auto* field) { return field->is_extension(); });
  return fields;
}

// What a reference is to, where it is to something.
pb::Reference object_meant(pb::Reference reference) {
  switch (reference) {
    case pb::CAPTURED_FILE_OR_NONE: return pb::CAPTURED_FILE;
    case pb::OPEN_FILE_IF_INSIDE:
    case pb::OPEN_FILE_IF_GIVEN: return pb::OPEN_FILE;
    default: return reference;
  }
}

// Ordered: an image chooses its ids, and could choose such as fill one bucket of a hash table.
using IdsByKind = std::map<pb::Reference, std::set<uint64_t>>;

// The ids of all objects in lists that the schema says to define some, here and in the messages within.
Result<void> collect_ids(const Message& message, IdsByKind& ids) {
  std::vector<const FieldDescriptor*> fields;
  message.GetReflection()->ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) continue;
    const pb::Reference kind = field->options().GetExtension(pb::defines);
    for (int i = 0; i < entries_of(message, *field); ++i) {
      const Message& object = message_at(message, *field, i);
      VMCKPT_TRY(collect_ids(object, ids));
      if (kind == pb::NOTHING) continue;
      const uint64_t id = unsigned_value(object, *object.GetDescriptor()->FindFieldByName("id"));
      if (ids[kind].insert(id).second) continue;
      return error(fmt::format("the {} id {} is there twice", words_of(pb::Reference_Name(kind)), id));
    }
  }
  return {};
}

// Whether the message says that the reference beside it is one.
bool refers_to_something(const Message& message, const FieldDescriptor& field, pb::Reference said) {
  const auto& reflection = *message.GetReflection();
  if (said == pb::CAPTURED_FILE_OR_NONE) return unsigned_value(message, field) != 0;
  if (said == pb::OPEN_FILE_IF_GIVEN) return reflection.HasField(message, &field);
  if (said != pb::OPEN_FILE_IF_INSIDE) return true;
  const FieldDescriptor* peer = message.GetDescriptor()->FindFieldByName("peer");
  return peer != nullptr && peer->cpp_type() == FieldDescriptor::CPPTYPE_ENUM &&
         reflection.GetEnumValue(message, peer) == pb::PEER_INSIDE;
}

// The bounds of a number, or of how many bytes there are.
Result<void> check_bounds(const Place& place, const FieldDescriptor& field, int64_t value, bool is_number) {
  const auto& options = field.options();
  const bool has_least = options.HasExtension(pb::least), has_most = options.HasExtension(pb::most);
  const int64_t least = options.GetExtension(pb::least), most = options.GetExtension(pb::most);
  if ((!has_least || value >= least) && (!has_most || value <= most)) return {};
  const std::string range = !has_most        ? fmt::format("{} or more", least)
                            : !has_least     ? fmt::format("at most {}", most)
                            : least == most ? fmt::format("{}", least)
                                            : fmt::format("{} to {}", least, most);
  return error(fmt::format("{}: {} {} {}{} instead of {}", text_of(place), words_of(field.name()), is_number ? "is" : "has",
                           value, is_number ? "" : " bytes", range));
}

Result<void> check_bytes(const Place& place, const FieldDescriptor& field, const std::string& bytes) {
  const auto& options = field.options();
  auto wrong = [&](const std::string& what) {
    return error(fmt::format("{}: {} {}", text_of(place), words_of(field.name()), what));
  };
  if (is_text_field(field) && bytes.find('\0') != std::string::npos) return wrong("has a NUL byte in its text");
  if (options.GetExtension(pb::absolute_path) && !bytes.empty() && bytes[0] != '/') {
    return wrong(fmt::format("is \"{}\", not an absolute path", printable(bytes)));
  }
  const uint32_t whole = options.GetExtension(pb::whole);
  if (whole != 0 && bytes.size() % whole != 0) return wrong(fmt::format("has {} bytes, no multiple of {}", bytes.size(), whole));
  return check_bounds(place, field, static_cast<int64_t>(bytes.size()), false);
}

Result<void> check_number(const Place& place, const FieldDescriptor& field, int at, const IdsByKind& ids) {
  const int64_t value = integer(place.message, field, at);
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_ENUM &&
      field.enum_type()->FindValueByNumber(static_cast<int>(value)) == nullptr) {
    return error(fmt::format("{}: {} has the value {} that this vmckpt does not know", text_of(place), field.name(), value),
                 kOtherVersion);
  }
  const pb::Reference said = field.options().GetExtension(pb::refers_to);
  if (said != pb::NOTHING && refers_to_something(place.message, field, said)) {
    const uint64_t id = unsigned_value(place.message, field);
    const auto known = ids.find(object_meant(said));
    if (known == ids.end() || known->second.count(id) == 0) {
      return error(fmt::format("{} refers to the {} {}, which is not there", text_of(place),
                               words_of(pb::Reference_Name(object_meant(said))), id));
    }
  }
  return check_bounds(place, field, value, true);
}

// A field that no two messages of the list may have the same.
Result<void> check_keys(const Place& place, const FieldDescriptor& list) {
  const auto& descriptor = *list.message_type();
  for (int i = 0; i < descriptor.field_count(); ++i) {
    const FieldDescriptor& key = *descriptor.field(i);
    if (!key.options().GetExtension(pb::key)) continue;
    const bool is_text = key.cpp_type() == FieldDescriptor::CPPTYPE_STRING;
    std::set<std::string> texts;
    std::set<int64_t> numbers;
    for (int k = 0; k < entries_of(place.message, list); ++k) {
      const Message& entry = message_at(place.message, list, k);
      std::string scratch;
      if (is_text ? texts.insert(bytes_at(entry, key, 0, &scratch)).second : numbers.insert(integer(entry, key)).second) continue;
      const std::string value = is_text ? printable(bytes_at(entry, key, 0, &scratch)) : fmt::format("{}", integer(entry, key));
      return error(fmt::format("{}: the {} {} is there twice among {}", text_of(place), words_of(key.name()), value,
                               words_of(list.name())));
    }
  }
  return {};
}

// Fields and extensions without which a message of this type is none. Looked up once for each type: there may be thousands of
// messages.
const std::vector<const FieldDescriptor*>& needed_fields(const google::protobuf::Descriptor& type) {
  static thread_local std::map<const google::protobuf::Descriptor*, std::vector<const FieldDescriptor*>> known;
  auto [found, is_new] = known.try_emplace(&type);
  if (!is_new) return found->second;
  std::vector<const FieldDescriptor*> fields;
  if (type.extension_range_count() != 0) type.file()->pool()->FindAllExtensions(&type, &fields);
  for (int i = 0; i < type.field_count(); ++i) fields.push_back(type.field(i));
  std::copy_if(fields.begin(), fields.end(), std::back_inserter(found->second),
               [](const auto* field) { return field->options().GetExtension(pb::needed); });
  return found->second;
}

// Walks the whole message by what the schema says of its fields: text without NUL, enums that this version knows, values within
// bounds, references to what is there. No fields that this version does not know: without them something other than what was
// checkpointed would be restarted.
Result<void> check_fields(const Place& place, const IdsByKind& ids) {
  const Message& message = place.message;
  const auto& unknown = message.GetReflection()->GetUnknownFields(message);
  if (!unknown.empty()) {
    return error(fmt::format("{} has a field {} that this vmckpt does not know", text_of(place), unknown.field(0).number()),
                 kOtherVersion);
  }
  for (const FieldDescriptor* field : needed_fields(*message.GetDescriptor())) {
    if (entries_of(message, *field) != 0) continue;
    return error(fmt::format("{}: {} is missing", text_of(place), words_of(field->name())), "make another checkpoint");
  }
  for (const FieldDescriptor* field : fields_of(message)) {
    const int count = entries_of(message, *field);
    const auto& options = field->options();
    if (field->is_repeated()) {
      const auto wanted = static_cast<int>(options.GetExtension(pb::entries));
      const auto most = static_cast<int>(options.GetExtension(pb::most_entries));
      const bool too_many = most != 0 && count > most;
      if ((wanted != 0 && count != 0 && count != wanted) || too_many) {
        return error(fmt::format("{}: there are {} {} instead of {}{}", text_of(place), count, words_of(field->name()),
                                 too_many ? "at most " : "", too_many ? most : wanted));
      }
    }
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      if (field->is_repeated()) VMCKPT_TRY(check_keys(place, *field));
      for (int i = 0; i < count; ++i) VMCKPT_TRY(check_fields({message_at(message, *field, i), field, &place}, ids));
      continue;
    }
    // A single field that is not there has its default value, and is checked like any other.
    for (int i = 0; i < (field->is_repeated() ? count : 1); ++i) {
      std::string scratch;
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
        VMCKPT_TRY(check_bytes(place, *field, bytes_at(message, *field, i, &scratch)));
      } else {
        VMCKPT_TRY(check_number(place, *field, field->is_repeated() ? i : -1, ids));
      }
    }
  }
  return {};
}

// What one process has only one of.
Result<void> check_one_process(const pb::Image& image) {
  auto refuse = [](const char* what, int count) -> Result<void> {
    if (count == 1) return {};
    return error(fmt::format("this release restarts one process; the image has {} {}", count, what), "use a newer vmckpt");
  };
  if (image.processes().empty()) return error("there is no process");
  VMCKPT_TRY(refuse("processes", image.processes_size()));
  VMCKPT_TRY(refuse("address spaces", image.address_spaces_size()));
  VMCKPT_TRY(refuse("descriptor tables", image.descriptor_tables_size()));
  VMCKPT_TRY(refuse("working directories", image.file_system_contexts_size()));
  VMCKPT_TRY(refuse("tables of signal handlers", image.signal_handlers_size()));
  const pb::Process& process = image.processes(0);
  if (process.parent() != 0)
    return error(fmt::format("process {} has the parent {}, which is not there", process.pid(), process.parent()));
  if (process.state() == pb::Process::ZOMBIE) return error(fmt::format("process {} had ended", process.pid()));
  if (image.address_spaces(0).id() != kFirstAddressSpace) {
    return error(fmt::format("the address space has the id {} instead of {}", image.address_spaces(0).id(), kFirstAddressSpace));
  }
  return {};
}

Result<void> check_target(const pb::Target& target) {
  if (target.name().empty() || target.name().find('/') != std::string::npos) {
    return error(fmt::format("the target's name \"{}\" is empty or has a slash", target.name()));
  }
  return {};
}

Result<void> check_process(const pb::Process& process) {
  if (process.threads().empty()) return error(fmt::format("process {}: there is no thread", process.pid()));
  if (process.threads(0).tid() == process.pid()) return {};
  return error(fmt::format("process {}: the first thread is {}, not the leader", process.pid(), process.threads(0).tid()));
}

Result<void> check_absolute(const std::string& path, const std::string& owner) {
  if (path.empty() || path[0] != '/')
    return error(fmt::format("{} has the path \"{}\", not an absolute one", owner, path));
  return {};
}

Result<void> check_mapping(const pb::Mapping& mapping) {
  const std::string owner = "mapping " + range_text(mapping.start(), mapping.end());
  if (!page_aligned(mapping.start()) || !page_aligned(mapping.end()) || mapping.start() >= mapping.end()) {
    return error(owner + " is empty or not of whole pages");
  }
  if (mapping.end() > kLargestUserSpaceEnd) return error(owner + " is outside user space");
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
      if (mapping.captured_id() != 0) return {};
      return error(owner + " is of no captured file");
    default: return error(fmt::format("{} is of the unknown kind {}", owner, static_cast<int>(mapping.kind())));
  }
}

Result<void> check_captured(const pb::CapturedFile& file) {
  if (file.size_bytes() > kMaxFileBytes) {
    return error(fmt::format("captured file {} has a size of {} bytes", file.id(), file.size_bytes()));
  }
  const bool is_named = file.kind() == pb::CapturedFile::NAMED, has_path = !file.path().empty();
  if (has_path && !is_named && file.kind() != pb::CapturedFile::KEPT) {
    return error(fmt::format("captured file {} has a path, and is of no kind that has one", file.id()));
  }
  if (is_named || has_path) VMCKPT_TRY(check_absolute(file.path(), fmt::format("captured file {}", file.id())));
  if (file.has_segment() && (file.segment().size_bytes() == 0 || file.segment().size_bytes() > kMaxFileBytes ||
                             page_round_up(file.segment().size_bytes()) != page_round_up(file.size_bytes()))) {
    return error(fmt::format("captured file {} is no System V segment", file.id()));
  }
  return {};
}

Result<void> check_memory(const pb::AddressSpace& memory) {
  uint64_t previous_end = 0;
  for (const auto& mapping : memory.mappings()) {
    VMCKPT_TRY(check_mapping(mapping));
    if (mapping.start() < previous_end) {
      return error(fmt::format("mapping {} overlaps the one before it or is out of order",
                               range_text(mapping.start(), mapping.end())));
    }
    previous_end = mapping.end();
  }
  previous_end = 0;
  for (const auto& guard : memory.guards()) {
    if (!page_aligned(guard.start()) || !page_aligned(guard.end()) || guard.start() >= guard.end() ||
        guard.start() < previous_end || guard.end() > kLargestUserSpaceEnd) {
      return error(fmt::format("guard region {} is not of whole pages in user space, or out of order",
                               range_text(guard.start(), guard.end())));
    }
    previous_end = guard.end();
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

// What else each kind of object needs is its module's to check.
Result<void> check_open_files(const pb::Image& image) {
  std::set<uint32_t> open;
  for (const pb::DescriptorTable& table : image.descriptor_tables()) {
    for (const pb::Descriptor& descriptor : table.descriptors()) open.insert(descriptor.file());
  }
  for (const pb::OpenFile& file : image.open_files()) {
    if (open.count(file.id()) == 0) return error(fmt::format("the open file {} has no descriptor", file.id()));
    if (object_of(file) == nullptr) return error(fmt::format("the open file {} is of an unknown kind", file.id()));
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
  return check_stored_ranges(records);
}

Result<void> check_metadata(const pb::Image& image) {
  if (!image.has_target()) return error("the metadata has no target");
  VMCKPT_TRY(check_one_process(image));
  IdsByKind ids;
  VMCKPT_TRY(collect_ids(image, ids));
  VMCKPT_TRY(check_fields({image, nullptr, nullptr}, ids));
  VMCKPT_TRY(check_target(image.target()));
  for (const pb::Process& process : image.processes()) VMCKPT_TRY(check_process(process));
  for (const pb::CapturedFile& file : image.captured_files()) VMCKPT_TRY(check_captured(file));
  for (const pb::AddressSpace& memory : image.address_spaces()) {
    if (ids[pb::CAPTURED_FILE].count(memory.id()) != 0) {
      return error(fmt::format("the address space {} has the id of a captured file", memory.id()));
    }
    VMCKPT_TRY(check_memory(memory));
  }
  return check_open_files(image);
}

Result<void> check_records_belong(const pb::Image& image, const std::vector<PageRecord>& records) {
  std::map<uint64_t, const pb::CapturedFile*> captured;
  for (const pb::CapturedFile& file : image.captured_files()) captured.emplace(file.id(), &file);
  const pb::AddressSpace& memory = one_process(image).memory;
  auto mapping = memory.mappings().begin();
  const auto mappings_end = memory.mappings().end();
  for (const PageRecord& record : records) {
    VMCKPT_TRY(check_store(record, image.page_stores()));
    if (record.object != memory.id()) {
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
