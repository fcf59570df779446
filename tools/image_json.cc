#include "image_json.h"

#include "kvm_json.h"

#include <algorithm>
#include <cstring>

#include <arpa/inet.h>
#include <elf.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/user.h>

#include "image/schema.pb.h"

namespace vmckpt {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

std::string hex_number(uint64_t value) { return fmt::format("{:#x}", value); }

template <class T>
T load(std::string_view bytes, size_t offset = 0) {
  T value{};
  if (offset < bytes.size()) std::memcpy(&value, bytes.data() + offset, std::min(sizeof value, bytes.size() - offset));
  return value;
}

Json registers_json(std::string_view bytes) {
  user_regs_struct r = load<user_regs_struct>(bytes);
  Json json;
  const std::pair<const char*, uint64_t> values[] = {{"rip", r.rip},
                                                     {"rsp", r.rsp},
                                                     {"rbp", r.rbp},
                                                     {"rax", r.rax},
                                                     {"rbx", r.rbx},
                                                     {"rcx", r.rcx},
                                                     {"rdx", r.rdx},
                                                     {"rsi", r.rsi},
                                                     {"rdi", r.rdi},
                                                     {"r8", r.r8},
                                                     {"r9", r.r9},
                                                     {"r10", r.r10},
                                                     {"r11", r.r11},
                                                     {"r12", r.r12},
                                                     {"r13", r.r13},
                                                     {"r14", r.r14},
                                                     {"r15", r.r15},
                                                     {"eflags", r.eflags},
                                                     {"orig_rax", r.orig_rax},
                                                     {"fs_base", r.fs_base},
                                                     {"gs_base", r.gs_base},
                                                     {"cs", r.cs},
                                                     {"ss", r.ss},
                                                     {"ds", r.ds},
                                                     {"es", r.es},
                                                     {"fs", r.fs},
                                                     {"gs", r.gs}};
  for (const auto& [name, value] : values) json[name] = hex_number(value);
  return json;
}

// The legacy area and the header of XSAVE's standard format (Intel SDM volume 1, chapter 13.4).
Json xstate_json(std::string_view bytes) {
  constexpr size_t kMxcsrOffset = 24;
  constexpr size_t kComponentsOffset = 512;
  return {{"bytes", bytes.size()},
          {"components", hex_number(load<uint64_t>(bytes, kComponentsOffset))},
          {"mxcsr", hex_number(load<uint32_t>(bytes, kMxcsrOffset))},
          {"hex", to_hex(bytes)}};
}

Json siginfo_json(std::string_view bytes) {
  siginfo_t info = load<siginfo_t>(bytes);
  return {{"signo", info.si_signo}, {"errno", info.si_errno}, {"code", info.si_code}, {"hex", to_hex(bytes)}};
}

std::string auxv_name(uint64_t type) {
  switch (type) {
    case AT_PHDR: return "AT_PHDR";
    case AT_PHENT: return "AT_PHENT";
    case AT_PHNUM: return "AT_PHNUM";
    case AT_PAGESZ: return "AT_PAGESZ";
    case AT_BASE: return "AT_BASE";
    case AT_FLAGS: return "AT_FLAGS";
    case AT_ENTRY: return "AT_ENTRY";
    case AT_UID: return "AT_UID";
    case AT_EUID: return "AT_EUID";
    case AT_GID: return "AT_GID";
    case AT_EGID: return "AT_EGID";
    case AT_PLATFORM: return "AT_PLATFORM";
    case AT_HWCAP: return "AT_HWCAP";
    case AT_CLKTCK: return "AT_CLKTCK";
    case AT_SECURE: return "AT_SECURE";
    case AT_RANDOM: return "AT_RANDOM";
    case AT_HWCAP2: return "AT_HWCAP2";
    case AT_EXECFN: return "AT_EXECFN";
    case AT_SYSINFO_EHDR: return "AT_SYSINFO_EHDR";
    case AT_MINSIGSTKSZ: return "AT_MINSIGSTKSZ";
    case 27: return "AT_RSEQ_FEATURE_SIZE";
    case 28: return "AT_RSEQ_ALIGN";
    default: return fmt::format("AT_{}", type);
  }
}

Json auxv_json(std::string_view bytes) {
  Json json = Json::object();
  for (size_t at = 0; at + 16 <= bytes.size(); at += 16) {
    uint64_t type = load<uint64_t>(bytes, at);
    if (type == AT_NULL) break;
    json[auxv_name(type)] = hex_number(load<uint64_t>(bytes, at + 8));
  }
  return json;
}

// {0, 1, 2, 3, 8} as "0-3,8".
std::string cpu_list(std::string_view bytes) {
  std::string list;
  auto has = [&](size_t cpu) { return cpu / 8 < bytes.size() && (bytes[cpu / 8] >> (cpu % 8) & 1) != 0; };
  for (size_t cpu = 0; cpu < bytes.size() * 8; ++cpu) {
    if (!has(cpu)) continue;
    size_t last = cpu;
    while (has(last + 1)) ++last;
    list += list.empty() ? "" : ",";
    list += last == cpu ? fmt::format("{}", cpu) : fmt::format("{}-{}", cpu, last);
    cpu = last;
  }
  return list;
}

Json filter_json(std::string_view bytes) {
  Json list = Json::array();
  for (size_t at = 0; at + sizeof(sock_filter) <= bytes.size(); at += sizeof(sock_filter)) {
    sock_filter instruction = load<sock_filter>(bytes, at);
    list.push_back(fmt::format("{:#06x} {} {} {:#x}", instruction.code, instruction.jt, instruction.jf, instruction.k));
  }
  return list;
}

std::string socket_address(std::string_view bytes) {
  if (bytes.empty()) return {};
  switch (load<sa_family_t>(bytes)) {
    case AF_UNIX: {
      std::string_view path = bytes.substr(std::min(bytes.size(), offsetof(sockaddr_un, sun_path)));
      if (path.empty()) return "unix:";
      if (path[0] == '\0') return "unix:@" + printable(path.substr(1));
      return "unix:" + printable(path.substr(0, path.find('\0')));
    }
    case AF_INET: {
      sockaddr_in address = load<sockaddr_in>(bytes);
      char text[INET_ADDRSTRLEN] = "?";
      ::inet_ntop(AF_INET, &address.sin_addr, text, sizeof text);
      return fmt::format("{}:{}", text, ntohs(address.sin_port));
    }
    case AF_INET6: {
      sockaddr_in6 address = load<sockaddr_in6>(bytes);
      char text[INET6_ADDRSTRLEN] = "?";
      ::inet_ntop(AF_INET6, &address.sin6_addr, text, sizeof text);
      return fmt::format("[{}]:{}", text, ntohs(address.sin6_port));
    }
    default: return "hex:" + to_hex(bytes);
  }
}

// How fields are shown is said in the schema (image/schema.proto).
Json bytes_json(const FieldDescriptor& field, const std::string& bytes) {
  switch (field.options().GetExtension(pb::show)) {
    case pb::TEXT: return printable(bytes);
    case pb::SOCKET_ADDRESS: return socket_address(bytes);
    case pb::CPU_LIST: return cpu_list(bytes);
    case pb::REGISTERS: return registers_json(bytes);
    case pb::XSTATE: return xstate_json(bytes);
    case pb::SIGINFO: return siginfo_json(bytes);
    case pb::BPF: return filter_json(bytes);
    case pb::AUXV: return auxv_json(bytes);
    default: return field.type() == FieldDescriptor::TYPE_STRING ? printable(bytes) : to_hex(bytes);
  }
}

Json integer_json(const FieldDescriptor& field, uint64_t value) {
  const pb::Show how = field.options().GetExtension(pb::show);
  const bool fixed = field.type() == FieldDescriptor::TYPE_FIXED32 || field.type() == FieldDescriptor::TYPE_FIXED64;
  if (how == pb::OCTAL) return fmt::format("{:#o}", value);
  if (how == pb::HEX || fixed) return hex_number(value);
  return value;
}

Json value_json(const Message& message, const FieldDescriptor& field, int index) {
  const auto& r = *message.GetReflection();
  const bool many = field.is_repeated();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return message_to_json(many ? r.GetRepeatedMessage(message, &field, index) : r.GetMessage(message, &field));
    case FieldDescriptor::CPPTYPE_STRING: {
      std::string scratch;
      return bytes_json(field, many ? r.GetRepeatedStringReference(message, &field, index, &scratch)
                                    : r.GetStringReference(message, &field, &scratch));
    }
    case FieldDescriptor::CPPTYPE_ENUM: {
      const auto* value = many ? r.GetRepeatedEnum(message, &field, index) : r.GetEnum(message, &field);
      return value->name();
    }
    case FieldDescriptor::CPPTYPE_BOOL:
      return many ? r.GetRepeatedBool(message, &field, index) : r.GetBool(message, &field);
    case FieldDescriptor::CPPTYPE_INT32:
      return many ? r.GetRepeatedInt32(message, &field, index) : r.GetInt32(message, &field);
    case FieldDescriptor::CPPTYPE_INT64:
      return many ? r.GetRepeatedInt64(message, &field, index) : r.GetInt64(message, &field);
    case FieldDescriptor::CPPTYPE_UINT32:
      return integer_json(field, many ? r.GetRepeatedUInt32(message, &field, index) : r.GetUInt32(message, &field));
    case FieldDescriptor::CPPTYPE_UINT64:
      return integer_json(field, many ? r.GetRepeatedUInt64(message, &field, index) : r.GetUInt64(message, &field));
    default: return nullptr;  // no floating point in the metadata
  }
}

