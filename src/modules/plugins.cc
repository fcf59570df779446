// State that plugins have saved. This vmckpt has none: what the image cannot do without is refused, the rest is left aside.
#include "core/printable.h"
#include "modules/module.h"

namespace vmckpt {
namespace {

void check(Preflight& preflight) {
  for (const pb::PluginState& plugin : preflight.image.plugins()) {
    const std::string name = fmt::format("the plugin \"{}\" (version {})", printable(plugin.name()), plugin.version());
    if (plugin.required()) {
      preflight.problems.push_back(error(fmt::format("it cannot go on without {}, which this vmckpt does not have", name),
                                         "restart it with a vmckpt that has the plugin"));
    } else {
      preflight.notes.push_back(fmt::format("the state of {} is left aside: this vmckpt does not have it", name));
    }
  }
}

}  // namespace

extern const StateModule kPluginsModule{.name = "plugins", .check = check};

}  // namespace vmckpt
