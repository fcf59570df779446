// An image's metadata as JSON that people can read: field names as in src/image/*.proto, registers by name, addresses
// and masks in hexadecimal, ids and binary data as hexadecimal digits, socket addresses as text. All fields are there,
// those with their default value too. Also the helpers by which `inspect` prints the same for people.
#pragma once

#include <string>
#include <string_view>

#include <google/protobuf/message.h>
#include <nlohmann/json.hpp>

#include "core/printable.h"
#include "image/reader.h"

namespace vmckpt {

using Json = nlohmann::ordered_json;

Json message_to_json(const google::protobuf::Message& message);

// The whole image: header, sizes and metadata.
Json image_to_json(const ImageReader& image);

std::string to_hex(std::string_view bytes);

// Bytes of page data that the image holds for an object's range (0: the process's memory).
uint64_t saved_bytes(const ImageReader& image, uint64_t object, uint64_t start, uint64_t end);

uint64_t allocated_bytes(const ImageReader& image);  // what the file takes on disk

}  // namespace vmckpt
