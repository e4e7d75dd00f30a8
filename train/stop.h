// Ctrl-C and SIGTERM: the first asks the run to end cleanly, the second ends the process at once.
#pragma once

namespace weft {

void install_stop_signals();
bool stop_requested();

}  // namespace weft
