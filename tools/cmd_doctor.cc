// vmckpt doctor: what this host can and cannot do, each with the reason and the cure.
#include <cstdio>
#include <string>

#include <nlohmann/json.hpp>

#include "command_line.h"
#include "commands.h"
#include "core/printable.h"
#include "json_text.h"
#include "supervisor/doctor.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kVerb = {"doctor", "",
                        "Tests what checkpoint and restart need from this host; exit status 0 if both can work."};

void print_table(const std::vector<Probe>& probes) {
  for (const Probe& probe : probes) {
    std::printf("%-8s %-19s %s\n", probe_state_name(probe.state), probe.name.c_str(), printable_message(probe.reason).c_str());
    if (!probe.cure.empty()) std::printf("%-8s %-19s cure: %s\n", "", "", printable_message(probe.cure).c_str());
  }
  std::string hindrances;
  for (const Probe& probe : probes) {
    if (probe.required && probe.state == ProbeState::kMissing)
      hindrances += (hindrances.empty() ? "" : ", ") + probe.name;
  }
  if (hindrances.empty()) {
    std::printf("\nThis host can checkpoint and restart.\n");
  } else {
    std::printf("\nThis host cannot checkpoint and restart: %s.\n", hindrances.c_str());
  }
}

void print_json(const std::vector<Probe>& probes) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Probe& probe : probes) {
    list.push_back({{"name", probe.name},
                    {"state", probe_state_name(probe.state)},
                    {"required", probe.required},
                    {"reason", probe.reason},
                    {"cure", probe.cure}});
  }
  nlohmann::ordered_json answer = {{"usable", host_is_usable(probes)}, {"probes", std::move(list)}};
  std::printf("%s\n", json_text(answer, 2).c_str());
}

}  // namespace

int cmd_doctor(int argc, char** argv) {
  po::options_description options("Options");
  options.add_options()
      ("image-dir,d", po::value<std::string>()->default_value("."), "image directory to test")
      ("json", "print one JSON object");
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kVerb, options, {}, values)) return *status;

  const std::vector<Probe> probes = run_probes(values["image-dir"].as<std::string>());
  if (values.count("json") != 0) {
    print_json(probes);
  } else {
    print_table(probes);
  }
  return host_is_usable(probes) ? kExitOk : kExitFailed;
}

}  // namespace vmckpt
