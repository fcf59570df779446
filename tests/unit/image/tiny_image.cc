#include "image/tiny_image.h"

#include <algorithm>
#include <cstring>

#include <sys/mman.h>
#include <sys/user.h>
#include <unistd.h>

#include <xxhash.h>

#include "core/fd.h"
#include "image/one_process.h"
#include "modules/process.pb.h"
#include "modules/credentials.pb.h"
#include "modules/seccomp.pb.h"
#include "modules/threads.pb.h"
#include "vmckpt/image_format.h"

namespace vmckpt::test {

Result<std::string> finish(ImageWriter& writer, const pb::Image& metadata) {
  VMCKPT_TRY(writer.seal(metadata));
  return writer.publish();
}
namespace {

constexpr int64_t kCreatedUnixUs = 1767225600000000;  // 2026-01-01 00:00:00 UTC

Id128 id_of(uint8_t byte) {
  Id128 id;
  id.fill(byte);
  return id;
}

}  // namespace

ImageIdentity tiny_identity() { return {id_of(0x11), id_of(0x00), id_of(0x22)}; }

pb::Image tiny_metadata() {
  pb::Image image;
  image.mutable_host()->set_kernel_release("6.1.0");
  auto& target = *image.mutable_target();
  target.set_name("tiny");
  Id128 target_id = tiny_identity().target_id;
  target.set_target_id(target_id.data(), target_id.size());
  target.add_command("/bin/tiny");

  const OneProcessToSave one = one_process(&image);
  auto& process = one.process;
  process.set_pid(100);
  process.MutableExtension(pb::process_state)->set_command_name("tiny");
  process.MutableExtension(pb::process_state)->set_executable("/bin/tiny");
  one.fs.set_working_directory("/");

  auto& thread = *process.add_threads();
  thread.set_tid(100);
  pb::ThreadState& state = *thread.MutableExtension(pb::thread_state);
  state.set_name("tiny");
  user_regs_struct registers{};
  registers.rip = 0x401000;
  registers.rsp = kTinyHeapStart + 2 * kImagePageBytes;
  state.set_registers(&registers, sizeof registers);
  state.set_xstate(std::string(576, '\0'));

  pb::Credentials& credentials = *thread.MutableExtension(pb::credentials);
  for (int i = 0; i < 4; ++i) {
    credentials.add_uid(1000);
    credentials.add_gid(1000);
  }
  thread.MutableExtension(pb::seccomp)->set_mode(0);

  auto& memory = one.memory;
  auto& code = *memory.add_mappings();
  code.set_kind(pb::Mapping::FILE_PRIVATE);
  code.set_start(0x400000);
  code.set_end(0x402000);
  code.set_protection(PROT_READ | PROT_EXEC);
  code.mutable_file()->set_path("/bin/tiny");
  code.mutable_file()->set_size_bytes(8192);
  code.set_name("/bin/tiny");
  auto& heap = *memory.add_mappings();
  heap.set_kind(pb::Mapping::ANONYMOUS);
  heap.set_start(kTinyHeapStart);
  heap.set_end(kTinyHeapStart + 2 * kImagePageBytes);
  heap.set_protection(PROT_READ | PROT_WRITE);
  heap.set_name("[heap]");
  auto& shared = *memory.add_mappings();
  shared.set_kind(pb::Mapping::CAPTURED);
  shared.set_start(0x20000000);
  shared.set_end(0x20000000 + kImagePageBytes);
  shared.set_protection(PROT_READ | PROT_WRITE);
  shared.set_captured_id(kTinyCapturedId);
  auto& file = *image.add_captured_files();
  file.set_id(kTinyCapturedId);
  file.set_kind(pb::CapturedFile::MEMFD);
  file.set_name("memfd:tiny");
  file.set_size_bytes(100);
  return image;
}

Result<void> write_tiny_pages(ImageWriter& writer) {
  std::string content(2 * kImagePageBytes, '\0');
  std::fill_n(content.begin(), kImagePageBytes, 'A');
  uint64_t heap = writer.reserve_pages(2 * kImagePageBytes);
  VMCKPT_TRY(writer.write_pages(content.data(), kImagePageBytes, heap));  // the second page stays a hole
  writer.add_record(plain_record(0, kTinyHeapStart, content.size(), heap, XXH3_64bits(content.data(), content.size())));

  std::string captured(kImagePageBytes, '\0');
  std::fill_n(captured.begin(), 100, 'B');
  uint64_t file = writer.reserve_pages(captured.size());
  VMCKPT_TRY(writer.write_pages(captured.data(), captured.size(), file));
  writer.add_record(plain_record(kTinyCapturedId, 0, captured.size(), file, XXH3_64bits(captured.data(), captured.size())));
  return {};
}

Result<std::string> tiny_image_bytes(const std::string& directory) {
  ImageDestination destination;
  destination.numbered_stem = directory + "/tiny-bytes";
  ImageWriter writer = VMCKPT_TRY(ImageWriter::create(destination, tiny_identity()));
  VMCKPT_TRY(write_tiny_pages(writer));
  std::string path = VMCKPT_TRY(finish(writer, tiny_metadata()));
  Result<std::string> bytes = read_whole_file(path);
  ::unlink(path.c_str());
  if (!bytes) return bytes;
  std::memcpy(bytes->data() + offsetof(ImageHeader, created_unix_us), &kCreatedUnixUs, sizeof kCreatedUnixUs);
  fix_checksums(*bytes);
  return bytes;
}

void fix_checksums(std::string& bytes) {
  if (bytes.size() < sizeof(ImageHeader)) return;
  ImageHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  auto inside = [&](uint64_t offset, uint64_t length) {
    return offset <= bytes.size() && bytes.size() - offset >= length;
  };
  for (uint32_t i = 0; i < std::min(header.section_count, kImageMaxSections); ++i) {
    SectionEntry& section = header.sections[i];
    if (!inside(section.offset, section.bytes)) continue;
    if (section.kind == static_cast<uint32_t>(SectionKind::kPageIndex)) {
      for (uint64_t at = 0; at + sizeof(PageRecord) <= section.bytes; at += sizeof(PageRecord)) {
        PageRecord record;
        std::memcpy(&record, bytes.data() + section.offset + at, sizeof record);
        if (record.kind != PageKind::kData || !inside(record.offset, record.stored_bytes)) continue;
        record.stored_xxh3 = XXH3_64bits(bytes.data() + record.offset, record.stored_bytes);
        std::memcpy(bytes.data() + section.offset + at, &record, sizeof record);
      }
    }
    section.xxh3 = XXH3_64bits(bytes.data() + section.offset, section.bytes);
  }
  header.header_xxh3 = XXH3_64bits(&header, offsetof(ImageHeader, header_xxh3));
  std::memcpy(bytes.data(), &header, sizeof header);
}

}  // namespace vmckpt::test
