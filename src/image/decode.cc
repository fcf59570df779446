#include "image/decode.h"

#include <climits>
#include <unordered_map>

#include <google/protobuf/descriptor.h>
#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/message.h>
#include <google/protobuf/stubs/logging.h>
#include <google/protobuf/wire_format_lite.h>

namespace vmckpt {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::MessageFactory;
using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

// Beside a message or a string itself: the pointer to it in a list that doubles when it is full, and the allocator's own.
constexpr uint64_t kOwnerBytes = 64;
constexpr int kMaxDepth = 32;  // the schema has no message within itself

WireFormatLite::WireType wire_type_of(const FieldDescriptor& field) {
  return WireFormatLite::WireTypeForFieldType(static_cast<WireFormatLite::FieldType>(field.type()));
}

Error undecodable() { return error("its metadata cannot be decoded"); }

// Walks encoded messages along the schema and adds up what they become. Knows no field's meaning and keeps nothing but the sum.
class Walk {
 public:
  explicit Walk(const std::string& encoded)
      : in_(reinterpret_cast<const uint8_t*>(encoded.data()), static_cast<int>(encoded.size())),
        limit_(metadata_memory_limit(encoded.size())) {
    in_.PushLimit(static_cast<int>(encoded.size()));
  }

  Result<void> message(const Descriptor& type, int depth = 0) {
    if (depth == kMaxDepth) return undecodable();
    while (const uint32_t tag = in_.ReadTag()) VMCKPT_TRY(field(type, tag, depth));
    // Not zero for want of bytes, but for one that is: a field has a number.
    if (!in_.ConsumedEntireMessage()) return undecodable();
    return {};
  }

  uint64_t memory_bytes() const { return memory_bytes_; }

 private:
  Result<void> take(uint64_t bytes) {
    memory_bytes_ += bytes;  // cannot wrap: each step is small, and the first beyond the limit is the last
    if (memory_bytes_ <= limit_) return {};
    return error(fmt::format("its metadata would take more than {} MiB of memory when it is decoded: no checkpoint writes such",
                             limit_ >> 20), "do not trust this image");
  }

  Result<void> field(const Descriptor& type, uint32_t tag, int depth) {
    const int number = WireFormatLite::GetTagFieldNumber(tag);
    const FieldDescriptor* field = type.FindFieldByNumber(number);
    if (type.IsExtensionNumber(number)) field = type.file()->pool()->FindExtensionByNumber(&type, number);
    const auto wire_type = WireFormatLite::GetTagWireType(tag);
    // Which extensions a message has, and the list of a repeated one, are objects of their own.
    if (field != nullptr && field->is_extension()) VMCKPT_TRY(take(kOwnerBytes));
    if (field != nullptr && wire_type == WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
      if (field->type() == FieldDescriptor::TYPE_MESSAGE) return submessage(*field->message_type(), depth);
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) return string();
      if (field->is_packable()) return packed(*field);
    }
    const bool is_number = field != nullptr && field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE &&
                           field->cpp_type() != FieldDescriptor::CPPTYPE_STRING;
    if (is_number && wire_type == wire_type_of(*field)) return one_number(*field, wire_type);
    return error(fmt::format("{} has a field {} that this vmckpt does not know", type.name(), number),
                 "use the vmckpt that made the image, or a newer one");
  }

  // The length of what follows, all of which is there.
  Result<uint32_t> length() {
    uint32_t bytes = 0;
    if (!in_.ReadVarint32(&bytes) || bytes > INT_MAX || in_.BytesUntilLimit() < static_cast<int>(bytes)) return undecodable();
    return bytes;
  }

  Result<void> submessage(const Descriptor& type, int depth) {
    const auto limit = in_.PushLimit(static_cast<int>(VMCKPT_TRY(length())));
    VMCKPT_TRY(take(object_bytes(type) + kOwnerBytes));
    VMCKPT_TRY(message(type, depth + 1));
    in_.PopLimit(limit);
    return {};
  }

  Result<void> string() {
    const uint32_t bytes = VMCKPT_TRY(length());
    VMCKPT_TRY(take(sizeof(std::string) + kOwnerBytes + bytes));
    if (!in_.Skip(static_cast<int>(bytes))) return undecodable();
    return {};
  }

  Result<void> one_number(const FieldDescriptor& field, WireFormatLite::WireType wire_type) {
    uint64_t value = 0;
    uint32_t half = 0;
    const bool read = wire_type == WireFormatLite::WIRETYPE_VARINT    ? in_.ReadVarint64(&value)
                      : wire_type == WireFormatLite::WIRETYPE_FIXED64 ? in_.ReadLittleEndian64(&value)
                                                                      : in_.ReadLittleEndian32(&half);
    if (!read) return undecodable();
    // Of one of proto2's enumerations a number that is not known is kept apart, as an unknown field.
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_ENUM) return take(kOwnerBytes);
    return take(field.is_repeated() ? 2 * sizeof value : 0);
  }

  Result<void> packed(const FieldDescriptor& field) {
    const auto limit = in_.PushLimit(static_cast<int>(VMCKPT_TRY(length())));
    while (in_.BytesUntilLimit() > 0) VMCKPT_TRY(one_number(field, wire_type_of(field)));
    in_.PopLimit(limit);
    return {};
  }

  uint64_t object_bytes(const Descriptor& type) {
    auto [known, is_new] = object_bytes_.try_emplace(&type, 0);
    if (is_new) known->second = MessageFactory::generated_factory()->GetPrototype(&type)->SpaceUsedLong();
    return known->second;
  }

  CodedInputStream in_;
  uint64_t limit_;
  uint64_t memory_bytes_ = 0;
  std::unordered_map<const Descriptor*, uint64_t> object_bytes_;
};

}  // namespace

Result<uint64_t> metadata_memory_bytes(const std::string& encoded) {
  if (encoded.size() > kMaxMetadataBytes) {
    return error(fmt::format("its metadata has {} bytes; at most {} are accepted", encoded.size(), kMaxMetadataBytes));
  }
  Walk walk(encoded);
  VMCKPT_TRY(walk.message(*pb::Image::descriptor()));
  return walk.memory_bytes();
}

Result<pb::Image> decode_metadata(const std::string& encoded) {
  VMCKPT_TRY(metadata_memory_bytes(encoded));
  google::protobuf::LogSilencer quiet;  // protobuf would print to stderr what is returned here as an error
  pb::Image image;
  if (!image.ParseFromString(encoded)) return undecodable();
  return image;
}

}  // namespace vmckpt