const char* section_name(uint32_t kind) {
  switch (static_cast<SectionKind>(kind)) {
    case SectionKind::kMetadata: return "metadata";
    case SectionKind::kPageIndex: return "page_index";
  }
  return "unknown";
}

}  // namespace

std::string to_hex(std::string_view bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(bytes.size() * 2);
  for (char byte : bytes) {
    text += kDigits[static_cast<unsigned char>(byte) >> 4];
    text += kDigits[static_cast<unsigned char>(byte) & 15];
  }
  return text;
}

Json message_to_json(const Message& message) {
  Json json = Json::object();
  const auto& descriptor = *message.GetDescriptor();
  const auto& reflection = *message.GetReflection();
  std::vector<const FieldDescriptor*> fields;
  for (int i = 0; i < descriptor.field_count(); ++i) {
    const FieldDescriptor* field = descriptor.field(i);
    // A number that is not there means 0, if the schema does not say that it may be missing. Messages may.
    const bool may_be_missing = field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE || field->containing_oneof() != nullptr ||
                                field->options().GetExtension(pb::may_be_missing);
    if (field->is_repeated() || !may_be_missing || reflection.HasField(message, field)) fields.push_back(field);
  }
  std::vector<const FieldDescriptor*> present;
  reflection.ListFields(message, &present);
  std::copy_if(present.begin(), present.end(), std::back_inserter(fields),
               [](const auto* field) { return field->is_extension(); });
  for (const FieldDescriptor* field : fields) {
    if (!field->is_repeated()) {
      json[field->name()] = value_json(message, *field, 0);
      continue;
    }
    Json list = Json::array();
    for (int k = 0; k < reflection.FieldSize(message, field); ++k) list.push_back(value_json(message, *field, k));
    json[field->name()] = std::move(list);
  }
  return json;
}

