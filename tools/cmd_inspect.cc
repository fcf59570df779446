// vmckpt inspect: all that restart will use, for people or as JSON. Everything printed comes from a file that may be
// hostile, so text goes through printable().
#include <cstdio>
#include <set>
#include <string>

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/user.h>
#include <time.h>

#include "command_line.h"
#include "commands.h"
#include "image/one_process.h"
#include "image/validate.h"
#include "image_json.h"
#include "json_text.h"
#include "kvm_json.h"
#include "modules/process.h"
#include "modules/signals.pb.h"
#include "modules/threads.h"
#include "modules/timers.pb.h"

namespace vmckpt {

namespace po = boost::program_options;

namespace {

constexpr Verb kVerb = {"inspect", "IMAGE", "Shows everything that a restart of the image will use; nothing in it is run."};

template <class... Arguments>
void line(fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  const std::string text = fmt::format(format, std::forward<Arguments>(arguments)...);
  std::printf("%s\n", printable_message(text).c_str());
}

void heading(const std::string& text) {
  line("");
  line("{}", text);
}

std::string size_text(uint64_t bytes) {
  if (bytes < 10 * 1024) return fmt::format("{} B", bytes);
  if (bytes < uint64_t{10} << 20) return fmt::format("{} KiB", bytes >> 10);
  if (bytes < uint64_t{10} << 30) return fmt::format("{} MiB", bytes >> 20);
  return fmt::format("{} GiB", bytes >> 30);
}

std::string time_text(int64_t unix_seconds) {
  time_t seconds = unix_seconds;
  tm fields;
  char text[64] = "";
  if (::gmtime_r(&seconds, &fields) == nullptr || std::strftime(text, sizeof text, "%F %T UTC", &fields) == 0) {
    return fmt::format("{} s since 1970", unix_seconds);
  }
  return text;
}

std::string seconds_text(double seconds) { return fmt::format("{:.6f} s", seconds); }
std::string ns_text(int64_t ns) { return seconds_text(static_cast<double>(ns) / 1e9); }
std::string us_text(int64_t us) { return seconds_text(static_cast<double>(us) / 1e6); }

std::string signal_text(uint32_t number) {
  const char* name = ::sigabbrev_np(static_cast<int>(number));
  return name == nullptr ? fmt::format("{}", number) : fmt::format("SIG{}", name);
}

std::string signal_set_text(uint64_t mask) {
  if (mask == 0) return "none";
  std::string text;
  for (uint32_t number = 1; number <= 64; ++number) {
    if ((mask >> (number - 1) & 1) == 0) continue;
    if (!text.empty()) text += " ";
    text += signal_text(number);
  }
  return text;
}

template <class Texts>
std::string joined(const Texts& texts, const char* separator = " ") {
  std::string all;
  for (const auto& text : texts) {
    if (!all.empty()) all += separator;
    all += printable(text);
  }
  return all;
}

// The fields of a message that are not at their default, as "name value, name value".
std::string compact(const Json& json) {
  auto is_default = [](const Json& value) {
    return value.is_null() || value == Json(0) || value == Json(false) || value == Json("") || value == Json("0x0") ||
           value == Json("0") || (value.is_structured() && value.empty());
  };
  if (json.is_object()) {
    std::string text;
    for (const auto& [name, value] : json.items()) {
      if (is_default(value)) continue;
      if (!text.empty()) text += ", ";
      text += value == Json(true) ? name : name + " " + compact(value);
    }
    return "{" + text + "}";
  }
  if (json.is_array()) {
    std::string text;
    for (const Json& value : json) text += (text.empty() ? "" : " ") + compact(value);
    return "[" + text + "]";
  }
  constexpr size_t kShownDigits = 64;  // of unread data and the like; --json has it all
  if (json.is_string()) {
    const std::string text = json.get<std::string>();
    return text.size() <= 2 * kShownDigits
               ? text
               : text.substr(0, kShownDigits) + fmt::format("... ({} more)", text.size() - kShownDigits);
  }
  return json.dump();
}

std::string without_braces(const std::string& text) { return text.substr(1, text.size() - 2); }

void print_summary(const ImageReader& image) {
  const ImageHeader& header = image.header();
  const pb::Image& metadata = image.metadata();
  auto id = [](const uint8_t(&bytes)[16]) { return to_hex({reinterpret_cast<const char*>(bytes), sizeof bytes}); };
  const PageIndex::Size pages = image.pages().size();
  line("Image {}", printable(image.path()));
  line("  id          {}", id(header.image_id));
  line("  parent      {}", id(header.parent_id));
  line("  target      \"{}\", {}, after {} restarts", printable(metadata.target().name()), id(header.target_id),
       metadata.target().generation());
  line("  made        {} by vmckpt {}, format {} (readers from {} on)", time_text(header.created_unix_us / 1000000),
       printable(metadata.host().vmckpt_version()), header.format_version, header.min_reader_version);
  line("  size        {} on disk, {} long; {} of page data in {} runs, {} of metadata",
       size_text(allocated_bytes(image)), size_text(header.file_bytes), size_text(pages.bytes), pages.records,
       size_text(metadata.ByteSizeLong()));
  for (const std::string& note : metadata.notes()) line("  note        {}", printable(note));
}

void print_target(const pb::Target& target) {
  heading("Target");
  line("  launched    {}", joined(target.command()));
  line("  image dir   {}", printable(target.image_dir()));
  line("  filter      {}",
       target.devices_denied() ? "io_uring, and Linux AIO that is not counted, are denied" : "none of launch's");
}

void print_host(const pb::Host& host) {
  heading("Host it was made on");
  line("  kernel      {}", printable(host.kernel_release()));
  line("  CPU         {}, XCR0 {:#x}", printable(host.cpu_model()), host.xstate_features());
  line("  CPU flags   {}", joined(host.cpu_flags()));
  line("  boot        {}", printable(host.boot_id()));
  line("  clocks      real time {}, monotonic {}, since boot {}", time_text(host.realtime_ns() / 1000000000),
       ns_text(host.monotonic_ns()), ns_text(host.boottime_ns()));
}

void print_timers(const pb::Process& process) {
  const pb::Timers& timers = process.GetExtension(pb::timers);
  if (timers.interval_timers().empty() && timers.posix_timers().empty()) return;
  heading(fmt::format("Timers of process {}", process.pid()));
  static constexpr const char* kIntervalNames[] = {"real", "virtual", "prof"};
  for (const auto& timer : timers.interval_timers()) {
    line("  {:<11} due in {}, every {}", timer.which() < 3 ? kIntervalNames[timer.which()] : "?",
         us_text(timer.value_us()), us_text(timer.interval_us()));
  }
  for (const auto& timer : timers.posix_timers()) {
    line("  POSIX {:<5} {}", timer.id(), without_braces(compact(message_to_json(timer))));
  }
}

void print_threads(const pb::Process& process) {
  heading(fmt::format("Threads of process {} ({})", process.pid(), process.threads_size()));
  for (const auto& thread : process.threads()) {
    const pb::ThreadState& state = state_of(thread);
    line("  {} \"{}\"", thread.tid(), printable(state.name()));
    // Known fields by name and in groups; whatever else the messages have is shown generically.
    Json json = message_to_json(state), others = message_to_json(thread);
    const Json registers = json["registers"];
    constexpr size_t kColumns = 4;
    std::string text;
    size_t column = 0;
    for (const auto& [name, value] : registers.items()) {
      text += fmt::format("{:<8} {:<18} ", name, value.get<std::string>());
      if (++column % kColumns != 0 && column != registers.size()) continue;
      line("    {}", text.substr(0, text.find_last_not_of(' ') + 1));
      text.clear();
    }
    line("    blocked signals: {}", signal_set_text(state.signal_mask()));
    json["xstate"].erase("hex");
    for (const char* shown : {"name", "registers", "signal_mask"}) json.erase(shown);
    for (const char* shown : {"tid", "thread_state"}) others.erase(shown);
    line("    {}", without_braces(compact(json)));
    if (const std::string text = without_braces(compact(others)); !text.empty()) line("    {}", text);
  }
}

std::string limit_text(uint64_t value) { return value == RLIM_INFINITY ? "unlimited" : fmt::format("{}", value); }

void print_process(const pb::Process& process) {
  static constexpr const char* kLimitNames[] = {"cpu",      "fsize",  "data",    "stack", "core",  "rss",
                                                "nproc",    "nofile", "memlock", "as",    "locks", "sigpending",
                                                "msgqueue", "nice",   "rtprio",  "rttime"};
  const pb::ProcessState& state = state_of(process);
  heading(fmt::format("Process {} ({})", process.pid(), printable(state.command_name())));
  line("  executable  {}", printable(state.executable()));
  line("  arguments   {}", joined(state.arguments()));
  line("  parent      {}", process.parent() == 0 ? "outside" : fmt::format("{}", process.parent()));
  line("  group       {}, session {}{}{}", process.process_group(), process.session(),
       state.has_terminal() ? ", has a terminal" : "", state.foreground() ? ", in its foreground" : "");
  line(
      "  settings    personality {:#x}, dumpable {}, subreaper {}, no huge pages {}, core dump filter {:#x}, "
      "oom_score_adj {}, xstate permission {:#x}",
      state.personality(), state.dumpable(), state.child_subreaper(), state.thp_disabled(),
      state.coredump_filter(), state.oom_score_adj(), state.xstate_permission());
  if (process.state() == pb::Process::STOPPED) {
    line("  stopped     by {}", signal_text(static_cast<uint32_t>(process.stop_signal())));
  }
  for (const auto& limit : state.limits()) {
    const char* name = limit.resource() < std::size(kLimitNames) ? kLimitNames[limit.resource()] : "?";
    line("  limit       {} {} (hard {})", name, limit_text(limit.soft()), limit_text(limit.hard()));
  }
  for (const auto& signal : process.GetRepeatedExtension(pb::pending_signals)) {
    line("  pending     {}", signal_text(signal.number()));
  }
  for (const auto& variable : state.environment()) line("  environment {}", printable(variable));
  line("  memory      address space {}, signal handlers {}", process.mm_id(), process.sighand_id());
  print_timers(process);
  print_threads(process);
}

void print_file_system_context(const pb::FileSystemContext& fs) {
  heading(fmt::format("Directories {}", fs.id()));
  line("  directory   {}, root {}, umask {:#o}", printable(fs.working_directory()), printable(fs.root_directory()), fs.umask());
}

void print_signal_handlers(const pb::SignalHandlers& handlers) {
  heading(fmt::format("Signal handlers {}", handlers.id()));
  for (const auto& action : handlers.GetRepeatedExtension(pb::actions)) {
    if (action.handler() == 0 && action.flags() == 0 && action.mask() == 0) continue;
    std::string handler = action.handler() == 0   ? "default"
                          : action.handler() == 1 ? "ignored"
                                                  : fmt::format("{:#x}", action.handler());
    line("  signal      {} {}, flags {:#x}, blocks {}", signal_text(action.number()), handler, action.flags(),
         signal_set_text(action.mask()));
  }
}

std::string protection_text(uint32_t protection, bool shared) {
  std::string text = "---p";
  if ((protection & PROT_READ) != 0) text[0] = 'r';
  if ((protection & PROT_WRITE) != 0) text[1] = 'w';
  if ((protection & PROT_EXEC) != 0) text[2] = 'x';
  if (shared) text[3] = 's';
  return text;
}

const char* mapping_kind_text(pb::Mapping::Kind kind) {
  switch (kind) {
    case pb::Mapping::ANONYMOUS: return "anonymous";
    case pb::Mapping::FILE_PRIVATE: return "file";
    case pb::Mapping::FILE_SHARED: return "shared file";
    case pb::Mapping::CAPTURED: return "captured";
    case pb::Mapping::VDSO: return "kernel";
    case pb::Mapping::VCPU_RUN: return "vCPU";
    default: return "?";
  }
}

void print_memory(const ImageReader& image, const pb::AddressSpace& memory) {
  heading(fmt::format("Address space {} ({} mappings; size, then how much of it is in the image)", memory.id(),
                      memory.mappings_size()));
  for (const auto& mapping : memory.mappings()) {
    const bool shared = mapping.kind() == pb::Mapping::FILE_SHARED || mapping.kind() == pb::Mapping::CAPTURED;
    std::string from;
    if (mapping.kind() == pb::Mapping::CAPTURED) from = fmt::format("captured file {}", mapping.captured_id());
    if (mapping.has_file()) from = printable(mapping.file().path());
    if (from.empty()) from = printable(mapping.name());
    if (mapping.file_offset() != 0) from += fmt::format(" +{:#x}", mapping.file_offset());
    line("  {:012x}-{:012x} {} {:<11} {:>9} {:>9} {}{}{}", mapping.start(), mapping.end(),
         protection_text(mapping.protection(), shared), mapping_kind_text(mapping.kind()),
         size_text(mapping.end() - mapping.start()), size_text(saved_bytes(image, memory.id(), mapping.start(), mapping.end())),
         from, mapping.advice().empty() ? "" : "  advice ", joined(mapping.advice()));
  }
  line("  code {:#x}-{:#x}, data {:#x}-{:#x}, heap {:#x}-{:#x}, stack {:#x}", memory.start_code(), memory.end_code(),
       memory.start_data(), memory.end_data(), memory.start_brk(), memory.brk(), memory.start_stack());
  line("  arguments {:#x}-{:#x}, environment {:#x}-{:#x}, mlockall flags {:#x}, vdso {}", memory.arg_start(),
       memory.arg_end(), memory.env_start(), memory.env_end(), memory.mlockall_flags(),
       size_text(memory.vdso_code().size()));
  line("  auxv {}", without_braces(compact(message_to_json(memory)["auxv"])));

  std::set<std::string> shown;
  for (const auto& mapping : memory.mappings()) {
    if (!mapping.has_file() || !shown.insert(mapping.file().path()).second) continue;
    if (shown.size() == 1) heading("Files that must be as they were");
    line("  {}", without_braces(compact(message_to_json(mapping.file()))));
  }
}

void print_captured_files(const ImageReader& image) {
  const auto& files = image.metadata().captured_files();
  if (!files.empty()) heading("Files whose content is in the image");
  for (const auto& file : files) {
    line("  {}, {} saved", without_braces(compact(message_to_json(file))),
         size_text(saved_bytes(image, file.id(), 0, UINT64_MAX)));
  }
}

std::string open_flags_text(uint32_t flags) {
  static constexpr std::pair<uint32_t, const char*> kFlags[] = {
      {O_APPEND, "append"},       {O_NONBLOCK, "nonblock"}, {O_PATH, "path"},
      {O_DIRECTORY, "directory"}, {O_NOFOLLOW, "nofollow"}, {O_ASYNC, "async"},
      {O_DIRECT, "direct"},       {O_DSYNC, "dsync"},       {O_NOATIME, "noatime"}};
  const uint32_t access = flags & O_ACCMODE;
  std::string text = access == O_RDONLY ? "r" : access == O_WRONLY ? "w" : "rw";
  for (const auto& [flag, name] : kFlags) {
    if ((flags & flag) == flag) text += fmt::format(",{}", name);
  }
  return text;
}

// Where a file is open: "0,1,5c", after the table if there are several.
std::string numbers_text(const pb::Image& image, const std::vector<DescriptorsOfFiles>& tables, const pb::OpenFile& file) {
  std::string text;
  for (size_t i = 0; i < tables.size(); ++i) {
    std::string numbers;
    for (const auto& descriptor : tables[i].of(file)) {
      numbers += fmt::format("{}{}{}", numbers.empty() ? "" : ",", descriptor.number(), descriptor.close_on_exec() ? "c" : "");
    }
    if (numbers.empty()) continue;
    if (tables.size() > 1) numbers = fmt::format("{}:{}", image.descriptor_tables(static_cast<int>(i)).id(), numbers);
    text += (text.empty() ? "" : " ") + numbers;
  }
  return text;
}

void print_open_files(const pb::Image& image) {
  heading(fmt::format("Open files ({}; descriptors, kind, flags, name)", image.open_files_size()));
  const std::vector<DescriptorsOfFiles> tables(image.descriptor_tables().begin(), image.descriptor_tables().end());
  for (const auto& file : image.open_files()) {
    const auto* field = object_of(file);
    std::string details;
    if (field != nullptr) details = without_braces(compact(message_to_json(file)[field->name()]));
    line("  {:<6} {:<12} {:<12} {}  {}", numbers_text(image, tables, file), field == nullptr ? "?" : field->name(),
         open_flags_text(file.status_flags()), printable(file.name()), details);
    for (const auto& lock : file.locks()) line("         lock {}", without_braces(compact(message_to_json(lock))));
    if (file.has_async()) line("         async {}", without_braces(compact(message_to_json(file.async()))));
  }
  line("  (c: closed by exec)");
  const pb::KernelObjects& objects = image.objects();
  // Objects that several of them lead to: each list is a module's own.
  std::vector<const google::protobuf::FieldDescriptor*> lists;
  objects.GetReflection()->ListFields(objects, &lists);
  for (const auto* list : lists) {
    if (!list->is_extension()) continue;
    const std::string name = list->name().substr(0, list->name().size() - 1);  // "pipes"
    for (int i = 0; i < objects.GetReflection()->FieldSize(objects, list); ++i) {
      const Json object = message_to_json(objects.GetReflection()->GetRepeatedMessage(objects, list, i));
      line("  {} {}", name, without_braces(compact(object)));
    }
  }
}

void print_plugins(const pb::Image& image) {
  if (!image.plugins().empty()) heading("Plugins");
  for (const auto& plugin : image.plugins()) {
    line("  {:<11} version {}, {}, {} of state", printable(plugin.name()), plugin.version(),
         plugin.required() ? "required" : "not required", size_text(plugin.state().size()));
  }
}

void print_kvm(const pb::Kvm& kvm) {
  for (const Json& vm : kvm_to_json(kvm)) {
    heading(fmt::format("KVM virtual machine of address space {} (type {}, interrupt controllers: {}{})", kvm.mm_id(),
                        vm["type"].dump(), vm["irqchip"].get<std::string>(), vm["pit"].get<bool>() ? ", PIT" : ""));
    static constexpr std::pair<const char*, const char*> kLists[] = {
        {"slots", "slot"}, {"routes", "route"}, {"irqfds", "irqfd"}, {"ioeventfds", "ioeventfd"},
        {"coalesced_zones", "coalesced"}, {"capabilities", "capability"}};
    for (const auto& [list, name] : kLists) {
      for (const Json& entry : vm[list]) line("  {:<11} {}", name, without_braces(compact(entry)));
    }
    for (Json vcpu : vm["vcpus"]) {
      line("  vCPU {:<6} {}", vcpu["id"].dump(), vcpu["state"].get<std::string>());
      for (const char* shown : {"id", "state"}) vcpu.erase(shown);
      for (const auto& [name, value] : vcpu.items()) line("    {} {}", name, compact(value));
    }
  }
}

}  // namespace

int cmd_inspect(int argc, char** argv) {
  po::options_description options("Options");
  options.add_options()("json", "print one JSON object");
  po::variables_map values;
  if (auto status = parse_command_line(argc, argv, kVerb, options, {"IMAGE"}, values)) return *status;

  Result<ImageReader> image = ImageReader::open(values["IMAGE"].as<std::string>());
  if (!image) return fail(kVerb, image.error());
  if (values.count("json") != 0) {
    std::printf("%s\n", json_text(image_to_json(*image), 2).c_str());
    return kExitOk;
  }
  print_summary(*image);
  print_host(image->metadata().host());
  const pb::Image& metadata = image->metadata();
  print_target(metadata.target());
  for (const auto& process : metadata.processes()) print_process(process);
  for (const auto& fs : metadata.file_system_contexts()) print_file_system_context(fs);
  for (const auto& handlers : metadata.signal_handlers()) print_signal_handlers(handlers);
  for (const auto& memory : metadata.address_spaces()) print_memory(*image, memory);
  print_captured_files(*image);
  print_open_files(metadata);
  for (const auto& kvm : metadata.GetRepeatedExtension(pb::virtual_machines)) print_kvm(kvm);
  print_plugins(metadata);
  return kExitOk;
}

}  // namespace vmckpt
