// The process of an image that has one, which is all that is saved and restarted so far (check_metadata() refuses others), with
// what it refers to in the image's tables. What takes one process for the whole image goes through here, so that it is found.
#pragma once

#include <map>
#include <vector>

#include "image/image.pb.h"

namespace vmckpt {

struct OneProcess {
  const pb::Process& process;
  const pb::Thread& leader;
  const pb::AddressSpace& memory;
  const pb::DescriptorTable& descriptors;
  const pb::FileSystemContext& fs;
  const pb::SignalHandlers& signal_handlers;
};
// What an image that is not complete yet lacks is empty.
OneProcess one_process(const pb::Image& image);

struct OneProcessToSave {
  pb::Process& process;
  pb::AddressSpace& memory;
  pb::DescriptorTable& descriptors;
  pb::FileSystemContext& fs;
  pb::SignalHandlers& signal_handlers;
};
// Made where they are not there yet.
OneProcessToSave one_process(pb::Image* image);

// Descriptors by the open file that they lead to.
class DescriptorsOfFiles {
 public:
  explicit DescriptorsOfFiles(const pb::DescriptorTable& table);
  // Ascending; of a file that the table has not: none.
  const std::vector<pb::Descriptor>& of(const pb::OpenFile& file) const;
  int lowest(const pb::OpenFile& file) const;  // -1: none
  // The lowest one if it is standard input, output or error; otherwise -1.
  int stdio(const pb::OpenFile& file) const;

 private:
  std::map<uint32_t, std::vector<pb::Descriptor>> by_file_;
};

}  // namespace vmckpt
