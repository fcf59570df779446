#include "modules/signals.h"

#include <cstring>

#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>

#include "image/one_process.h"
#include "modules/module.h"

namespace vmckpt {
namespace {

constexpr int kSignals = 64;
constexpr size_t kMaskBytes = 8;

// struct sigaction as the kernel has it (arch/x86/include/uapi/asm/signal.h).
struct KernelAction {
  uint64_t handler;
  uint64_t flags;
  uint64_t restorer;
  uint64_t mask;
};

bool has_action(int number) { return number != SIGKILL && number != SIGSTOP; }

struct ActionAnswers {
  struct Action {
    int number;
    size_t call;
    TapeWord answer;
  };
  std::vector<Action> actions;
};

ActionAnswers ask_signal_actions(TapeDraft& tape) {
  ActionAnswers questions;
  for (int number = 1; number <= kSignals; ++number) {
    if (!has_action(number)) continue;
    const TapeWord answer = tape.room(sizeof(KernelAction));
    size_t call = tape.call(SYS_rt_sigaction, {static_cast<uint64_t>(number), 0, answer, kMaskBytes}, true,
                            fmt::format("read the action of signal {}", number));
    questions.actions.push_back({number, call, answer});
  }
  return questions;
}

void save_signal_actions(const ActionAnswers& questions, const TapeDraft& tape, pb::SignalHandlers* handlers) {
  for (const auto& question : questions.actions) {
    const auto& action = tape.as<KernelAction>(question.answer);
    if (action.handler == 0 && action.flags == 0 && action.mask == 0) continue;  // SIG_DFL
    pb::SignalAction* saved = handlers->AddExtension(pb::actions);
    saved->set_number(static_cast<uint32_t>(question.number));
    saved->set_handler(action.handler);
    saved->set_flags(action.flags);
    saved->set_restorer(action.restorer);
    saved->set_mask(action.mask);
  }
}

void plan_signal_actions(const pb::SignalHandlers& handlers, TapeDraft& tape) {
  for (int number = 1; number <= kSignals; ++number) {
    if (!has_action(number)) continue;
    KernelAction action{};
    for (const pb::SignalAction& saved : handlers.GetRepeatedExtension(pb::actions)) {
      if (static_cast<int>(saved.number()) == number) {
        action = {saved.handler(), saved.flags(), saved.restorer(), saved.mask()};
      }
    }
    tape.call(SYS_rt_sigaction, {static_cast<uint64_t>(number), tape.data_of(action), 0, kMaskBytes}, true,
              fmt::format("set the action of signal {}", number));
  }
}

void plan_pending_signals(const pb::Process& process, TapeDraft& tape) {
  for (const pb::Signal& signal : process.GetRepeatedExtension(pb::pending_signals)) {
    tape.call(SYS_rt_sigqueueinfo,
              {static_cast<uint64_t>(process.pid()), signal.number(), tape.data(signal.info().data(), signal.info().size())},
              true, fmt::format("queue pending signal {}", signal.number()));
  }
}

Result<void> ask(Questions& questions) {
  questions.when_answered(
      [answers = ask_signal_actions(questions.leader())](const std::vector<TapeDraft>& tapes, pb::Image& image) {
        save_signal_actions(answers, tapes.front(), &one_process(&image).signal_handlers);
      });
  return {};
}

Result<void> plan(ProcessPlan& process) {
  plan_signal_actions(one_process(process.image).signal_handlers, process.tape);
  return {};
}

Result<void> plan_late(ProcessPlan& process) {
  plan_pending_signals(one_process(process.image).process, process.tape);
  return {};
}

}  // namespace

Result<void> save_pending_signals(pid_t tid, bool shared, google::protobuf::RepeatedPtrField<pb::Signal>* pending) {
  constexpr int kBatch = 32;
  for (uint64_t offset = 0;;) {
    siginfo_t infos[kBatch];
    __ptrace_peeksiginfo_args range{};
    range.off = offset;
    range.flags = shared ? PTRACE_PEEKSIGINFO_SHARED : 0;
    range.nr = kBatch;
    long got = ::ptrace(PTRACE_PEEKSIGINFO, tid, &range, infos);
    if (got < 0) return errno_error(fmt::format("read pending signals of thread {}", tid));
    for (long i = 0; i < got; ++i) {
      pb::Signal* signal = pending->Add();
      signal->set_number(static_cast<uint32_t>(infos[i].si_signo));
      signal->set_info(&infos[i], sizeof infos[i]);
    }
    offset += static_cast<uint64_t>(got);
    if (got < kBatch) return {};
  }
}

void plan_pending_signals(const pb::Thread& thread, int32_t pid, TapeDraft& tape) {
  for (const pb::Signal& signal : thread.GetRepeatedExtension(pb::own_pending_signals)) {
    tape.call(SYS_rt_tgsigqueueinfo,
              {static_cast<uint64_t>(pid), static_cast<uint64_t>(thread.tid()), signal.number(),
               tape.data(signal.info().data(), signal.info().size())},
              true, fmt::format("queue signal {} pending for thread {}", signal.number(), thread.tid()));
  }
}

extern const StateModule kSignalsModule{.name = "signals", .ask = ask, .plan = plan, .plan_late = plan_late};

}  // namespace vmckpt
