#include "image/decode.h"

#include <cstring>
#include <functional>
#include <random>
#include <set>

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include "catch.h"
#include "image/one_process.h"
#include "image/tiny_image.h"
#include "modules/process.pb.h"

namespace vmckpt {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

std::string repeated(const std::string& text, size_t times) {
  std::string all;
  for (size_t i = 0; i < times; ++i) all += text;
  return all;
}

std::string said_of(const std::string& encoded) {
  auto image = decode_metadata(encoded);
  return image ? "ok" : image.error().message();
}

// `encoded` as the content of the length-delimited field `number`.
std::string within(int number, const std::string& encoded) {
  std::string bytes(1, static_cast<char>(number << 3 | 2));
  size_t length = encoded.size();
  for (; length >= 0x80; length >>= 7) bytes += static_cast<char>(length | 0x80);
  return bytes + static_cast<char>(length) + encoded;
}

std::vector<const FieldDescriptor*> all_fields(const Descriptor& type) {
  std::vector<const FieldDescriptor*> fields;
  type.file()->pool()->FindAllExtensions(&type, &fields);
  for (int i = 0; i < type.field_count(); ++i) fields.push_back(type.field(i));
  return fields;
}

// Calls `with` once for each field of the schema, with an image that has nothing but `times` of it.
void for_each_field(Message& image, Message& message, int times, const std::function<void(const FieldDescriptor&)>& with,
                    std::set<const FieldDescriptor*>& seen) {
  const auto& reflection = *message.GetReflection();
  for (const FieldDescriptor* field : all_fields(*message.GetDescriptor())) {
    if (!seen.insert(field).second) continue;
    for (int i = 0; i < (field->is_repeated() ? times : 1); ++i) {
      const bool again = field->is_repeated();
      switch (field->cpp_type()) {
        case FieldDescriptor::CPPTYPE_MESSAGE:
          again ? reflection.AddMessage(&message, field) : reflection.MutableMessage(&message, field);
          break;
        case FieldDescriptor::CPPTYPE_STRING:
          again ? reflection.AddString(&message, field, "") : reflection.SetString(&message, field, "text");
          break;
        case FieldDescriptor::CPPTYPE_UINT32:
          again ? reflection.AddUInt32(&message, field, 1)
                : reflection.SetUInt32(&message, field, 1);
          break;
        case FieldDescriptor::CPPTYPE_UINT64:
          again ? reflection.AddUInt64(&message, field, 1)
                : reflection.SetUInt64(&message, field, 1);
          break;
        case FieldDescriptor::CPPTYPE_INT32:
          again ? reflection.AddInt32(&message, field, 1)
                : reflection.SetInt32(&message, field, 1);
          break;
        case FieldDescriptor::CPPTYPE_INT64:
          again ? reflection.AddInt64(&message, field, 1)
                : reflection.SetInt64(&message, field, 1);
          break;
        case FieldDescriptor::CPPTYPE_BOOL:
          again ? reflection.AddBool(&message, field, true)
                : reflection.SetBool(&message, field, true);
          break;
        case FieldDescriptor::CPPTYPE_ENUM:
          again ? reflection.AddEnumValue(&message, field, 1) : reflection.SetEnumValue(&message, field, 1);
          break;
        default: FAIL("a type of field that the walk has not been tried with: " << field->full_name());
      }
    }
    with(*field);
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      Message* inner = field->is_repeated() ? reflection.MutableRepeatedMessage(&message, field, 0)
                                            : reflection.MutableMessage(&message, field);
      for_each_field(image, *inner, times, with, seen);
    }
    reflection.ClearField(&message, field);
  }
}

}  // namespace

TEST_CASE("metadata that would take far more memory than it is long is refused before it is decoded") {
  const std::string tiny = test::tiny_metadata().SerializeAsString();
  CHECK(said_of(tiny) == "ok");
  constexpr size_t kMany = 1 << 20;
  auto refused = [&](const char* what, const std::string& more) {
    INFO(what);
    CHECK_THAT(said_of(tiny + more), Contains("MiB of memory when it is decoded") && Contains("do not trust"));
  };
  refused("processes", repeated(within(4, ""), kMany));
  refused("threads", within(4, repeated(within(10, ""), kMany)));
  refused("mappings", within(5, repeated(within(1, ""), kMany)));
  refused("a mapping's advice", within(5, within(1, repeated(within(9, ""), 4 * kMany))));
  refused("descriptors", within(7, repeated(within(2, ""), kMany)));
  refused("open files", repeated(within(8, ""), kMany));
  refused("notes", repeated(within(3, ""), 4 * kMany));
}

