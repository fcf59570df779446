// What an image must say to be restarted, checked by the writer before it commits and by the reader before anyone uses it.
// The input may be hostile: every check is a value, nothing aborts.
#pragma once

#include <cstdint>
#include <vector>

#include "core/result.h"
#include "image/image.pb.h"
#include "vmckpt/image_format.h"

namespace google::protobuf {
class FieldDescriptor;
}

namespace vmckpt {

// What a reader takes into its own memory before it knows whether the image is worth it; for the metadata see decode.h.
constexpr uint64_t kMaxPageIndexBytes = uint64_t{1} << 30;

// Records sorted, not overlapping in memory, whole pages, what is stored in this file between the header page and `data_end`,
// what two of them store either apart or the same; no kind and no codec that this vmckpt cannot read.
Result<void> check_records(const std::vector<PageRecord>& records, uint64_t data_end);

// Everything that can be told from the metadata alone.
Result<void> check_metadata(const pb::Image& image);

// Every record lies within one private mapping, or within the captured file it names, and its content in a store that this
// vmckpt can read.
Result<void> check_records_belong(const pb::Image& image, const std::vector<PageRecord>& records);

// Whether a string or bytes field of the metadata is text (a name, path or argument) rather than binary data. Restart hands
// these to the kernel as C strings: a NUL would silently cut them.
bool is_text_field(const google::protobuf::FieldDescriptor& field);

// The extension that says what kind of object an open file is; null when there is none, or more than one.
const google::protobuf::FieldDescriptor* object_of(const pb::OpenFile& file);

}  // namespace vmckpt
