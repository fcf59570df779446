// From the bytes of the metadata section to the message. protobuf takes as much memory as the bytes ask for, which may be far
// more than they are: an empty message within a message is two bytes long and becomes an object of some hundred. So the bytes
// are walked first, and what they would become is added up.
#pragma once

#include <cstdint>
#include <string>

#include "core/result.h"
#include "image/image.pb.h"

namespace vmckpt {

// What a reader takes into its memory at most before it has decoded anything.
constexpr uint64_t kMaxMetadataBytes = uint64_t{256} << 20;

// What decoded metadata may take, by its encoded length. That of a real image takes up to ten times its length, which an
// anonymous mapping does, mostly two to six. The part that does not depend on the length is for what is short by nature:
// arguments and variables that are empty (two bytes each, of which execve(2) takes 700,000), descriptors of one file.
constexpr uint64_t metadata_memory_limit(uint64_t encoded_bytes) { return (uint64_t{64} << 20) + 16 * encoded_bytes; }

// Nothing that this vmckpt does not know is in it, and what it becomes is within the limit: the meaning is not checked.
Result<pb::Image> decode_metadata(const std::string& encoded);

// At least what decode_metadata() would take in memory; fails as it does. For tests.
Result<uint64_t> metadata_memory_bytes(const std::string& encoded);

}  // namespace vmckpt