TEST_CASE("what metadata will take in memory is added up to no less than what it takes") {
  pb::Image image;
  std::set<const FieldDescriptor*> seen;
  for (int times : {1, 1000}) {
    seen.clear();
    for_each_field(image, image, times, [&](const FieldDescriptor& field) {
      INFO(times << " of " << field.full_name());
      const std::string encoded = image.SerializeAsString();
      pb::Image decoded;
      REQUIRE(decoded.ParseFromString(encoded));
      auto sum = metadata_memory_bytes(encoded);
      REQUIRE(sum.ok());
      CHECK(*sum + sizeof(pb::Image) >= decoded.SpaceUsedLong());
    }, seen);
  }
  CHECK(seen.size() > 300);
}

TEST_CASE("the metadata of a large real process is far from what is allowed") {
  pb::Image image = test::tiny_metadata();
  const OneProcessToSave one = one_process(&image);
  const pb::Thread thread = one.process.threads(0);
  for (int i = 0; i < 4000; ++i) *one.process.add_threads() = thread;
  for (int i = 0; i < 65530; ++i) {
    pb::Mapping& mapping = *one.memory.add_mappings();
    mapping.set_kind(pb::Mapping::FILE_PRIVATE);
    mapping.set_start(uint64_t{1} << 40);
    mapping.set_end(uint64_t{1} << 41);
    mapping.set_name("/usr/lib/libsomething.so.1");
    mapping.mutable_file()->set_path("/usr/lib/libsomething.so.1");
    mapping.mutable_file()->mutable_origin()->set_number(12345678);
    mapping.add_advice("dd");
  }
  for (int i = 0; i < 65530; ++i) {
    pb::Mapping& mapping = *one.memory.add_mappings();
    mapping.set_kind(pb::Mapping::ANONYMOUS);
    mapping.set_start(uint64_t{1} << 40);
    mapping.set_end(uint64_t{1} << 41);
  }
  for (int i = 0; i < 10000; ++i) {
    image.add_open_files()->set_id(static_cast<uint32_t>(i));
    pb::Descriptor& descriptor = *one.descriptors.add_descriptors();
    descriptor.set_number(i);
    descriptor.set_file(static_cast<uint32_t>(i));
  }
  pb::ProcessState& state = *one.process.MutableExtension(pb::process_state);
  for (int i = 0; i < 700000; ++i) state.add_environment("");  // ARG_MAX, with the pointer to each
  for (int i = 0; i < 100000; ++i) state.add_arguments("A_NAME=and what it is");
  const std::string encoded = image.SerializeAsString();
  auto sum = metadata_memory_bytes(encoded);
  REQUIRE(sum.ok());
  CHECK(*sum < metadata_memory_limit(encoded.size()) / 3 * 2);
}

TEST_CASE("what the walk over encoded metadata lets pass can be decoded, and is what its schema says") {
  const std::string tiny = test::tiny_metadata().SerializeAsString();
  std::mt19937_64 random(1);
  size_t passed = 0;
  for (int i = 0; i < 50000; ++i) {
    INFO("case " << i);
    std::string bytes = tiny;
    for (uint64_t count = 1 + random() % 3; count > 0 && !bytes.empty(); --count) {
      const size_t at = random() % bytes.size();
      if (const uint64_t how = random() % 4; how == 0) {
        bytes.erase(at, random() % 16);
      } else if (how == 1) {
        bytes.insert(at, 1, static_cast<char>(random()));
      } else {
        bytes[at] = static_cast<char>(random());
      }
    }
    pb::Image image;
    const bool decodes = image.ParseFromString(bytes);
    auto walked = metadata_memory_bytes(bytes);
    if (walked.ok()) {
      CHECK(decodes);
      ++passed;
    }
    if (!decodes) CHECK_FALSE(walked.ok());
  }
  CHECK(passed > 1000);
}

TEST_CASE("metadata without an end is refused") {
  std::string nested;
  for (int i = 0; i < 100; ++i) nested = within(5, nested);
  CHECK_FALSE(decode_metadata(nested).ok());
  CHECK_THAT(said_of(std::string(1, '\0')), Contains("cannot be decoded"));
  CHECK_THAT(said_of(std::string("\x22\xff\xff\xff\xff\x07", 6)), Contains("cannot be decoded"));  // a length of 2 GiB
  CHECK_THAT(said_of(std::string("\x22\x05", 2)), Contains("cannot be decoded"));
}

}  // namespace vmckpt
