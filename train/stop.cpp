#include "train/stop.h"

#include <unistd.h>

#include <csignal>

namespace weft {
namespace {

volatile std::sig_atomic_t requested = 0;

void on_signal(int signal) {
  if (requested) _exit(128 + signal);
  requested = 1;
}

}  // namespace

void install_stop_signals() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool stop_requested() { return requested != 0; }

}  // namespace weft