uint64_t saved_bytes(const ImageReader& image, uint64_t object, uint64_t start, uint64_t end) {
  return image.pages().size_of(object, start, end).bytes;
}

uint64_t allocated_bytes(const ImageReader& image) {
  struct stat status;
  return ::fstat(image.fd(), &status) == 0 ? static_cast<uint64_t>(status.st_blocks) * 512 : 0;
}

namespace {

PageIndex::Size memory_pages(const ImageReader& image) {
  PageIndex::Size all{};
  for (const pb::AddressSpace& memory : image.metadata().address_spaces()) {
    const PageIndex::Size of = image.pages().size_of(memory.id());
    all.bytes += of.bytes;
    all.stored_bytes += of.stored_bytes;
    all.records += of.records;
  }
  return all;
}

}  // namespace

Json image_to_json(const ImageReader& image) {
  const ImageHeader& header = image.header();
  auto id = [](const uint8_t(&bytes)[16]) { return to_hex({reinterpret_cast<const char*>(bytes), sizeof bytes}); };
  Json json;
  json["image"] = printable(image.path());
  json["format_version"] = header.format_version;
  json["min_reader_version"] = header.min_reader_version;
  json["image_id"] = id(header.image_id);
  json["parent_id"] = id(header.parent_id);
  json["target_id"] = id(header.target_id);
  json["created_unix_us"] = header.created_unix_us;

  const PageIndex::Size all = image.pages().size(), memory = memory_pages(image);
  json["sizes"] = {{"file_bytes", header.file_bytes},
                   {"allocated_bytes", allocated_bytes(image)},
                   {"memory_bytes_saved", memory.bytes},
                   {"captured_bytes_saved", all.bytes - memory.bytes},
                   {"page_bytes_stored", all.stored_bytes},
                   {"page_runs", all.records}};
  Json sections = Json::array();
  for (uint32_t i = 0; i < header.section_count; ++i) {
    const SectionEntry& section = header.sections[i];
    sections.push_back({{"kind", section.kind},
                        {"name", section_name(section.kind)},
                        {"skippable", (section.flags & kSectionSkippable) != 0},
                        {"offset", section.offset},
                        {"bytes", section.bytes},
                        {"xxh3", hex_number(section.xxh3)}});
  }
  json["sections"] = std::move(sections);

  json.update(message_to_json(image.metadata()));
  // A mapping's and a file's share of the page data is not in the metadata, but what a reader wants to know next.
  const pb::Image& metadata = image.metadata();
  for (int space = 0; space < metadata.address_spaces_size(); ++space) {
    const pb::AddressSpace& memory = metadata.address_spaces(space);
    for (int i = 0; i < memory.mappings_size(); ++i) {
      const auto& mapping = memory.mappings(i);
      json["address_spaces"][space]["mappings"][i]["saved_bytes"] = saved_bytes(image, memory.id(), mapping.start(),
                                                                                mapping.end());
    }
  }
  for (int i = 0; i < metadata.captured_files_size(); ++i) {
    json["captured_files"][i]["saved_bytes"] = saved_bytes(image, metadata.captured_files(i).id(), 0, UINT64_MAX);
  }
  // Structures of the kernel's are no help as hexadecimal digits.
  json["virtual_machines"] = Json::array();
  for (const pb::Kvm& kvm : metadata.GetRepeatedExtension(pb::virtual_machines)) {
    for (Json vm : kvm_to_json(kvm)) {
      vm["mm_id"] = kvm.mm_id();
      json["virtual_machines"].push_back(std::move(vm));
    }
  }
  return json;
}

}  // namespace vmckpt
