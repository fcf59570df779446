#include "image/one_process.h"

#include <algorithm>

namespace vmckpt {
namespace {

template <class Message>
const Message& first_of(const google::protobuf::RepeatedPtrField<Message>& table) {
  return table.empty() ? Message::default_instance() : table.Get(0);
}

template <class Message>
Message& first_of(google::protobuf::RepeatedPtrField<Message>* table) {
  return table->empty() ? *table->Add() : *table->Mutable(0);
}

}  // namespace

OneProcess one_process(const pb::Image& image) {
  const pb::Process& process = first_of(image.processes());
  return {process,
          first_of(process.threads()),
          first_of(image.address_spaces()),
          first_of(image.descriptor_tables()),
          first_of(image.file_system_contexts()),
          first_of(image.signal_handlers())};
}

// Every id stays 0.
OneProcessToSave one_process(pb::Image* image) {
  return {first_of(image->mutable_processes()), first_of(image->mutable_address_spaces()),
          first_of(image->mutable_descriptor_tables()), first_of(image->mutable_file_system_contexts()),
          first_of(image->mutable_signal_handlers())};
}

DescriptorsOfFiles::DescriptorsOfFiles(const pb::DescriptorTable& table) {
  for (const pb::Descriptor& descriptor : table.descriptors()) by_file_[descriptor.file()].push_back(descriptor);
  for (auto& [file, descriptors] : by_file_) {
    std::sort(descriptors.begin(), descriptors.end(), [](const auto& a, const auto& b) { return a.number() < b.number(); });
  }
}

const std::vector<pb::Descriptor>& DescriptorsOfFiles::of(const pb::OpenFile& file) const {
  static const std::vector<pb::Descriptor> kNone;
  auto found = by_file_.find(file.id());
  return found == by_file_.end() ? kNone : found->second;
}

int DescriptorsOfFiles::lowest(const pb::OpenFile& file) const {
  const auto& all = of(file);
  return all.empty() ? -1 : all.front().number();
}

int DescriptorsOfFiles::stdio(const pb::OpenFile& file) const {
  const int number = lowest(file);
  return number <= 2 ? number : -1;
}

}  // namespace vmckpt
