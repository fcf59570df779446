#include "catch.h"

#include "image/tiny_image.h"
#include "modules/module.h"
#include "modules/process.pb.h"
#include "modules/threads.pb.h"

namespace vmckpt {
namespace {

std::vector<Error> problems_of(const std::string& name, const pb::Image& image) {
  std::vector<Error> problems;
  std::vector<std::string> notes;
  const FileAccess access;
  const std::set<std::string> put_back;
  Preflight preflight{image, access, put_back, {}, {}, problems, notes};
  for (const StateModule* module : state_modules()) {
    if (module->name == name) module->check(preflight);
  }
  return problems;
}

}  // namespace

// The schema's bounds hold for what is there; that it is there is the module's to see.
TEST_CASE("an image that lacks the state of its process or of a thread is refused before anything is started") {
  pb::Image image = test::tiny_metadata();
  image.mutable_processes(0)->mutable_threads(0)->ClearExtension(pb::thread_state);
  const auto of_threads = problems_of("threads", image);
  REQUIRE(of_threads.size() == 1);
  CHECK(of_threads[0].what == "the image has no registers of thread 100");
  image.mutable_processes(0)->ClearExtension(pb::process_state);
  const auto of_process = problems_of("process", image);
  REQUIRE(of_process.size() == 1);
  CHECK(of_process[0].what == "the image has no settings of process 100");
}

}  // namespace vmckpt
