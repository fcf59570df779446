#include "catch.h"

#include "image/tiny_image.h"
#include "image/validate.h"
#include "modules/module.h"

namespace vmckpt {
namespace {


struct Verdict {
  std::vector<Error> problems;
  std::vector<std::string> notes;
};

pb::Image image_with_plugin(bool required) {
  pb::Image image = test::tiny_metadata();
  pb::PluginState* plugin = image.add_plugins();
  plugin->set_name("gpu");
  plugin->set_version(3);
  plugin->set_required(required);
  plugin->set_state("whatever");
  return image;
}

Verdict preflight_of_plugins(const pb::Image& image) {
  Verdict verdict;
  const FileAccess access;
  const std::set<std::string> put_back;
  Preflight preflight{image, access, put_back, {}, {}, verdict.problems, verdict.notes};
  for (const StateModule* module : state_modules()) {
    if (module->name == std::string("plugins")) module->check(preflight);
  }
  return verdict;
}

}  // namespace

TEST_CASE("an image that needs a plugin is refused by the plugin's name, with what to do") {
  const Verdict verdict = preflight_of_plugins(image_with_plugin(true));
  REQUIRE(verdict.problems.size() == 1);
  CHECK(verdict.problems[0].what == "it cannot go on without the plugin \"gpu\" (version 3), which this vmckpt does not have");
  CHECK_THAT(verdict.problems[0].cure, Contains("with a vmckpt that has the plugin"));
  CHECK(verdict.notes.empty());
}

TEST_CASE("state of a plugin that is not required is left aside, and the user is told") {
  const Verdict verdict = preflight_of_plugins(image_with_plugin(false));
  CHECK(verdict.problems.empty());
  REQUIRE(verdict.notes.size() == 1);
  CHECK(verdict.notes[0] == "the state of the plugin \"gpu\" (version 3) is left aside: this vmckpt does not have it");
}

TEST_CASE("a plugin has one name, and a name at all") {
  pb::Image image = image_with_plugin(false);
  REQUIRE(check_metadata(image).ok());
  *image.add_plugins() = image.plugins(0);
  CHECK_THAT(check_metadata(image).error().message(), Contains("the name gpu is there twice among plugins"));
  image.mutable_plugins(1)->clear_name();
  CHECK_THAT(check_metadata(image).error().message(), Contains("plugins: name has 0 bytes instead of 1 or more"));
}

}  // namespace vmckpt
